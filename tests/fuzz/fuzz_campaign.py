"""Many changed files of a target, and what became of each."""

import collections
import hashlib
import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from fuzz_mutations import ANY, LAYOUT, NEUTRAL, mutation
from fuzz_pool import Files, Reader, lay
from fuzz_targets import TARGETS

CASES = Path(__file__).parent / "cases"
FULL = 8  # one of so many is read by the outermost door, which takes longer


class Fault(NamedTuple):
    """Files whose reading went wrong."""

    target: str
    number: str
    message: str
    changed: Files

    def keep(self, folder: Path = CASES) -> Path:
        """Write the changed files where `cases` finds them."""
        name = hashlib.sha1(b"".join(self.changed.values())).hexdigest()[:8]
        lay(self.changed, folder / self.target / name)
        return folder / self.target / name


class Campaign:
    """The sound files of a target, and what they mean."""

    def __init__(self, target: str, reader: Reader) -> None:
        self.target, self.reader = target, reader
        with tempfile.TemporaryDirectory() as folder:
            TARGETS[target].make(Path(folder))
            paths = sorted(p for p in Path(folder).rglob("*") if p.is_file())
            self.files = {str(p.relative_to(folder)): p.read_bytes() for p in paths}
        self.meanings = {full: reader.read(target, self.files, full) for full in (False, True)}
        for meaning in self.meanings.values():
            assert meaning["is"] == "loads", meaning
        self.counts: collections.Counter[str] = collections.Counter()

    def try_one(self, number: str) -> Fault | None:
        """Change the files as the number says, and read them."""
        rng = random.Random(f"{self.target} {number}")
        names = [n for n in self.files if Path(n).name in TARGETS[self.target].files]
        changed: Files = {}
        kinds = set()
        for name in rng.sample(names, rng.choice([1] * 5 + [min(2, len(names))])):
            changed[name], kind = mutation(name)(rng, self.files[name])
            kinds.add(kind)
        kind = next(kind for kind in (ANY, LAYOUT, NEUTRAL) if kind in kinds)
        message = self.judge(changed, kind, full=rng.randrange(FULL) == 0)
        return None if message is None else Fault(self.target, number, message, changed)

    def judge(self, changed: Files, kind: str, *, full: bool) -> str | None:
        """What is wrong with how files are read, None if nothing is."""
        found = self.reader.read(self.target, {**self.files, **changed}, full)
        same = found == self.meanings[full]
        self.counts[f"{found['is']}{' the same' if same else ''}"] += 1
        if found["is"] == "fault":
            return found["message"]
        if kind == NEUTRAL and not same:
            return f"a change without meaning: {found}"
        if kind == LAYOUT and found["is"] == "loads" and not same:
            return "another layout is read, with another meaning"
        return None


def cases() -> Iterator[tuple[str, Path]]:
    """Changed files that went wrong once: targets and folders."""
    for folder in sorted(CASES.glob("*/*")):
        yield folder.parent.name, folder


def changed_files(folder: Path) -> Files:
    """The files of a case."""
    paths = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): p.read_bytes() for p in paths}


def run(seconds: float, seed: str, targets: list[str]) -> list[Fault]:
    """Change and read files until the time is up; a line per target says what became of them."""
    faults: list[Fault] = []
    reader = Reader()
    campaigns = [Campaign(target, reader) for target in targets]
    end, number = time.monotonic() + seconds, 0
    try:
        while time.monotonic() < end:
            for campaign in campaigns:
                fault = campaign.try_one(f"{seed}-{number}")
                if fault is not None:
                    print(f"FAULT {fault.target} {fault.number}: {fault.message:.300}", flush=True)
                    print(f"  kept in {fault.keep()}", flush=True)
                    faults.append(fault)
            number += 1
    finally:
        reader.end()
    for campaign in campaigns:
        print(f"{campaign.target:12} {dict(campaign.counts)}")
    return faults
