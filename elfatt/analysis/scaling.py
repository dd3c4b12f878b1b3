"""Benchmark latency and peak memory of any models over the resolution."""

from __future__ import annotations

import argparse
import ast
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch

import elfatt  # noqa: F401  registers the models
from elfatt.analysis.arguments import add_speed_arguments, apply_speed_arguments
from elfatt.analysis.environment import describe_environment, machine_name
from elfatt.analysis.memory import count_memory, fit_batch, measure_memory
from elfatt.analysis.results import RESULTS, format_number, save_rows, to_markdown
from elfatt.analysis.rivals import RIVALS
from elfatt.analysis.tables import KINDS
from elfatt.analysis.timing import REFUSALS, RunSpec, check_numerics, numerics_shape, time_in_turns
from elfatt.backbones.zoo import MODELS, check_model

DEFAULT_MODELS = [name for name in MODELS if name.startswith("cswin_tiny_")]
AGAINST_RIVALS = ["cswin_tiny_elfatt", "cswin_tiny_elfatt:levels=EEEE", "cswin_tiny_local", "swin_tiny_elfatt"]
DEFAULT_SIZES = ["224", "384", "512", "768", "1024", "1536", "2048"]
# sdpa: fused by PyTorch only, without this package's kernels; plain: unoptimised ELFATT; eager: fa, ignoring --compile
WAYS: dict[str, dict[str, Any]] = {
    **KINDS,
    "sdpa": {"backend": "sdpa"},
    "plain": {"backend": "plain"},
    "eager": {"compile": False},
}
HELP = (
    "softmax attention explicit (nfa), fused (fa) or fused by PyTorch only (sdpa); unoptimised ELFATT (plain); "
    "fa without --compile (eager)"
)
KEY = ("model", "attention", "height", "width")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the ``scaling`` command."""
    add = parser.add_argument
    text = "timm models with options, e.g. cswin_tiny_elfatt:levels=EEEE (default: CSWin-T with each attention; "
    add("--models", nargs="+", metavar="NAME", help=f"{text}with --rivals {', '.join(AGAINST_RIVALS)})")
    add("--rivals", action="store_true", help="add alternatives from timm, such as ConvNeXt-T")
    add("--baseline", metavar="NAME", help="baseline of speed-ups (default: vanilla attention, or the first)")
    add("--sizes", nargs="+", default=DEFAULT_SIZES, metavar="SIZE", help="side or HEIGHTxWIDTH in pixels")
    add("--attention", nargs="+", choices=WAYS, default=list(KINDS), help=HELP)
    add("--backward", action="store_true", help="include the backward pass, as in training")
    add("--memory", action="store_true", help="measure peak memory instead of only counting it")
    add("--count-only", action="store_true", help="only count memory, without running models")
    add("--plot", type=Path, metavar="FILE", help="plot the curves to a .png or .svg file")
    add("--results", type=Path, help=f"results file to add to (default: {RESULTS}/MACHINE.json)")
    add_speed_arguments(parser)
    parser.set_defaults(run=run, batch_size=1)


def run(args: argparse.Namespace) -> None:
    """Benchmark every model at every size; models at one size are timed in turns."""
    args.models = args.models or (AGAINST_RIVALS if args.rivals else DEFAULT_MODELS)
    if args.rivals:
        args.models = list(dict.fromkeys([*args.models, *RIVALS]))
    for text in args.models:
        check_model(parse_model(text)[0])
    baseline = args.baseline or next((name for name in args.models if name.endswith("_global")), args.models[0])
    if baseline not in args.models:
        raise ValueError(f"--baseline {baseline} must be one of the models {', '.join(args.models)}")
    sizes = [parse_size(text) for text in args.sizes]
    if args.plot and args.plot.suffix not in (".png", ".svg", ".pdf"):
        raise ValueError(f"--plot {args.plot} must end in .png, .svg or .pdf")
    settings = {**apply_speed_arguments(args), "baseline": baseline, "backward": args.backward}
    path = args.results or (None if args.count_only else RESULTS / f"{machine_name(args.device)}.json")
    head = {"kind": "scaling", "settings": settings, "environment": describe_environment(args.device)}
    rows = []
    for size in sizes:
        print(f"{size[0]}x{size[1]} pixels", file=sys.stderr)
        done = measure_size(size, baseline, args)
        if path:
            save_rows(path, head, done, KEY)
        rows += done
    print(format_rows(rows))
    if args.plot:
        from elfatt.analysis.plots import draw_scaling

        draw_scaling(rows, args.plot)
    if path:
        print(f"\nadded to {path}", file=sys.stderr)


def parse_model(text: str) -> tuple[str, dict[str, Any]]:
    """Parse ``NAME:KEY=VALUE:…`` into a timm name and options.

    Raises:
        ValueError: An option has no value.
    """
    name, *options = text.split(":")
    found = {}
    for option in options:
        key, equals, value = option.partition("=")
        if not (key and equals):
            raise ValueError(f"model {text!r} must be NAME:KEY=VALUE, such as cswin_tiny_elfatt:levels=EEEE")
        try:
            found[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            found[key] = value
    return name, found


def parse_size(text: str) -> tuple[int, int]:
    """Parse ``224`` or ``512x2048`` into height and width.

    Raises:
        ValueError: Invalid size.
    """
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(part.isdecimal() and int(part) >= 32 for part in parts):
        raise ValueError(f"size {text!r} must be a side or HEIGHTxWIDTH of at least 32 pixels, such as 512x2048")
    return int(parts[0]), int(parts[-1])


def measure_size(size: tuple[int, int], baseline: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Benchmark every model and attention at one size; refused rows contain the reason instead of a latency."""
    rows: list[dict[str, Any]] = []
    passes: dict[tuple[str, str], Callable[[], torch.Tensor]] = {}
    for name in args.models:
        build = partial(_build, name, size)
        model = None if args.count_only else build(args.device)
        for attention in args.attention:
            options = {"compile": args.compile, "cuda_graph": args.cuda_graphs, "backward": args.backward}
            how = RunSpec(args.device, args.precision, **options | WAYS[attention])
            row = {"model": name, "attention": attention, "height": size[0], "width": size[1]}
            rows.append(row)
            label = f"{name} ({attention})"
            try:
                needed = count_memory(build("meta"), (1, 3, *size), how.backend, how.dtype, how.backward)
                row["counted_memory_mib"] = needed / 2**20
                if model is None:
                    continue
                if name not in RIVALS:  # independent of the backend
                    check_numerics(label, model, numerics_shape(size), how)
                batch, passes[name, attention] = fit_batch(label, needed, args.batch_size, size, how, model)
                row["batch_size"] = batch
                if args.memory:
                    eager = replace(how, compile=False, cuda_graph=False)
                    call = partial(_prepare, build, eager, (batch, 3, *size))
                    row["peak_memory_mib"] = measure_memory(call, args.device)
            except REFUSALS as error:
                print(f"{label} is not timed: {error}", file=sys.stderr)
                row["refused"] = str(error)
    timings = time_in_turns(passes, args.repeats, args.warm_up, args.device)
    by_key = {(row["model"], row["attention"]): row for row in rows}
    for key, timing in timings.items():
        row = by_key[key]
        row |= {"latency_ms": 1e3 * timing.median, "images_per_s": row["batch_size"] / timing.median}
        row["latency_ms_quartiles"] = [1e3 * timing.low, 1e3 * timing.high]
    for (_, attention), row in by_key.items():
        reference = by_key[baseline, attention]
        timed = "images_per_s" in row and "images_per_s" in reference
        if timed and row["batch_size"] == reference["batch_size"]:
            row["speedup"] = row["images_per_s"] / reference["images_per_s"]
    for (name, _), row in by_key.items():
        plain = by_key.get((name, "plain"), {})
        if "images_per_s" in row and plain.get("batch_size") == row["batch_size"]:
            row["over_plain"] = row["images_per_s"] / plain["images_per_s"]
    return rows


def format_rows(rows: list[dict[str, Any]]) -> str:
    """Format a Markdown table with one line per model, attention and size."""
    over_plain = ["over plain"] if any("over_plain" in row for row in rows) else []
    memory = ["peak memory, MiB", "counted, MiB"]
    header = ["model", "size", "ms", "quartiles", "images/s", "speed-up", *over_plain, *memory]
    lines = []
    for row in rows:
        low, high = row.get("latency_ms_quartiles", ("", ""))
        lines.append(
            [
                f"{row['model']} {row['attention'].upper().replace('NFA', 'nFA')}",
                f"{row['height']}×{row['width']}",
                format_number(row.get("latency_ms")),
                f"{format_number(low)}–{format_number(high)}" if low else "",
                format_number(row.get("images_per_s")),
                f"{row['speedup']:.2f}" if "speedup" in row else "",
                *(f"{row['over_plain']:.2f}" if "over_plain" in row else "" for _ in over_plain),
                format_number(row.get("peak_memory_mib")),
                format_number(row.get("counted_memory_mib")),
            ]
        )
    return to_markdown(header, lines)


def _build(text: str, size: tuple[int, int], device: str) -> torch.nn.Module:
    name, options = parse_model(text)
    with torch.device(device):
        if name in RIVALS and "window" in name:  # timm's Swin is built for one size
            options["img_size"] = size
        return timm.create_model(name, **options).eval()


def _prepare(build, how: RunSpec, shape: tuple[int, ...]):
    return how.prepare(build(how.device), shape)
