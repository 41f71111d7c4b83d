"""The process that renders chat templates, a program that `templates` starts.

It imports neither this package nor JAX. A request is a pickle in JSON's types, from the process
that started this one; an answer is a byte that says what it is, and a text.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import json
import os
import pickle
import struct
import sys
from typing import Any

TEXT, REFUSED, EXHAUSTED = b"trm"
LENGTH = struct.Struct("<Q")
_MAX_MESSAGE = 1000  # characters


def main() -> None:
    """Answer requests until there are none."""
    requests, answers = sys.stdin.buffer, os.dup(sys.stdout.fileno())
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    environment = _environment()
    make = functools.lru_cache(maxsize=8)(environment.from_string)
    _answer(answers, TEXT, "ready")
    while header := requests.read(LENGTH.size):
        request = pickle.loads(requests.read(*LENGTH.unpack(header)))
        _limit(request["seconds"], request["memory"])
        try:
            text = make(request["template"]).render(**request["context"])
            if len(text) > request["characters"]:
                raise ValueError(f"its text is longer than {request['characters']} characters")
            _answer(answers, TEXT, text)
        except MemoryError:
            _answer(answers, EXHAUSTED, "")
            return  # with what it holds
        except Exception as error:  # of any class: templates compute
            _answer(answers, REFUSED, f"{error}"[:_MAX_MESSAGE])


def _answer(file: int, kind: int, text: str) -> None:
    content = text.encode("utf-8", "surrogatepass")
    with open(file, "wb", closefd=False) as answers:
        answers.write(bytes([kind]) + LENGTH.pack(len(content)) + content)


def _limit(seconds: float, memory: int) -> None:
    """Let the system end what takes more, even if nobody waits for the answer."""
    try:
        import resource
    except ImportError:  # Windows, where time alone is limited, from outside
        return
    usage = resource.getrusage(resource.RUSAGE_SELF)
    used = usage.ru_utime + usage.ru_stime
    for kind, limit in ((resource.RLIMIT_AS, memory), (resource.RLIMIT_CPU, used + seconds + 2)):
        with contextlib.suppress(ValueError, OSError):  # a lower limit holds, or there is none
            resource.setrlimit(kind, (int(limit), resource.getrlimit(kind)[1]))


def _environment() -> Any:
    """What templates see, as in transformers."""
    import jinja2.ext
    from jinja2 import nodes
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(jinja2.ext.Extension):
        """The tags around what the assistant says, which change nothing in the text."""

        tags: set[str] = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    def to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    extensions = [Generation, jinja2.ext.loopcontrols]
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=extensions
    )
    environment.filters["tojson"] = to_json  # Jinja's own escapes HTML
    names: dict[str, Any] = environment.globals
    names["raise_exception"] = refuse
    names["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment


if __name__ == "__main__":
    main()
