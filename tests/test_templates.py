"""Chat templates that would never end, or take all memory, and the process that ends them."""

import os
import signal
import threading
import time

import pytest

from nyscaled.models.tokenizers import templates

NESTED = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
DOUBLED = (
    "{% set n = namespace(x='ab') %}{% for i in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}"
)
TREE = "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(99) }}"
ENDLESS = {
    "loops": NESTED,
    "loops in silence": "{% set x %}" + NESTED + "{% endset %}",
    "power": "{{ 2 ** (2 ** 40) }}",
    "slice": "{{ [1] | slice(10 ** 10) | list }}",
    "sort": "{{ (range(99999) | list * 300) | sort(reverse=true) | length }}",
    "large": "{{ x }}" * (20 * 2**20 // 7),
    "doubling": DOUBLED,
    "macros": TREE,
    "center": "{{ 'a' | center(10 ** 11) }}",
    "indent": "{{ ('a\n' * 10 ** 7) | indent(10 ** 4) }}",
    "tojson": "{{ ([1] * 10 ** 8) | tojson }}",
    "format": "{{ '%99999999999d' % 1 }}",
    "method": "{{ 'a'.zfill(10 ** 11) }}",
    "replace": "{{ ('a' * 10 ** 6).replace('', 'a' * 10 ** 6) }}",
    "lipsum": "{{ lipsum(n=10 ** 9) }}",
    "join": "{{ range(99999) | join('a' * 10 ** 8) }}",
    "product": "{{ [0] * 10 ** 12 }}",
    "long": "{{ 'a' * (2 ** 24 + 1) }}",
    "depth": "{{ " + "(" * 10**5 + ")" * 10**5 + " }}",
    "number": "{{ (10 ** (10 ** 6)) ~ '' }}",
}


@pytest.fixture
def soon(monkeypatch):
    """A limit of time that tests can wait for; it holds for a rendering, not for the start."""
    assert templates.SECONDS <= 5
    monkeypatch.setattr(templates, "SECONDS", 0.5)


@pytest.mark.long_beyond(3)
@pytest.mark.parametrize("name", ENDLESS)
def test_templates_without_an_end_are_ended(name, soon):
    start = time.monotonic()
    with pytest.raises(ValueError, match=r"the chat template (takes|refuses|ends)"):
        templates.render(ENDLESS[name], {"x": 1})
    assert time.monotonic() - start < 40  # a process may have to be started on a busy machine
    assert templates.render("{{ x }}", {"x": 1}) == "1"


def test_what_is_rendered_goes_there_and_back():
    values = {"a": [1, 2.5, None, True, ("é", "\ud800")], "b": {3: {"c": "x" * 10**5}}}
    text = templates.render("{{ a }}{{ b[3].c }}{{ a[4][1] }}", values)
    assert text == f"{values['a']}{'x' * 10**5}\ud800"


def test_one_process_renders_many():
    templates.render("", {})
    process = templates._state.process
    assert [templates.render("{{ x }}", {"x": i}) for i in range(50)] == [*map(str, range(50))]
    with pytest.raises(ValueError, match="division by zero"):
        templates.render("{{ 1 / 0 }}", {})
    assert templates._state.process is process
    # One that something else has ended is replaced.
    os.kill(process.popen.pid, signal.SIGKILL)
    process.popen.wait()
    assert templates.render("{{ 1 }}", {}) == "1"


def test_threads_take_turns():
    texts = {}

    def render(i):
        texts[i] = templates.render("{{ x }}", {"x": i})

    threads = [threading.Thread(target=render, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == {i: str(i) for i in range(8)}


def test_the_process_sees_no_module_of_ours():
    """It starts in no time, and `names.py` or `config.py` do not stand before other modules."""
    source = templates._PROGRAM.read_text()
    assert "import nyscaled" not in source
    assert "from nyscaled" not in source
