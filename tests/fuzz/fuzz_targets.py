"""What is fuzzed: how small sound files are made, and how they are read and what they then mean."""

import contextlib
import gzip
import hashlib
import json
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from fuzz_diffusion import DIFFUSION
from fuzz_target import TESTS, Target, array, arrays

sys.path[:0] = [str(TESTS)]
LLAMA = TESTS / "fixtures" / "models" / "llama"


def _words() -> Any:
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers
    from tokenizers.processors import TemplateProcessing

    vocabulary = {"[UNK]": 0, "[BOS]": 1, "a": 2, "b": 3, "c": 4, "ab": 5, "é": 6}
    inner = tokenizers.Tokenizer(models.BPE(vocabulary, [("a", "b")], unk_token="[UNK]"))
    parts = [normalizers.NFC(), normalizers.Replace("x", "a")]
    inner.normalizer = normalizers.Sequence(parts)
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = TemplateProcessing(
        single="[BOS] $A", pair="[BOS] $A [BOS]:1 $B:1", special_tokens=[("[BOS]", 1)]
    )
    inner.decoder = decoders.Fuse()
    inner.add_special_tokens(["[UNK]", "[BOS]"])
    return inner


def _make_tokenizer(folder: Path) -> None:
    from nyscaled.models import Tokenizer

    settings = {"pad_token": "[UNK]", "bos_token": {"content": "[BOS]"}, "chat_template": "{{ x }}"}
    Tokenizer(_words(), settings).save(folder)


def _make_tokenizers(folder: Path) -> None:
    """One of each kind of parts that the library has."""
    import tokenizers
    from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors

    words = ["[UNK]", "[CLS]", "[SEP]", *"abcdé", "##b", "##c", "▁a", "▁", "Ġ", "<0x61>", "ab"]
    vocabulary = {word: i for i, word in enumerate(words)}
    ends = [("[SEP]", 2), ("[CLS]", 1)]
    level, split = (
        pre_tokenizers.ByteLevel(),
        pre_tokenizers.Split(Regex(r"\s+|[a-c]+"), "isolated"),
    )
    kinds = {
        "pieces": (
            models.WordPiece(vocabulary, unk_token="[UNK]"),
            normalizers.BertNormalizer(),
            pre_tokenizers.BertPreTokenizer(),
            processors.BertProcessing(*ends),
            decoders.WordPiece(),
        ),
        "unigram": (
            models.Unigram([(word, -float(i)) for i, word in enumerate(words)], 0, False),
            normalizers.Sequence([normalizers.NFKC(), normalizers.Prepend("▁")]),
            pre_tokenizers.Metaspace(),
            processors.RobertaProcessing(*ends),
            decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(), decoders.Fuse()]),
        ),
        "bytes": (
            models.BPE(vocabulary, [("a", "b")], unk_token="[UNK]", fuse_unk=True),
            normalizers.Sequence([normalizers.Strip(), normalizers.Replace(Regex("x+"), "a")]),
            pre_tokenizers.Sequence([split, pre_tokenizers.Digits(), level]),
            processors.ByteLevel(trim_offsets=True),
            decoders.ByteLevel(),
        ),
        "words": (
            models.WordLevel(vocabulary, "[UNK]"),
            normalizers.Sequence([normalizers.Lowercase(), normalizers.StripAccents()]),
            pre_tokenizers.Sequence([pre_tokenizers.Punctuation(), pre_tokenizers.Whitespace()]),
            processors.Sequence([processors.ByteLevel(), processors.BertProcessing(*ends)]),
            decoders.Sequence(
                [decoders.CTC(), decoders.Strip(" ", 1, 0), decoders.Replace("a", "b")]
            ),
        ),
    }
    for name, parts in kinds.items():
        inner = tokenizers.Tokenizer(parts[0])
        inner.normalizer, inner.pre_tokenizer, inner.post_processor, inner.decoder = parts[1:]
        inner.add_special_tokens(["[CLS]", tokenizers.AddedToken("[SEP]", lstrip=True)])
        (folder / name).mkdir()
        inner.save(str(folder / name / "tokenizer.json"))
    token = {"content": "<x>", "special": True, "lstrip": False, "normalized": False}
    beside = {
        "tokenizer_config.json": {
            "tokenizer_class": "BertTokenizer",
            "do_lower_case": False,
            "strip_accents": True,
            "model_max_length": 512,
            "truncation_side": "left",
            "added_tokens_decoder": {str(len(words)): token},
            "additional_special_tokens": ["<y>"],
            "unk_token": "[UNK]",
        },
        "special_tokens_map.json": {"cls_token": "[CLS]", "pad_token": {"content": "[SEP]"}},
        "added_tokens.json": {"<z>": len(words) + 1},
    }
    for name, settings in beside.items():
        (folder / "pieces" / name).write_text(json.dumps(settings))


def _read_tokenizers(folder: Path, full: bool) -> Any:
    return [_read_tokenizer(path, full) for path in sorted(folder.iterdir())]


def _read_tokenizer(folder: Path, full: bool) -> Any:
    from nyscaled.models.tokenizers.files import open_tokenizer

    tokenizer = open_tokenizer(folder)
    if tokenizer is None:
        return None
    texts = ["ab c é xx", "[BOS] zzz", ""]
    ids = [tokenizer.encode(text).ids for text in texts]
    if tokenizer.pad_id is not None:
        tokenizer(texts, max_length=9)
        tokenizer.pairs(texts, texts)
    words = [tokenizer.decode(row) for row in ids]
    return ids, words, tokenizer.pad_id, repr(sorted(tokenizer.settings.items(), key=str))


def _make_rotated(folder: Path) -> None:
    """Configurations alone, one for each kind of rotations that has numbers of its own."""
    numbers = {"factor": 4.0, "original_max_position_embeddings": 16}
    yarn = {"beta_fast": 32.0, "beta_slow": 1.0, "mscale": 0.7, "mscale_all_dim": 1.0}
    llama3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    kinds = {"yarn": numbers | yarn, "llama3": numbers | llama3, "dynamic": {"factor": 2.0}}
    config = json.loads((LLAMA / "config.json").read_text())
    for kind, rope in kinds.items():
        whole = config | {"rope_parameters": {"rope_type": kind, "rope_theta": 1e4, **rope}}
        (folder / kind).mkdir()
        (folder / kind / "config.json").write_text(json.dumps(whole))


def _read_rotated(folder: Path, full: bool) -> Any:
    from nyscaled.checkpoints import files
    from nyscaled.models import rope
    from nyscaled.models.llama import LlamaConfig

    meanings = []
    for path in sorted(folder.iterdir()):
        settings = files.read_object(path / "config.json", "a configuration")
        try:
            config = LlamaConfig.from_json(settings)
        except ValueError as error:
            raise ValueError(files.brief(error)) from error
        scaling, width = config.rope_scaling, min(config.head_dim, 64)
        angles = rope.inverse_frequencies(width, config.rope_theta, scaling, 9)
        assert np.isfinite(angles).all(), "rotations are not finite"
        assert np.isfinite(scaling.attention_factor if scaling else 1), "they are not finite"
        meanings.append((repr(config), array(angles)))
    return meanings


def _make_model(folder: Path) -> None:
    shutil.copytree(LLAMA, folder, dirs_exist_ok=True)
    (folder / "expected.safetensors").unlink()
    ends = {"eos_token_id": [2, 3], "bos_token_id": 1, "temperature": 0.5}
    (folder / "generation_config.json").write_text(json.dumps(ends))
    _make_tokenizer(folder)


def _read_model(folder: Path, full: bool) -> Any:
    import nyscaled as nys
    from nyscaled.models.opening import open_all

    if full:
        model, _ = nys.models.load(folder)
        logits = np.asarray(model(np.ones((1, 3), np.int32)))
        assert np.isfinite(logits).all() or not _small(folder), "NaN from weights that are small"
        return repr(model.config), array(logits)
    opened, _, config, _ = open_all(folder)
    return repr(config), arrays(opened)


def _small(folder: Path) -> bool:
    """Whether weights are: they are taken as they are, NaN and what overflows too."""
    from nyscaled.checkpoints.folder import open_folder

    opened = open_folder(folder)
    values = [np.asarray(opened.read(name), np.float32) for name in opened.names]
    return all((abs(value) < 1e10).all() for value in values)


def _make_sharded(folder: Path) -> None:
    from nyscaled.checkpoints.folder import open_folder, write

    source = open_folder(LLAMA)
    write(folder, source.config, ((n, source.read(n)) for n in source.names), max_shard_size=9000)


def _make_swap(folder: Path) -> None:
    """A save that was ended in the midst."""
    from nyscaled.checkpoints import folder as folders

    folders.write(folder, {"a": 1}, [("a", np.ones(3, "f"))], max_shard_size=1)
    killed = mock.patch("os.replace", side_effect=OSError(5, "killed"))
    with killed, contextlib.suppress(OSError):
        folders.write(folder, {"a": 2}, [("b", np.ones(3, "f")), ("c", np.ones(2, "f"))])
    # Its name is drawn anew each time.
    (inner,) = (folder / ".nyscaled-save").iterdir()
    inner.rename(inner.with_name("inner"))


def _read_folder(folder: Path, full: bool) -> Any:
    from nyscaled.checkpoints.folder import open_folder

    opened = open_folder(folder)
    return opened.config, arrays(opened)


def _make_gguf(folder: Path) -> None:
    import gguf_cases

    tokens = ["<unk>", "<s>", "</s>", *"abcdefghijklmnopqrstuvwxyz", "ab", "cd", "abcd"]
    vocabulary = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [-float(i) for i in range(len(tokens))],
        "tokenizer.ggml.token_type": [2, 3, 3] + [1] * (len(tokens) - 3),
        "tokenizer.ggml.unknown_token_id": 0,
    }
    gguf_cases.write(folder / "model.gguf", "llama", metadata=vocabulary)


def _read_gguf(folder: Path, full: bool) -> Any:
    import nyscaled as nys
    from nyscaled.checkpoints.gguf import open_gguf
    from nyscaled.models.family import gguf_maps
    from nyscaled.models.tokenizers.gguf import gguf_tokenizer

    path = folder / "model.gguf"
    if full:
        model, tokenizer = nys.models.load(path)
        return repr(model.config), tokenizer and tokenizer.encode("ab cd").ids
    opened = open_gguf(path, gguf_maps())
    tokenizer = gguf_tokenizer(opened.metadata)
    return opened.config, arrays(opened), tokenizer and tokenizer.encode("ab cd").ids


def _make_adapter(folder: Path) -> None:
    from nyscaled.checkpoints import peft

    rng = np.random.default_rng(0)

    def update(rank: int) -> Any:
        down, up = rng.normal(size=(rank, 8)), rng.normal(size=(8, rank))
        return peft.Update(down.astype("f"), up.astype("f"), 4.0)

    updates = {"q_proj": update(2), "v_proj": update(3)}
    peft.write(folder, updates, base_model="mine", dropout=0.1)


def _read_adapter(folder: Path, full: bool) -> Any:
    import jax.numpy as jnp
    from flax import nnx

    import nyscaled as nys
    from nyscaled.checkpoints import peft

    if full:
        model = nnx.Dict(
            q_proj=nnx.Linear(8, 8, rngs=nnx.Rngs(0)), v_proj=nnx.Linear(8, 8, rngs=nnx.Rngs(0))
        )
        nys.lora.load_peft(model, folder)
        outputs = [np.asarray(model[name](jnp.ones((1, 8)))) for name in ("q_proj", "v_proj")]
        assert all(np.isfinite(y).all() for y in outputs), "outputs are not finite"
        return [array(y) for y in outputs]
    saved = peft.read(folder)
    updates = {m: (array(u.down), array(u.up), u.alpha) for m, u in saved.updates.items()}
    return updates, saved.rank_stabilized, saved.dropout, sorted(saved.whole)


def _make_matrices(folder: Path) -> None:
    matrix = np.diag([3.0, 2.0, 1.0]) + 0.25
    np.save(folder / "a.npy", matrix)
    np.savez_compressed(folder / "a.npz", a=matrix)
    entries = [f"{i + 1} {j + 1} {matrix[i, j]}" for i in range(3) for j in range(i + 1)]
    text = "%%MatrixMarket matrix coordinate real symmetric\n3 3 6\n" + "\n".join(entries) + "\n"
    (folder / "a.mtx").write_text(text)
    (folder / "b.mtx.gz").write_bytes(gzip.compress(text.encode(), mtime=0))
    rows = "\n".join(str(x) for x in matrix.T.ravel())
    (folder / "c.mtx").write_text(f"%%MatrixMarket matrix array real general\n3 3\n{rows}\n")


def _read_matrices(folder: Path, full: bool) -> Any:
    from experiments.lib import matrix

    return [array(matrix.load(path)) for path in sorted(folder.iterdir())]


BESIDE = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
WEIGHTS, SETTINGS = "model.safetensors", "tokenizer_config.json"
TARGETS = {
    "config": Target(_make_model, ("config.json", "generation_config.json"), _read_model),
    "rotations": Target(_make_rotated, ("config.json",), _read_rotated),
    "safetensors": Target(_make_model, (WEIGHTS,), _read_model),
    "index": Target(
        _make_sharded,
        (f"{WEIGHTS}.index.json", "model-00001-of-00002.safetensors"),
        _read_folder,
    ),
    "swap": Target(_make_swap, ("plan.json", "config.json"), _read_folder),
    "tokenizer": Target(_make_tokenizer, ("tokenizer.json", SETTINGS), _read_tokenizer),
    "tokenizers": Target(_make_tokenizers, ("tokenizer.json", *BESIDE), _read_tokenizers),
    "gguf": Target(_make_gguf, ("model.gguf",), _read_gguf),
    "adapter": Target(
        _make_adapter, ("adapter_config.json", "adapter_model.safetensors"), _read_adapter
    ),
    "matrix": Target(
        _make_matrices, ("a.npy", "a.npz", "a.mtx", "b.mtx.gz", "c.mtx"), _read_matrices
    ),
    **DIFFUSION,
}


def outcome(target: str, folder: Path, full: bool) -> dict[str, str]:
    """How files are read: "loads" with their meaning, "refused" with a message, or "fault"."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            meaning = TARGETS[target].read(folder, full)
    except (ValueError, OSError) as error:
        message = str(error)
        clear = 10 < len(message) < 3000
        return {
            "is": "refused" if clear else "fault",
            "message": f"{type(error).__name__}: {message}",
        }
    except BaseException as error:
        return {"is": "fault", "message": f"{type(error).__name__}: {str(error)[:500]}"}
    return {
        "is": "loads",
        "meaning": hashlib.sha1(repr(meaning).encode("utf-8", "replace")).hexdigest(),
    }
