"""Methods of fine-tuning: how each prepares a model, which variables it trains, by which updates.

A method is data. Its start is an init of `nyscaled.lora`, its updates are a transform around any
optimizer. What is tuned is an array in both: starts are values of variables, and learning rates and
damping are in the state of the optimizer. So methods with one transform can share a program.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import math
from collections.abc import Callable, Generator, Iterable, Mapping
from typing import Literal

import jax.numpy as jnp
import optax
from flax import nnx
from flax.nnx.filterlib import Filter
from jaxtyping import Array, Key

from nyscaled import lora
from nyscaled.models import PrefixParam, add_prefix
from nyscaled.transforms import lora_p, lora_plus, lora_rite, nora_plus, reflora, reflora_s
from nyscaled.typing import Scalar

Optimizer = Callable[[optax.ScalarOrSchedule], optax.GradientTransformation]
"""A function from a learning rate to an optimizer, as `optax.adam`."""

FULL = 2e-5  # a usual learning rate of Adam for all weights of a trained model
ADAPTERS = 10 * FULL  # Schulman et al., LoRA without regret, 2025: ten times that, for every rank


def _plain(inner: Optimizer, learning_rate: optax.ScalarOrSchedule) -> optax.GradientTransformation:
    return inner(learning_rate)


def _lora_p(
    inner: Optimizer, learning_rate: optax.ScalarOrSchedule, damping: float | Scalar = 1e-2
) -> optax.GradientTransformation:
    return lora_p(inner(learning_rate), damping)


def _lora_one_p(
    inner: Optimizer, learning_rate: optax.ScalarOrSchedule, damping: float | Scalar = 1e-6
) -> optax.GradientTransformation:
    """That of LoRA-P with the damping of LoRA-One's authors."""
    return lora_p(inner(learning_rate), damping)


def _lora_plus(
    inner: Optimizer, learning_rate: optax.ScalarOrSchedule, ratio: float | Scalar = 16.0
) -> optax.GradientTransformation:
    return lora_plus(inner, learning_rate, ratio)


def _nora_plus(
    inner: Optimizer, learning_rate: optax.ScalarOrSchedule, damping: float | Scalar = 1e-6
) -> optax.GradientTransformation:
    return nora_plus(inner(learning_rate), damping)


def _reflora(
    inner: Optimizer, learning_rate: optax.ScalarOrSchedule, warmup_steps: int | Array = 100
) -> optax.GradientTransformation:
    return reflora(inner(learning_rate), warmup_steps)


def _reflora_s(
    inner: Optimizer, learning_rate: optax.ScalarOrSchedule, warmup_steps: int | Array = 100
) -> optax.GradientTransformation:
    return reflora_s(inner(learning_rate), warmup_steps)


def _lora_rite(
    inner: Optimizer,
    learning_rate: optax.ScalarOrSchedule,
    b1: float | Scalar = 0.9,
    b2: float | Scalar = 0.999,
    clip: float | Scalar = math.inf,
    weight_decay: float | Scalar = 0.0,
) -> optax.GradientTransformation:
    """An optimizer itself, so that it has its own clipping and decay, as AdamW has."""
    return optax.chain(
        optax.clip_by_global_norm(clip),  # pyright: ignore[reportArgumentType]
        lora_rite(1.0, b1, b2),
        optax.scale(-1.0),
        optax.add_decayed_weights(weight_decay),  # pyright: ignore[reportArgumentType]
        optax.scale_by_learning_rate(learning_rate),
    )


@dataclasses.dataclass(frozen=True)
class Method:
    """How a model is fine-tuned.

    Attributes:
        reference: where the method is described.
        init: name of the start of the adapters, in `lora.KERNEL_INITS`, `lora.GRADIENT_INITS` or
            `lora.INPUT_INITS`; None for a method without adapters.
        transform: function of an optimizer's constructor, a learning rate and hyperparameters.
            That of `lora-rite` is an optimizer itself and does not use the first.
        warmup: share of the steps of a run that its transform lets pass as they are, one at least.
        rank_stabilized: whether adapters are scaled by α/√r in place of α/r.
        trains: which variables are trained besides a new head.
        learning_rate: the default by the rule of thumb. The best one depends on the task and on the
            number of steps: search around it.
    """

    reference: str
    init: str | None = "lora"
    transform: Callable[..., optax.GradientTransformation] = _plain
    warmup: float | None = None
    rank_stabilized: bool = False
    trains: Literal["adapters", "prefix", "head", "everything"] = "adapters"
    learning_rate: float = ADAPTERS

    @property
    def needs(self) -> Literal["kernel", "gradient", "inputs"] | None:
        """What the start is made from; all but "kernel" need `loss` and `batches` in `prepare`."""
        if self.init is None:
            return None
        if self.init in lora.INPUT_INITS:
            return "inputs"
        return "gradient" if self.init in lora.GRADIENT_INITS else "kernel"

    @property
    def options(self) -> Mapping[str, object]:
        """The options of the start, such as `scale`, with their defaults."""
        if self.trains == "prefix":
            return _defaults(add_prefix, keyword_only=False)
        if self.init is None:
            return {}
        inits = {**lora.KERNEL_INITS, **lora.GRADIENT_INITS, **lora.INPUT_INITS}
        return _defaults(inits[self.init], keyword_only=True)

    @property
    def hyperparameters(self) -> Mapping[str, object]:
        """The numbers of the transform besides the learning rate, such as `damping`."""
        return _defaults(self.transform, keyword_only=False)

    def require_known(
        self, options: Iterable[str] = (), hyperparameters: Iterable[str] = ()
    ) -> None:
        """Refuse names of options and hyperparameters that the method has not.

        Args:
            options: names of options of the start.
            hyperparameters: names of numbers of the transform.

        Raises:
            ValueError: if one is not in `options` or `hyperparameters` of the method.
        """
        _require_known("option", options, self.options)
        _require_known("hyperparameter", hyperparameters, self.hyperparameters)

    def prepare(
        self,
        model: nnx.Module,
        *,
        rank: int = 8,
        alpha: float | None = None,
        targets: str | Mapping[str, int],
        key: Key[Array, ""],
        dropout: float = 0.0,
        head: tuple[str, ...] = ("classifier",),
        loss: Callable[..., Array] | None = None,
        batches: Iterable[object] = (),
        **options: object,
    ) -> Filter:
        """Put what the method trains into a model, in place, and return the filter that finds it.

        Args:
            model: the base, frozen by everything that trains by the filter.
            rank: r of the adapters.
            alpha: α of the adapters; None is α = r.
            targets: which layers have adapters, as in `lora.apply`.
            key: PRNG key of the start.
            dropout: rate of dropout on the inputs of adapters.
            head: names of modules that are new, so that every method trains them.
            loss: function of (model, batch), for starts from gradients or inputs.
            batches: the batches for these.
            **options: options of the start, of those in `options`.

        Returns:
            A filter of `flax.nnx`, for `nnx.Optimizer(…, wrt=…)` or `nnx.split`.

        Raises:
            ValueError: on options that the start has not, on a linear probe of a model without a
                head of its own, and as `lora.apply`, `lora.initialize` and `models.add_prefix` do.

        Examples:
            >>> model = nnx.Sequential(nnx.Linear(6, 8, rngs=nnx.Rngs(0)))
            >>> wrt = method("nora+").prepare(model, rank=2, targets=".*", key=jax.random.key(0))
            >>> sum(x.size for x in jax.tree.leaves(nnx.state(model, wrt)))
            28
        """
        self.require_known(options)
        parts = {str(part) for path, _ in nnx.iter_modules(model) for part in path}
        if self.trains == "everything":
            return nnx.Param
        new = _inside(name for name in head if name in parts)
        if self.trains == "prefix":
            add_prefix(model, key=key, **options)  # pyright: ignore[reportArgumentType]
            return (PrefixParam, *new)
        if self.trains == "head":
            own = [name for name in (*head, "lm_head") if name in parts]
            if not own:
                raise ValueError(
                    f"the {type(model).__name__} has no module {' or '.join((*head, 'lm_head'))}; "
                    "expected a classifier, or a head with weights of its own (model.untie())"
                )
            return _inside(own)
        assert self.init is not None
        from_batches = self.needs != "kernel"
        lora.apply(
            model,
            rank,
            alpha,
            targets=targets,
            init="lora" if from_batches else self.init,
            key=key,
            rank_stabilized=self.rank_stabilized,
            dropout=dropout,
            **({} if from_batches else options),  # pyright: ignore[reportArgumentType]
        )
        if from_batches:
            source = {"loss": loss, "batches": batches, **options}
            with _without_dropout(model):
                lora.initialize(model, self.init, key=key, **source)  # pyright: ignore[reportArgumentType]
        return (nnx.LoRAParam, *new)

    def optimizer(
        self,
        learning_rate: optax.ScalarOrSchedule | None = None,
        inner: Optimizer = optax.adam,
        **hyperparameters: float,
    ) -> optax.GradientTransformationExtraArgs:
        """Return the optimizer, whose numbers are arrays in the `hyperparams` of its state.

        Args:
            learning_rate: a number or an optax schedule; None is the method's own default.
            inner: constructor of the optimizer around which the method is wrapped. Decay of weights
                pulls starts other than LoRA's to zero, so the default has none.
            **hyperparameters: of those in `hyperparameters`, such as `damping`.

        Raises:
            ValueError: on hyperparameters that the method has not.

        Examples:
            >>> tx = method("nora+").optimizer(1e-3, damping=1e-4)
            >>> state = tx.init({"lora_a": jnp.ones((5, 2)), "lora_b": jnp.zeros((2, 4))})
            >>> sorted(state.hyperparams)
            ['damping', 'learning_rate']
        """
        self.require_known(hyperparameters=hyperparameters)
        make = optax.inject_hyperparams(
            self.transform,
            static_args="inner",
            hyperparam_dtype=jnp.float32,  # pyright: ignore[reportArgumentType]
        )
        rate = self.learning_rate if learning_rate is None else learning_rate
        return make(inner=inner, learning_rate=rate, **hyperparameters)


@contextlib.contextmanager
def _without_dropout(model: nnx.Module) -> Generator[None, None, None]:
    """Switch dropout off, and back to what it was."""
    modules = [m for _, m in nnx.iter_modules(model) if hasattr(m, "deterministic")]
    before: list[object] = [getattr(m, "deterministic") for m in modules]  # noqa: B009
    try:
        model.eval()
        yield
    finally:
        for module, value in zip(modules, before, strict=True):
            setattr(module, "deterministic", value)  # noqa: B010


def _inside(names: Iterable[str]) -> tuple[Filter, ...]:
    """Filters of the parameters in modules with these names."""
    return tuple(nnx.All(nnx.Param, nnx.PathContains(name)) for name in names)


def _defaults(function: Callable[..., object], *, keyword_only: bool) -> dict[str, object]:
    parameters = inspect.signature(function).parameters.values()
    return {
        p.name: p.default
        for p in parameters
        if p.default is not p.empty and (p.kind is p.KEYWORD_ONLY or not keyword_only)
    }


def _require_known(what: str, given: Iterable[str], known: Mapping[str, object]) -> None:
    if unknown := [name for name in given if name not in known]:
        expected = f"one of {', '.join(known)}" if known else "none for this method"
        raise ValueError(f"{what} is {unknown[0]!r}; expected {expected}")


METHODS: dict[str, Method] = {
    "lora": Method("Hu et al., ICLR 2022"),
    "rslora": Method("Kalajdzievski, 2023", rank_stabilized=True),
    # The geometric mean of the rates of a and b is that of the other methods.
    "lora+": Method(
        "Hayou, Ghosh, Yu, ICML 2024", transform=_lora_plus, learning_rate=ADAPTERS / 4
    ),
    "lora-p": Method("Zhang, Pilanci, ICML 2024", transform=_lora_p),
    "lora-p-normalized": Method("NoRA+ from the start of LoRA", transform=_nora_plus),
    "nora": Method("Algorithm 1 of the paper", init="nora"),
    "nora+": Method("Algorithm 2 of the paper", init="nora", transform=_nora_plus),
    "pissa": Method("Meng, Wang, Zhang, NeurIPS 2024", init="pissa"),
    "olora": Method("Büyükakyüz, 2024", init="olora"),
    "eva": Method("Paischer et al., 2024", init="eva"),
    "milora": Method("Wang et al., 2024", init="milora"),
    "lora-one": Method("Zhang, Liu, Chen, ICML 2025", init="lora_one"),
    "lora-one-p": Method(
        "Zhang, Liu, Chen, ICML 2025, preconditioned", init="lora_one", transform=_lora_one_p
    ),
    "nora-grad": Method("Appendix A.4 of the paper", init="nora_grad"),
    "lora-rite": Method("Yen et al., ICLR 2025", transform=_lora_rite),
    # The authors' scripts let 100 of 21,300 steps pass: 170,420 examples, twice, in batches of 16.
    "reflora": Method("Zhang, Li, Giannakis, NeurIPS 2025", transform=_reflora, warmup=0.005),
    "reflora-s": Method("Zhang, Li, Giannakis, NeurIPS 2025", transform=_reflora_s, warmup=0.005),
    "prefix": Method("Li, Liang, ACL 2021", init=None, trains="prefix", learning_rate=1e-2),
    "full": Method("all weights", init=None, trains="everything", learning_rate=FULL),
    "linear-probe": Method("the head", init=None, trains="head", learning_rate=1e-3),
}
"""Methods by name."""


def method(name: str) -> Method:
    """Return the method of that name.

    Raises:
        ValueError: on an unknown name.

    Examples:
        >>> method("nora+").init
        'nora'
    """
    if name not in METHODS:
        raise ValueError(f"method is {name!r}; expected one of {', '.join(METHODS)}")
    return METHODS[name]
