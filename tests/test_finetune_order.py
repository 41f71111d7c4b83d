"""The order of examples: a pure function of seed and step; lengths that waste least."""

import itertools

import numpy as np
import pytest

from nyscaled.finetune import order

LENGTHS = tuple(np.random.default_rng(0).integers(1, 90, 203).tolist())


def test_each_epoch_has_every_example_once():
    run = order.Order(LENGTHS, 8, seed=0)
    assert run.steps_per_epoch == 26
    for epoch in range(2):
        rows = np.concatenate([run.rows(26 * epoch + i) for i in range(26)])
        assert sorted(rows[rows != order.NONE]) == list(range(203))
    assert not np.array_equal(run.rows(0), run.rows(26))


def test_the_rows_of_a_step_depend_on_nothing_before_it():
    first, second = (order.Order(LENGTHS, 8, seed=3) for _ in range(2))
    everything = [first.rows(step) for step in range(60)]
    order._epoch.cache_clear()
    np.testing.assert_array_equal(second.rows(59), everything[59])
    assert not np.array_equal(order.Order(LENGTHS, 8, seed=4).rows(59), everything[59])


def test_windows_waste_less_than_shuffled_batches():
    run = order.Order(LENGTHS, 8, seed=0)
    shuffled = np.random.default_rng(0).permutation(LENGTHS)[:200].reshape(-1, 8)
    assert 8 * run.longest().sum() < 0.8 * 8 * shuffled.max(axis=1).sum()


def test_short_batches_do_not_come_first():
    longest = order.Order(LENGTHS[:128], 8, seed=0).longest().tolist()
    assert longest != sorted(longest)


def test_rows_without_an_example_have_no_length():
    run = order.Order((*(1,) * 128, 50), 8, seed=0)
    assert sorted(run.longest()) == [*(1,) * 16, 50]


def test_examples_of_one_length_keep_their_order():
    """Which sorting algorithms differ in, on one machine and on another."""
    lengths = (6, 5) * 500
    falling = [[*range(0, 1000, 2), *range(1, 1000, 2)]]
    np.testing.assert_array_equal(order.by_length(lengths, 1000), falling)
    run = order.Order(lengths, 100, seed=0)
    shuffled = np.random.default_rng([0, 0]).permutation(1000)
    rising = np.concatenate([shuffled[shuffled % 2 == 1], shuffled[shuffled % 2 == 0]])
    batches = [run.rows(step).tolist() for step in range(10)]
    assert sorted(batches) == sorted(rising.reshape(-1, 100).tolist())


def test_a_batch_by_length_has_the_longest_first():
    rows = order.by_length([3, 9, 4], 2)
    np.testing.assert_array_equal(rows, [[1, 2], [0, order.NONE]])


@pytest.mark.parametrize("seed", range(20))
def test_the_lengths_of_batches_waste_least(seed):
    rng = np.random.default_rng(seed)
    longest, count = rng.integers(1, 80, rng.integers(1, 30)), int(rng.integers(1, 5))
    rounded = -(-longest // 8) * 8
    known = np.unique(rounded)

    def padded(lengths):
        lengths = np.array(sorted(lengths))
        return lengths[np.searchsorted(lengths, rounded)].sum()

    chosen = order.choose_lengths(longest, count)
    subsets = itertools.combinations(known[:-1], min(count, len(known)) - 1)
    assert len(chosen) <= count
    assert padded(chosen) == min(padded({*subset, known[-1]}) for subset in subsets)
