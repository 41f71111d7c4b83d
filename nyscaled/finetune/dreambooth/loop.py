"""The loop of training: steps, metrics, evaluations, samples and checkpoints."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx

from nyscaled.finetune import progress
from nyscaled.finetune.dreambooth.config import as_options
from nyscaled.finetune.dreambooth.plan import Plan
from nyscaled.finetune.dreambooth.samples import Sampler
from nyscaled.finetune.dreambooth.step import LOSS, Grid, Measured, merged, train_step
from nyscaled.finetune.loop import CHECKPOINTS, Stopped
from nyscaled.finetune.progress import Interruption, NotFiniteError, Progress
from nyscaled.finetune.state import Checkpoints
from nyscaled.finetune.trackers import Tracked
from nyscaled.finetune.training import Tree
from nyscaled.lora.adapter import AdapterState


class Trained(NamedTuple):
    """What training gave.

    Attributes:
        variables: trained variables after the last step, and what adapters keep.
        base_loss: loss on the fixed times and noises before the first step.
        loss: that after the last step.
    """

    variables: Tree
    base_loss: float
    loss: float


def train(plan: Plan, out: Path, grid: Grid, sampler: Sampler | None) -> Trained:
    """Train, from the newest checkpoint of the folder if there is one.

    Args:
        plan: what is trained.
        out: folder of the run.
        grid: the fixed times and noises.
        sampler: what generates images, None for none.

    Raises:
        ValueError: if the loss before the first step is not finite, or not what it was when the run
            began.
        Stopped: after Ctrl-C or SIGTERM, when the state is saved.
        NotFiniteError: at a loss or gradient that is not finite.
        OSError: if a file cannot be written.
    """
    config, checkpoints = plan.config, Checkpoints(out / CHECKPOINTS)
    state, kept = plan.initial(), nnx.filter_state(plan.parts.frozen, AdapterState)
    with progress.timed("computing the loss of the base"):
        base_loss = loss = plan.evaluate(state.params, plan.parts, grid)[0]
    if not math.isfinite(base_loss):
        raise ValueError(
            f"the loss of {config.model} is {base_loss} before any step; expected a base whose "
            "weights are finite"
        )
    step = 0
    if (saved := checkpoints.restore((state, kept))) is not None:
        step, (state, kept), facts = saved
        _require_same(base_loss, float(facts["base_loss"] or 0), config.dtype, out)
    else:
        (out / progress.METRICS).unlink(missing_ok=True)
    frozen = nnx.merge_state(plan.parts.frozen, kept)
    plan = dataclasses.replace(plan, parts=plan.parts._replace(frozen=frozen))
    tracked = Tracked(config.log, out, as_options(config), step)
    log = Progress(out, step, config.steps, tracked=tracked)
    pending: list[tuple[int, Measured]] = []

    def save() -> None:
        checkpoints.save(step, (state, kept), {"base_loss": base_loss})

    with tracked, log, Interruption() as interruption:
        if saved is not None:
            log.say(f"going on after step {step}; the loss of the base is {base_loss:.4f}")
        else:
            log.evaluation(0, base_loss, name=LOSS)
        if step == config.steps:  # but for the files at the end
            loss = plan.evaluate(state.params, plan.parts, grid)[0]
        while step < config.steps:
            state, measured = train_step(
                state,
                plan.parts.counts,
                frozen,
                plan.data.batch(step),
                plan.rate(step),
                program=plan.program,
                objective=plan.objective,
            )
            step += 1
            pending.append((step, measured))
            is_last, asked = step == config.steps, interruption.asked
            evaluates = is_last or step % config.eval_every == 0
            saves = is_last or step % config.checkpoint_every == 0 or asked
            if evaluates or saves or step % config.log_every == 0:
                message = log.measured(pending, plan.rate, plan.data.sources, config.dtype)
                pending.clear()
                if message is not None:
                    # The state is that before the bad step.
                    step = int(state.step)
                    state = state._replace(finite=jnp.ones((), bool))
                    save()
                    raise NotFiniteError(message)
            if evaluates:
                loss = plan.evaluate(state.params, plan.parts, grid)[0]
                if not math.isfinite(loss):
                    rate = float(plan.rate(step - 1))
                    raise NotFiniteError(
                        progress.not_finite_in_evaluation(step, loss, rate, config.dtype, name=LOSS)
                    )
                log.evaluation(step, loss, name=LOSS)
            if sampler is not None and (is_last or step % (config.sample_every or step) == 0):
                model = merged(plan.program, state.params, plan.parts.counts, frozen)
                log.say(f"step {step}: {sampler.write(out, model, step)}")
            if saves:
                save()
            if asked and not is_last:
                raise Stopped(f"stopped after step {step} of {config.steps}, which is saved")
    return Trained(nnx.merge_state(state.params, kept), base_loss, loss)


def _require_same(now: float, before: float, dtype: str, out: Path) -> None:
    """Compare a loss that was computed again.

    What identifies a base is a small part of its values; their effect is compared here.
    """
    limit = max(1e-3, 4 * float(jnp.finfo(dtype).eps)) * max(1.0, abs(before))
    if not abs(now - before) <= limit:
        raise ValueError(
            f"the loss of the base in {out} was {before:.6g} and is {now:.6g}; expected the same "
            "up to rounding: the base or the images differ from those that the run began with "
            "(use these, or another --out)"
        )
