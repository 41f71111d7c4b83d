"""An integer that says how something ended, and in which words that is said."""

from __future__ import annotations

import enum


class Outcome(enum.IntEnum):
    """An enumeration of `NAME = number, message`."""

    message: str
    """What happened, and what the usual causes are."""

    def __new__(cls, value: int, message: str) -> Outcome:
        outcome = int.__new__(cls, value)
        outcome._value_ = value
        outcome.message = message
        return outcome
