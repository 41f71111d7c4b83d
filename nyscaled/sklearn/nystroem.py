"""`Nystroem`, with the interface of scikit-learn's and points drawn by what they explain."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import cast, no_type_check

import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Float, Int
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils import Tags
from sklearn.utils.validation import check_is_fitted, validate_data

from nyscaled.linalg import KernelMatrix
from nyscaled.linalg.kernels import Kernel, evaluate, gaussian, laplace
from nyscaled.lowrank import pivoted_cholesky
from nyscaled.numerics import full_precision, keeping
from nyscaled.sklearn.random_state import RandomState, as_key
from nyscaled.typing import MatrixLike, Number, Scalar
from nyscaled.validation import require_count, require_nonnegative

Point = Float[Array, " d"]


class Nystroem(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    """Map points to features whose products approximate a kernel.

    What differs from `sklearn.kernel_approximation.Nystroem` is which training points span the
    features: they are drawn one after another in proportion to what the others leave unexplained
    (randomly pivoted Cholesky), and not uniformly. So fewer of them are needed, and duplicates are
    never drawn. The kernel must be positive semidefinite. X is dense. float32 is computed in
    float32, and float64 in float64 whether or not JAX's x64 is on.

    Args:
        kernel: "rbf" exp(−γ‖x − y‖²), "laplacian" exp(−γ Σᵢ|xᵢ − yᵢ|), "polynomial" or "poly"
            (γxᵀy + c₀)^degree, "linear" xᵀy, or a function of JAX from two points to a number.
        gamma: γ ≥ 0, finite; by default 1 / n_features.
        coef0: c₀ ≥ 0 of "polynomial"; 1 by default.
        degree: of "polynomial", an integer; 3 by default.
        kernel_params: keyword arguments of a function.
        n_components: number of features, at most.
        tol: no more features are made once they explain all but this share of the kernel's trace;
            0 ≤ tol < 1.
        random_state: of the points: an integer, a generator, or None.

    Attributes:
        components_: training points that span the features (n_components, n_features).
        component_indices_: their rows in X.
        normalization_: inverse square root of the kernel matrix of `components_`.
        relative_error_: share of the trace of the kernel matrix that features do not explain.
        n_features_in_: number of coordinates.
        feature_names_in_: their names, if X had names.

    Examples:
        >>> import numpy as np
        >>> x = np.random.default_rng(0).normal(size=(100, 2))
        >>> features = Nystroem(gamma=0.1, n_components=20, random_state=0).fit_transform(x)
        >>> squares = np.sum((x[:, None] - x) ** 2, axis=2)
        >>> bool(np.allclose(features @ features.T, np.exp(-0.1 * squares), atol=1e-2))
        True
    """

    @no_type_check  # scikit-learn's rule: constructors store what they get, `fit` checks it
    def __init__(
        self,
        kernel: str | Callable[..., Scalar] = "rbf",
        *,
        gamma: float | None = None,
        coef0: float | None = None,
        degree: int | None = None,
        kernel_params: Mapping[str, float] | None = None,
        n_components: int = 100,
        tol: float = 0.0,
        random_state: RandomState = None,
    ) -> None:
        self.kernel = kernel
        self.gamma = gamma
        self.coef0 = coef0
        self.degree = degree
        self.kernel_params = kernel_params
        self.n_components = n_components
        self.tol = tol
        self.random_state = random_state

    def fit(self, X: MatrixLike, y: object = None) -> Nystroem:
        """Choose the points that span the features.

        Args:
            X: points (n_samples, n_features).
            y: ignored.

        Raises:
            ValueError: on a parameter out of range, a kernel that is not positive semidefinite or
                vanishes at all points, and on NaN or Inf in X.
        """
        x = self._validated(X, reset=True)
        count = require_count("n_components", self.n_components, low=1)
        if count > len(x):
            warnings.warn(f"n_components is {count}; {len(x)} samples give fewer", stacklevel=2)
        count = min(count, len(x))
        self.component_indices_, self.relative_error_ = self._chosen(x, count)
        self.components_ = x[self.component_indices_]
        self.normalization_ = _inverse_root(self._values(self.components_))
        return self

    def transform(self, X: MatrixLike) -> Float[np.ndarray, "n k"]:
        """Return the features of points.

        Args:
            X: points (n_samples, n_features).
        """
        check_is_fitted(self)
        x = self._validated(X, reset=False)
        return self._values(x) @ self.normalization_.T.astype(x.dtype)

    def _validated(self, X: MatrixLike, *, reset: bool) -> Float[np.ndarray, "n d"]:
        x: MatrixLike = validate_data(self, X, reset=reset, dtype=[np.float64, np.float32])
        return x

    def _chosen(
        self, x: Float[np.ndarray, "n d"], count: int
    ) -> tuple[Int[np.ndarray, " k"], float]:
        """The rows of the points, and the share of the trace that they leave."""
        with keeping(x.dtype):
            matrix = KernelMatrix(self._as_kernel(x), x)
            key = as_key(self.random_state)
            result = pivoted_cholesky(matrix, count, key=key, tol=self.tol)
            rank = int(result.numerical_rank)
            if rank == 0:
                raise ValueError("the kernel vanishes at all points; expected another kernel or X")
            # Means of a size that both fit, where sums may not.
            size = jnp.max(matrix.diagonal())
            share = float(jnp.sum(result.residual / size) / jnp.sum(matrix.diagonal() / size))
            return np.asarray(result.pivots[:rank]), share

    @full_precision
    def _values(self, x: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n k"]:
        with keeping(x.dtype):
            points = jnp.asarray(self.components_, x.dtype)
            return np.asarray(evaluate(self._as_kernel(x), jnp.asarray(x), points))

    def _as_kernel(self, x: Float[np.ndarray, "n d"]) -> Kernel:
        """The kernel of points as a function of JAX, of which the numbers are arguments."""
        parameters = {"gamma": self.gamma, "coef0": self.coef0, "degree": self.degree}
        if callable(self.kernel):
            given = [name for name, value in parameters.items() if value is not None]
            if given:
                raise ValueError(f"kernel is a function and has {given[0]}; expected kernel_params")
            options = {} if self.kernel_params is None else self.kernel_params
            if not isinstance(options, Mapping):
                raise ValueError(f"kernel_params is {options!r}; expected values by name")
            return Partial(self.kernel, **options)
        gamma = 1 / x.shape[1] if self.gamma is None else _number("gamma", self.gamma)
        coef0 = 1.0 if self.coef0 is None else _number("coef0", self.coef0)
        degree = require_count("degree", 3 if self.degree is None else self.degree, low=1)
        kernels = {
            "rbf": lambda: gaussian(_inverse((2 * gamma) ** 0.5, x.dtype)),
            "laplacian": lambda: laplace(_inverse(gamma, x.dtype)),
            "polynomial": lambda: Partial(_polynomial, gamma, coef0, degree),
            "poly": lambda: Partial(_polynomial, gamma, coef0, degree),
            "linear": lambda: Partial(_linear),
        }
        if not isinstance(self.kernel, str) or self.kernel not in kernels:
            names = ", ".join(kernels)
            raise ValueError(f"kernel is {self.kernel!r}; expected one of {names}, or a function")
        if self.kernel_params:
            raise ValueError(
                f"kernel_params is {self.kernel_params!r} and kernel is {self.kernel!r}; expected "
                "a function (gamma, coef0 and degree are parameters of their own)"
            )
        return kernels[self.kernel]()

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags

    @property
    def _n_features_out(self) -> int:
        return len(self.components_)


def _linear(x: Point, y: Point) -> Scalar:
    return x @ y


def _polynomial(gamma: Number, coef0: Number, degree: Number, x: Point, y: Point) -> Scalar:
    return (gamma * (x @ y) + coef0) ** degree


def _number(name: str, value: object) -> float:
    """Return a parameter as a finite number that is not negative."""
    require_nonnegative(name, value)
    return float(cast(float, value))


def _inverse(x: float, dtype: np.dtype) -> float:
    """1/x, or the largest number of the dtype if that is less: length scales are finite."""
    largest = float(np.finfo(dtype).max)
    return min(1 / x, largest) if x else largest


def _inverse_root(gram: Float[np.ndarray, "k k"]) -> Float[np.ndarray, "k k"]:
    """The inverse square root of a Gram matrix, 0 along eigenvectors that are rounding."""
    values, vectors = np.linalg.eigh(gram.astype(np.float64))
    live = values > len(gram) * np.finfo(gram.dtype).eps * values[-1]
    roots = np.where(live, np.where(live, values, 1) ** -0.5, 0)
    return ((vectors * roots) @ vectors.T).astype(gram.dtype)
