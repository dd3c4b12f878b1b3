"""Compare Tables I to IX of the paper with measurements on this machine."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from elfatt.analysis.accuracy import evaluate
from elfatt.analysis.arguments import add_speed_arguments, apply_speed_arguments
from elfatt.analysis.environment import describe_environment, machine_name
from elfatt.analysis.memory import count_memory, fit_batch, measure_memory
from elfatt.analysis.results import RESULTS, format_number, save_rows, to_markdown, write_csv
from elfatt.analysis.rows import TITLES, Row, select_rows
from elfatt.analysis.timing import REFUSALS, RunSpec, check_numerics, numerics_shape, time_in_turns

# the paper's names: softmax attention as explicit products, or fused by the selected backend
KINDS: dict[str, dict[str, Any]] = {"nfa": {"backend": "math"}, "fa": {}}
EDGE = {"fp32": "float32", "amp": "amp"}  # columns of Tables VIII and IX
KEY = ("table", "name")


class Column(NamedTuple):
    """A quantity: heading, column in the paper's tables, key in the results, scale factor and decimals."""

    heading: str
    published: str | None
    key: str
    factor: float = 1
    decimals: int | None = None


COLUMNS = (
    Column("parameters, M", "params_m", "params", 1e-6, 0),
    Column("GMACs nFA", "gmacs_nfa", "macs_nfa", 1e-9, 2),
    Column("GMACs FA", "gmacs_fa", "macs_fa", 1e-9, 2),
    Column("GMACs true", None, "macs_true", 1e-9, 2),
    *(
        Column(f"{heading} {kind.upper().replace('NFA', 'nFA')}", f"{key}_{kind}", f"{key}_{kind}", 1, decimals)
        for heading, key, decimals in (
            ("images/s", "images_per_s", None),
            ("speed-up over the baseline", "speedup", 2),
            ("ms a pass", "latency_ms", None),
            ("batch", "batch_size", 0),
            ("peak memory, MiB,", "peak_memory_mib", 0),
            ("its batch", "memory_batch_size", 0),
        )
        for kind in (*KINDS, *EDGE)
    ),
    Column("top-1, %", "top1_percent", "top1_percent", 1, 1),
    Column("mIoU, %", "miou_percent", "miou_percent", 1, 1),
    Column("mAcc, %", "macc_percent", "macc_percent", 1, 1),
    *(
        Column(f"{what} {ap}", f"{ap.lower()}_{what}", f"{ap.lower()}_{what}", 1, 1)
        for what in ("box", "mask")
        for ap in ("AP", "AP50", "AP75")
    ),
)


@dataclass
class Entry:
    """A published row and its measurements."""

    row: Row
    values: dict[str, Any] = field(default_factory=dict)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the ``tables`` command."""
    add = parser.add_argument
    add("tables", nargs="*", type=int, default=list(TITLES), metavar="N", help="tables 1 to 9 (default: all)")
    add("--rows", nargs="+", metavar="PATTERN", help="models, such as 'CSWin-T*' or '*-ELFATT' (default: all)")
    add("--measure", nargs="+", choices=STEPS, default=["counts"], help="default: counts, without running models")
    add("--baseline", metavar="PATTERN", help="baseline row of speed-ups (default: vanilla attention's)")
    add_speed_arguments(parser)
    group = parser.add_argument_group("accuracy")
    add = group.add_argument
    add("--checkpoints", type=Path, help="folder of checkpoints named after their configs")
    add("--imagenet", type=Path, help="ImageNet-1K folder that contains val")
    add("--ade20k", type=Path, help="ADEChallengeData2016 folder")
    add("--coco", type=Path, help="COCO 2017 folder")
    group = parser.add_argument_group("output")
    add = group.add_argument
    add("--output", type=Path, nargs="+", default=[], metavar="FILE", help="write the tables as .md or .csv")
    add("--results", type=Path, help=f"results file to add to (default: {RESULTS}/MACHINE.json if models run)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Run the requested measurements and print them next to the published values."""
    for file in args.output:
        if file.suffix not in (".md", ".csv"):
            raise ValueError(f"--output {file} must end in .md or .csv")
    settings = apply_speed_arguments(args)
    entries = [Entry(row, {"table": row.table, "name": row.name}) for row in select_rows(args.tables, args.rows)]
    path = args.results
    if path is None and set(args.measure) != {"counts"}:
        path = RESULTS / f"{machine_name(args.device)}.json"
    head = {"kind": "tables", "settings": settings, "environment": describe_environment(args.device)}
    for measure in args.measure:
        for done in STEPS[measure](entries, args):
            if path:  # after every group, so that a killed run keeps its measurements
                save_rows(path, head, [entry.values for entry in done], KEY, FIELDS[measure])
    text = format_tables(entries)
    print(text)
    for file in args.output:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n") if file.suffix == ".md" else write_csv(file, long_rows(entries))
    if path:
        print(f"\nadded to {path}", file=sys.stderr)


def measure_counts(entries: list[Entry], args: argparse.Namespace) -> Iterator[list[Entry]]:
    """Count parameters and multiply-adds on the meta device."""

    def model(row: Row) -> str:  # rows can share a model
        return f"{row.timm_model()} {row.img_size}"

    rows = {model(entry.row): entry.row for entry in entries}
    workers = min(os.cpu_count() or 1, len(rows) // 8)  # starting a process takes as long as counting a few models
    with multiprocessing.get_context("spawn").Pool(workers) if workers > 1 else nullcontext() as pool:
        found = pool.imap(_count, rows.values()) if pool else map(_count, rows.values())
        progress = tqdm(found, "counts", total=len(rows), disable=None, leave=False)
        counts = dict(zip(rows, progress, strict=True))
    for entry in entries:
        entry.values.update(counts[model(entry.row)])
    yield entries


def _count(row: Row) -> dict[str, int]:
    return vars(row.count())


def measure_speed(
    entries: list[Entry], args: argparse.Namespace, watch: Callable[[], AbstractContextManager] = nullcontext
) -> Iterator[list[Entry]]:
    """Measure images per second; the rows of a group are timed in turns, inside the context of ``watch``."""
    for title, group in _groups(entries):
        print(f"speed: {title}", file=sys.stderr)
        passes: dict[tuple[str, str], Callable[[], torch.Tensor]] = {}
        chosen: dict[tuple[str, str], int] = {}
        for entry in group:
            model = entry.row.build(args.device)
            for kind, how in variants(entry.row, args).items():
                try:
                    check_numerics(entry.row.name, model, numerics_shape(entry.row.img_size), how)
                    batch, call = fit_row(entry.row, how, args, model)
                except REFUSALS as error:
                    print(f"{entry.row.name} ({kind}) is not timed: {error}", file=sys.stderr)
                    entry.values[f"refused_{kind}"] = str(error)
                    continue
                passes[entry.row.name, kind], chosen[entry.row.name, kind] = call, batch
        with watch():
            timings = time_in_turns(passes, args.repeats, args.warm_up, args.device)
        for entry in group:
            for kind in variants(entry.row, args):
                if (entry.row.name, kind) not in timings:
                    continue
                timing, batch = timings[entry.row.name, kind], chosen[entry.row.name, kind]
                entry.values |= {
                    f"batch_size_{kind}": batch,
                    f"latency_ms_{kind}": 1e3 * timing.median,
                    f"images_per_s_{kind}": batch / timing.median,
                    f"images_per_s_{kind}_quartiles": [batch / timing.high, batch / timing.low],
                }
        _compare(group, args.baseline)
        yield group


def _compare(group: list[Entry], pattern: str | None) -> None:
    """Add speed-ups over the baseline, if it is in the group and has the same batch size."""
    baseline = next((entry for entry in group if is_baseline(entry.row, pattern)), None)
    if baseline is None:
        return
    for entry in group:
        entry.values["speedup_over"] = baseline.row.name
        for kind in (*KINDS, *EDGE):
            key, batch = f"images_per_s_{kind}", f"batch_size_{kind}"
            if entry.values.get(batch) == baseline.values.get(batch) is not None:
                entry.values[f"speedup_{kind}"] = entry.values[key] / baseline.values[key]


def is_baseline(row: Row, pattern: str | None) -> bool:
    """Whether a row matches the pattern or, by default, has vanilla attention."""
    return row.fits(pattern) if pattern else row.is_vanilla


def measure_peak(entries: list[Entry], args: argparse.Namespace) -> Iterator[list[Entry]]:
    """Measure the peak memory of a forward pass."""
    for entry in tqdm(entries, "memory", disable=None, leave=False):
        for kind, how in variants(entry.row, args).items():
            try:
                # eager only: compilation adds memory of its own, and a graph's is allocated at capture
                eager = replace(how, compile=False, cuda_graph=False)
                batch, _ = fit_row(entry.row, eager, args)
                peak = measure_memory(partial(_build_pass, entry.row, eager, batch), args.device)
            except REFUSALS as error:
                print(f"{entry.row.name} ({kind}) is not measured: {error}", file=sys.stderr)
                continue
            entry.values |= {f"peak_memory_mib_{kind}": peak, f"memory_batch_size_{kind}": batch}
        yield [entry]


def fit_row(row: Row, how: RunSpec, args: argparse.Namespace, model: torch.nn.Module | None = None) -> tuple[int, Any]:
    """Run ``fit_batch`` for a row, starting from ``--batch-size`` or the paper's batch size."""
    needed = count_memory(row.build(), (1, 3, *row.img_size), how.backend, how.dtype)
    return fit_batch(row.name, needed, args.batch_size or row.batch_size, row.img_size, how, model)


def _build_pass(row: Row, how: RunSpec, batch: int):
    return how.prepare(row.build(how.device), (batch, 3, *row.img_size))


def measure_accuracy(entries: list[Entry], args: argparse.Namespace) -> Iterator[list[Entry]]:
    """Evaluate the checkpoints that exist."""
    folders = {"classification": args.imagenet, "segmentation": args.ade20k, "detection": args.coco}
    if not args.checkpoints or not args.checkpoints.is_dir():
        raise ValueError(f"--checkpoints {args.checkpoints} is not a folder: accuracy needs checkpoints and a dataset")
    for entry in entries:
        metrics = evaluate(entry.row, args.checkpoints, folders, args.device)
        if metrics:
            entry.values |= metrics
            yield [entry]


STEPS = {"counts": measure_counts, "speed": measure_speed, "memory": measure_peak, "accuracy": measure_accuracy}
FIELDS = {  # prefixes of the fields that each of them writes
    "counts": ("params", "macs_"),
    "speed": ("images_per_s_", "latency_ms_", "batch_size_", "speedup_", "refused_"),
    "memory": ("peak_memory_", "memory_batch_size_"),
    "accuracy": ("checkpoint", "top1_", "miou_", "macc_", "ap"),
}


def variants(row: Row, args: argparse.Namespace) -> dict[str, RunSpec]:
    """Return the run specs of a row by column of its table."""
    common: dict[str, Any] = {"device": args.device, "compile": args.compile, "cuda_graph": args.cuda_graphs}
    if row.is_edge:
        return {kind: RunSpec(precision=precision, **common) for kind, precision in EDGE.items()}
    return {
        kind: RunSpec(precision=args.precision, **backend, **common)
        for kind, backend in KINDS.items()
        if row.published.get(f"images_per_s_{kind}")  # a dash: no softmax attention, or none that can be fused
    }


def _groups(entries: list[Entry]) -> Iterator[tuple[str, list[Entry]]]:
    def group(entry: Entry) -> str:
        return f"table {entry.row.table}, {entry.row.group}"

    for title, members in groupby(sorted(entries, key=group), group):
        yield title, list(members)


def format_tables(entries: list[Entry]) -> str:
    """Format Markdown tables of published and measured values, with quartiles in brackets."""
    parts = []
    for number, members in groupby(entries, lambda entry: entry.row.table):
        group = list(members)
        header, lines = ["model"], [[entry.row.name] for entry in group]
        for column in COLUMNS:
            for source, cells in (("paper", _published(column, group)), ("here", _measured(column, group))):
                if any(cells):
                    header.append(f"{column.heading} ({source})")
                    for line, cell in zip(lines, cells, strict=True):
                        line.append(cell)
        parts.append(f"### Table {number}: {TITLES[number]}\n\n{to_markdown(header, lines)}")
    return "\n\n".join(parts)


def long_rows(entries: list[Entry]) -> Iterator[dict[str, Any]]:
    """Yield one dictionary per value: table, model, quantity, paper, here."""
    for entry in entries:
        for column in COLUMNS:
            paper, here = _published(column, [entry])[0], entry.values.get(column.key)
            if paper or here is not None:
                measured = "" if here is None else column.factor * here
                line = {"table": entry.row.table, "model": entry.row.name, "quantity": column.heading}
                yield {**line, "paper": paper, "here": measured}


def _published(column: Column, entries: list[Entry]) -> list[str]:
    if column.key.startswith("speedup_"):
        return [_published_speedup(entry, column.key.replace("speedup", "images_per_s")) for entry in entries]
    return [entry.row.published.get(column.published or "", "") for entry in entries]


def _published_speedup(entry: Entry, cell: str) -> str:
    """Compute the speed-up from the paper's images per second, as its tables print other ratios or none."""
    over = next((row for row in select_rows([entry.row.table]) if row.name == entry.values.get("speedup_over")), None)
    speeds = [row.published.get(cell, "") for row in (entry.row, over)] if over else [""]
    return f"{float(speeds[0]) / float(speeds[1]):.2f}" if all(speeds) else ""


def _measured(column: Column, entries: list[Entry]) -> list[str]:
    cells = []
    for entry in entries:
        value, spread = entry.values.get(column.key), entry.values.get(f"{column.key}_quartiles")
        cell = "" if value is None else format_number(column.factor * value, column.decimals)
        cells.append(f"{cell} ({format_number(spread[0])}–{format_number(spread[1])})" if spread else cell)
    return cells
