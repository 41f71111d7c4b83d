"""How a model's parameters lie on a mesh with the axes "fsdp" and "tensor"."""

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

    "tensor" splits the heads and the insides of MLPs (Shoeybi et al., 2019): the outputs of
    the first layers of both, the inputs of the second (the family's `split_inputs`, such as
    `o_proj` and `down_proj`), and the tokens of embeddings and the head.
    "fsdp" splits the other side, and the batch, so that each layer is gathered when it is its turn
    (Rajbhandari et al., 2020): compile what calls the model under `jax.set_mesh(mesh)`, where it
    holds its activations to that. The axis of stacked layers is never split. An
    axis that the mesh's does not divide stays whole, and so do norms, biases and whatever is not
    the model's own: adapters have a rule of their own, as `nys.lora.apply` lays their factors as
    it finds their kernels.

    Args:
        model: a model of this package, or its state; either may be abstract.
        mesh: mesh with one or both of the axes; others are not used.
        family: the model's `family`, required with a state.

    Returns:
        The model's state with a `NamedSharding` for each value, as `jax.device_put` and `jax.jit`
        take it.

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
        >>> found = shardings(model, mesh)
        >>> tuple(found.layers.mlp.down_proj.kernel.get_value().spec)
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
    ends = tuple(f".{name}.kernel" for name in family.split_inputs)
    flat = [
        (path, variable.replace(NamedSharding(mesh, _spec(path, variable.shape, mesh, ends))))
        for path, variable in nnx.to_flat_state(state)
    ]
    return nnx.from_flat_state(flat)


def split_batch(x: Array) -> Array:
    """Keeps the first axis split by "fsdp", under `jax.set_mesh` of a mesh that has it.

    The compiler, left alone, may split the width of activations in its place, as the kernels of
    one product after another have it, and then works on the whole batch on every device.
    """
    mesh = jax.sharding.get_abstract_mesh()
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    if kinds.get(FSDP) != AxisType.Auto or x.shape[0] % mesh.shape[FSDP]:
        return x
    others = (PartitionSpec.UNCONSTRAINED for _ in x.shape[1:])
    return jax.lax.with_sharding_constraint(x, PartitionSpec(FSDP, *others))


def require_mesh(mesh: Mesh) -> None:
    """Raises ValueError unless the mesh has an axis to split by, and all are left to the compiler."""
    if not isinstance(mesh, Mesh):
        raise ValueError(f"mesh is {mesh!r:.80}; expected a jax.sharding.Mesh")
    if not {FSDP, TENSOR} & set(mesh.axis_names):
        raise ValueError(f"mesh has the axes {mesh.axis_names}; expected {FSDP!r} or {TENSOR!r}")
    if any(kind != AxisType.Auto for kind in mesh.axis_types):
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
        wanted = TENSOR, FSDP
    elif path[-1] == "kernel":
        wanted = FSDP, TENSOR
    else:
        return PartitionSpec(*(None for _ in shape))
    axes = (*(None for _ in shape[2:]), *wanted)
    return PartitionSpec(
        *(
            axis if axis in mesh.shape and length % mesh.shape[axis] == 0 else None
            for axis, length in zip(axes, shape, strict=True)
        )
    )
