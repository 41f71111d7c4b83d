"""The model of a run as files, which are read again and compared."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float

from nyscaled import lora, models
from nyscaled._files import replacing
from nyscaled.checkpoints.files import open_tensors, read_tensor, write_tensors
from nyscaled.finetune import described, identity, training
from nyscaled.finetune.folders import ADAPTER as ADAPTER
from nyscaled.finetune.methods import method
from nyscaled.finetune.preparation import Prepared
from nyscaled.models import BertClassifier
from nyscaled.models.prefix import PrefixedAttention

PREFIX = "prefix.safetensors"

Scores = Float[np.ndarray, "rows scores"]


def save(prepared: Prepared) -> float:
    """Write what was trained, read it again, and return the largest difference of scores.

    Args:
        prepared: a run whose model has the trained variables.

    Raises:
        ValueError: if the saved model computes something else.
    """
    model, folder = prepared.model, prepared.config.out / ADAPTER
    expected = _scores(model, prepared)
    if lora.adapted_layers(model):
        lora.save_peft(
            model,
            folder,
            base_model=prepared.config.model,
            modules_to_save=[_path(model, name) for name in prepared.head],
            task_type="SEQ_CLS" if isinstance(model, BertClassifier) else "CAUSAL_LM",
        )
        prepared.tokenizer.save(folder)
        read = nnx.clone(model)
        lora.remove(read)
        for name in prepared.head:  # so that they must come from the file
            _blank(read, name)
        lora.load_peft(read, folder)
    elif method(prepared.config.method).trains == "prefix":
        read = _through_file(model, folder, prepared)
    else:
        models.save(model, folder, prepared.tokenizer)
        read, _ = models.load(folder, dtype=prepared.config.dtype)
    if method(prepared.config.method).trains in ("adapters", "prefix"):
        with replacing(folder / identity.FILE) as file:
            file.write((prepared.config.out / identity.FILE).read_bytes())
    described.write(folder, prepared.described)
    compared = compare(_scores(read, prepared), expected)
    return require_close(folder, *compared, prepared.config.dtype)


def require_close(folder: Path, difference: float, size: float, dtype: str) -> float:
    """Return the difference of two models' outputs; refuse one that rounding does not explain.

    Args:
        folder: folder that one was read from.
        difference: largest difference of their outputs, as from `compare`.
        size: the largest output.
        dtype: dtype of the models.

    Raises:
        ValueError: on such a difference.
    """
    limit = max(1e-3, 4 * float(jnp.finfo(dtype).eps)) * max(1.0, size)
    if not difference <= limit:
        raise ValueError(
            f"the scores of {folder} differ by {difference:.2g} from those of the trained model; "
            f"expected at most {limit:.2g}"
        )
    return difference


def unchanged(parts: training.Parts, variables: training.Tree) -> float:
    """Return the share of the trained numbers that are the same as before in the model's dtypes.

    Training is in float32, and a narrow dtype may round its small changes away when it is written.

    Args:
        parts: the parts of the model before the training.
        variables: the trained variables.
    """
    after, same, count = dict(nnx.to_flat_state(variables)), 0, 0
    before = nnx.to_flat_state(parts.params)
    for (path, variable), dtype in zip(before, parts.dtypes, strict=True):
        old, new = (x[...].astype(dtype) for x in (variable, after[path]))
        same, count = same + int(jnp.sum(old == new)), count + old.size
    return same / count


def compare(scores: Scores, expected: Scores) -> tuple[float, float]:
    """Return the largest difference of scores, and the largest of the expected ones.

    The difference is infinite where only one of two scores is finite.

    Args:
        scores: scores of a model.
        expected: those of another one.

    Examples:
        >>> compare(np.array([[1.0, -np.inf]]), np.array([[1.5, -np.inf]]))
        (0.5, 1.5)
        >>> compare(np.array([[1.0, np.nan]]), np.array([[1.5, 2.0]]))
        (inf, 2.0)
    """
    finite = np.isfinite(expected)
    size = float(np.max(np.abs(expected), where=finite, initial=0.0))
    if not np.array_equal(finite, np.isfinite(scores)):
        return math.inf, size
    # Apart from the others: the difference of two infinite scores is no number.
    return float(np.max(np.abs(scores[finite] - expected[finite]), initial=0.0)), size


def _through_file(model: nnx.Module, folder: Path, prepared: Prepared) -> nnx.Module:
    """Write the trained variables by their paths, for which PEFT has no names; read them again."""
    folder.mkdir(exist_ok=True)
    params = training.split(model, prepared.trained).params
    flat = {".".join(map(str, path)): v[...] for path, v in nnx.to_flat_state(params)}
    values = {name: np.asarray(value) for name, value in flat.items()}
    write_tensors(folder / PREFIX, values, {"format": "pt"})
    prepared.tokenizer.save(folder)
    read = nnx.clone(model)
    for _, module in nnx.iter_modules(read):
        if isinstance(module, PrefixedAttention):
            module.prefix = None
    for name in prepared.head:
        _blank(read, name)
    load_adapter(read, folder)
    return read


def load_adapter(model: nnx.Module, folder: Path) -> None:
    """Put the adapter of a folder into a model, in place: PEFT's, or a prefix of a run.

    Args:
        model: the base, with a head if the adapter has one.
        folder: folder of the adapter.

    Raises:
        ValueError: on a prefix of another model, and as `nys.lora.load_peft` does.
    """
    if not (folder / PREFIX).exists():
        lora.load_peft(model, folder)
        return
    file = open_tensors(folder / PREFIX)
    names = list(file.keys())
    tensors = {name: read_tensor(file, folder / PREFIX, name) for name in names}
    keys = [value for name, value in tensors.items() if name.endswith(".prefix.key")]
    if len(keys) != 1 or keys[0].ndim != 4:
        raise ValueError(f"{folder / PREFIX} has no keys of a prefix; expected those of a run")
    models.add_prefix(model, keys[0].shape[1], key=jax.random.key(0))
    state = {".".join(map(str, p)): v for p, v in nnx.to_flat_state(nnx.state(model))}
    for name, value in tensors.items():
        shape = state[name].shape if name in state else None
        if value.shape != shape:
            raise ValueError(
                f"{folder / PREFIX} has {name} of shape {value.shape}, and the model {shape}; "
                "expected a prefix of this base"
            )
    for name, value in tensors.items():
        state[name][...] = jnp.asarray(value, state[name].dtype)


def _scores(model: nnx.Module, prepared: Prepared) -> Scores:
    """The scores of the longest batch for validation, whose program exists."""
    plan, parts = prepared.plan, training.split(model, prepared.trained)
    size = plan.config.micro_batch_size or plan.config.batch_size
    _, batch = next(plan.validation.sorted(size))
    program = dataclasses.replace(plan.program, graphdef=parts.evaluating, dtypes=parts.dtypes)
    state = parts.params, parts.counts, parts.frozen
    scores = training.evaluate_step(*state, batch, program=program)[2]
    return np.asarray(scores, np.float32)


def _path(model: nnx.Module, name: str) -> str:
    """The dotted path of a module of this name."""
    return next(
        ".".join(map(str, path)) for path, _ in nnx.iter_modules(model) if path[-1:] == (name,)
    )


def _blank(model: nnx.Module, name: str) -> None:
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        if name in path:
            variable[...] = jax.numpy.zeros_like(variable[...])
