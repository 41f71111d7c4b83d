"""What is drawn from examples, and what occurs twice."""

import numpy as np
import pytest
from finetune_cases import DATA, without_data

from nyscaled.finetune.examples import Example, few_shot, overlap
from nyscaled.finetune.records import read_split
from nyscaled.finetune.tasks import by_name


def test_examples_are_drawn_as_by_the_global_generator_with_this_seed():
    """MeZO seeds NumPy's global generator, permutes, and takes dev from the end."""
    train, validation = [f"t{i}" for i in range(40)], [f"v{i}" for i in range(9)]
    state = np.random.get_state()
    np.random.seed(3)
    order = np.random.permutation(40)
    np.random.seed(3)
    order_of_test = np.random.permutation(9)
    np.random.set_state(state)
    drawn = few_shot(train, validation, 3, sizes=(20, 10, 5))
    assert drawn[0] == [train[i] for i in order[:20]]
    assert drawn[1] == [train[i] for i in order[20:30]]
    assert drawn[2] == [validation[i] for i in order_of_test[:5]]
    assert np.random.get_state()[2] == state[2]  # the global generator is left alone


def test_small_sets_keep_the_size_of_dev():
    """CB: 250 rows, of which 100 are for dev."""
    train, dev, test = few_shot(range(250), range(56), 0, sizes=(1000, 100, 1000))
    assert (len(train), len(dev), len(test)) == (150, 100, 56)
    assert sorted(train + dev) == list(range(250))


def test_sizes_that_are_refused():
    with pytest.raises(ValueError, match="the train set has 500 examples; expected more than 500"):
        few_shot(range(500), range(9), 0)
    with pytest.raises(ValueError, match="the size of dev is 0"):
        few_shot(range(500), range(9), 0, sizes=(1, 0, 1))


def test_examples_of_the_train_set_are_found_in_the_test_set():
    train = [Example("A film.", "good", second="x"), Example("Other", "bad")]
    test = [
        Example("a  film.", "bad", second="X"),  # another answer does not matter
        Example("A film.", "good", second="y"),
        Example("A film.", "good"),
        Example("other\n", "bad"),
    ]
    assert overlap(train, test) == [test[0], test[3]]


@without_data
@pytest.mark.parametrize(
    ("name", "folder", "sources"),
    [
        ("sst2", "glue/sst2", ["test.tsv:153", "test.tsv:1451"]),
        ("commonsense", "commonsense/ARC-Easy", ["test.json:1454", "test.json:2960"]),
    ],
)
def test_published_test_sets_repeat_examples_of_the_train_sets(name, folder, sources):
    task = by_name(name)
    train, test = (
        task.examples(read_split(DATA / folder, split, task.layouts)) for split in ("train", "test")
    )
    assert [example.source for example in overlap(train, test)] == sources
