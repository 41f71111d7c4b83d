"""`TruncatedSVD`, with the interface of scikit-learn's and a tolerance in place of the rank."""

from __future__ import annotations

import warnings
from typing import no_type_check

import jax
import numpy as np
from jaxtyping import Float
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import Tags, check_array
from sklearn.utils.extmath import safe_sparse_dot
from sklearn.utils.sparsefuncs import mean_variance_axis
from sklearn.utils.validation import check_is_fitted, validate_data

from nyscaled.lowrank import LowRank, Status, factorize
from nyscaled.numerics import keeping
from nyscaled.sklearn.random_state import RandomState, as_key
from nyscaled.typing import MatrixLike
from nyscaled.validation import require_count


class TruncatedSVD(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    """Project rows on the leading right singular vectors, which `nyscaled.factorize` finds.

    X is not centred, so that a sparse X stays sparse. What differs from
    `sklearn.decomposition.TruncatedSVD` is the algorithm and its parameters, and that a tolerance
    may stand in the place of the number of components. float32 is computed in float32, and
    float64 in float64 whether or not JAX's x64 is on.

    Args:
        n_components: number of components, at most the number of features. If X has fewer rows,
            there are as many components as rows. None if only `tol` decides.
        tol: largest error ‖X − X VᵀV‖_F / ‖X‖_F, estimated. Components are added until it is met,
            or there are `n_components`, which is a `ConvergenceWarning`.
        passes: products with X or its transpose, without `tol`; 6 by default.
        random_state: of the random start: an integer, a generator, or None.

    Attributes:
        components_: V (n_components, n_features), orthonormal rows. The largest entry of each is
            positive, as in scikit-learn. Rows beyond the numerical rank of X are zero.
        singular_values_: σ (n_components,), falling, and 0 beyond the numerical rank.
        explained_variance_: variances of the columns of `fit_transform(X)`.
        explained_variance_ratio_: the same over the sum of variances of the features; 0 if these
            do not vary, but for rounding.
        relative_error_: estimate of the relative error in the Frobenius norm.
        n_features_in_: number of features.
        feature_names_in_: names of features, if X had names.

    Examples:
        >>> import numpy as np
        >>> x = np.random.default_rng(0).normal(size=(100, 3)) @ np.diag([9.0, 3.0, 0.1])
        >>> TruncatedSVD(n_components=2, random_state=0).fit_transform(x).shape
        (100, 2)
        >>> TruncatedSVD(n_components=None, tol=0.1, random_state=0).fit(x).components_.shape
        (2, 3)
    """

    @no_type_check  # scikit-learn's rule: constructors store what they get, `fit` checks it
    def __init__(
        self,
        n_components: int | None = 2,
        *,
        tol: float | None = None,
        passes: int | None = None,
        random_state: RandomState = None,
    ) -> None:
        self.n_components = n_components
        self.tol = tol
        self.passes = passes
        self.random_state = random_state

    def fit(self, X: MatrixLike, y: object = None) -> TruncatedSVD:
        """Find the components of X.

        Args:
            X: (n_samples, n_features), dense or sparse.
            y: ignored.
        """
        self.fit_transform(X)
        return self

    def fit_transform(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, X: MatrixLike, y: object = None
    ) -> Float[np.ndarray, "n k"]:
        """Find the components of X and return its projections.

        Args:
            X: (n_samples, n_features), dense or sparse.
            y: ignored.

        Raises:
            ValueError: on a parameter out of range, and on NaN or Inf in X.
        """
        x = self._validated(X, reset=True)
        low_rank = self._factorized(x)
        right = low_rank.right.T
        largest = np.abs(right).argmax(axis=1)
        signs = np.where(right[np.arange(len(right)), largest] < 0, -1, 1)
        self.components_ = right * signs[:, None].astype(right.dtype)
        self.singular_values_ = low_rank.singular_values
        norm = float(low_rank.norm_estimate)
        self.relative_error_ = float(low_rank.error_estimate) / norm if norm > 0 else 0.0
        projected = safe_sparse_dot(x, self.components_.T)
        # The squares of numbers of size 1 stay in range.
        limit = np.finfo(x.dtype).maxexp - 2
        power = int(np.clip(-np.frexp(norm)[1], -limit, limit))
        scale = x.dtype.type(2.0**power)
        variances = _variances(projected * scale)
        total = float(_variances(x * scale).sum())
        constant = total <= len(projected) * np.finfo(np.float64).eps ** 2  # of sums of squares ≤ 1
        ratio = np.zeros_like(variances) if constant else variances / total
        self.explained_variance_ = np.ldexp(variances, -2 * power).astype(x.dtype)
        self.explained_variance_ratio_ = ratio.astype(x.dtype)
        return projected

    def transform(self, X: MatrixLike) -> Float[np.ndarray, "n k"]:
        """Return projections of rows on the components, X Vᵀ.

        Args:
            X: (n_samples, n_features), dense or sparse.
        """
        check_is_fitted(self)
        return safe_sparse_dot(self._validated(X, reset=False), self.components_.T)

    def inverse_transform(self, X: MatrixLike) -> Float[np.ndarray, "n m"]:
        """Return the rows, dense, that have these projections and lie in the components' span.

        Args:
            X: projections (n_samples, n_components).
        """
        check_is_fitted(self)
        return check_array(X) @ self.components_

    def _validated(self, X: MatrixLike, *, reset: bool) -> MatrixLike:
        return validate_data(
            self,
            X,
            reset=reset,
            accept_sparse=["csr", "csc"],
            dtype=[np.float64, np.float32],
            ensure_min_features=2 if reset else 1,
        )

    def _factorized(self, X: MatrixLike) -> LowRank:
        """The factors of X as NumPy arrays."""
        rank = None
        if self.n_components is not None:
            rank = require_count("n_components", self.n_components, low=1)
            if rank > X.shape[1]:
                raise ValueError(f"n_components is {rank}; expected at most {X.shape[1]} features")
            rank = min(rank, X.shape[0])
        elif self.tol is None:
            raise ValueError("n_components and tol are None; expected at least one of them")
        rank, max_rank = (rank, None) if self.tol is None else (None, rank)
        key = as_key(self.random_state)
        with keeping(X.dtype):
            low_rank = factorize(
                X, rank, tol=self.tol, key=key, passes=self.passes, max_rank=max_rank
            )
        if low_rank.status is Status.MAX_RANK:
            warnings.warn(low_rank.status.message, ConvergenceWarning, stacklevel=4)
        return jax.tree.map(np.asarray, low_rank)

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags

    @property
    def _n_features_out(self) -> int:
        return len(self.components_)


def _variances(x: MatrixLike) -> Float[np.ndarray, " m"]:
    """The variances of columns, in double precision."""
    if isinstance(x, np.ndarray):
        return np.var(x, axis=0, dtype=np.float64)
    return np.asarray(np.asarray(mean_variance_axis(x, axis=0))[1], np.float64)
