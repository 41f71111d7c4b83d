"""typing: pytrees, static fields, and functions whose bound arrays are arguments."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import pytest
from cases import FORMS, N, R, normal, psd

import nyscaled as nys
from nyscaled._pytree import as_partial, field, pytree_dataclass
from nyscaled.typing import LinearMap


@pytree_dataclass
class Thing:
    array: object
    name: str = field(static=True, default="a")

    def __post_init__(self):
        if self.array is None:
            raise ValueError("validated")

    def total(self, x):
        return jnp.sum(self.array) * x


def test_factors_are_a_pytree_with_named_leaves():
    factors = nys.Factors(jnp.ones(1), jnp.zeros(1))
    paths = [jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(factors)]
    assert paths == [".left", ".right"]
    doubled = jax.tree.map(lambda x: 2 * x, factors)
    assert isinstance(doubled, nys.Factors)


def test_dataclass_is_frozen_and_its_static_fields_are_structure():
    thing = Thing(jnp.ones(3), "b")
    with pytest.raises(dataclasses.FrozenInstanceError):
        thing.array = None
    leaves, treedef = jax.tree.flatten(thing)
    chex.assert_trees_all_equal(leaves, [jnp.ones(3)])
    assert treedef != jax.tree.structure(Thing(jnp.ones(3), "c"))
    assert treedef.unflatten(leaves).name == "b"
    assert jax.tree_util.keystr(jax.tree_util.tree_leaves_with_path(thing)[0][0]) == ".array"


def test_rebuilding_does_not_validate_again_but_constructing_does():
    with pytest.raises(ValueError, match="validated"):
        Thing(None)
    assert jax.tree.map(lambda _: None, Thing(jnp.ones(3))).array is None


def test_method_of_a_pytree_becomes_a_partial_over_its_arrays():
    bound = as_partial(Thing(jnp.ones(3)).total)
    chex.assert_trees_all_equal(jax.tree.leaves(bound), [jnp.ones(3)])
    assert bound(2.0) == 6.0
    assert jax.tree.structure(bound) == jax.tree.structure(as_partial(Thing(jnp.zeros(3)).total))


def test_plain_function_becomes_a_partial_without_leaves_and_a_partial_stays():
    bound = as_partial(jnp.sum)
    assert jax.tree.leaves(bound) == []
    assert as_partial(bound) is bound


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_matrix_is_a_linear_map(form):
    a = FORMS[form](psd(m=N)[0])
    assert isinstance(a, LinearMap)
    assert (a @ normal(0, (N, R))).shape == (N, R)
    assert not isinstance([[1.0]], LinearMap)
