"""A linear layer fine-tuned by LoRA and by NoRA (Appendix A.2), and a control for NoRA's start.

    python experiments/linear_lora.py                      # figures/linear_lora.*
    python experiments/linear_lora.py --quick --out /tmp   # fewer seeds, sizes and methods

An `nnx.Linear` y = xW_0 with an adapter of `nys.lora.apply`, on whitened data (xᵀx = I) with
targets xB: the loss ½‖x(W_0 + ab − B)‖_F² is that of problem (4) with A = B − W_0. Here W_0
(96 × 64) has rank 12 and singular values 2^(−i/2), and A has rank r = 4 and norm 0.1.

(a) A = W_0C with a random C of rank 4: range(A) is inside range(W_0), which NoRA's a_0 = W_0Ω
    spans.
(b) The control: the same A rotated to a range orthogonal to that of W_0. There a_0ᵀA = 0, and NoRA
    starts on a saddle point, which only rounding (of float32) lets it leave.
(c) Steps to the target against the size of the start, with the learning rate tuned per size.

In (a) and (b) learning rate and size of the start, ‖a_0‖_F, are tuned on a grid per method by the
same rule: the fewest steps to 1e-6 of the first loss in the median over the seeds, all of which
must reach it. Curves are medians, bands the range over the seeds (of W_0, C, data and start).
The results are in `figures/README.md`.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx
from matplotlib.ticker import NullFormatter
from tqdm import tqdm

import nyscaled as nys
from experiments.lib import sweep
from experiments.lib.config import BaseConfig, command_line
from experiments.lib.record import save
from experiments.lib.style import COLOURS, MARKERS

INPUTS, OUTPUTS, BASE_RANK, RANK = 96, 64, 12, 4
CHANGE = 0.1  # ‖A‖, where ‖W_0‖ = 1
TARGET = 1e-6
SIZES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
GD_RATES = tuple(2.0**i for i in range(-3, 6))
# NoRA+ divides by the norm of an inverse Gram matrix, here about 1e2.
NORA_PLUS_RATES = tuple(2.0**i for i in range(1, 11))
ADAM_RATES = tuple(10.0 ** (i / 3) for i in range(-10, -1))


@dataclasses.dataclass(frozen=True)
class Config(BaseConfig):
    """LoRA against NoRA on a linear layer.

    --quick: three seeds, two sizes of the start, no preconditioners.
    """

    seeds: int = 5
    """The number of random layers."""


@dataclasses.dataclass(frozen=True)
class Method:
    """A start, and the optimizer that follows it."""

    init: str
    transform: Callable[[Any], optax.GradientTransformation]
    rates: tuple[float, ...]
    colour: int
    dashed: bool = False
    steps: int = 300


METHODS = {
    "LoRA, GD": Method("lora", optax.sgd, GD_RATES, 0),
    "NoRA, GD": Method("nora", optax.sgd, GD_RATES, 1),
    "LoRA, Adam": Method("lora", optax.adam, ADAM_RATES, 0, True),
    "NoRA, Adam": Method("nora", optax.adam, ADAM_RATES, 1, True),
    "LoRA-P, GD": Method("lora", lambda rate: nys.lora_p(optax.sgd(rate)), GD_RATES, 2, steps=100),
    "NoRA+, GD": Method(
        "nora", lambda rate: nys.nora_plus(optax.sgd(rate)), NORA_PLUS_RATES, 3, steps=100
    ),
}


class Model(nnx.Module):
    """One linear layer without bias, whose kernel is `w`."""

    def __init__(self, w: jax.Array) -> None:
        self.linear = nnx.Linear(*w.shape, use_bias=False, rngs=nnx.Rngs(0))
        self.linear.kernel[...] = w

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.linear(x)


def draw_task(seed: tuple[int, int], inside: bool) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return W_0, A and whitened data.

    Args:
        seed: of the random numbers.
        inside: whether range(A) is inside range(W_0); nothing else depends on it, except for the
            left singular vectors of A.
    """
    rng = np.random.default_rng(seed)
    u, v, x = (np.linalg.qr(rng.standard_normal((s, s)))[0] for s in (INPUTS, OUTPUTS, INPUTS))
    spectrum = 2.0 ** (-np.arange(BASE_RANK) / 2)
    w = (u[:, :BASE_RANK] * spectrum) @ v[:, :BASE_RANK].T
    c = rng.standard_normal((OUTPUTS, RANK)) @ rng.standard_normal((RANK, OUTPUTS))
    a = w @ c
    if not inside:
        a = u[:, BASE_RANK : 2 * BASE_RANK] @ (u[:, :BASE_RANK].T @ a)
    a *= CHANGE / np.linalg.norm(a, 2)
    return jnp.asarray(w, jnp.float32), jnp.asarray(a, jnp.float32), jnp.asarray(x, jnp.float32)


def adapted(config: Config, init: str, inside: bool) -> tuple[Any, Any]:
    """Return the graph and the arrays of all layers: adapters, other values, inputs, targets.

    Args:
        config: the options.
        init: the start of the adapters.
        inside: whether range(A) is inside range(W_0).
    """
    layers = []
    for seed in range(3 if config.quick else config.seeds):
        w, a, x = draw_task((config.seed, seed), inside)
        model = Model(w)
        key = jax.random.fold_in(jax.random.key(config.seed), seed)
        nys.lora.apply(model, RANK, targets="linear", init=init, key=key)
        graph, params, others = nnx.split(model, nnx.LoRAParam, ...)
        layers.append((graph, (params, others, x, x @ (w + a))))
    arrays = (arrays for _, arrays in layers)
    return layers[0][0], jax.tree.map(lambda *leaves: jnp.stack(leaves), *arrays)


def curves_of(
    transform: Callable[[Any], optax.GradientTransformation], graph: Any, steps: int
) -> Callable[..., jax.Array]:
    """Return a compiled function to losses (seed, learning rate, size, step) over the first loss.

    Args:
        transform: an optimizer for a learning rate.
        graph: the graph of the layers.
        steps: the number of steps.
    """

    def run(params: Any, others: Any, x: Any, y: Any, rate: Any, size: Any) -> jax.Array:
        # b_0 = 0, so that the size of the start is that of a_0
        params = jax.tree.map(lambda p: p * (size / optax.tree.norm(params)), params)
        tx = transform(rate)

        def loss(params: Any) -> jax.Array:
            return 0.5 * jnp.sum((nnx.merge(graph, params, others)(x) - y) ** 2)

        def body(carry: Any, _: None) -> tuple[Any, jax.Array]:
            params, state = carry
            value, grads = jax.value_and_grad(loss)(params)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), value

        _, values = jax.lax.scan(body, (params, tx.init(params)), length=steps + 1)
        return values / values[0]

    seed, rate, size = (0,) * 4 + (None, None), (None,) * 4 + (0, None), (None,) * 5 + (0,)
    return sweep.over(run, seed, rate, size)


def steps_to_target(values: np.ndarray) -> np.ndarray:
    """Return the first step at which the loss is at the target; infinite if there is none."""
    reached = values <= TARGET
    return np.where(reached.any(-1), np.argmax(reached, axis=-1), np.inf)


def tune(
    values: np.ndarray, method: Method, sizes: Any
) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """Return the losses of the best run, (seed, step), the fewest steps by size, and the choice.

    The best run has the fewest steps in the median, among equals in the mean. All seeds must reach
    the target.

    Args:
        values: losses, (seed, learning rate, size, step).
        method: the method.
        sizes: the sizes of the start.
    """
    steps = steps_to_target(values)
    median = np.where(np.isinf(steps).any(axis=0), np.inf, np.median(steps, axis=0))
    trials = np.moveaxis(steps, 0, -1).reshape(median.size, -1)
    best = sweep.best(trials, median.ravel(), np.mean(steps, axis=0).ravel())
    rate, size = np.unravel_index(best.point, median.shape)
    choice = {
        "learning_rate": method.rates[rate],
        "size": float(f"{sizes[size]:g}"),
        "steps": best.trials.tolist(),
        "inside_grid": bool(0 < rate < len(method.rates) - 1),
    }
    return values[:, rate, size], median.min(axis=0), choice


def draw_curves(axes: Any, curves: Any, low: Any, high: Any) -> None:
    """Draw loss against steps with the range over the seeds.

    Args:
        axes: where to draw.
        curves: medians, by method.
        low: least losses, by method.
        high: largest losses, by method.
    """
    for index, (label, values) in enumerate(curves.items()):
        method = METHODS[label]
        style = {"color": COLOURS[method.colour], "ls": "--" if method.dashed else "-"}
        # Rounding follows, and the spikes of Adam there.
        stop = int(np.argmax(values < 1e-8)) + 1 if values.min() < 1e-8 else len(values)
        t, values = np.arange(stop) + 1, values[:stop]
        every = np.unique(np.geomspace(1, len(t), 14).astype(int) - 1).tolist()
        axes.fill_between(
            t, low[label][:stop], high[label][:stop], color=style["color"], alpha=0.15, lw=0
        )
        axes.plot(t, values, marker=MARKERS[index], markevery=every, label=label, **style)
    axes.axhline(TARGET, color="0.3", lw=0.8, ls=":")
    axes.set(xscale="log", yscale="log", xlim=(0.9, 320), ylim=(1e-8, 3), xlabel="iteration + 1")
    axes.set_ylabel("loss / first loss")
    axes.legend(loc="lower left")


def draw_sizes(axes: Any, by_size: Any, sizes: Any) -> None:
    """Draw steps to the target against the size of the start, for GD and Adam only.

    Args:
        axes: where to draw.
        by_size: the fewest steps by panel and method.
        sizes: the sizes of the start.
    """
    for index, label in enumerate(list(METHODS)[:4]):
        method = METHODS[label]
        style = {"color": COLOURS[method.colour], "ls": "--" if method.dashed else "-"}
        style |= {"marker": MARKERS[index]}
        axes.plot(sizes, by_size["a"][label], label=label, **style)
        axes.plot(sizes, by_size["b"][label], lw=0.8, mfc="white", **style)
    axes.plot([], [], color="0.4", lw=0.8, marker="o", mfc="white", label="thin, open: as in (b)")
    # E‖a_0‖² is r/3 for U(±1/√m) and ξ²r‖W_0‖_F² for W_0Ω, where ‖W_0‖_F² is nearly 2.
    for usual, text, colour in ((0.28, "NoRA, ξ = 0.1", 1), (1.15, "LoRA of PEFT", 0)):
        axes.axvline(usual, color=COLOURS[colour], lw=0.8, ls=":")
        axes.text(
            usual, 0.98, text, fontsize=7, rotation=90, ha="right", va="top", color="0.2",
            transform=axes.get_xaxis_transform(),
        )  # fmt: skip
    axes.set(
        xscale="log",
        yscale="log",
        xlim=(7e-3, 4),
        ylim=(15, 900),
        xlabel=r"size of the start, $\|a_0\|_F$",
    )
    axes.set_yticks([20, 50, 100, 200, 300], labels=["20", "50", "100", "200", "300"])
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_ylabel(f"iterations to {TARGET:g} of the first loss (none: > 300)")
    axes.legend(loc="lower right")


def main(config: Config) -> None:
    """Run all methods on both tasks and draw them."""
    sizes = np.array(SIZES[2:5:2] if config.quick else SIZES, np.float32)
    labels = list(METHODS)[: 4 if config.quick else None]
    curves: dict[str, Any] = {p: {} for p in ("a", "a low", "a high", "b", "b low", "b high")}
    by_size: dict[str, dict[str, np.ndarray]] = {"a": {}, "b": {}}
    chosen: dict[str, dict[str, Any]] = {"a": {}, "b": {}}
    tasks = {
        (init, panel): adapted(config, init, panel == "a")
        for init in ("lora", "nora")
        for panel in ("a", "b")
    }
    compiled: dict[Any, Any] = {}
    with tqdm(total=2 * len(labels), desc="linear_lora", unit="series", file=sys.stderr) as bar:
        for label in labels:
            method = METHODS[label]
            # Both starts have the same graph, so that one compilation serves both.
            if method.transform not in compiled:
                graph = tasks["lora", "a"][0]
                compiled[method.transform] = curves_of(method.transform, graph, method.steps)
            for panel in ("a", "b"):
                rates = jnp.asarray(method.rates, jnp.float32)
                arrays = tasks[method.init, panel][1]
                values = np.asarray(compiled[method.transform](*arrays, rates, sizes))
                losses, by_size[panel][label], chosen[panel][label] = tune(values, method, sizes)
                for suffix, curve in sweep.spread(losses, axis=0).items():
                    curves[panel + suffix][label] = curve
                bar.update()

    figure, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    for ax, panel in zip(axes, ("a", "b"), strict=False):
        draw_curves(ax, *(curves[panel + name] for name in ("", " low", " high")))
    draw_sizes(axes[2], by_size, sizes)
    axes[0].set_title(r"(a) range($B - W_0$) in range($W_0$)")
    axes[1].set_title(r"(b) control: range($B - W_0$) $\perp$ range($W_0$)")
    axes[2].set_title("(c) size of the start, learning rate tuned")
    for panel in ("a", "b"):
        curves[f"c, as {panel}"] = by_size[panel]
    notes: dict[str, Any] = {
        "chosen": chosen,
        "sizes": [float(f"{s:g}") for s in sizes],
        "target": TARGET,
    }
    save(config.out, "linear_lora", figure, curves, config, **notes)
    for panel, series in chosen.items():
        for label, choice in series.items():
            median, rate = np.median(choice["steps"]), choice["learning_rate"]
            where = "" if choice["inside_grid"] else " (at the edge of the grid)"
            print(
                f"({panel}) {label}: {median:g} steps, {choice['steps']}, "
                f"η = {rate:.3g}{where}, size {choice['size']:g}"
            )


if __name__ == "__main__":
    command_line(main, Config)
