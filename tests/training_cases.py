"""Examples as ids and a tiny model with adapters, for the tests of training."""

import functools

import jax
import model_cases
import numpy as np
import safetensors.numpy
import tokenizers
from flax import nnx
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing

import nyscaled as nys
from nyscaled.finetune import batches, progress, training
from nyscaled.finetune.examples import Encoded
from nyscaled.models import Tokenizer

WORDS = ((7,), (8,))
PHRASES = ((7,), (8, 9), (10, 11, 12))


def examples(count=21, answers=WORDS, seed=0, longest=30):
    """Examples of random ids, whose answer is told by the first one."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        prompt = rng.integers(13, 32, rng.integers(3, longest)).tolist()
        label = prompt[0] % len(answers)
        rows.append(Encoded((1, *prompt), answers, label, source=f"train.tsv:{i + 1}"))
    return rows


@functools.cache
def adapted(method="nora", dropout=0.0, key=0, **options):
    """The parts of the tiny LLaMA with adapters, and the model."""
    model = model_cases.load("llama")
    trained = nys.finetune.method(method).prepare(
        model, rank=2, targets=r".*[qv]_proj", key=jax.random.key(key), dropout=dropout, **options
    )
    return training.split(model, trained), model


def program(parts, objective="tokens", method="nora", **options):
    """The program of a step on these parts."""
    return training.program_of(parts, objective, nys.finetune.method(method), **options)


def one_step(parts, program, batch, count=1, state=None, rate=1e-2):
    """The state after a step on a batch, and what was measured."""
    if state is None:
        state = training.initial(program, jax.tree.map(jax.numpy.copy, parts.params))
    split = training.micro_batches(batch, count)
    return training.train_step(
        state, parts.counts, parts.frozen, split, np.float32(rate), program=program
    )


def model_of(parts):
    """The model of these parts."""
    return nnx.merge(parts.evaluating, parts.params, parts.counts, parts.frozen, copy=True)


@functools.cache
def made(objective="tokens", answers=WORDS, **options):
    """Batches of eight of the examples."""
    return batches.make(examples(answers=answers), objective, batch_size=8, programs=1, **options)


NAMES = (
    *("[PAD]", "<s>", "</s>", "?", "It", "was", "terrible", "great", "good", "bad"),
    *("film", "plot", "scene", "fine", "dull"),
)


def tokenizer(encoder=False):
    """A token per word."""
    inner = tokenizers.Tokenizer(WordLevel({name: i for i, name in enumerate(NAMES)}, "?"))
    inner.pre_tokenizer = Whitespace()
    begin, end = "<s>", "</s>"
    inner.post_processor = TemplateProcessing(
        single=f"{begin} $A {end}" if encoder else f"{begin} $A",
        pair=f"{begin} $A {end} $B:1 {end}:1",
        special_tokens=[(begin, 1), (end, 2)],
    )
    inner.add_special_tokens(["[PAD]", begin, end])
    return Tokenizer(inner, {"pad_token": "[PAD]", "bos_token": begin, "eos_token": end})


def write_model(folder, name="llama"):
    """A folder of a tiny model with its tokenizer."""
    nys.models.save(model_cases.load(name), folder, tokenizer(encoder=name != "llama"))
    return folder


def write_data(folder, train=40, dev=12):
    """A folder of SST-2: sentences that are good if they have more good words."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("dev", dev)):
        lines = []
        for _ in range(count):
            label = int(rng.integers(2))
            mood = ("fine", "good") if label else ("dull", "bad")
            words = [*rng.choice(NAMES[10:13], rng.integers(1, 9)), *rng.choice(mood, 2)]
            lines.append(f"{' '.join(rng.permutation(words))}\t{label}\n")
        (folder / f"{split}.tsv").write_text("".join(lines))
    return folder


def settings(root, **options):
    """Settings of a run of a few small steps; the model and the data are written once."""
    name = options.pop("base", "llama")
    model, data = root / name, root / "data"
    if not model.exists():
        write_model(model, name)
    if not data.exists():
        write_data(data)
    defaults = {
        "task": "sst2",
        "method": "nora+",
        "rank": 2,
        "targets": r".*(query|value|[qv]_proj)",
        "learning_rate": 1e-2,
        "steps": 12,
        "batch_size": 8,
        "eval_every": 6,
        "log_every": 4,
        "out": root / "out",
    }
    return nys.finetune.Config(model=str(model), data=data, **(defaults | options))


def lines(out):
    """The metrics without times."""
    return [
        {k: v for k, v in line.items() if k != "seconds"}
        for line in progress.read_metrics(out / progress.METRICS)
    ]


def tensors(out):
    """The bytes of what was trained."""
    values = safetensors.numpy.load_file(out / "adapter" / "adapter_model.safetensors")
    return {name: value.tobytes() for name, value in values.items()}
