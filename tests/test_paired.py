"""experiments/lib/paired.py against SciPy's tests, and by the properties of its statistics."""

import itertools

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from experiments.lib import paired

SAMPLES = arrays.arrays(float, st.integers(3, 9), elements=st.floats(-5, 5, width=16)).filter(
    lambda x: x.std() > 0.01
)
FEW = settings(max_examples=25, deadline=None)


@FEW
@given(SAMPLES)
def test_interval_is_that_of_the_t_test(values):
    expected = scipy.stats.ttest_1samp(values, 0).confidence_interval(0.95)
    np.testing.assert_allclose(paired.interval(values), expected, rtol=1e-9, atol=1e-12)


@FEW
@given(SAMPLES)
def test_t_test_is_scipys(values):
    expected = scipy.stats.ttest_1samp(values, 0).pvalue
    assert paired.t_test(values) == pytest.approx(expected, rel=1e-6, abs=1e-12)


def test_equal_differences_have_no_spread():
    assert paired.compare([2.0, 2.0]) == (2.0, 2.0, 2.0, 0.5, 0.0, 0.0, 2)
    assert paired.compare([0.0, 0.0]).t_test == 1


@FEW
@given(SAMPLES)
def test_sign_flip_counts_all_signs(values):
    signs = np.array(list(itertools.product((1, -1), repeat=len(values))))
    sums, total = np.abs(signs @ values), abs(values.sum())
    p = paired.sign_flip(values)
    assert p == np.mean(sums >= total - 1e-9 * np.abs(values).sum())
    assert 2.0 ** (1 - len(values)) <= p <= 1
    assert paired.sign_flip(-values) == p


@FEW
@given(SAMPLES, st.floats(0.01, 100))
def test_all_scale_with_the_unit(values, unit):
    one, other = paired.compare(values), paired.compare(unit * values)
    for name in ("mean", "low", "high", "detectable"):
        expected = unit * getattr(one, name)
        assert getattr(other, name) == pytest.approx(expected, rel=1e-6, abs=1e-9 * unit)
    assert other.p == pytest.approx(one.p)


@FEW
@given(st.lists(st.floats(0, 1), min_size=1, max_size=6))
def test_holm_is_between_the_p_values_and_bonferroni(p):
    corrected = paired.holm(p)
    assert (corrected >= np.asarray(p) - 1e-12).all()
    assert (corrected <= np.minimum(1, np.asarray(p) * len(p)) + 1e-12).all()
    assert corrected.min() == pytest.approx(min(1, min(p) * len(p)))
    order = np.argsort(p, kind="stable")
    assert (np.diff(corrected[order]) >= 0).all()


def test_levels_and_power_are_what_they_say():
    """By simulation: without a difference 1 in 20 is found, with the detectable one 4 in 5."""
    rng = np.random.default_rng(0)
    samples = rng.normal(size=(4000, 8))
    half = scipy.stats.t.ppf(0.975, 7) * samples.std(axis=1, ddof=1) / 8**0.5
    sample = rng.normal(size=8)
    size = paired.detectable((sample - sample.mean()) / sample.std(ddof=1))
    assert np.mean(np.abs(samples.mean(axis=1)) > half) == pytest.approx(0.05, abs=0.015)
    assert np.mean(np.abs(samples.mean(axis=1) + size) > half) == pytest.approx(0.8, abs=0.03)
    found = [paired.sign_flip(x) < 0.05 for x in samples[:600]]
    assert np.mean(found) == pytest.approx(0.047, abs=0.03)  # 12 of 256 signs


def test_equivalence_requires_the_whole_interval_inside():
    values = np.array([0.2, 0.1, 0.3, 0.15])
    low, high = paired.interval(values, 0.9)
    assert low > 0
    assert paired.equivalent(values, high * 1.001)
    assert not paired.equivalent(values, high * 0.999)
    assert not paired.equivalent(-values, high * 0.999)


def test_mcnemar_counts_only_items_on_which_the_two_differ():
    first = np.array([True] * 9 + [False] * 3 + [True] * 50)
    second = np.array([False] * 9 + [True] * 3 + [True] * 50)
    expected = scipy.stats.binomtest(3, 12).pvalue
    assert paired.mcnemar(first, second) == pytest.approx(expected)
    assert paired.mcnemar(first, first) == 1
    with pytest.raises(ValueError, match="same items"):
        paired.mcnemar(first, second[:5])


@pytest.mark.parametrize("values", [[], [1.0], [1.0, np.nan], [[1.0, 2.0]]])
def test_too_few_or_no_numbers_are_refused(values):
    with pytest.raises(ValueError, match="expected at least 2 finite numbers"):
        paired.compare(values)


def test_too_many_signs_are_refused():
    with pytest.raises(ValueError, match="expected at most 20"):
        paired.sign_flip(np.ones(21))
