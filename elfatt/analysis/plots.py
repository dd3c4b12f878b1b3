"""Plot results files: scaling curves, speed against accuracy, and edge devices."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from typing import Any

from elfatt.analysis.results import RESULTS, load_runs
from elfatt.analysis.rivals import RIVALS, published_top1
from elfatt.analysis.rows import TITLES, Row, select_rows

STYLES = {
    "nfa": (":", "o"),
    "fa": ("-", "s"),
    "sdpa": ("--", "^"),
    "plain": (":", "v"),
    "eager": ("--", "D"),
    "fp32": ("-", "o"),
    "amp": ("--", "s"),
}
MECHANISMS = ("elfatt", "global", "local", "effatt", "agent", "flatten")  # one colour each, the same in every figure
RIVAL_COLOURS = dict(zip(RIVALS, ("black", "dimgrey", "darkgrey", "saddlebrown", "olive", "teal"), strict=True))
ACCURACY = {1: "top1_percent", 6: "ap_box", 7: "miou_percent"}

ACCURACY_LABELS = {1: "top-1, %", 6: "box AP", 7: "mIoU, %"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the ``plot`` command."""
    add = parser.add_argument
    add("results", type=Path, nargs="*", help=f"results files (default: all of {RESULTS})")
    add("--folder", type=Path, help="output folder (default: that of the results file)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Draw every figure for which the files have rows.

    Raises:
        ValueError: There are no such rows.
    """
    drawn, files = [], args.results or sorted(RESULTS.glob("*.json"))
    for file in files:
        folder = args.folder or file.parent
        folder.mkdir(parents=True, exist_ok=True)
        runs = load_runs(file)
        for number, rows in enumerate(_join_sizes(runs), start=1):
            path = folder / f"{file.stem}-rivals-{number}.png"
            if draw_rivals(rows, path):
                drawn.append(path)
        for number, run in enumerate(runs, start=1):
            for name, draw in FIGURES.get(run["kind"], {}).items():
                path = folder / f"{file.stem}-{number}-{name}.png"
                if draw(run["rows"], path):
                    drawn.append(path)
    if not drawn:
        names = ", ".join(map(str, files)) or RESULTS
        raise ValueError(f"{names} has nothing to plot: run a benchmark first, such as `scaling`")
    print(*drawn, sep="\n")


def draw_scaling(rows: list[dict[str, Any]], path: Path) -> bool:
    """Plot latency and memory of every model against image size, on log-log axes."""
    quantities = {"latency_ms": "ms a pass", "peak_memory_mib": "peak memory, MiB", "counted_memory_mib": "live MiB"}
    shown = [key for key in quantities if len({_pixels(row) for row in rows if row.get(key)}) > 1]
    if not shown:
        return False
    figure, axes = pyplot().subplots(1, len(shown), figsize=(6 * len(shown), 4.5), layout="constrained", squeeze=False)
    for axis, key in zip(axes[0], shown, strict=True):
        for (model, attention), members in groupby(rows_by_model(rows), lambda row: (row["model"], row["attention"])):
            points = sorted((_pixels(row), row[key]) for row in members if row.get(key))
            line, marker = STYLES[attention]
            line = "-." if ":" in model else line
            label = f"{model} {_kind(attention)}"
            axis.loglog(*zip(*points, strict=True), line, marker=marker, ms=4, color=_colour(model), label=label)
            axis.lines[-1].set_markerfacecolor("white" if model.startswith("swin") else _colour(model))
        sizes = {_pixels(row): f"{row['height']}×{row['width']}" for row in rows}
        axis.set_xticks(list(sizes), list(sizes.values()), rotation=45)
        axis.minorticks_off()
        axis.set(xlabel="image, pixels", ylabel=quantities[key])
        axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize=7)
    return _save(figure, path)


def draw_rivals(rows: list[dict[str, Any]], path: Path) -> bool:
    """Plot published top-1 against images per second, one panel per image size; a line if none is published."""
    timed = [row for row in rows if "images_per_s" in row]
    if not any(row["model"] in RIVALS for row in timed):
        return False
    sizes = sorted({(row["height"], row["width"]) for row in timed}, key=lambda size: size[0] * size[1])
    figure, axes = pyplot().subplots(
        1, len(sizes), figsize=(3.4 * len(sizes) + 3, 4), layout="constrained", sharey=True, squeeze=False
    )
    for axis, size in zip(axes[0], sizes, strict=True):
        for row in rows_by_model(timed):
            if (row["height"], row["width"]) != size:
                continue
            model, speed = row["model"], row["images_per_s"]
            style, label = {"color": _colour(model)}, f"{model} {_kind(row['attention'])}".removesuffix(" FA")
            top1 = published_top1(model)
            if top1 is None:
                axis.axvline(speed, ls="-.", label=f"{label} (no published accuracy)", **style)
            else:
                marker = "s" if model in RIVALS else "D" if model.startswith("swin") else "o"
                axis.plot(speed, top1, marker, ms=7, ls="", label=label, **style)
        axis.set(title=f"{size[0]}×{size[1]}", xlabel="images/s")
        axis.margins(x=0.1)
        axis.set_xlim(left=0)
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("published top-1 at 224×224, %")
    entries = {label: line for axis in axes[0] for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(entries.values(), entries.keys(), loc="outside right upper", fontsize=8)
    return _save(figure, path)


def draw_tradeoff(rows: list[dict[str, Any]], path: Path) -> bool:
    """Plot accuracy against measured images per second, one panel per group of Tables I, VI and VII."""
    groups: dict[str, list[tuple[Row, dict]]] = {}
    for row, values in paired(rows):
        if row.table in ACCURACY and ("images_per_s_fa" in values or "images_per_s_nfa" in values):
            groups.setdefault(f"Table {row.table}: {row.group}", []).append((row, values))
    groups = {title: members for title, members in groups.items() if len(members) > 1}
    if not groups:
        return False
    figure, axes = pyplot().subplots(
        1, len(groups), figsize=(5 * len(groups), 4.2), layout="constrained", squeeze=False
    )
    for axis, (title, members) in zip(axes[0], groups.items(), strict=True):
        for row, values in members:
            cell = ACCURACY[row.table]
            accuracy, measured = float(row.published[cell]), cell in values
            for kind in ("nfa", "fa"):
                if f"images_per_s_{kind}" in values:
                    point = values[f"images_per_s_{kind}"], values.get(cell, accuracy)
                    axis.plot(*point, STYLES[kind][1], color=_colour(row.config), mfc=None if measured else "none")
                    axis.lines[-1].set_label(f"{row.model} {_kind(kind)}")
        axis.set(
            title=title, xlabel="images/s (here)", ylabel=ACCURACY_LABELS[members[0][0].table] + " (open: the paper's)"
        )
        axis.legend(fontsize=6)
        axis.grid(alpha=0.3)
    return _save(figure, path)


def draw_edge(rows: list[dict[str, Any]], path: Path) -> bool:
    """Plot images per second and speed-up over vanilla attention against power, or power mode."""
    kinds = [kind for kind in ("fp32", "amp") if any(f"images_per_s_{kind}" in row for row in rows)]
    if not kinds:
        return False
    figure, axes = pyplot().subplots(2, len(kinds), figsize=(5.5 * len(kinds), 7), layout="constrained", squeeze=False)
    powered = all(row.get("watts") for row in rows)
    for column, kind in zip(axes.T, kinds, strict=True):
        for axis, key, label in zip(
            column, ("images_per_s", "speedup"), ("images/s", "speed-up over GLOBAL"), strict=True
        ):
            for name, members in groupby(sorted(rows, key=lambda row: row["name"]), lambda row: row["name"]):
                points = [
                    (row["watts"] if powered else row["mode"], row[f"{key}_{kind}"])
                    for row in members
                    if f"{key}_{kind}" in row
                ]
                if points:
                    points = sorted(points) if powered else points
                    axis.plot(*zip(*points, strict=True), "o-", ms=4, color=_colour(name), label=name)
            axis.set(xlabel="power, W" if powered else "power mode", ylabel=f"{label} ({_kind(kind)})")
            axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize=7)
    return _save(figure, path)


FIGURES = {
    "scaling": {"scaling": draw_scaling},
    "tables": {"tradeoff": draw_tradeoff},
    "edge": {"edge": draw_edge},
}


def _join_sizes(runs: Iterable[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Join the rows of scaling runs of the same models at other sizes, whatever their batch and number of rounds."""
    found: dict[str, list] = {}
    for run in runs:
        if run["kind"] == "scaling":
            settings = {k: v for k, v in run["settings"].items() if k not in ("batch_size", "repeats", "warm_up")}
            models = sorted({(row["model"], row["attention"]) for row in run["rows"]})
            key, sizes = repr((settings, run["environment"], models)), {_pixels(row) for row in run["rows"]}
            if sizes & {_pixels(row) for row in found.get(key, [])}:
                key += f" {id(run)}"  # the same sizes again: a figure of its own
            found.setdefault(key, []).extend(run["rows"])
    return list(found.values())


def paired(rows: Iterable[dict[str, Any]]) -> list[tuple[Row, dict[str, Any]]]:
    """Return pairs of published and measured rows, in the paper's order."""
    values = {(row["table"], row["name"]): row for row in rows}
    found = [(row, values.get((row.table, row.name))) for row in select_rows(list(TITLES))]
    return [(row, measured) for row, measured in found if measured]


def rows_by_model(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Sort rows by model and attention."""
    return sorted(rows, key=lambda row: (row["model"], row["attention"]))


def _pixels(row: dict[str, Any]) -> int:
    return row["height"] * row["width"]


def _kind(attention: str) -> str:
    return attention.upper().replace("NFA", "nFA")


def _colour(name: str) -> str:
    if name in RIVAL_COLOURS:
        return RIVAL_COLOURS[name]
    parts = name.partition(":")[0].lower().replace("-", "_").split("_")
    known = next((i for i, mechanism in enumerate(MECHANISMS) if mechanism in parts), len(MECHANISMS))
    return f"C{known}"


def pyplot():
    """Import ``matplotlib.pyplot`` with the Agg backend."""
    try:
        import matplotlib
    except ImportError as error:
        raise RuntimeError("plots need matplotlib: pip install matplotlib") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _save(figure, path: Path) -> bool:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot().close(figure)
    return True
