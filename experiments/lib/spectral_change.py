"""Which singular values of a weight an update changes, and what chance gives (Figure 2).

A low-rank update cannot move all singular values alike: σᵢ stays between its r-th neighbours, so
where the spectrum is steep there is room to move, and in the flat part there is not. A count of
the values that changed most must therefore be compared with updates of random directions.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from experiments.lib.adapter_runs import haar

Matrix = Float[np.ndarray, "m n"]


class Decomposed(NamedTuple):
    """A weight and its singular value decomposition, in float64."""

    weight: Matrix
    left: Matrix
    values: Float[np.ndarray, " k"]
    right: Matrix

    @classmethod
    def of(cls, weight: Matrix) -> Decomposed:
        """Return the decomposition of a weight."""
        wide = np.asarray(weight, np.float64)
        left, values, right = np.linalg.svd(wide, full_matrices=False)
        return cls(wide, left, values, right.T)


class Update(NamedTuple):
    """An update left·diag(values)·rightᵀ with orthonormal left and right."""

    left: Matrix
    values: Float[np.ndarray, " r"]
    right: Matrix

    @classmethod
    def of(cls, a: Matrix, b: Matrix) -> Update:
        """Return the update a @ b.

        Args:
            a: first factor.
            b: second factor.
        """
        q, r = np.linalg.qr(np.asarray(a, np.float64))
        p, s = np.linalg.qr(np.asarray(b, np.float64).T)
        left, values, right = np.linalg.svd(r @ s.T)
        return cls(q @ left, values, p @ right.T)

    @property
    def matrix(self) -> Matrix:
        """The update as a matrix."""
        return (self.left * self.values) @ self.right.T

    def randomized(self, rng: np.random.Generator, *, keep_left: bool) -> Update:
        """Return an update of the same singular values with random vectors.

        Args:
            rng: source of random numbers.
            keep_left: whether only the right vectors are random.
        """
        left = self.left if keep_left else haar(rng, self.left.shape)
        return self._replace(left=left, right=haar(rng, self.right.shape))


def changed(weight: Decomposed, update: Update, count: int) -> Int[np.ndarray, " count"]:
    """Return the indices of the singular values that changed most.

    Both spectra are in falling order, and the change is |σᵢ(W + Δ) − σᵢ(W)|.

    Args:
        weight: W.
        update: Δ.
        count: number of indices.

    Examples:
        >>> weight = Decomposed.of(np.diag([4.0, 2.0, 1.0]))
        >>> changed(weight, Update.of(np.eye(3)[:, 1:2], 0.5 * np.eye(3)[1:2]), 1)
        array([1])
    """
    after = np.linalg.svd(weight.weight + update.matrix, compute_uv=False)
    return np.sort(np.argsort(-np.abs(after - weight.values), kind="stable")[:count])


def energies(weight: Decomposed, update: Update) -> tuple[np.ndarray, np.ndarray]:
    """Return the shares of ‖Δ‖² along the left and along the right singular vectors of W.

    Args:
        weight: W.
        update: Δ.

    Examples:
        >>> weight = Decomposed.of(np.diag([4.0, 2.0, 1.0]))
        >>> energies(weight, Update.of(np.eye(3)[:, 1:2], np.eye(3)[:1]))[0].round(3)
        array([0., 1., 0.])
    """
    total = np.sum(update.values**2)
    left = np.sum(((weight.left.T @ update.left) * update.values) ** 2, axis=1)
    right = np.sum(((weight.right.T @ update.right) * update.values) ** 2, axis=1)
    return left / total, right / total
