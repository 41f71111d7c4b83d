"""Flags with which XLA compiles a program for a CPU in a third of the time, and runs it slower."""

import importlib.util
import mmap
from pathlib import Path


def _known(flag: str) -> bool:
    """Whether the installed jaxlib has the flag: XLA ends a process at unknown ones."""
    package = importlib.util.find_spec("jaxlib")
    folder = Path(package.origin).parent if package and package.origin else Path()
    for path in folder.glob("libjax_common*"):
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
            return text.find(flag.encode()) >= 0
    return False


_OPTIMIZATION = {
    "xla_backend_optimization_level": "0",
    "xla_cpu_use_fusion_emitters": "false",
    "xla_cpu_parallel_codegen_split_count": "1",
}
FLAGS = " ".join(f"--{flag}={value}" for flag, value in _OPTIMIZATION.items() if _known(flag))
