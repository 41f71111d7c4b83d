"""How a model's parameters are split over a mesh with the axes "fsdp" and "tensor"."""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from nyscaled.models.family import Family, LanguageModel

FSDP, TENSOR = "fsdp", "tensor"


def shardings(model: Any, mesh: Mesh, *, family: Family | None = None) -> Any:
    """Return the sharding of each parameter, by the names of its modules.

    The axis "tensor" splits the heads and the insides of MLPs (Shoeybi et al., 2019): the outputs
    of their first layers, the inputs of their last (the family's `split_inputs`, such as `o_proj`
    and `down_proj`), and the tokens of embeddings and the head. The axis "fsdp" splits the other
    side of each kernel, and the batch, so that each layer is gathered when it is used (Rajbhandari
    et al., 2020). Compile what calls the model under `jax.set_mesh(mesh)`: the model then keeps its
    activations split in the same way.

    The axis of stacked layers is never split. A side that the mesh's axis does not divide stays
    whole, and so do norms, biases and everything that is not the model's own. `nys.lora.apply`
    places the factors of adapters as their kernels.

    Args:
        model: a model of this package, or its state; either may be abstract.
        mesh: mesh with one or both of the axes; others are not used.
        family: the model's `family`, required with a state.

    Returns:
        The model's state with a `NamedSharding` for each value, as `jax.device_put` and `jax.jit`
        accept it.

    Raises:
        ValueError: if the mesh has neither axis, or axes that are not of type Auto; on a state
            without its family.

    Examples:
        >>> from nyscaled.models import Llama, LlamaConfig
        >>> sizes = dict(vocab_size=16, hidden_size=8, intermediate_size=12, num_hidden_layers=3)
        >>> heads = dict(num_attention_heads=4, num_key_value_heads=2, head_dim=2)
        >>> config = LlamaConfig(**sizes, **heads)
        >>> model = nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0)))
        >>> axes = (jax.sharding.AxisType.Auto,) * 2
        >>> mesh = jax.make_mesh((1, 1), ("fsdp", "tensor"), axis_types=axes)
        >>> layout = shardings(model, mesh)
        >>> tuple(layout.layers.mlp.down_proj.kernel.get_value().spec)
        (None, 'tensor', 'fsdp')
    """
    require_mesh(mesh)
    state = model if isinstance(model, nnx.State) else nnx.state(model)
    if isinstance(model, LanguageModel):
        family = model.family
    if family is None:
        raise ValueError(
            f"model is a {type(model).__name__}; expected a model of this package, or the state "
            "of one with its `family`"
        )
    return layout(state, mesh, family.split_inputs)


def layout(
    state: nnx.State[object, object], mesh: Mesh, split_inputs: tuple[str, ...]
) -> nnx.State[object, object]:
    """Return the sharding of each parameter of a state, as `shardings` does.

    Args:
        state: the state, which may be abstract.
        mesh: the mesh.
        split_inputs: ends of the paths of linear layers whose inputs an earlier layer leaves split.
    """
    ends = tuple(f".{name}.kernel" for name in split_inputs)
    flat = [
        (path, variable.replace(NamedSharding(mesh, _spec(path, variable.shape, mesh, ends))))
        for path, variable in nnx.to_flat_state(state)
    ]
    return nnx.from_flat_state(flat)


def split_batch(x: Array) -> Array:
    """Keep the first axis split by "fsdp", under `jax.set_mesh` of a mesh that has it.

    Without this the compiler may split the width of activations instead, as the kernels are, and
    then compute the whole batch on every device.
    """
    mesh = jax.sharding.get_abstract_mesh()
    types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    if types.get(FSDP) != AxisType.Auto or x.shape[0] % mesh.shape[FSDP]:
        return x
    others = (PartitionSpec.UNCONSTRAINED for _ in x.shape[1:])
    return jax.lax.with_sharding_constraint(x, PartitionSpec(FSDP, *others))


def require_mesh(mesh: Mesh) -> None:
    """Require a mesh with an axis to split by, whose axes are all left to the compiler.

    Raises:
        ValueError: on another mesh.
    """
    if not isinstance(mesh, Mesh):
        raise ValueError(f"mesh is {mesh!r:.80}; expected a jax.sharding.Mesh")
    if not {FSDP, TENSOR} & set(mesh.axis_names):
        raise ValueError(f"mesh has the axes {mesh.axis_names}; expected {FSDP!r} or {TENSOR!r}")
    if any(axis_type != AxisType.Auto for axis_type in mesh.axis_types):
        raise ValueError(
            f"mesh has axes of types {mesh.axis_types}; expected Auto ones: "
            "jax.make_mesh(..., axis_types=(jax.sharding.AxisType.Auto,) * 2)"
        )


def _spec(
    path: tuple[Any, ...], shape: tuple[int, ...], mesh: Mesh, split_inputs: tuple[str, ...]
) -> PartitionSpec:
    """The axes of the mesh for the last two of a parameter's."""
    name = ".".join(("", *map(str, path)))
    if path[-1] == "embedding" or name.endswith(split_inputs):
        sides = TENSOR, FSDP
    elif path[-1] == "kernel":
        sides = FSDP, TENSOR
    else:
        return PartitionSpec(*(None for _ in shape))
    axes = (*(None for _ in shape[2:]), *sides)
    return PartitionSpec(
        *(
            axis if axis in mesh.shape and length % mesh.shape[axis] == 0 else None
            for axis, length in zip(axes, shape, strict=True)
        )
    )
