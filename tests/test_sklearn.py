"""The estimators of `nyscaled.sklearn`, by scikit-learn's own checks and beside its estimators."""

import pickle
import threading

import jax
import numpy as np
import pytest
import scipy.sparse
from sklearn import datasets
from sklearn.base import clone
from sklearn.decomposition import TruncatedSVD as Peer
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.kernel_approximation import Nystroem as PeerNystroem
from sklearn.linear_model import LogisticRegression
from sklearn.metrics.pairwise import pairwise_kernels
from sklearn.pipeline import make_pipeline
from sklearn.utils.estimator_checks import parametrize_with_checks

from nyscaled.sklearn import Nystroem, TruncatedSVD


@pytest.mark.long
@parametrize_with_checks([TruncatedSVD(passes=2)])
def test_truncated_svd_meets_the_checks_of_scikit_learn(estimator, check):
    check(estimator)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:n_components is:UserWarning")  # as scikit-learn's warns
@parametrize_with_checks([Nystroem(n_components=5)])
def test_nystroem_meets_the_checks_of_scikit_learn(estimator, check):
    check(estimator)


@pytest.fixture(scope="module")
def digits():
    """Images of digits, (1797, 64), in float64; 3 pixels are always 0."""
    return datasets.load_digits().data


@pytest.fixture(scope="module")
def sparse():
    """A sparse matrix with decaying singular values."""
    rng = np.random.default_rng(0)
    a = scipy.sparse.random_array((300, 200), density=0.05, rng=rng)
    return scipy.sparse.csr_array(a * (0.97 ** np.arange(200)))


@pytest.mark.parametrize("name", ["digits", "sparse"])
@pytest.mark.long_beyond(1)
def test_is_scikit_learn_s_svd(name, request):
    x = request.getfixturevalue(name)
    ours = TruncatedSVD(5, passes=12, random_state=0)
    peer = Peer(5, algorithm="arpack", random_state=0)
    projected, expected = ours.fit_transform(x), peer.fit_transform(x)
    for attribute in ("singular_values_", "explained_variance_", "explained_variance_ratio_"):
        np.testing.assert_allclose(getattr(ours, attribute), getattr(peer, attribute), rtol=1e-3)
    # Signs too: the rule for them is the same.
    np.testing.assert_allclose(ours.components_, peer.components_, atol=0.05)
    np.testing.assert_allclose(projected, expected, atol=0.05 * np.abs(expected).max())
    back = ours.inverse_transform(projected)
    error = np.linalg.norm(back - x) / scipy.sparse.linalg.norm(scipy.sparse.csr_array(x))
    assert error == pytest.approx(ours.relative_error_, rel=0.1)


@pytest.mark.long
def test_dtypes_are_kept(digits):
    for dtype, tol in ((np.float32, 1e-5), (np.float64, 1e-12)):
        x = digits.astype(dtype)
        svd = TruncatedSVD(n_components=64, random_state=0).fit(x)
        for value in (svd.components_, svd.singular_values_, svd.transform(x)):
            assert value.dtype == dtype
        identity = svd.components_ @ svd.components_.T
        np.testing.assert_allclose(identity[:61, :61], np.eye(61), atol=10 * tol)
        values = np.linalg.svd(digits, compute_uv=False)
        np.testing.assert_allclose(svd.singular_values_, values, atol=tol * values[0])


@pytest.mark.long
def test_float64_in_a_thread_leaves_the_configuration_alone(digits):
    before, results = dict(jax.config.values), []

    def fit():
        results.append(TruncatedSVD(3, random_state=0).fit(digits).components_)

    threads = [threading.Thread(target=fit) for _ in range(2)]
    for thread in threads:
        thread.start()
    fit()
    for thread in threads:
        thread.join()
    assert dict(jax.config.values) == before
    assert jax.numpy.ones(1).dtype == np.float32
    assert all(np.array_equal(result, results[0]) for result in results)
    assert results[0].dtype == np.float64


@pytest.mark.long
def test_tolerance_finds_the_number_of_components(digits):
    x = digits.astype(np.float32)
    svd = TruncatedSVD(n_components=None, tol=0.2, random_state=0).fit(x)
    values = np.linalg.svd(x, compute_uv=False)
    tails = np.sqrt(np.cumsum(values[::-1] ** 2)[::-1] / np.sum(values**2))
    least = int(np.argmax(tails <= 0.2))
    assert least <= len(svd.components_) <= 1.3 * least
    assert svd.relative_error_ <= 0.2
    with pytest.warns(ConvergenceWarning):
        capped = TruncatedSVD(n_components=3, tol=0.01, random_state=0).fit(x)
    assert len(capped.components_) == 3


@pytest.mark.long
def test_sparse_input_is_not_densified():
    """Dense it would take 160 GB."""
    size, count, kinds = 200_000, 2000, 50
    data = 1 + np.arange(count, dtype=np.float32) % kinds
    x = scipy.sparse.csr_array(
        (data, (np.arange(count) * 99, np.arange(count) % kinds)), shape=(size, size)
    )
    svd = TruncatedSVD(3, passes=12, random_state=0)
    assert svd.fit_transform(x).shape == (size, 3)
    values = np.sqrt(count / kinds) * np.array([50, 49, 48])
    np.testing.assert_allclose(svd.singular_values_, values, rtol=1e-2)


@pytest.mark.long
def test_random_state(sparse):
    def fit(random_state):
        return TruncatedSVD(4, passes=2, random_state=random_state).fit(sparse).components_

    assert np.array_equal(fit(1), fit(1))
    assert np.array_equal(fit(1), fit(np.random.RandomState(1)))
    state = np.random.RandomState(1)
    assert not np.array_equal(fit(state), fit(state))
    np.random.seed(3)
    first = fit(None)
    np.random.seed(3)
    assert np.array_equal(fit(None), first)


@pytest.mark.long
def test_pickle_clone_and_names(digits):
    svd = TruncatedSVD(3, random_state=0).fit(digits)
    again = pickle.loads(pickle.dumps(svd))
    assert np.array_equal(again.transform(digits), svd.transform(digits))
    fresh = clone(svd)
    assert fresh.get_params() == svd.get_params()
    with pytest.raises(NotFittedError):
        fresh.transform(digits)
    assert list(svd.get_feature_names_out()) == [f"truncatedsvd{i}" for i in range(3)]


def test_pipeline_and_pandas(digits):
    pd = pytest.importorskip("pandas")
    labels = datasets.load_digits().target
    frame = pd.DataFrame(digits, columns=[f"pixel{i}" for i in range(64)])
    svd = TruncatedSVD(n_components=20, random_state=0).set_output(transform="pandas")
    pipeline = make_pipeline(svd, LogisticRegression(max_iter=200, tol=1e-2))
    assert pipeline.fit(frame / 16, labels).score(frame / 16, labels) > 0.9
    assert list(svd.transform(frame).columns[:2]) == ["truncatedsvd0", "truncatedsvd1"]
    assert list(svd.feature_names_in_) == list(frame.columns)


@pytest.mark.parametrize(
    ("parameters", "reason"),
    [
        ({"n_components": 0}, "n_components is 0"),
        ({"n_components": 2.5}, "n_components is 2.5"),
        ({"n_components": 65}, "at most 64 features"),
        ({"n_components": None}, "at least one"),
        ({"n_components": None, "tol": -1.0}, "tol"),
        ({"passes": -1}, "passes"),
    ],
)
def test_parameters_are_checked_in_fit(digits, parameters, reason):
    svd = TruncatedSVD().set_params(**parameters)  # which only stores
    with pytest.raises(ValueError, match=reason):
        svd.fit(digits)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.long
def test_data_that_do_not_vary_have_no_explained_variance(dtype):
    for x in (np.zeros((20, 4)), np.diag([1.0, 0, 0, 0])[[0] * 20], np.full((1, 4), 3.0)):
        for form in (np.asarray, scipy.sparse.csr_array):
            svd = TruncatedSVD(1, random_state=0).fit(form(x.astype(dtype)))
            np.testing.assert_array_equal(svd.explained_variance_ratio_, [0])
            assert svd.explained_variance_ratio_.dtype == dtype


@pytest.mark.parametrize("scale", [1e-280, 1e-160, 1e150])
def test_sizes_whose_squares_leave_the_range(scale):
    x = np.random.default_rng(0).normal(size=(30, 4))
    one, other = (TruncatedSVD(2, random_state=0).fit(c * x) for c in (1, scale))
    for name in ("explained_variance_ratio_", "relative_error_"):
        np.testing.assert_allclose(getattr(other, name), getattr(one, name), rtol=1e-9)


@pytest.mark.long
def test_components_beyond_the_numerical_rank_are_zero():
    x = np.outer(np.arange(1.0, 21), [1.0, -2, 3, 0.5])
    svd = TruncatedSVD(3, random_state=0).fit(x)
    np.testing.assert_array_equal(svd.components_[1:], 0)
    np.testing.assert_array_equal(svd.singular_values_[1:], 0)
    np.testing.assert_allclose(svd.inverse_transform(svd.transform(x)), x, rtol=1e-9)


KERNELS = {
    "rbf": {"gamma": 0.02},
    "laplacian": {"gamma": 0.02},
    "polynomial": {"gamma": 0.1, "coef0": 2.0, "degree": 2},
    "linear": {},
}


@pytest.fixture(scope="module")
def points(digits):
    """300 points in 64 dimensions, in float64."""
    return digits[:300] / 16


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.long_beyond(1)
def test_nystroem_is_the_projection_of_the_kernel(points, kernel):
    ours = Nystroem(kernel, **KERNELS[kernel], n_components=20, random_state=0)
    features = ours.fit_transform(points)
    matrix = pairwise_kernels(points, metric=kernel, **KERNELS[kernel])
    chosen = ours.component_indices_
    assert len(set(chosen)) == 20
    np.testing.assert_array_equal(ours.components_, points[chosen])
    columns = matrix[:, chosen]
    expected = columns @ np.linalg.solve(columns[chosen], columns.T)
    size = np.abs(matrix).max()
    np.testing.assert_allclose(features @ features.T, expected, atol=1e-9 * size)
    np.testing.assert_allclose(ours.transform(points[:7]), features[:7], atol=1e-9 * size**0.5)
    error = np.trace(matrix - expected) / np.trace(matrix)
    assert ours.relative_error_ == pytest.approx(error, rel=1e-6)


@pytest.mark.long
def test_nystroem_needs_fewer_components_than_uniform_samples():
    """Of 1000 points, 20 lie apart from the others."""
    rng = np.random.default_rng(0)
    x = np.concatenate([0.01 * rng.normal(size=(980, 2)), 30 * rng.normal(size=(20, 2))])
    matrix = pairwise_kernels(x, metric="rbf", gamma=1.0)

    def error(estimator):
        features = estimator.fit_transform(x)
        return np.trace(matrix - features @ features.T)

    settings = {"gamma": 1.0, "n_components": 25, "random_state": 0}
    assert error(Nystroem(**settings)) < 0.1 * error(PeerNystroem(**settings))


@pytest.mark.long
def test_nystroem_with_a_function(points):
    def kernel(x, y, shift=1.0):
        return jax.numpy.maximum(x @ y, 0) + shift

    settings = {"n_components": 10, "random_state": 0}
    ours = Nystroem(kernel, kernel_params={"shift": 2.0}, **settings)
    chosen = ours.fit(points).component_indices_
    features = ours.transform(points)
    expected = np.maximum(points @ points[chosen].T, 0) + 2
    np.testing.assert_allclose(features @ features[chosen].T, expected, atol=1e-8)
    with pytest.raises(ValueError, match="kernel_params"):
        Nystroem(kernel, gamma=1.0).fit(points)


@pytest.mark.long
def test_nystroem_keeps_dtypes_and_ends_at_the_tolerance_or_the_rank(points):
    for dtype in (np.float32, np.float64):
        ours = Nystroem(n_components=200, tol=0.05, random_state=0).fit(points.astype(dtype))
        assert 1 < len(ours.components_) < 150
        assert ours.relative_error_ <= 0.05
        for value in (ours.components_, ours.normalization_, ours.transform(ours.components_)):
            assert value.dtype == dtype
    doubled = np.concatenate([points[:10]] * 3).astype(np.float32)
    assert len(Nystroem(n_components=20, random_state=0).fit(doubled).components_) == 10


@pytest.mark.long
def test_nystroem_explains_a_smooth_kernel_to_rounding(points):
    x = points[:, 20:22]
    for dtype, least in ((np.float32, 1e-5), (np.float64, 1e-13)):
        ours = Nystroem(gamma=0.1, n_components=60, random_state=0).fit(x.astype(dtype))
        assert ours.relative_error_ < least


@pytest.mark.long
@pytest.mark.parametrize("kernel", ["rbf", "laplacian"])
@pytest.mark.parametrize("gamma", [0, 1e-320])
def test_nystroem_with_a_constant_kernel(points, kernel, gamma):
    for dtype in (np.float32, np.float64):
        x = points[:9, :2].astype(dtype)
        features = Nystroem(kernel, gamma=gamma, n_components=3).fit_transform(x)
        np.testing.assert_allclose(features, np.ones((9, 1)), rtol=1e-6)


@pytest.mark.long
def test_nystroem_is_pickled_and_named(points):
    ours = Nystroem("laplacian", n_components=5, random_state=0).fit(points)
    again = pickle.loads(pickle.dumps(ours))
    np.testing.assert_array_equal(again.transform(points), ours.transform(points))
    assert clone(ours).get_params() == ours.get_params()
    assert list(ours.get_feature_names_out()) == [f"nystroem{i}" for i in range(5)]


@pytest.mark.parametrize(
    ("parameters", "reason"),
    [
        ({"kernel": "sigmoid"}, "kernel is 'sigmoid'"),
        ({"gamma": -1.0}, "gamma is -1"),
        ({"kernel": "polynomial", "degree": 2.5}, "degree is 2.5"),
        ({"kernel": "polynomial", "coef0": -1.0}, "coef0 is -1"),
        ({"n_components": 0}, "n_components is 0"),
        ({"tol": -1.0}, "tol is -1"),
        ({"tol": 1.0}, r"tol is 1.0; expected a number in \[0, 1\)"),
        ({"gamma": np.inf}, r"gamma is inf; expected a number in \[0, inf\)"),
        ({"kernel_params": {"gamma": 0.1}}, "kernel_params is .* and kernel is 'rbf'; expected a"),
        ({"kernel": lambda x, y: 1e200 * x @ (1e200 * y)}, "A has a diagonal entry of inf"),
        ({"kernel": lambda x, y: np.exp(x @ y)}, "the kernel of two points fails"),
        (
            {"kernel": lambda x, y: x @ y, "kernel_params": {"c": 1}},
            "the kernel of two points fail",
        ),
        ({"kernel": lambda x, y: -x @ y}, "not positive semidefinite"),
        ({"kernel": lambda x, y: 0 * x @ y}, "vanishes"),
        ({"kernel": lambda x, y: x}, "expected a number"),
    ],
)
def test_nystroem_checks_its_parameters_in_fit(points, parameters, reason):
    estimator = Nystroem(n_components=5).set_params(**parameters)
    with pytest.raises(ValueError, match=reason):
        estimator.fit(points)
