"""ScaledGD as optax transforms: gradients of low-rank factors, preconditioned by Gram matrices.

    single factor X           G  ←  G (XᵀX + λI)⁻¹                                    (2), (26)
    pair X Yᵀ                 G_X ← G_X (YᵀY + λI)⁻¹,   G_Y ← G_Y (XᵀX + λI)⁻¹        (6), (35)

Which leaves of a tree of parameters are factors is a *spec*: a tree like the parameters with a
`FactorSpec` or None at each leaf, or a callable that makes one from the parameters.

References:
    Tong, Ma, Chi, Accelerating ill-conditioned low-rank matrix estimation via scaled gradient
    descent, JMLR 2021 (λ = 0). Xu, Shen, Chi, Ma, The power of preconditioning in
    overparameterized low-rank matrix sensing, ICML 2023 (ScaledGD(λ)).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from nyscaled import linalg, validation


@dataclasses.dataclass(frozen=True)
class FactorSpec:
    """How a leaf is read as thin factors.

    Attributes:
        pair: None for a symmetric factor, preconditioned by its own Gram matrix. Otherwise a
            name that exactly two leaves carry, each preconditioned by the other's.
        rank_axis: the axis of length r.
        batch_axes: axes that index independent factors (stacked layers); both leaves of a pair
            must agree in them. What remains is flattened to the long axis.
    """

    pair: Hashable | None = None
    rank_axis: int = -1
    batch_axes: tuple[int, ...] = ()


Spec = Any
"""A tree of `FactorSpec` or None like the parameters, or a callable that makes one from them."""

_PAIRS = {"left": ("left", "right"), "right": ("left", "right")}
_PAIRS |= {"lora_a": ("lora_a", "lora_b"), "lora_b": ("lora_a", "lora_b")}


def _name(entry: Any) -> Any:
    return next((getattr(entry, k) for k in ("key", "name", "idx") if hasattr(entry, k)), entry)


def default_spec(params: Any) -> Any:
    """Reads `params` by name: pairs are `left`/`right` (`Factors`) and `lora_a`/`lora_b` siblings.

    Every other array is a symmetric factor. The last two axes are (long, rank), but (rank, long)
    for `lora_b`; axes before them are batch axes.

    Raises:
        ValueError: on an array of fewer than two axes; it names the leaf.
    """

    def of_leaf(path: Any, leaf: Any) -> FactorSpec:
        if jnp.ndim(leaf) < 2:
            raise ValueError(
                f"leaf {_show(path)} has shape {jnp.shape(leaf)}; a factor wants (…, long, rank): "
                "keep other leaves away with optax.masked or optax.partition, or pass a spec"
            )
        last = _name(path[-1]) if path else None
        pair = (path[:-1], _PAIRS[last]) if last in _PAIRS else None
        return FactorSpec(pair, -2 if last == "lora_b" else -1, tuple(range(jnp.ndim(leaf) - 2)))

    return jax.tree_util.tree_map_with_path(of_leaf, params)


def _show(path: Any) -> str:
    return jax.tree_util.keystr(path) or "params"


class _Member(NamedTuple):
    leaf: int
    path: Any
    spec: FactorSpec


def _groups(spec: Spec, params: Any) -> list[tuple[_Member, ...]]:
    """The leaves of `params` that go together: one member if symmetric, two if a pair."""
    tree = default_spec(params) if spec is None else spec(params) if callable(spec) else spec
    leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
    groups: dict[tuple[str, Any], list[_Member]] = {}
    for index, ((path, leaf), s) in enumerate(
        zip(leaves, treedef.flatten_up_to(tree), strict=True)
    ):
        if s is None:
            continue
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ValueError(f"leaf {_show(path)} has dtype {leaf.dtype}; wanted a floating one")
        key = ("single", index) if s.pair is None else ("pair", s.pair)
        groups.setdefault(key, []).append(_Member(index, path, s))
    arrays = [leaf for _, leaf in leaves]
    for key, members in groups.items():
        if key[0] == "pair" and len(members) != 2:
            named = ", ".join(_show(m.path) for m in members)
            raise ValueError(
                f"leaf {named} belongs to a pair with {len(members)} member(s); wanted exactly two: "
                "its partner is missing, masked away or named otherwise"
            )
        shapes = [_canonical(arrays[m.leaf], m.spec).shape for m in members]
        if any(s[:-2] != shapes[0][:-2] or s[-1] != shapes[0][-1] for s in shapes) or not all(
            shapes[0]
        ):
            named = " and ".join(f"{_show(m.path)} {arrays[m.leaf].shape}" for m in members)
            raise ValueError(
                f"{named} do not go together; wanted the same batch axes and the same rank ≥ 1"
            )
    return [tuple(members) for members in groups.values()]


def _canonical(leaf: Any, spec: FactorSpec) -> Any:
    """(batch…, long, rank), in float32 at least."""
    batch = tuple(a % leaf.ndim for a in spec.batch_axes)
    rank = spec.rank_axis % leaf.ndim
    rest = tuple(a for a in range(leaf.ndim) if a not in (*batch, rank))
    moved = jnp.transpose(leaf, (*batch, *rest, rank))
    lengths = [leaf.shape[a] for a in batch]
    wide = jnp.promote_types(leaf.dtype, jnp.float32)
    return moved.reshape((*lengths, -1, leaf.shape[rank])).astype(wide)


def _restore(value: Any, leaf: Any, spec: FactorSpec) -> Any:
    """The inverse of `_canonical`, in the layout and dtype of `leaf`."""
    batch = tuple(a % leaf.ndim for a in spec.batch_axes)
    rank = spec.rank_axis % leaf.ndim
    rest = tuple(a for a in range(leaf.ndim) if a not in (*batch, rank))
    order = (*batch, *rest, rank)
    moved = value.reshape([leaf.shape[a] for a in order])
    inverse = [order.index(a) for a in range(leaf.ndim)]
    return jnp.transpose(moved, inverse).astype(leaf.dtype)


def _over_batch(fn: Callable[..., Any], value: Any, *args: Any) -> Any:
    for _ in range(value.ndim - 2):
        fn = jax.vmap(fn)
    return fn(value, *args)


class ScaleByGramState(NamedTuple):
    """Row spaces found at `init`, one r×r matrix a group, for the pseudo-inverse form; else empty."""

    row_spaces: tuple[Array, ...]


def scale_by_gram(
    damping: Any = 0.0, *, pseudo_inverse: bool = False, spec: Spec = None
) -> optax.GradientTransformationExtraArgs:
    """Preconditions gradients of factors by (damped) inverse Gram matrices.

    The exact form (λ = 0) never forms an inverse Gram matrix; see `linalg.gram_solve`. Factors are
    raised to float32 for the r×r work and results return in the gradient's dtype. A column that
    is exactly zero in a factor is taken as absent, so at Y_0 = 0 the left factor rests, as in (6).

    Args:
        damping: λ ≥ 0, in units of XᵀX; may be injected by `optax.inject_hyperparams`.
        pseudo_inverse: (XᵀX)† in place of the inverse, for factors of deficient rank, (26) and
            (35). ScaledGD keeps the row space of its factors, so the rank is cut once, by `init`,
            at √m·eps of the largest singular value; cutting anew at each step would amplify the
            rounding noise in the cut directions.
        spec: which leaves are factors; `default_spec` if None.

    Returns:
        A transformation whose `update` wants `params`.

    Raises:
        ValueError: by `init`, on a leaf without its partner or one that cannot be a factor
            (named in the message); by `update`, without params; on damping together with
            pseudo_inverse or a negative one.

    Example:
        >>> tx = optax.chain(scale_by_gram(), optax.scale_by_learning_rate(0.5))
        >>> x = jnp.array([[2.0], [0.0]])
        >>> updates, _ = tx.update(jnp.ones_like(x), tx.init(x), x)
        >>> updates
        Array([[-0.125],
               [-0.125]], dtype=float32)
    """
    validation.require_scalar("damping", damping, 0, float("inf"), open_low=False)
    known = validation.is_concrete(damping)
    if pseudo_inverse and known and float(damping) != 0:
        raise ValueError(f"damping is {damping} with pseudo_inverse=True; wanted one or the other")

    def row_space(*factors: Array) -> Array:
        sizes = [jnp.linalg.norm(f) for f in factors]
        stacked = jnp.concatenate(
            [f / jnp.where(s > 0, s, 1) for f, s in zip(factors, sizes, strict=True)]
        )
        cut = linalg.compress(stacked, linalg.default_rcond(factors[0].shape[0], stacked.dtype))
        return jnp.where(jnp.arange(stacked.shape[1]) < cut.rank, cut.rotation, 0)

    def init(params: optax.Params) -> ScaleByGramState:
        groups = _groups(spec, params)
        if not pseudo_inverse:
            return ScaleByGramState(())
        leaves = jax.tree.leaves(params)
        factors = [[_canonical(leaves[m.leaf], m.spec) for m in group] for group in groups]
        return ScaleByGramState(tuple(_over_batch(row_space, *group) for group in factors))

    @linalg.full_precision
    def precondition(x: Array, g: Array, row_space: Array | None) -> Array:
        if row_space is None:
            return linalg.gram_solve(x, g, damping)
        return linalg.gram_solve(x @ row_space, g @ row_space) @ row_space.T

    def update(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, Any]:
        if params is None:
            raise ValueError(
                "params is None; wanted the current parameters: update(grads, state, params)"
            )
        leaves, treedef = jax.tree.flatten(params)
        grads = treedef.flatten_up_to(updates)
        for i, group in enumerate(_groups(spec, params)):
            space = state.row_spaces[i] if pseudo_inverse else None
            new = {}
            for mine, other in zip(group, group[::-1], strict=True):
                x = _canonical(leaves[other.leaf], other.spec)
                g = _canonical(grads[mine.leaf], mine.spec)
                args = (g,) if space is None else (g, space)
                solved = _over_batch(lambda x, g, v=None: precondition(x, g, v), x, *args)
                new[mine.leaf] = _restore(solved, grads[mine.leaf], mine.spec)
            grads = [new.get(j, g) for j, g in enumerate(grads)]
        return treedef.unflatten(grads), state

    return optax.GradientTransformationExtraArgs(init, update)


def require_step_size(learning_rate: Any) -> None:
    """Raises ValueError if a known learning rate is outside (0, 1], where ScaledGD is defined."""
    validation.require_scalar("learning_rate", learning_rate, 0, 1, open_low=True)


def scaled_gd(
    learning_rate: optax.ScalarOrSchedule,
    damping: Any = 0.0,
    *,
    pseudo_inverse: bool = False,
    spec: Spec = None,
) -> optax.GradientTransformation:
    """Scaled gradient descent: (2) and (6); ScaledGD(λ) with damping; (26), (35) with pseudo_inverse.

    Args:
        learning_rate: η in (0, 1], or an optax schedule. 0.5 is quadratic on (1), 1 is one step
            on (4). For other ranges use `scale_by_gram` with a scaling of your own.
        damping: λ ≥ 0; see `scale_by_gram`.
        pseudo_inverse: see `scale_by_gram`.
        spec: see `scale_by_gram`.

    Raises:
        ValueError: on η outside (0, 1], and as `scale_by_gram` does.

    Example:
        >>> import nyscaled as nys
        >>> a, _ = nys.spectra.psd(jax.random.key(0), 30, [1.0, 0.5, 0.1])
        >>> problem, tx = nys.problems.Symmetric(a), scaled_gd(0.5)
        >>> x = nys.initializers.nystrom(jax.random.key(1), a, rank=3)
        >>> state = tx.init(x)
        >>> for _ in range(15):
        ...     updates, state = tx.update(problem.gradient(x), state, x)
        ...     x = optax.apply_updates(x, updates)
        >>> bool(problem.residual(x) < 1e-5)
        True
    """
    require_step_size(learning_rate)
    return optax.chain(
        scale_by_gram(damping, pseudo_inverse=pseudo_inverse, spec=spec),
        optax.scale_by_learning_rate(learning_rate),
    )
