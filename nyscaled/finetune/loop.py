"""The loop of training: steps, metrics, validation, checkpoints, and how a run stops."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from nyscaled.finetune import meshes, processes, progress, samples, training
from nyscaled.finetune.batches import Batches, of_processes
from nyscaled.finetune.config import Config, as_options
from nyscaled.finetune.order import NONE, Order
from nyscaled.finetune.progress import Interruption, NotFiniteError, Progress
from nyscaled.finetune.samples import Sampler
from nyscaled.finetune.state import Checkpoints
from nyscaled.finetune.trackers import Tracked
from nyscaled.finetune.training import Parts, Program, State, Tree
from nyscaled.lora.adapter import AdapterState

CHECKPOINTS = "checkpoints"
BEST = "best"
MOST = 500
"""Most steps between checkpoints, unless asked for more."""


class Stopped(KeyboardInterrupt):
    """A run that was asked to stop, and has saved its state."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a run trains on, and for how long.

    Attributes:
        parts: the model, split for training.
        program: what a step computes.
        hyperparameters: numbers of the method, such as `damping`.
        train: batches to train on.
        order: their order.
        validation: batches for validation.
        sources: file and line of each example.
        steps: number of steps.
        rate: learning rate of each step.
        config: settings of the run, with batches that are not larger than the data.
        sampler: generates texts during the training, None for none.
    """

    parts: Parts
    program: Program
    hyperparameters: dict[str, float]
    train: Batches
    order: Order
    validation: Batches
    sources: tuple[str, ...]
    steps: int
    rate: Callable[[int], np.float32]
    config: Config
    sampler: Sampler | None = None

    @property
    def eval_every(self) -> int:
        """Steps between validations."""
        return self.config.eval_every or min(self.order.steps_per_epoch, self.steps)

    @property
    def checkpoint_every(self) -> int:
        """Steps between checkpoints."""
        return self.config.checkpoint_every or min(self.eval_every, MOST)

    @property
    def micro_batches(self) -> int:
        """Micro-batches in a step."""
        return self.config.batch_size // (self.config.micro_batch_size or self.config.batch_size)

    def batch(self, step: int) -> training.Batch:
        """Return the batch of a step, with an axis of micro-batches.

        Each process makes the arrays of its share of the examples.
        """
        rows, count = self.order.rows(step), jax.process_count()
        share = rows.reshape(self.micro_batches, count, -1)[:, jax.process_index()].ravel()
        own = training.micro_batches(self.train.batch(share, rows), self.micro_batches)
        return of_processes(own)

    def sources_of(self, step: int) -> list[str]:
        """Return file and line of each example of a step."""
        return [self.sources[i] for i in self.order.rows(step) if i != NONE]

    def initial(self) -> State:
        """Return the state before the first step."""
        params = jax.tree.map(jnp.copy, self.parts.params)
        return meshes.placed(training.initial(self.program, params, **self.hyperparameters))

    def samples(self, params: Tree, step: int) -> list[dict[str, str | int]]:
        """Return texts that the model generates after a step, none if this is not one for them."""
        every = self.config.sample_every
        if self.sampler is None or every is None or step % every or not processes.is_first():
            return []
        evaluating = dataclasses.replace(self.program, graphdef=self.parts.evaluating)
        model = evaluating.merge(params, self.parts.counts, self.parts.frozen)
        return self.sampler.lines(model, step)

    def validate(self, params: Tree) -> training.Validation:
        """Return the loss of the examples for validation, and the accuracy."""
        size = self.config.micro_batch_size or self.config.batch_size
        batches = (batch for _, batch in self.validation.sorted(size))
        batches = itertools.islice(batches, jax.process_index(), None, jax.process_count())
        return training.validate(params, self.parts, batches, self.program)


@dataclasses.dataclass
class Best:
    """The validation with the lowest loss so far.

    Attributes:
        step: number of steps before it.
        loss: its loss.
        waited: validations since then.
    """

    step: int = 0
    loss: float = math.inf
    waited: int = 0

    def is_lower(self, step: int, loss: float) -> bool:
        """Return whether a loss is the lowest so far, and remember it."""
        lower = loss < self.loss
        self.step, self.loss = (step, loss) if lower else (self.step, self.loss)
        self.waited = 0 if lower else self.waited + 1
        return lower


@dataclasses.dataclass(frozen=True)
class Trained:
    """What training gave.

    Attributes:
        variables: trained variables at the lowest validation loss, and what adapters keep.
        steps: number of steps that were made.
        best: the validation with the lowest loss.
    """

    variables: Tree
    steps: int
    best: Best


def train(plan: Plan, out: Path) -> Trained:
    """Train, from the newest checkpoint of the folder if there is one.

    Args:
        plan: what is trained.
        out: folder of the run.

    Raises:
        ValueError: if the saved validation loss is not that of this base and these data.
        Stopped: after Ctrl-C or SIGTERM, when the state is saved.
        NotFiniteError: at a loss or gradient that is not finite, in training or in validation.
        OSError: if a file cannot be written.
    """
    with processes.written(out) as folder:
        return _train(plan, folder)


def _train(plan: Plan, out: Path) -> Trained:
    checkpoints, bests = Checkpoints(out / CHECKPOINTS), Checkpoints(out / BEST, keep=1)
    # Another machine may round the starts of adapters otherwise.
    state, kept = processes.same(
        (plan.initial(), nnx.filter_state(plan.parts.frozen, AdapterState))
    )
    step, best = 0, Best()
    if (saved := checkpoints.restore((state, kept))) is not None:
        step, (state, kept), facts = saved
        best = Best(**facts)  # pyright: ignore[reportArgumentType]
    frozen = nnx.merge_state(plan.parts.frozen, kept)
    plan = dataclasses.replace(plan, parts=plan.parts._replace(frozen=frozen))
    compared = _compare_loss(plan, bests, state.params, out) if step else ""
    progress.keep_until(out / samples.FILE, step)
    tracker = plan.config.log if processes.is_first() else None
    tracked = Tracked(tracker, out, as_options(plan.config), step)
    log = Progress(out, step, plan.steps, tracked=tracked)
    pending: list[tuple[int, training.Measured]] = []

    def save() -> None:
        checkpoints.save(step, (meshes.own(state), kept), dataclasses.asdict(best))

    state, counts, frozen = meshes.shared((state, plan.parts.counts, frozen))

    with tracked, log, Interruption() as interruption:
        if step:
            log.say(f"going on after step {step}{compared}")
        while step < plan.steps and not _is_stopped(plan, best):
            with meshes.over_processes():
                state, measured = training.train_step(
                    state,
                    counts,
                    frozen,
                    plan.batch(step),
                    plan.rate(step),
                    program=plan.program,
                )
            step += 1
            pending.append((step, measured))
            is_last, logs = step == plan.steps, step % plan.config.log_every == 0
            asked = processes.is_any(interruption.asked, ask=logs)
            validates = is_last or step % plan.eval_every == 0
            saves = is_last or step % plan.checkpoint_every == 0 or asked
            if validates or saves or logs:
                bad = log.measured(pending, plan.rate, plan.sources_of, plan.config.dtype)
                pending.clear()
                if bad is not None:
                    # The state is that before the bad step.
                    step = int(state.step)
                    state = state._replace(finite=jnp.ones((), bool))
                    save()
                    raise NotFiniteError(bad)
            if lines := plan.samples(meshes.own(state.params), step):
                samples.append(out, lines)
                for line in lines:
                    log.say(f"step {step}, {line['source']}: {line['generated']!r}")
            if validates:
                params = meshes.own(state.params)
                validation = plan.validate(params)
                if not math.isfinite(validation.loss):
                    # What was saved before is kept: the state is that which gave this loss.
                    raise NotFiniteError(
                        progress.not_finite_in_evaluation(
                            step, validation.loss, float(plan.rate(step - 1)), plan.config.dtype
                        )
                    )
                log.evaluation(step, *validation)
                if best.is_lower(step, validation.loss):
                    bests.save(step, params, {"validation_loss": validation.loss})
            if saves or (validates and _is_stopped(plan, best)):
                save()
            if asked and not is_last:
                raise Stopped(f"stopped after step {step} of {plan.steps}, which is saved")
        params = meshes.own(state.params)
        restored = bests.restore(params)
        params = params if restored is None else restored[1]
    return Trained(nnx.merge_state(params, kept), step, best)


def _compare_loss(plan: Plan, bests: Checkpoints, params: Tree, out: Path) -> str:
    """Compute the lowest validation loss again, and return what is said of it.

    What identifies a base is a small part of its values; their effect is compared here.
    """
    if (best := bests.restore(params)) is None:
        return ""
    step, params, facts = best
    before, now = float(facts["validation_loss"] or 0), plan.validate(params).loss
    limit = max(1e-3, 4 * float(jnp.finfo(plan.config.dtype).eps)) * max(1.0, abs(before))
    if not abs(now - before) <= limit:
        raise ValueError(
            f"the validation loss of step {step} in {out} was {before:.6g} and is {now:.6g}; "
            "expected the same up to rounding: the base or the data differ from those that the "
            "run began with (use these, or another --out)"
        )
    return f"; the validation loss of step {step} is {now:.4f}, as it was"


def _is_stopped(plan: Plan, best: Best) -> bool:
    """Whether the validation loss has not fallen for too long."""
    return plan.config.patience is not None and best.waited >= plan.config.patience
