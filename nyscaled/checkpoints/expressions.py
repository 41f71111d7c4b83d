"""Regular expressions from files, matched in a time that is bounded for every expression.

Python's `re` tries one way after another, and `(a+)+b` has exponentially many ways. Here all ways
are followed at once, as the set of the positions where each could end (Thompson, 1968). The syntax
is Python's, since `re` parses it. What cannot be matched so (references to groups, atomic groups)
is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from re import _compiler, _constants, _parser  # pyright: ignore[reportAttributeAccessIssue]
from typing import Any

STEPS = 3_000_000
"""Limit for matching all names of an adapter with all its expressions: about two seconds."""

_READING = 20  # steps for each character of an expression

_REPEATS = _constants.MAX_REPEAT, _constants.MIN_REPEAT
_ASSERTIONS = _constants.ASSERT, _constants.ASSERT_NOT
# What reads a fixed number of characters: runs of it are left to `re`.
_SIMPLE = {
    *(_constants.LITERAL, _constants.NOT_LITERAL, _constants.IN, _constants.ANY),
    *(_constants.AT, _constants.FAILURE),
}

# From a name, a place in it and the budget to the set of places where a match can end, as bits.
Node = Callable[[str, int, "Budget"], int]


class Budget:
    """Steps that are left for all the expressions of a file.

    Attributes:
        left: the number of them.
    """

    def __init__(self, steps: int = STEPS) -> None:
        self.left = steps

    def spend(self, steps: int = 1) -> None:
        """Raise ValueError if fewer steps are left."""
        self.left -= steps
        if self.left < 0:
            raise ValueError(
                "its expressions take too long to match; expected simpler ones, or lists of names"
            )


class Expression:
    """A regular expression for whole names.

    Args:
        pattern: the expression, in the syntax of Python's `re`.
        form: the expression that PEFT makes of it, with `{}` for the pattern.
        budget: the steps that are left, shared by the expressions of a file.

    Raises:
        ValueError: on a pattern that is not an expression in this form, or is not supported.

    Examples:
        >>> Expression(r".*\\.(q|v)_proj").fullmatch("layers.0.q_proj")
        True
        >>> Expression("(a+)+b").fullmatch("a" * 1000)
        False
    """

    def __init__(self, pattern: str, form: str = "{}", budget: Budget | None = None) -> None:
        self.budget = budget or Budget()
        self._shown = repr(pattern) if len(pattern) <= 80 else f"{pattern[:80]!r}…"
        self.budget.spend(_READING * len(pattern))
        try:
            tree = _parser.parse(form.replace("{}", pattern))
            self._node = _sequence(tree, tree.state.flags)
            # Most names are seen not to match by their ends.
            self._end = "" if tree.state.flags & re.IGNORECASE else _literal_end(tree)[0]
            self._anchored = bool(tree) and tree[-1] == (_constants.AT, _constants.AT_END)
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"{self._shown} is not a regular expression: {error}") from error

    def fullmatch(self, name: str) -> bool:
        """Return whether the whole name matches.

        Raises:
            ValueError: if the budget is spent.
        """
        return name.endswith(self._end) and bool(self._ends(name) >> len(name) & 1)

    def match(self, name: str) -> bool:
        """Return whether a beginning of the name matches: all of it, if the expression ends in `$`.

        Raises:
            ValueError: if the budget is spent.
        """
        possible = not self._anchored or name.endswith(self._end)
        return possible and self._ends(name) != 0

    def _ends(self, name: str) -> int:
        try:
            return self._node(name, 0, self.budget)
        except RecursionError as error:
            raise ValueError(f"{self._shown} is nested too deeply to be matched") from error


def _sequence(tree: Any, flags: int) -> Node:
    """One part after the other; the runs of simple ones are one part each."""
    parts: list[Node] = []
    run: list[Any] = []
    for item in [*tree, None]:
        if item is not None and item[0] in _SIMPLE:
            run.append(item)
            continue
        if run:
            parts.append(_run(_parser.SubPattern(tree.state, run), flags))
            run = []
        if item is not None:
            parts.append(_structured(item[0], item[1], flags))
    if len(parts) == 1:
        return parts[0]

    def match(name: str, start: int, budget: Budget) -> int:
        ends = 1 << start
        for part in parts:
            ends = _from_all(part, name, ends, budget)
        return ends

    return match


def _run(run: Any, flags: int) -> Node:
    pattern = _compiler.compile(run, flags & ~re.DEBUG)

    def match(name: str, start: int, budget: Budget) -> int:
        budget.spend()
        run = pattern.match(name, start)
        return 0 if run is None else 1 << run.end()

    return match


def _structured(operation: Any, argument: Any, flags: int) -> Node:
    if operation is _constants.SUBPATTERN:
        _, added, removed, tree = argument
        return _remembered(_sequence(tree, (flags | added) & ~removed))
    if operation is _constants.BRANCH:
        return _branch([_sequence(tree, flags) for tree in argument[1]])
    if operation in _REPEATS:
        low, high, tree = argument
        return _remembered(_repeat(low, high, _sequence(tree, flags)))
    if operation in _ASSERTIONS:
        direction, tree = argument
        back = tree.getwidth()[0] if direction < 0 else 0
        return _assertion(_sequence(tree, flags), back, operation is _constants.ASSERT)
    raise re.error(f"{str(operation).lower()} is not supported")


def _from_all(node: Node, name: str, starts: int, budget: Budget) -> int:
    """The ends of all matches that begin at one of these places."""
    ends = 0
    while starts:
        lowest = starts & -starts
        ends |= node(name, lowest.bit_length() - 1, budget)
        starts ^= lowest
    return ends


def _remembered(node: Node) -> Node:
    """The same node, which is computed once for each position of a name."""
    last, known = "", dict[int, int]()

    def match(name: str, start: int, budget: Budget) -> int:
        nonlocal last
        if name != last:
            known.clear()
            last = name
        if start not in known:
            budget.spend()
            known[start] = node(name, start, budget)
        return known[start]

    return match


def _branch(nodes: list[Node]) -> Node:
    def match(name: str, start: int, budget: Budget) -> int:
        ends = 0
        for node in nodes:
            ends |= node(name, start, budget)
        return ends

    return match


def _repeat(low: int, high: Any, node: Node) -> Node:
    unbounded = high is _constants.MAXREPEAT

    def match(name: str, start: int, budget: Budget) -> int:
        ends = 1 << start
        # One round more than there are places, and rounds that read nothing can be added at will.
        for _ in range(min(low, len(name) + 1)):
            ends = _from_all(node, name, ends, budget)
        new, rounds = ends, len(name) + 1 if unbounded else high - low
        while new and rounds > 0:
            new = _from_all(node, name, new, budget) & ~ends
            ends, rounds = ends | new, rounds - 1
        return ends

    return match


def _assertion(node: Node, back: int, positive: bool) -> Node:
    def match(name: str, start: int, budget: Budget) -> int:
        matches = start >= back and node(name, start - back, budget) != 0
        return 1 << start if matches == positive else 0

    return match


def _literal_end(tree: Any) -> tuple[str, bool]:
    """The characters that a match ends with, and whether they are all of it."""
    end = ""
    for operation, argument in reversed(list(tree)):
        if operation is _constants.LITERAL:
            end = chr(argument) + end
        elif operation is _constants.SUBPATTERN and not argument[1] & re.IGNORECASE:
            inner, whole = _literal_end(argument[3])
            end = inner + end
            if not whole:
                return end, False
        elif operation is not _constants.AT:
            return end, False
    return end, True
