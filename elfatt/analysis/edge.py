"""Benchmark Tables VIII and IX at every power mode of an edge device, or at given numbers of CPU threads.

On a Jetson, ``nvpmodel`` sets the power modes and ``tegrastats`` is logged during timing; other machines need neither.
Speed-ups are over GLOBAL; the paper's AMP speed-ups in Table VIII are over its slowest row.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from elfatt.analysis.arguments import add_speed_arguments, apply_speed_arguments
from elfatt.analysis.environment import describe_environment, machine_name
from elfatt.analysis.results import RESULTS, save_rows, to_markdown
from elfatt.analysis.rows import select_rows
from elfatt.analysis.tables import EDGE, Entry, measure_speed

KEY = ("table", "name", "mode")
TOTALS = ("VDD_IN", "POM_5V_IN")  # total power rail, by board
PARTS = ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0")  # rails of an AGX Orin, which add up to the total


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the ``edge`` command."""
    add = parser.add_argument
    add("table", type=int, choices=(8, 9), help="8: batch 128; 9: batch 1")
    add("--rows", nargs="+", metavar="PATTERN", help="models, such as '*-ELFATT' (default: all)")
    add("--modes", nargs="+", type=int, help="nvpmodel modes of a Jetson (default: the current one)")
    add_speed_arguments(parser, precision=False)
    parser.add_argument("--thread-modes", nargs="+", type=int, metavar="N", help="numbers of CPU threads to benchmark")
    parser.add_argument("--results", type=Path, help=f"results file to add to (default: {RESULTS}/MACHINE.json)")
    parser.set_defaults(run=run, baseline=None)


def run(args: argparse.Namespace) -> None:
    """Benchmark the rows at every mode.

    Raises:
        ValueError: Jetson modes on another machine, or modes of both kinds.
    """
    if args.modes and not shutil.which("nvpmodel"):
        raise ValueError(f"--modes {args.modes} needs a Jetson's nvpmodel: omit it, or use --thread-modes")
    if args.modes and args.thread_modes:
        raise ValueError("--modes and --thread-modes are mutually exclusive: pass one")
    settings = {**apply_speed_arguments(args), "table": args.table}
    path = args.results or RESULTS / f"{machine_name(args.device)}.json"
    rows: list[dict[str, Any]] = []
    for mode in args.modes or args.thread_modes or [None]:
        name = set_mode(mode, bool(args.modes))
        print(f"mode {name}", file=sys.stderr)
        entries = [
            Entry(row, {"table": row.table, "name": row.name, "mode": name})
            for row in select_rows([args.table], args.rows)
        ]
        log: list[str] = []
        for _ in measure_speed(entries, args, watch=partial(power_log, log)):
            pass
        done = [{**entry.values, "watts": mean_watts(log)} for entry in entries]
        environment = describe_environment(args.device)
        del environment["hardware"]["threads"]  # given by the mode
        save_rows(path, {"kind": "edge", "settings": settings, "environment": environment}, done, KEY)
        rows += done
    print(format_rows(rows))
    print(f"\nadded to {path}", file=sys.stderr)


def set_mode(mode: int | None, jetson: bool) -> str:
    """Set a power mode or number of threads and return its name."""
    if jetson:
        subprocess.run(["sudo", "nvpmodel", "-m", str(mode)], check=True, stdin=subprocess.DEVNULL)
        found = subprocess.run(["nvpmodel", "-q"], check=True, capture_output=True, text=True).stdout
        name = re.search(r"Power Mode: (\S+)", found)
        if not name:
            raise RuntimeError(f"nvpmodel -q reports no power mode: {found.strip()!r}")
        return name[1]
    if mode is not None:
        torch.set_num_threads(mode)
    return f"{torch.get_num_threads()} threads"


@contextmanager
def power_log(lines: list[str]) -> Iterator[None]:
    """Append the output of ``tegrastats`` inside the context, if available."""
    if not shutil.which("tegrastats"):
        yield
        return
    with tempfile.TemporaryFile("w+") as file:  # an unread pipe would block it
        process = subprocess.Popen(["tegrastats", "--interval", "200"], stdout=file)
        try:
            yield
        finally:
            process.terminate()
            process.wait()
            file.seek(0)
            lines.extend(file.read().splitlines())


def mean_watts(lines: Iterable[str]) -> float | None:
    """Return the mean power of a ``tegrastats`` log in watts, or None if it has none."""
    found = []
    for line in lines:
        rails = {name: int(milliwatts) for name, milliwatts in re.findall(r"(\w+) (\d+)(?:mW)?/\d+(?:mW)?", line)}
        total = next((rails[name] for name in TOTALS if name in rails), None)
        if total is None and all(name in rails for name in PARTS):
            total = sum(rails[name] for name in PARTS)
        if total is not None:
            found.append(total / 1000)
    return fmean(found) if found else None


def format_rows(rows: list[dict[str, Any]]) -> str:
    """Format a Markdown table with one line per model and mode."""
    header = ["model", "mode", "W", "images/s FP32", "speed-up FP32", "images/s AMP", "speed-up AMP"]
    lines = []
    for row in rows:
        speeds = [row.get(f"{key}_{kind}") for kind in EDGE for key in ("images_per_s", "speedup")]
        figures = ["" if value is None else f"{value:.3g}" for value in (row.get("watts"), *speeds)]
        lines.append([row["name"], row["mode"], *figures])
    return to_markdown(header, lines)
