"""Figure 2: which singular values of the weights fine-tuning changes, and what chance gives.

    python experiments/fig2.py                     # figures/fig2.*, from updates of tier_a.py
    python experiments/fig2.py --quick --out /tmp  # made-up weights and updates

The updates are those of `experiments/tier_a.py`: MiniLM on SST-2, r = 8 on queries and values. As
in the paper, for each weight the indices of the r singular values that changed most are taken,
|σᵢ(W₀ + ΔW) − σᵢ(W₀)| in falling order of both, and are counted over layers (a to c). The scaling
α/r is part of ΔW. The lines are the same counts for updates of the same singular values with random
directions: of both sides, and with the left vectors of ΔW (those of the factor that starts as W₀Ω)
kept. (d) to (f) do not depend on the room that singular values have: the share of ‖ΔW‖² along each
singular vector of W₀, of which random directions have 1/384 everywhere. The results are in
`docs/pages/finetuning_results.md`.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
from flax import nnx
from tqdm import tqdm

from experiments.lib import paired
from experiments.lib.adapter_data import load
from experiments.lib.config import BaseConfig, command_line
from experiments.lib.curves import Curve
from experiments.lib.record import save
from experiments.lib.spectral_change import Decomposed, Update, changed, energies
from experiments.lib.style import COLOURS, PREDICTION

METHODS = ("LoRA", "NoRA", "PiSSA")
NULLS = {"random": False, "random right": True}
COUNTED = ("changed", *NULLS)
SHOWN = 64


@dataclasses.dataclass(frozen=True)
class Config(BaseConfig):
    """Which singular values of the weights fine-tuning changes.

    --quick: made-up weights and updates, two seeds.
    """

    model: str = "build/weights/all-MiniLM-L6-v2"
    """Folder of the encoder."""
    updates: Path = Path("build/updates")
    """Folder of the updates that tier_a.py kept."""
    rank: int = 8
    """Rank r of the adapters, and number of singular values that are counted."""
    draws: int = 5
    """Random updates for each update."""


class Case(NamedTuple):
    """A weight, and its update by a run."""

    weight: str
    update: Update


Cases = dict[str, dict[int, list[Case]]]
"""Cases by method and seed."""


def read(config: Config) -> tuple[dict[str, Decomposed], Cases]:
    """Return the weights and their updates."""
    model, _ = load(config.model)
    modules: dict[str, Any] = {
        ".".join(map(str, path)): module for path, module in nnx.iter_modules(model)
    }
    weights: dict[str, Decomposed] = {}
    cases: Cases = {}
    for method in METHODS:
        files = sorted(config.updates.glob(f"{method}-*.npz"))
        if not files:
            raise ValueError(
                f"{config.updates} has no updates of {method}; expected those that "
                "experiments/tier_a.py keeps (run it, or --updates FOLDER)"
            )
        for file in files:
            arrays = np.load(file)
            seed = int(file.stem.rpartition("-")[2])
            of_seed = cases.setdefault(method, {}).setdefault(seed, [])
            for path in sorted({name.partition("|")[0] for name in arrays}):
                kernels = np.asarray(modules[path.removeprefix("bert.")].kernel[...])
                for layer, kernel in enumerate(kernels):
                    name = f"{path}.{layer}"
                    if name not in weights:
                        weights[name] = Decomposed.of(kernel)
                    factors = (arrays[f"{path}|{side}"][layer] for side in "ab")
                    of_seed.append(Case(name, Update.of(*factors)))
    return weights, cases


def made_up(config: Config) -> tuple[dict[str, Decomposed], Cases]:
    """Return random weights with decaying spectra, and random updates; "PiSSA" is along the top."""
    rng = np.random.default_rng(config.seed)
    weights = {
        str(i): Decomposed.of(rng.normal(size=(32, 24)) * np.geomspace(1, 0.05, 24))
        for i in range(3)
    }
    cases: Cases = {}
    for method in METHODS:
        for seed in range(2):
            for name, weight in weights.items():
                a, b = rng.normal(size=(32, config.rank)), 0.02 * rng.normal(size=(config.rank, 24))
                if method == "PiSSA":
                    a = weight.left[:, : config.rank]
                case = Case(name, Update.of(a, b))
                cases.setdefault(method, {}).setdefault(seed, []).append(case)
    return weights, cases


def measure(
    config: Config, weights: dict[str, Decomposed], cases: list[Case], seed: int
) -> dict[str, np.ndarray]:
    """Return counts by index of a run and its nulls, and energies along singular vectors."""
    rng = np.random.default_rng([config.seed, seed])
    size = min(min(w.weight.shape) for w in weights.values())
    totals = {name: np.zeros(size) for name in (*COUNTED, "left", "right")}
    for case in cases:
        weight = weights[case.weight]
        np.add.at(totals["changed"], changed(weight, case.update, config.rank), 1)
        for null, keep_left in NULLS.items():
            for _ in range(config.draws):
                other = case.update.randomized(rng, keep_left=keep_left)
                np.add.at(totals[null], changed(weight, other, config.rank), 1 / config.draws)
        for side, energy in zip(("left", "right"), energies(weight, case.update), strict=True):
            totals[side] += energy[:size] / len(cases)
    return totals


def shares(config: Config, runs: dict[int, dict[str, np.ndarray]]) -> dict[str, Any]:
    """Return the shares of the top r: of the counts, of the nulls', and of the energies."""
    top = config.rank
    of_run = {
        name: np.array([run[name][:top].sum() / run[name].sum() for run in runs.values()])
        for name in COUNTED
    }
    of_run |= {
        side: np.array([run[side][:top].sum() for run in runs.values()])
        for side in ("left", "right")
    }
    result: dict[str, Any] = {name: float(values.mean()) for name, values in of_run.items()}
    if len(runs) < 2:  # no interval
        return result
    for null in NULLS:
        result[f"less {null}"] = paired.compare(of_run["changed"] - of_run[null])._asdict()
    for side in ("left", "right"):
        result[f"{side} interval"] = paired.interval(of_run[side])
    return result


def draw(config: Config, totals: dict[str, dict[str, np.ndarray]]) -> Any:
    """Draw counts by index, as in the paper, with those of chance; and energies."""
    figure, axes = plt.subplots(
        2, len(totals), figsize=(10.5, 5), layout="constrained", sharey="row"
    )
    for column, (method, total) in enumerate(totals.items()):
        size = min(SHOWN, len(total["changed"]))
        x = np.arange(1, size + 1)
        colours = [COLOURS[1] if i <= config.rank else COLOURS[0] for i in x]
        upper, lower = axes[:, column]
        upper.bar(x, total["changed"][:size], color=colours, width=0.9)
        for null, colour in zip(NULLS, ("0.1", COLOURS[2]), strict=True):
            label = {"random": "random directions", "random right": "left vectors kept"}[null]
            upper.plot(x, total[null][:size], color=colour, lw=1.2, label=label)
        upper.set(title=f"({'abc'[column]}) {method}", xlabel="index of the singular value")
        for side, colour in zip(("left", "right"), COLOURS[2:4], strict=True):
            lower.plot(x, total[side][:size], ".-", color=colour, label=f"{side} vectors", lw=0.8)
        lower.axhline(1 / len(total["left"]), label="random directions", **PREDICTION)
        lower.set(
            title=f"({'def'[column]}) {method}", xlabel="index of the singular vector", yscale="log"
        )
    axes[0, 0].set_ylabel("count over layers and seeds")
    axes[1, 0].set_ylabel("share of ‖ΔW‖²")
    axes[0, 0].legend()
    axes[1, 0].legend()
    return figure


def main(config: Config) -> None:
    """Count the singular values that changed most, and draw them."""
    if config.quick:
        config = dataclasses.replace(config, rank=2)
    weights, cases = made_up(config) if config.quick else read(config)
    totals: dict[str, dict[str, np.ndarray]] = {}
    notes: dict[str, Any] = {}
    counts: dict[str, dict[str, dict[str, float]]] = {}
    for method, of_method in cases.items():
        runs = {
            seed: measure(config, weights, of_seed, seed)
            for seed, of_seed in tqdm(of_method.items(), desc=method)
        }
        notes[method] = shares(config, runs) | {"seeds": len(runs)}
        counts[method] = {
            str(seed): {name: float(run[name][: config.rank].sum()) for name in COUNTED}
            for seed, run in runs.items()
        }
        totals[method] = {
            name: np.sum([run[name] for run in runs.values()], axis=0)
            / (len(runs) if name in ("left", "right") else 1)
            for name in next(iter(runs.values()))
        }
    panels: dict[str, dict[str, Curve]] = {}
    for method, total in totals.items():
        for name, values in total.items():
            panels.setdefault(name, {})[method] = Curve(np.arange(1, len(values) + 1), values)
    save(
        config.out,
        "fig2",
        draw(config, totals),
        panels,
        config,
        columns=("index", "value"),
        matrices=len(weights),
        shares=notes,
        counts_in_top=counts,
    )


if __name__ == "__main__":
    command_line(main, Config)
