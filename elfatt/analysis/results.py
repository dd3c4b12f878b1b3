"""Results files: measurements of one machine with their environment, ``results/MACHINE.json``.

A file contains runs; a run has a command's settings, its environment and its rows. Rows with the same settings and
environment are merged into the existing run; with other versions or code they replace it.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

RESULTS = Path("results")


def load_runs(path: Path) -> list[dict[str, Any]]:
    """Load the runs of a results file; empty if the file does not exist.

    Raises:
        ValueError: The file is not a results file.
    """
    if not path.exists():
        return []
    try:
        runs = json.loads(path.read_text())["runs"]
        for run in runs:
            run["kind"], run["settings"], run["environment"], run["rows"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a results file ({error}): move it away") from error
    return runs


def save_rows(
    path: Path,
    head: dict[str, Any],
    rows: list[dict[str, Any]],
    key: tuple[str, ...],
    replaces: tuple[str, ...] = ("",),
) -> None:
    """Add rows to the run with this head, replacing the file atomically.

    An existing row loses all its fields of the same measurement, so results from different times never mix.

    Args:
        path: Results file.
        head: ``kind``, ``settings`` and ``environment`` of the run.
        rows: Measured rows.
        key: Fields that identify a row.
        replaces: Prefixes of the fields to replace; all by default.
    """
    runs = load_runs(path)
    head = json.loads(json.dumps(head))
    run = next((run for run in runs if all(run[name] == value for name, value in head.items())), None)
    if run is None:
        runs = [run for run in runs if not _is_older(run, head)]
        run = {**head, "rows": []}
        runs.append(run)
    known = {tuple(row[name] for name in key): row for row in run["rows"]}
    for row in rows:
        name = tuple(row[field] for field in key)
        kept = {field: value for field, value in known.get(name, {}).items() if not field.startswith(replaces)}
        known[name] = kept | row
    run["rows"] = list(known.values())
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(_one_line_per_row(runs))
    os.replace(unfinished, path)


def _one_line_per_row(runs: list[dict[str, Any]]) -> str:
    texts = []
    for run in runs:
        head = json.dumps({name: value for name, value in run.items() if name != "rows"}, indent=1)
        rows = ",\n".join(f"  {json.dumps(row)}" for row in run["rows"])
        texts.append(f'{head[:-2]},\n "rows": [\n{rows}\n ]\n}}')
    return '{"runs": [\n' + ",\n".join(texts) + "\n]}\n"


def _is_older(run: dict[str, Any], head: dict[str, Any]) -> bool:
    """Whether a run has the same settings, hardware and backend, but other versions or code."""
    same = all(run[name] == head[name] for name in ("kind", "settings"))
    mine, other = (each["environment"] for each in (run, head))
    return same and mine["hardware"] == other["hardware"] and _backend(mine) == _backend(other)


def _backend(environment: dict[str, dict]) -> str:
    return environment.get("flags", {}).get("backend", "auto")  # missing in older files


def to_markdown(header: list[str], rows: list[list[str]]) -> str:
    """Format a Markdown table with a text column followed by number columns."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write_csv(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write dictionaries with the same keys as CSV."""
    lines = list(rows)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(lines[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)


def format_number(value: float | None, decimals: int | None = None) -> str:
    """Format a number for a table, with the given decimals or three significant digits; empty for None."""
    if value is None:
        return ""
    if decimals is not None:
        return f"{value:.{decimals}f}"
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
