"""Names of factors: one table for flax, qwix, gemma, `Factors` and the adapters of this package."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from flax.traverse_util import flatten_dict

import nyscaled as nys
from nyscaled.transforms.leaf_names import names_of, parse

NAMES = {
    # path: library, position, partner's last name, layer, kernels
    "q/lora_b": ("flax", 1, "lora_a", "q", ["q/kernel", "q/base_module/kernel"]),
    "q/lora/lora_a": ("flax", 0, "lora_b", "q", ["q/kernel", "q/base_module/kernel"]),
    "lora_a": ("flax", 0, "lora_b", "", ["kernel", "base_module/kernel"]),
    "q/adapters/english/lora_a": ("nyscaled", 0, "lora_b", "q", []),
    "mlp/up_lora_b": ("qwix", 1, "up_lora_a", "mlp/up", ["mlp/up"]),
    "mlp/kernel_lora_a": ("qwix", 0, "kernel_lora_b", "mlp", ["mlp/kernel"]),
    "q/lora/a": ("gemma", 0, "b", "q", ["q/w", "q/kernel"]),
    "x/right": ("Factors", 1, "left", "x", []),
}


@pytest.mark.parametrize("path", NAMES)
def test_a_factor_is_known_by_its_path(path):
    library, position, partner, layer, kernels = NAMES[path]
    name = parse(tuple(path.split("/")))
    assert (name.convention.library, name.position) == (library, position)
    assert name.partner == (*path.split("/")[:-1], partner)
    assert "/".join(name.layer) == layer
    assert ["/".join(kernel) for kernel in name.kernels] == kernels
    other = parse(name.partner)
    assert (other.pair, other.position) == (name.pair, 1 - position)


@pytest.mark.parametrize("path", ["", "a", "q/a", "lora/bias", "lora_c", "_lora_a", "leftover"])
def test_other_leaves_are_not_factors(path):
    assert parse(tuple(path.split("/"))) is None


def test_boxes_are_not_part_of_a_name():
    trees = {"linen": linen.Partitioned(jnp.ones(2), ("x",)), "nnx": nnx.Param(jnp.ones(2))}
    leaves, _ = jax.tree_util.tree_flatten_with_path({"w": trees, "list": [0]})
    assert [names_of(path) for path, _ in leaves] == [("list", "0"), ("w", "linen"), ("w", "nnx")]


@pytest.mark.parametrize("separator", ["/", ".", None], ids=["slash", "dot", "tuple"])
def test_flattened_trees_have_the_pairs_of_nested_ones(separator):
    shapes = {"kernel": (6, 4), "lora_a": (6, 2), "lora_b": (2, 4)}
    nested = {"layers": {str(i): {k: jnp.ones(s) for k, s in shapes.items()} for i in range(2)}}
    params = flatten_dict(nested, sep=separator)
    specs = [spec for spec in nys.pair_spec(params).values() if spec is not None]
    assert len(specs) == 4
    assert len({spec.pair for spec in specs}) == 2
    started = nys.lora.initialize_params(params, key=jax.random.key(0))
    expected = nys.lora.initialize_params(nested, key=jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, started, flatten_dict(expected, sep=separator))
