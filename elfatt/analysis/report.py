"""Write docs/results.md from the results files: every run of every machine, with its environment."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from elfatt.analysis import diffusion, edge, op, pretrained, runtimes, scaling
from elfatt.analysis.plots import paired
from elfatt.analysis.results import RESULTS, load_runs, to_markdown
from elfatt.analysis.tables import Entry, format_tables

HEAD = """# Results

Written by `python -m elfatt.analysis report` from the files of `results/`; do not edit. "Paper" columns are the figures
that the paper printed, on its hardware; "here" columns were measured on the machine of the section. Speeds are medians
of turns, quartiles in brackets; speed-ups are ratios within one run.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the ``report`` command."""
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of results files (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("docs/results.md"), help="default: %(default)s")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Write the report.

    Raises:
        ValueError: There are no results.
    """
    files = sorted(args.results.glob("*.json"))
    if not files:
        raise ValueError(f"{args.results} contains no results files: run a benchmark first, such as `tables 1`")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(write_report(files))
    print(f"wrote {args.output}", file=sys.stderr)


def write_report(files: list[Path]) -> str:
    """Return the text of the report."""
    parts = [HEAD]
    for file in files:
        parts.append(f"## {file.stem}\n")
        for number, run in enumerate(load_runs(file), start=1):
            parts.append(f"**Run {number}: {run['kind']}.** {_sentence(run['settings'])}\n")
            parts.append(f"{_sentence(flatten(run['environment']))}\n")
            parts.append(FORMATS.get(run["kind"], format_any)(run["rows"]) + "\n")
    return "\n".join(parts)


def flatten(environment: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Merge hardware, versions and flags into one dictionary."""
    return {name: value for group in environment.values() for name, value in group.items()}


def format_any(rows: list[dict[str, Any]]) -> str:
    """Format rows as they are, with one column per key."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[_cell(row.get(key, "")) for key in keys] for row in rows]
    return to_markdown([key.replace("_", " ") for key in keys], cells)


def _format_tables(rows: list[dict[str, Any]]) -> str:
    return format_tables([Entry(row, values) for row, values in paired(rows)])


FORMATS = {
    "tables": _format_tables,
    "scaling": scaling.format_rows,
    "edge": edge.format_rows,
    "op": op.format_rows,
    "runtimes": runtimes.format_rows,
    "diffusion": diffusion.format_rows,
    "pretrained": pretrained.format_rows,
}


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _sentence(values: dict[str, Any]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in values.items() if value is not None) + "."
