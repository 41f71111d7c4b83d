"""Processes that read changed files, and are replaced when they die, hang, or take all memory."""

import json
import os
import struct
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

LENGTH = struct.Struct("<Q")
MEMORY = 3 * 2**30  # bytes of address space beyond what is taken at the start
SECONDS = 20.0

Files = dict[str, bytes]


class Reader:
    """A process with limits that reads files of a target, and says how that went."""

    def __init__(self, seconds: float = SECONDS) -> None:
        self.seconds = seconds
        self.process: subprocess.Popen[bytes] | None = None

    def read(self, target: str, files: Files, full: bool) -> dict[str, str]:
        """The outcome; a process that dies or takes too long is a fault."""
        if self.process is None:
            self.process = self._started()
        sizes = {name: len(content) for name, content in files.items()}
        request = json.dumps({"target": target, "full": full, "sizes": sizes}).encode()
        answer = self._exchange(LENGTH.pack(len(request)) + request + b"".join(files.values()))
        if answer is not None:
            return answer
        code = self.process.wait()
        self.process = None
        return {
            "is": "fault",
            "message": f"the process ended with {code} (-9: after {self.seconds} s)",
        }

    def end(self) -> None:
        """Kill the process."""
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None

    def _started(self) -> "subprocess.Popen[bytes]":
        process = subprocess.Popen(
            [sys.executable, str(Path(__file__))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        return process

    def _exchange(self, request: bytes) -> dict[str, str] | None:
        assert self.process is not None
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        timer = threading.Timer(self.seconds, self.process.kill)
        timer.start()
        try:
            self.process.stdin.write(request)
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except OSError:
            return None
        finally:
            timer.cancel()
        return json.loads(line) if line.endswith(b"\n") else None


def main() -> None:
    """Read files as they are asked for."""
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print
    import fuzz_targets
    import jax

    import nyscaled  # noqa: F401

    jax.devices()
    _limit_memory()
    answers.write(b"ready\n")
    answers.flush()
    while header := requests.read(LENGTH.size):
        request = json.loads(requests.read(*LENGTH.unpack(header)))
        files = {name: requests.read(size) for name, size in request["sizes"].items()}
        with tempfile.TemporaryDirectory() as folder:
            lay(files, Path(folder))
            found = fuzz_targets.outcome(request["target"], Path(folder), request["full"])
        found = {key: value.encode("utf-8", "replace").decode() for key, value in found.items()}
        answers.write(json.dumps(found).encode() + b"\n")
        answers.flush()


def lay(files: Files, folder: Path) -> None:
    """Write files, which may be in folders, into a folder."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def _limit_memory() -> None:
    try:
        import resource
    except ImportError:
        return
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if os.path.exists("/proc") else 0
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


if __name__ == "__main__":
    main()
