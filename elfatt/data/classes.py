"""Read and compare class names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from elfatt.suggest import closest, form_clash, other_form

SHOWN = 5  # maximum names in a message


def read_class_map(path: str | Path) -> dict[str, int]:
    """Read a text file of class names, one per line, numbered from 0.

    Raises:
        ValueError: The file is missing, empty or not UTF-8, or a name is empty or duplicated.
    """
    try:
        names = [line.strip() for line in Path(path).read_text(encoding="utf-8-sig").rstrip().splitlines()]
    except FileNotFoundError:
        raise ValueError(f"class map {path} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"class map {path} must be a text file of one class per line ({error})") from error
    if not names:
        raise ValueError(f"class map {path} is empty: write one class per line")
    labels: dict[str, int] = {}
    for number, name in enumerate(names):
        if not name:
            raise ValueError(f"class map {path}: line {number + 1} is empty, write one class per line")
        if name in labels:
            raise ValueError(f"class map {path}: '{name}' is on lines {labels[name] + 1} and {number + 1}")
        labels[name] = number
    if clash := form_clash(labels):
        raise ValueError(f"class map {path} contains {clash}")
    return labels


def differences(found: Iterable[str], expected: Iterable[str]) -> str:
    """Describe surplus and missing names; empty if there are none."""
    found, expected = dict.fromkeys(found), dict.fromkeys(expected)  # ordered sets
    surplus = [name for name in found if name not in expected]
    missing = [name for name in expected if name not in found]
    parts = [f"{len(surplus)} surplus ({shown(surplus)})"] * bool(surplus)
    parts += [f"{len(missing)} missing ({shown(missing)})"] * bool(missing)
    if surplus and (hint := other_form(surplus[0], missing)):
        return ", ".join(parts) + hint
    close = closest(surplus[0], missing) if surplus else None
    return ", ".join(parts) + (f"; is '{surplus[0]}' the same as '{close}'?" if close else "")


def mismatch(found: Mapping[str, int], expected: Mapping[str, int]) -> str:
    """Describe how classes differ in names or labels; empty if they are the same."""
    return differences(found, expected) or renumbered(found, expected)


def renumbered(found: Mapping[str, int], expected: Mapping[str, int]) -> str:
    """Describe the first shared name with different labels; empty if all agree."""
    for name, index in found.items():
        if expected.get(name, index) != index:
            return f"'{name}' is class {index} here and class {expected[name]} there"
    return ""


def shown(names: Iterable[str]) -> str:
    """Format the first names for a message."""
    names = list(names)
    return ", ".join(f"'{name}'" for name in names[:SHOWN]) + ", …" * (len(names) > SHOWN)
