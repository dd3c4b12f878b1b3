"""Suggestions for mistyped names."""

from __future__ import annotations

import difflib
import unicodedata
from collections.abc import Iterable


def closest(name: str, valid: Iterable[str]) -> str | None:
    """Return the closest valid name, or None if none is close."""
    return next(iter(difflib.get_close_matches(name, list(valid), n=1)), None)


def did_you_mean(name: str, valid: Iterable[str]) -> str:
    """Return ``; did you mean 'x'?`` to append to an error message, or an empty string."""
    found = closest(name, valid)
    return f"; did you mean {found!r}?" if found else ""


def other_form(name: str, valid: Iterable[str]) -> str:
    """Return a hint to append to an error message if a valid name differs in Unicode form only, or an empty string.

    Args:
        name: Name that was not found.
        valid: Names to search.
    """
    form = unicodedata.normalize("NFC", name)
    for other in valid:
        if other != name and unicodedata.normalize("NFC", other) == form:
            kinds = ["NFC" if unicodedata.is_normalized("NFC", text) else "NFD" for text in (name, other)]
            return f"; '{other}' looks the same, but is in Unicode form {kinds[1]}, not {kinds[0]}: rename one"
    return ""


def form_clash(names: Iterable[str]) -> str:
    """Return the first name that differs from an earlier one in Unicode form only, with a hint, or an empty string."""
    seen: dict[str, str] = {}
    for name in names:
        first = seen.setdefault(unicodedata.normalize("NFC", name), name)
        if first != name:
            return f"'{name}'{other_form(name, [first])}"
    return ""
