"""The entry point: which subcommands exist, and how one is run and ends."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Sequence

COMMANDS = {
    "factorize": "approximate the matrices of a file, or the weights of a model, by low rank",
    "finetune": "fine-tune a language model or Stable Diffusion, from data to a tested adapter",
    "evaluate": "score a language model, with or without an adapter, in a task",
    "export": "merge an adapter into its base, from file to file",
}
"""What each subcommand does; `nyscaled.cli.NAME` has its `Config` and its `run`."""

TASKS = ("dreambooth",)
"""Tasks of `finetune` with options of their own, each in the module of its name."""

USAGE = 2  # the status of a command line that cannot be read, as in other programs
INTERRUPTED = 130
UNREAD = 141  # of a program whose output nobody reads on, as the shell has it


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line and return its status: 0, or not 0 with a line of reason on stderr.

    Args:
        argv: the words after `nyscaled`; by default those of the process.

    Examples:
        >>> main(["--version"])
        nyscaled 0.1.0
        0
    """
    try:
        status = _main(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes once more at its end, which would fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return UNREAD
    return status


def _main(words: list[str]) -> int:
    if words[:1] == ["--version"]:
        import nyscaled

        print(f"nyscaled {nyscaled.__version__}")
        return 0
    if not words or words[0] in ("-h", "--help"):
        print(_overview(), end="", file=sys.stdout if words else sys.stderr)
        return 0 if words else USAGE
    name, *options = words
    if name not in COMMANDS:
        known = ", ".join(COMMANDS)
        return _fail("nyscaled", f"the command is {name!r}; expected one of: {known}", USAGE)
    return _run(name, options)


def _run(name: str, options: Sequence[str]) -> int:
    program = f"nyscaled {name}"
    try:
        reading = importlib.import_module("nyscaled.cli.options")
        task, shown = reading.word_of("task", options) if name == "finetune" else None, program
        if task in TASKS:
            name, shown = task, f"{program} --task {task}"
        command = importlib.import_module(f"nyscaled.cli.{name}")
        config = reading.parse(command.Config, options, shown, command.__doc__)
        return 0 if config is None else command.run(config)
    except KeyboardInterrupt:
        return _fail(program, "interrupted", INTERRUPTED)
    except BrokenPipeError:
        raise
    except ModuleNotFoundError as error:
        extra = "cli" if name == "factorize" else "finetune"
        install = f"pip install 'nyscaled[{extra}]'"
        return _fail(program, f"{error.name} is missing; expected it to be installed ({install})")
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):  # of JAX
            raise
        return _fail(program, f"memory is too small: {error}")
    except (ValueError, OSError, ImportError) as error:
        return _fail(program, str(error))


def _fail(program: str, reason: str, status: int = 1) -> int:
    print(f"{program}: error: {' '.join(reason.split())}", file=sys.stderr)
    return status


def _overview() -> str:
    lines = [
        "usage: nyscaled COMMAND [options]",
        "",
        "Low-rank factorization, and fine-tuning by adapters, in JAX.",
        "",
        "commands:",
        *(f"  {name:<12}{summary}" for name, summary in COMMANDS.items()),
        "",
        "`nyscaled COMMAND --help` has the options and examples.",
    ]
    if importlib.util.find_spec("tyro") is None:
        lines.append("Packages are missing here: pip install 'nyscaled[cli]' for factorize,")
        lines.append("pip install 'nyscaled[finetune]' for the others.")
    return "\n".join(lines) + "\n"
