"""Shape and type checks over the whole package, and a hypothesis profile that repeats itself."""

import atexit
import collections
import os
import shutil
import tempfile
from pathlib import Path

# The workers of one run, and the processes that tests start, share what they compile.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    folder = tempfile.mkdtemp(prefix="nyscaled-compiled-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = folder
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
    atexit.register(shutil.rmtree, folder, ignore_errors=True)

import paper_checks  # noqa: F401, I001  before NumPy and jax: it sets their threads and flags

from jaxtyping import install_import_hook

# Before anything imports nyscaled: each annotation of the package is then checked in each call.
install_import_hook("nyscaled", "typecheck.check")

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

hypothesis.settings.register_profile("tests", deadline=None, derandomize=True, max_examples=10)
hypothesis.settings.load_profile("tests")

# What writes the fixtures needs torch. float64 and the number of devices are settings of a process:
# these folders run in their own, started by test_x64.py and test_multidevice.py.
collect_ignore = ["fixtures"]
if os.environ.get("JAX_ENABLE_X64", "0").lower() not in ("1", "true"):
    collect_ignore.append("x64")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    collect_ignore.append("multidevice")

# Tests kill processes, not the power: what is written need not reach the disk while they wait.
os.fsync = lambda descriptor: None

MAPS = Path("/proc/self/maps")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Marks as long what `long_beyond(n)` says: the cases of a test after its first n."""
    seen = collections.Counter()
    for item in items:
        mark = item.get_closest_marker("long_beyond")
        if mark and not item.get_closest_marker("long"):
            name = item.nodeid.partition("[")[0]
            seen[name] += 1
            if seen[name] > mark.args[0]:
                item.add_marker(pytest.mark.long)


@pytest.fixture(autouse=True, scope="module")
def few_programs():
    """Forgets compiled programs before Linux's limit of 65530 mapped regions, which is a crash."""
    yield
    if MAPS.exists() and MAPS.read_text().count("\n") > 40_000:
        jax.clear_caches()
