"""Model folders: tensors in one file or in shards, and folders that are refused."""

import json
import os
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from nyscaled.checkpoints import files, swap
from nyscaled.checkpoints.folder import CONFIG, open_folder, write

A = np.arange(6, dtype=np.float32).reshape(2, 3)
B = np.linspace(-1, 1, 5).astype(ml_dtypes.bfloat16)
INDEX, TENSORS = "model.safetensors.index.json", "model.safetensors"
SHARDS = "one.safetensors", "two.safetensors"


@pytest.fixture
def folder(tmp_path):
    write(tmp_path, {"model_type": "mine"}, [("a", A), ("b", B)])
    return tmp_path


@pytest.fixture
def sharded(tmp_path):
    (tmp_path / CONFIG).write_text("{}")
    for shard, tensors in zip(SHARDS, ({"a": A}, {"b": B}), strict=True):
        safetensors.numpy.save_file(tensors, tmp_path / shard)
    index(tmp_path, {"a": SHARDS[0], "b": SHARDS[1]})
    return tmp_path


def index(folder, weight_map):
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize("kind", ["folder", "sharded"])
def test_tensors_are_read_as_they_are(kind, request):
    opened = open_folder(request.getfixturevalue(kind))
    assert sorted(opened.names) == ["a", "b"]
    assert opened.shape("a") == (2, 3)
    for name, expected in (("a", A), ("b", B)):
        got = opened.read(name)
        assert got.dtype == expected.dtype
        np.testing.assert_array_equal(got, expected)
    for ask in (opened.shape, opened.read):
        with pytest.raises(ValueError, match="has no tensor c"):
            ask("c")


def test_tensors_come_in_the_order_of_the_index(sharded):
    index(sharded, {"b": SHARDS[1], "a": SHARDS[0]})
    assert open_folder(sharded).names == ("b", "a")


@pytest.mark.parametrize("kind", [np.float32, ml_dtypes.bfloat16])
def test_tensors_in_blocks_of_rows(kind, tmp_path, monkeypatch):
    value = np.arange(42).reshape(7, 3, 2).astype(kind)
    scalar, empty = np.array(3, kind), np.zeros((0, 4), kind)
    write(tmp_path, {}, [("a", value), ("scalar", scalar), ("empty", empty)])
    opened, row = open_folder(tmp_path), value[0].nbytes
    for size, heights in ((3 * row + 1, [3, 3, 1]), (row, [1] * 7), (1, [1] * 7), (999, [7])):
        blocks = list(opened.blocks("a", size))
        assert [len(block) for _, block in blocks] == heights
        assert [first for first, _ in blocks] == list(np.cumsum([0, *heights[:-1]]))
        got = np.concatenate([block for _, block in blocks])
        assert got.dtype == value.dtype
        np.testing.assert_array_equal(got, value)
    for name, expected in (("scalar", scalar), ("empty", empty)):
        ((first, got),) = opened.blocks(name, 1)
        assert (first, got.dtype) == (0, expected.dtype)
        np.testing.assert_array_equal(got, expected)
    # A block is all that is read at a time.
    monkeypatch.setattr(type(opened), "read", None)
    assert next(opened.blocks("a", row))[1].nbytes == row


def test_blocks_are_refused_as_whole_tensors_are(tmp_path):
    write(tmp_path, {}, [("a", np.ones((2, 2), ml_dtypes.float8_e4m3fn))])
    opened = open_folder(tmp_path)
    for name, message in (("c", "has no tensor c"), ("a", "not a sound safetensors file, at a")):
        for ask in (opened.read, lambda name: list(opened.blocks(name, 9))):
            with pytest.raises(ValueError, match=message):
                ask(name)


def test_others_may_read_what_they_may_read_elsewhere(folder, tmp_path):
    (tmp_path / "plain").write_text("")
    expected = (tmp_path / "plain").stat().st_mode
    assert {(folder / name).stat().st_mode for name in (CONFIG, TENSORS)} == {expected}


def test_an_array_that_is_not_contiguous_is_written_as_it_reads(tmp_path):
    write(tmp_path, {}, [("a", A.T)])
    np.testing.assert_array_equal(open_folder(tmp_path).read("a"), A.T)


def test_a_failure_leaves_the_old_folder(folder, monkeypatch):
    before = {name: (folder / name).read_bytes() for name in os.listdir(folder)}

    def flush(path):
        raise OSError("no space left")

    monkeypatch.setattr(files, "flush", flush)
    with pytest.raises(OSError, match="no space left"):
        write(folder, {}, [("a", A)])
    assert {name: (folder / name).read_bytes() for name in os.listdir(folder)} == before


@pytest.mark.parametrize("name", [CONFIG, TENSORS, "model-00001-of-00002.safetensors"])
def test_a_directory_in_the_place_of_a_file_is_refused(name, folder):
    (folder / name).unlink(missing_ok=True)
    (folder / name).mkdir()
    before = {p.name: p.is_file() and p.read_bytes() for p in folder.iterdir()}
    with pytest.raises(ValueError, match=f"{name} is a directory; expected a file"):
        write(folder, {}, [("a", A + 1)])
    assert {p.name: p.is_file() and p.read_bytes() for p in folder.iterdir()} == before


def test_a_swap_that_fails_keeps_what_is_new(folder, monkeypatch):
    moved = []

    def replace(source, target):
        if len(moved) == 2:
            raise OSError("disk on fire")
        moved.append(target)
        os.rename(source, target)

    monkeypatch.setattr(files.os, "replace", replace)
    with pytest.raises(OSError, match=r"disk on fire; the new files are whole.*") as caught:
        write(folder, {}, [("a", A + 1), ("b", B), ("c", A)], max_shard_size=1)
    assert f"whole in {folder / swap.SAVE}: opening {folder}" in str(caught.value)
    with monkeypatch.context() as patch:
        patch.setattr(swap, "TRIES", 2)
        with pytest.raises(ValueError, match="a save in it has not ended"):
            open_folder(folder)  # as long as nothing can be moved
    monkeypatch.undo()
    np.testing.assert_array_equal(open_folder(folder).read("a"), A + 1)
    assert open_folder(folder).names == ("a", "b", "c")
    assert not list(folder.glob(".*"))


def test_folders_without_sound_files_are_refused(folder):
    path = folder / TENSORS
    whole = path.read_bytes()
    for broken in (whole[:-1], whole[:4], b"", b"\xff" * 100):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=r"model\.safetensors is not a sound safetensors"):
            open_folder(folder)
    path.unlink()
    with pytest.raises(ValueError, match=r"has no model\.safetensors and no model\.safe"):
        open_folder(folder)
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin: a pickle can run code"):
        open_folder(folder)
    refused = ("[]", "holds a list"), ("{", "not JSON"), ("[" * 100_000, "not JSON: .*recursion")
    for text, message in refused:
        (folder / CONFIG).write_text(text)
        with pytest.raises(ValueError, match=message):
            open_folder(folder)
    (folder / CONFIG).unlink()
    with pytest.raises(ValueError, match=r"config\.json.*expected a model folder"):
        open_folder(folder)


def test_json_is_read_as_utf8_whatever_the_locale(folder):
    """The name is one that cp1252 and ASCII would spoil."""
    (folder / CONFIG).write_text('{"<｜é｜>": 1}', encoding="utf-8")
    code = (
        "from nyscaled.checkpoints.folder import *;"
        f"print(ascii(open_folder({str(folder)!r}).config))"
    )
    plain = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    run = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | plain, capture_output=True, text=True
    )
    assert run.stdout.strip() == ascii({"<｜é｜>": 1}), run.stderr


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "../one.safetensors"}, r"'\.\./one.safetensors'; expected a file in the folder"),
        ({"a": "/etc/passwd"}, "expected a file in the folder"),
        ({"a": ".."}, "expected a file in the folder"),
        ({"a": "three.safetensors"}, "expected a file in the folder"),
        ({"a": "a" * 300}, "expected a file in the folder"),
        ({"a": "a\0"}, "expected a file in the folder"),
        ({"a": SHARDS[0], "c": SHARDS[1]}, f"names c in {SHARDS[1]}, which does not have"),
        ({"a": SHARDS[0], "b": SHARDS[0]}, f"names b in {SHARDS[0]}, which does not have"),
        ({"a": 1}, "no weight_map"),
        ([], "no weight_map"),
    ],
)
def test_an_index_that_leaves_the_folder_or_lies_is_refused(weight_map, message, sharded):
    index(sharded, weight_map)
    with pytest.raises(ValueError, match=message):
        open_folder(sharded)


def files_of(folder):
    return sorted(p.name for p in folder.iterdir())


def test_large_models_are_written_in_shards_that_replace_what_was_there(folder):
    (folder / "tokenizer.json").write_text("{}")
    tensors = {"a": A, "b": B, "c": A + 1, "d": A + 2}
    names = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    # 24 bytes each, and b 10: a file takes a and b, or one of the others.
    write(folder, {}, tensors.items(), max_shard_size=34)
    assert files_of(folder) == sorted([CONFIG, INDEX, "tokenizer.json", *names])
    index = json.loads((folder / INDEX).read_text())
    assert index["metadata"] == {"total_size": 82}
    assert [list(safetensors.numpy.load_file(folder / n)) for n in names] == [
        ["a", "b"],
        ["c"],
        ["d"],
    ]
    opened = open_folder(folder)
    assert opened.names == ("a", "b", "c", "d")
    for name, expected in tensors.items():
        np.testing.assert_array_equal(opened.read(name), expected)
    write(folder, {}, tensors.items(), max_shard_size=1)  # a file each
    assert len(files_of(folder)) == 7
    assert open_folder(folder).names == ("a", "b", "c", "d")
    write(folder, {}, [("a", B)])
    assert files_of(folder) == [CONFIG, TENSORS, "tokenizer.json"]
    np.testing.assert_array_equal(open_folder(folder).read("a"), B)
    with pytest.raises(ValueError, match="max_shard_size is 0; expected a positive"):
        write(folder, {}, [("a", A)], max_shard_size=0)


def test_tensors_are_asked_for_as_their_shard_is_written(tmp_path):
    """No shard is begun before the one in front is on the disk, and a failure leaves no trace."""

    def tensors():
        for i in range(4):
            (aside,) = tmp_path.iterdir()
            # The third is taken while the second is still in memory.
            assert len(list(aside.glob("*/new/*"))) == max(0, i - 1)
            yield str(i), A
        raise OSError("lost")

    with pytest.raises(OSError, match="lost"):
        write(tmp_path, {}, tensors(), max_shard_size=A.nbytes)
    assert not files_of(tmp_path)


def test_a_full_disk_is_an_error_of_the_system(folder):
    """And what was there stays: the library that writes has an exception of its own for it."""
    resource = pytest.importorskip("resource")
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"cannot be written: .*File too large"):
            write(folder, {}, [("a", np.ones(1000, np.float32))])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="makes FIFOs")
@pytest.mark.parametrize("name", [CONFIG, TENSORS, INDEX])
def test_what_would_block_a_reader_is_refused_at_once(name, folder):
    for file in ({TENSORS} if name == INDEX else set()) | {name}:
        (folder / file).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    with pytest.raises(ValueError, match=f"{name} is not a regular file"):
        open_folder(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1, "b": {"c": 1, "d": 2, "c": 3}}', "key 'c' twice"),
        ('{"a": ' + "[" * 70 + "]" * 70 + "}", "nests deeper than 64"),
        ('{"a": ' + "9" * 5000 + "}", "is not JSON: Exceeds the limit"),
    ],
)
def test_json_that_readers_take_for_different_things_is_refused(text, message, folder):
    (folder / CONFIG).write_text(text)
    with pytest.raises(ValueError, match=message):
        open_folder(folder)


def test_texts_beyond_a_limit_are_not_read(folder):
    with (folder / CONFIG).open("r+") as file:
        file.truncate(2**40)  # a file of holes
    with pytest.raises(ValueError, match=r"has 1099511627776 bytes; expected at most"):
        open_folder(folder)
