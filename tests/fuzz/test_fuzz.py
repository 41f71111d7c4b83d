"""Changed files are refused with a ValueError or OSError, or mean what they meant.

The changes here are the same each time. `make fuzz` goes on for longer, with others, and keeps what
went wrong in `cases/`, which is tried here.
"""

import pytest
from fuzz_campaign import Campaign, cases, changed_files
from fuzz_mutations import ANY
from fuzz_pool import Reader
from fuzz_targets import TARGETS

COUNT = 40


@pytest.fixture(scope="module")
def campaign():
    """Makes campaigns whose files one process reads."""
    reader, made = Reader(seconds=60), {}

    def get(target):
        if target not in made:
            made[target] = Campaign(target, reader)
        return made[target]

    yield get
    reader.end()


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.long_beyond(len(TARGETS) - 2)
def test_changed_files(target, campaign):
    tried = campaign(target)
    tried.counts.clear()
    faults = [fault for i in range(COUNT) if (fault := tried.try_one(f"test-{i}"))]
    assert not faults, [(fault.number, fault.message) for fault in faults]
    assert tried.counts["refused"] > COUNT / 8
    assert sum(tried.counts.values()) == COUNT


@pytest.mark.parametrize(("target", "folder"), [*cases()], ids=lambda x: getattr(x, "name", x))
def test_files_that_went_wrong_once(target, folder, campaign):
    for full in (False, True):
        message = campaign(target).judge(changed_files(folder), ANY, full=full)
        assert message is None, message


@pytest.mark.long
def test_readers_that_die_or_hang_are_faults(campaign, monkeypatch):
    """Of what the fuzzer is for, without which it would find nothing."""
    reader = Reader(seconds=60)
    reader.process = reader._started()
    reader.process.kill()
    assert "ended with -9" in reader.read("swap", {}, False)["message"]
    assert reader.read("swap", {}, False)["is"] == "refused"
    reader.seconds = 0.0
    assert reader.read("config", dict(campaign("config").files), True)["is"] == "fault"
    reader.end()
