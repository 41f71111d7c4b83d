"""Saves and readings that meet at every pair of steps, and saves that are killed at every step."""

import contextlib
import dataclasses
import os
import subprocess
import sys
import threading
from pathlib import Path

import jax
import numpy as np
import pytest
import tokenizers
from flax import nnx
from model_cases import arrays, load

import nyscaled as nys
from nyscaled.checkpoints import files, folder, peft, swap
from nyscaled.models import Tokenizer
from nyscaled.models.tokenizers.files import open_tokenizer

# All by which a folder is changed, and what readers call.
CHANGES = "replace", "rename", "unlink", "rmdir", "mkdir", "fsync"
LOOKS = "stat", "listdir"
SHARDS = 3


def save_model(path, value):
    """A model whose configuration, shards and file of text say the same number."""
    tensors = [(f"{value}.{i}", np.full(4, value, "f")) for i in range(SHARDS + value)]
    texts = {"more.txt": str(value), ("old.txt" if value else "none.txt"): None}
    folder.write(path, {"value": value}, tensors, max_shard_size=1, texts=texts)


def read_model(path):
    opened = folder.open_folder(path)
    values = {int(opened.read(name)[0]) for name in opened.names}
    (value,) = {opened.config["value"], *values}
    assert len(opened.names) == SHARDS + value
    return value


def save_adapter(path, value):
    update = peft.Update(np.full((2, 3), value, "f"), np.full((4, 2), value, "f"), 1.0 + value)
    peft.write(path, {"layer": update}, base_model="mine")


def read_adapter(path):
    (update,) = peft.read(path).updates.values()
    (value,) = {*update.down.flat, *update.up.flat, update.alpha - 1}
    return int(value)


def save_tokenizer(path, value):
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": value}, "a"))
    Tokenizer(inner, {"pad_token": "a", "chat_template": str(value)}).save(path)


def read_tokenizer(path):
    tokenizer = open_tokenizer(path)
    (value,) = {tokenizer.token_to_id("a"), int(tokenizer.settings["chat_template"])}
    return value


KINDS = {
    "model": (save_model, read_model),
    "adapter": (save_adapter, read_adapter),
    "tokenizer": (save_tokenizer, read_tokenizer),
}


class Killed(BaseException):
    """What ends a process: no operation after it has an effect."""


@contextlib.contextmanager
def before(step, act, names=CHANGES):
    """Calls `act` before the operation of this number; the list holds how many there were."""
    count, whole = [0], {name: getattr(os, name) for name in names}

    def counted(name):
        def operation(*args, **options):
            count[0] += 1
            if count[0] - 1 == step or (act is die and count[0] > step):
                act()
            return whole[name](*args, **options)

        return operation

    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            patch.setattr(os, name, counted(name))
        yield count


def die():
    raise Killed


def steps(call, names=CHANGES):
    with before(-1, None, names) as count:
        call()
    assert count[0] > 3
    return count[0]


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    """Nothing waits for the disk; only the system's end could show it."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture(params=KINDS)
def kind(request, tmp_path):
    """The two functions, and how many steps a save over another takes."""
    save, read = KINDS[request.param]
    save(tmp_path / "count", 1)
    return save, read, steps(lambda: save(tmp_path / "count", 0)), tmp_path / "folder"


def test_a_save_that_is_killed_leaves_the_old_or_the_new(kind):
    save, read, count, path = kind
    values = []
    for step in range(count):
        save(path, 1)
        with before(step, die), pytest.raises(Killed):
            save(path, 0)
        values.append(read(path))
        assert not list(path.glob(".*")), "nothing is left behind"
        assert read(path) == values[-1]
    assert values == sorted(values, reverse=True)  # one step between the old and the new
    assert set(values) == {0, 1}


def test_a_recovery_that_is_killed_is_ended_by_the_next(kind):
    save, read, count, path = kind
    for step in range(count):
        save(path, 1)
        with before(step, die), pytest.raises(Killed):
            save(path, 0)
        begun = (path / swap.SAVE).exists()
        for later in range(6):
            with before(later, die), contextlib.suppress(Killed):
                read(path)
        assert read(path) == 0 or not begun


def test_a_reader_at_each_step_of_a_save(kind):
    save, read, count, path = kind
    values = []
    for step in range(count):
        save(path, 1)
        with before(step, lambda: values.append(read(path))):
            save(path, 0)
        assert read(path) == 0
    assert len(values) == count
    assert values == sorted(values, reverse=True)


def test_a_save_at_each_step_of_a_reader(kind):
    save, read, _, path = kind
    save(path, 1)
    for step in range(steps(lambda: read(path), LOOKS)):
        save(path, 1)
        with before(step, lambda: save(path, 0), LOOKS):
            assert read(path) in (0, 1)
        assert read(path) == 0


def test_a_save_at_each_step_of_another(kind):
    save, read, count, path = kind
    values = []
    for step in range(count):
        save(path, 1)
        with before(step, lambda: save(path, 2)):
            save(path, 0)
        values.append(read(path))
        assert not list(path.glob(".*"))
    # The save that ends later is the one that stays.
    assert values == sorted(values)
    assert set(values) == {0, 2}


def test_readers_beside_writers(tmp_path):
    """Free running: two threads save, two read."""
    save_adapter(tmp_path, 0)
    done, faults = threading.Event(), []

    def repeat(act):
        try:
            for value in range(40):
                act(value % 3)
        except BaseException as error:
            faults.append(error)

    def look():
        try:
            while not done.is_set():
                read_adapter(tmp_path)
        except BaseException as error:
            faults.append(error)

    saving = lambda value: save_adapter(tmp_path, value)  # noqa: E731
    writers = [threading.Thread(target=repeat, args=(saving,)) for _ in range(2)]
    readers = [threading.Thread(target=look) for _ in range(2)]
    for thread in (*writers, *readers):
        thread.start()
    for thread in writers:
        thread.join()
    done.set()
    for thread in readers:
        thread.join()
    assert not faults
    assert sorted(p.name for p in tmp_path.iterdir()) == [peft.CONFIG, peft.TENSORS]


KILLS = """
import os, sys
import test_swap
save, read = test_swap.KINDS["model"]
path, count, values = sys.argv[1], int(sys.argv[2]), []
for step in range(count):
    save(path, 1)
    if (child := os.fork()) == 0:
        with test_swap.before(step, lambda: os._exit(9)):
            save(path, 0)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    values.append(read(path))
print(*values, os.listdir(path) == [n for n in os.listdir(path) if n[0] != "."])
"""


@pytest.mark.long
@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills children that it forks")
def test_processes_that_are_killed(tmp_path):
    save_model(tmp_path / "count", 1)
    count = steps(lambda: save_model(tmp_path / "count", 0))
    paths = [str(Path(__file__).parent), *sys.path]
    run = subprocess.run(
        [sys.executable, "-c", KILLS, str(tmp_path / "folder"), str(count)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
    )
    *values, clean = run.stdout.split()
    assert (set(values), clean) == ({"0", "1"}, "True"), run.stderr
    assert values == sorted(values, reverse=True)


def test_a_folder_that_is_saved_into_aside_keeps_its_leftovers_only_while_that_lives(tmp_path):
    """A living save's folder is locked; a dead one's is removed."""
    save_model(tmp_path, 1)
    (tmp_path / f"{swap.STAGING}dead").mkdir()
    with swap.replacing(tmp_path, {"config.json": "{}"}, last="config.json") as aside:
        assert [p.name for p in tmp_path.glob(".*")] == [aside.parent.parent.name]
        assert read_model(tmp_path) == 1
        assert aside.is_dir()


def test_a_folder_that_cannot_be_written_to(tmp_path, monkeypatch):
    """It is read if no save is in its midst, and refused otherwise."""
    save_model(tmp_path, 1)

    def refuse(*args, **options):
        raise OSError(30, "read-only file system")

    for name in CHANGES:
        monkeypatch.setattr(os, name, refuse)
    assert read_model(tmp_path) == 1
    monkeypatch.undo()
    with before(2, die, ("replace",)), pytest.raises(Killed):
        save_model(tmp_path, 0)
    assert (tmp_path / swap.SAVE).exists()
    monkeypatch.setattr(os, "replace", refuse)
    monkeypatch.setattr(swap, "TRIES", 2)
    with pytest.raises(ValueError, match=r"a save in it has not ended.*can be written to"):
        read_model(tmp_path)
    monkeypatch.undo()
    assert read_model(tmp_path) == 0


def test_files_that_another_program_writes_meanwhile_are_read_again(tmp_path, monkeypatch):
    save_model(tmp_path, 1)
    whole, calls = files.open_tensors, []

    def opened(path):
        if not calls:
            (tmp_path / "config.json").write_text('{"value": 1, "again": true}')
        calls.append(path)
        return whole(path)

    monkeypatch.setattr(files, "open_tensors", opened)
    assert folder.open_folder(tmp_path).config == {"value": 1, "again": True}
    monkeypatch.setattr(swap, "TRIES", 3)
    numbers = iter(range(10, 99))

    def changing(path):
        (tmp_path / "config.json").write_text(f'{{"value": 1, "number": {10 ** next(numbers)}}}')
        return whole(path)

    monkeypatch.setattr(files, "open_tensors", changing)
    with pytest.raises(ValueError, match="changed each time that it was read"):
        folder.open_folder(tmp_path)


@pytest.mark.parametrize(
    "plan",
    [
        '{"last": "a", "new": "abc", "gone": []}',
        '{"last": "..", "new": [".."], "gone": []}',
        '{"last": "a", "new": ["a"], "gone": [' + '"*",' * 999 + '"*"]}',
        '{"last": "../x", "new": ["../x"], "gone": []}',
        "[]",
        "{",
        '{"last": "a", "new": 5}',
        "[" * 9999,
    ],
)
def test_what_no_save_has_left_is_refused(plan, tmp_path):
    save_model(tmp_path, 1)
    (tmp_path / swap.SAVE / "x").mkdir(parents=True)
    (tmp_path / swap.SAVE / "x" / "plan.json").write_text(plan)
    for act in (read_model, lambda path: save_model(path, 0)):
        with pytest.raises(ValueError, match=r"plan\.json is not what a save writes"):
            act(tmp_path)


@pytest.mark.parametrize("part", ["", "x", "x/new", "x/old"])
def test_links_move_and_remove_no_files_of_others(part, tmp_path):
    model, others = tmp_path / "model", tmp_path / "others"
    save_model(model, 1)
    inner = others / "x" if not part else others
    for name in ("new", "old", "y"):
        (inner / name).mkdir(parents=True)
    names = [inner / "config.json", inner / "new" / "config.json", inner / "y" / "z"]
    for name in names:
        name.write_text("theirs")
    link = model / swap.SAVE / part
    link.parent.mkdir(parents=True, exist_ok=True)
    plan = model / swap.SAVE / "x" / "plan.json" if "/" in part else inner / "plan.json"
    link.symlink_to(others)
    for text in ('{"last": "config.json", "new": ["config.json"], "gone": ["*"]}', None):
        plan.write_text(text) if text else plan.unlink()
        for act in (read_model, lambda path: save_model(path, 0)):
            with pytest.raises(ValueError, match="is a link; expected what a save leaves"):
                act(model)
        assert [name.read_text() for name in names] == ["theirs"] * 3
    assert (model / "config.json").is_file()


def test_the_empty_path_is_no_folder():
    for act in (folder.open_folder, peft.read, lambda path: save_model(path, 1)):
        with pytest.raises(ValueError, match="the folder is ''; expected a path"):
            act("")


@pytest.mark.parametrize("place", ["open_tensors", "read_object", "exists"])
def test_a_model_is_loaded_from_one_save(place, tmp_path, monkeypatch):
    """Configuration, weights and tokenizer, when another model is saved during a reading."""
    first = load("llama")
    graphdef, state = nnx.split(first)
    second = nnx.merge(graphdef, jax.tree.map(lambda x: x + 1, state))
    second.config = dataclasses.replace(first.config, rms_norm_eps=0.5)

    def save(model, value):
        inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": value}, "a"))
        nys.models.save(model, tmp_path, Tokenizer(inner), max_shard_size=2000)

    save(first, 1)
    calls, whole = [], getattr(files, place)

    def looked(*args):
        if len(calls) == 2:
            save(second, 2)
        calls.append(args)
        return whole(*args)

    monkeypatch.setattr(files, place, looked)
    model, tokenizer = nys.models.load(tmp_path)
    assert len(calls) > 3
    assert (model.config.rms_norm_eps, tokenizer.token_to_id("a")) == (0.5, 2)
    jax.tree.map(np.testing.assert_array_equal, arrays(model), arrays(second))


def test_a_save_of_which_nothing_is_left_stops_no_reader(tmp_path, monkeypatch):
    """A process was killed before it removed the last, empty folder, which now stays."""
    save_model(tmp_path, 1)
    (tmp_path / swap.SAVE).mkdir()

    def refuse(*args, **options):
        raise OSError(30, "read-only file system")

    monkeypatch.setattr(os, "rmdir", refuse)
    assert read_model(tmp_path) == 1
    monkeypatch.undo()
    save_model(tmp_path, 0)
    assert not list(tmp_path.glob(".*"))
