"""Suggestions for mistyped names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def closest(name: str, valid: Iterable[str]) -> str | None:
    """The valid name most like this one, or None if none is close."""
    return next(iter(difflib.get_close_matches(name, list(valid), n=1)), None)


def did_you_mean(name: str, valid: Iterable[str]) -> str:
    """``; did you mean 'x'?`` to end an error message with, or an empty string."""
    found = closest(name, valid)
    return f"; did you mean {found!r}?" if found else ""
