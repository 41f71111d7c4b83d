"""A matrix known by two functions of NumPy arrays, whose results are checked."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Float, Inexact

from nyscaled.lowrank.host_arrays import (
    HostArray,
    all_finite,
    as_argument,
    as_dtype,
    require_host,
)
from nyscaled.operators import as_shape

Product = Callable[[HostArray], HostArray]

_SUMS = 4  # of columns with random signs, which two products are compared for


class HostOperator:
    """A matrix known only by its products, which are functions of NumPy arrays.

    For functions of JAX use `nyscaled.linalg.Operator`, which is compiled. Results are checked:
    their shape and dtype, NaN and Inf, and once, whether ⟨y, A x⟩ = ⟨Aᴴ y, x⟩ for sums x and y of
    columns that were multiplied anyhow, with random signs. The two may differ by 8·√max(m, n)·eps
    times the larger of ‖A x‖ and ‖Aᴴ y‖, for x and y of norm 1; in double precision by 10⁻⁸ times,
    because products may come from iterative solvers.

    Args:
        times: x ↦ A x, (n, k) → (m, k).
        adjoint_times: y ↦ Aᴴ y, (m, k) → (n, k): of the conjugate transpose if A is complex.
        shape: (m, n).
        dtype: of the products: float32, float64, complex64 or complex128.
        name: what errors call the matrix.

    Raises:
        ValueError: on a wrong shape or dtype; its products raise it where a check fails.

    Examples:
        >>> d = np.array([[1.0], [2.0]], np.float32)
        >>> a = HostOperator(lambda x: d * x, lambda y: d * y, shape=(2, 2), dtype=np.float32)
        >>> a.times(np.ones((2, 1), np.float32)).T
        array([[1., 2.]], dtype=float32)
    """

    def __init__(
        self,
        times: Product,
        adjoint_times: Product,
        shape: Sequence[int],
        dtype: DTypeLike,
        name: str = "the operator",
    ) -> None:
        for label, fn in (("times", times), ("adjoint_times", adjoint_times)):
            if not callable(fn):
                raise ValueError(f"{label} is a {type(fn).__name__}; expected a function of NumPy")
        self.shape = as_shape(name, shape)
        self.dtype = as_dtype(f"the dtype of {name}", dtype)
        self._name = name
        require_host(name, self.shape, self.dtype)
        self._products = times, adjoint_times
        self._sample: tuple[int, Sample] | None = None
        self._agree = False

    def times(self, x: Inexact[np.ndarray, "n k"], /) -> Inexact[np.ndarray, "m k"]:
        """Return A x."""
        return self._product(0, x)

    def adjoint_times(self, y: Inexact[np.ndarray, "m k"], /) -> Inexact[np.ndarray, "n k"]:
        """Return Aᴴ y."""
        return self._product(1, y)

    def _product(self, side: int, x: HostArray) -> HostArray:
        label = f"{self._name}'s product " + ("A x", "Aᴴ y")[side]
        x = as_argument(label, x, self.shape[1 - side], self.dtype)
        try:
            image = self._products[side](x)
        except Exception as error:  # what somebody else's function raises
            reason = f"{type(error).__name__}: {error}"
            raise ValueError(f"{label} failed ({reason}); expected a NumPy array") from error
        if not isinstance(image, np.ndarray):
            raise ValueError(f"{label} is a {type(image).__name__}; expected a NumPy array")
        shape = (self.shape[side], x.shape[1])
        if (image.shape, image.dtype) != (shape, self.dtype):
            got = f"{image.shape} {image.dtype}"
            raise ValueError(f"{label} is {got}; expected {shape} {self.dtype}")
        if not all_finite(image):
            raise ValueError(f"{label} has NaN or Inf entries; expected finite ones")
        if not self._agree:
            self._compare(side, Sample.of(x, image))
        return image

    def _compare(self, side: int, sample: Sample) -> None:
        """Raise ValueError unless this product agrees with the last one from the other side."""
        other, self._sample = self._sample, (side, sample)
        if other is None or other[0] == side:
            return
        self._agree = True
        x, y = (sample, other[1]) if side == 0 else (other[1], sample)
        eps = float(np.finfo(self.dtype).eps)
        require_agreement(self._name, x, y, max(8 * max(self.shape) ** 0.5 * eps, 1e-8))


def require_agreement(name: str, x: Sample, y: Sample, limit: float) -> None:
    """Raise ValueError if ⟨y, A x⟩ is not ⟨Aᴴ y, x⟩.

    Products that are so small that their dtype loses digits are not compared.

    Args:
        name: what the error calls A.
        x: columns and their products with A.
        y: columns and their products with Aᴴ.
        limit: how much the two may differ, for x and y of norm 1, over the larger of ‖A x‖ and
            ‖Aᴴ y‖.
    """
    size, info = max(x.gain, y.gain), np.finfo(x.dtype)
    if size < min(len(x.sums), len(y.sums)) ** 0.5 * float(info.tiny) / float(info.eps):
        return
    forms = (
        x.gain / size * (y.sums.conj().T @ x.images),
        y.gain / size * (y.images.conj().T @ x.sums),
    )
    difference = np.abs(forms[0] - forms[1])
    if np.linalg.norm(difference) > limit:
        worst = np.unravel_index(np.argmax(difference), difference.shape)
        first, second = (size * form[worst] for form in forms)
        raise ValueError(
            f"{name}'s products disagree: ⟨y, A x⟩ is {first:.6g} and ⟨Aᴴ y, x⟩ is "
            f"{second:.6g} for some x and y; expected equal numbers (adjoint_times, or "
            "rmatmat, must multiply by the conjugate transpose of A)"
        )


@dataclasses.dataclass(frozen=True)
class Sample:
    """Sums of columns and of their images, both over the norm of all, and the ratio of norms."""

    sums: np.ndarray
    images: np.ndarray
    gain: float
    dtype: np.dtype

    @staticmethod
    def of(x: HostArray, image: HostArray) -> Sample:
        """Return sums with random signs."""
        k = x.shape[1]
        count = min(k, _SUMS)
        signs = np.random.default_rng(k).choice([-1.0, 1.0], (k, count)) / count**0.5
        (sums, length), (images, stretched) = _summed(x, signs), _summed(image, signs)
        return Sample(sums, images, stretched / length if length else 0.0, image.dtype)


def _summed(columns: HostArray, signs: Float[np.ndarray, "k s"]) -> tuple[np.ndarray, float]:
    """Return C S/‖C‖ in double precision, and ‖C‖; no square overflows."""
    largest = max(np.max(np.abs(part(columns))) for part in (np.real, np.imag))
    scaled = columns / (largest or largest.dtype.type(1))
    length = float(np.linalg.norm(scaled))
    sums = scaled @ signs.astype(scaled.dtype)
    wide = np.result_type(sums, np.float64)
    return sums.astype(wide) / (length or 1.0), float(largest) * length
