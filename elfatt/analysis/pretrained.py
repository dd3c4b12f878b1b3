"""Benchmark converted ViTs of timm against the unconverted model: speed and memory by resolution.

Weights are random, as speed does not depend on them. Each variant has its own copy of the model, with shared weights,
and variants are timed in turns.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

import elfatt
from elfatt.analysis.arguments import add_speed_arguments, apply_speed_arguments
from elfatt.analysis.complexity import count_true
from elfatt.analysis.diffusion import UNPATCHED, add_times, clock_of, format_times, log_call
from elfatt.analysis.diffusion_models import Meter, share_weights, total
from elfatt.analysis.environment import available_bytes, describe_environment, machine_name
from elfatt.analysis.memory import count_memory, measure_memory
from elfatt.analysis.results import RESULTS, format_number, save_rows, to_markdown
from elfatt.analysis.scaling import parse_size
from elfatt.analysis.timing import REFUSALS, RunSpec, summarize, time_in_turns
from elfatt.backbones.zoo import check_model
from elfatt.conversion import Plan
from elfatt.integrations import timm as adapter

KEY = ("model", "height", "width", "variant")
UNIFORM, CALIBRATED, NO_ATTENTION = "ELFATT", "ELFATT calibrated", "no attention"
VARIANTS = (UNPATCHED, UNIFORM, CALIBRATED, NO_ATTENTION)
DINOV2 = tuple(f"vit_{size}_patch14_reg4_dinov2" for size in ("small", "base", "large"))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the ``pretrained`` command."""
    add = parser.add_argument
    add("--models", nargs="+", default=list(DINOV2), metavar="NAME", help="of timm (default: DINOv2 with registers)")
    add("--sizes", nargs="+", default=["518", "1036"], metavar="SIZE", help="side or HEIGHTxWIDTH in pixels")
    add("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME", help=", ".join(VARIANTS))
    add("--block", type=int, default=8, help="block size of ELFATT in tokens (default: %(default)s)")
    text = "maximum share of attention's multiply-adds in the calibrated plan (default: %(default)s)"
    add("--budget", type=float, default=0.5, help=text)
    add("--memory", action="store_true", help="also measure peak memory, in fresh processes on a CPU")
    add("--results", type=Path, help=f"results file to add to (default: {RESULTS}/MACHINE.json)")
    add_speed_arguments(parser)
    parser.set_defaults(run=run, batch_size=1, warm_up=1, repeats=5, precision="float32")


def run(args: argparse.Namespace) -> None:
    """Benchmark every model at every size.

    Raises:
        TypeError: A model cannot be converted.
        ValueError: Unknown model, or a number out of range.
    """
    for name in args.models:
        check_model(name)
    if not 0 < args.budget <= 1:
        raise ValueError(f"--budget {args.budget} must be a share above 0 and at most 1")
    if UNPATCHED not in args.variants:
        args.variants.insert(0, UNPATCHED)
    settings = apply_speed_arguments(args) | {"block": args.block, "budget": args.budget}
    path = args.results or RESULTS / f"{machine_name(args.device)}.json"
    head = {"kind": "pretrained", "settings": settings, "environment": describe_environment(args.device)}
    rows = []
    for name in args.models:
        for size in map(parse_size, args.sizes):
            print(f"{name} at {size[0]}x{size[1]}", file=sys.stderr)
            row = {"model": name, "height": size[0], "width": size[1]}
            done = [row | {"variant": variant} | found for variant, found in measure(name, size, args).items()]
            save_rows(path, head, done, KEY)
            rows += done
    print(format_rows(rows))
    print(f"\nadded to {path}", file=sys.stderr)


def build(name: str, size: tuple[int, int], device: str) -> nn.Module:
    """Build a timm model for an image size, with random weights and in eval mode."""
    with torch.device(device):
        return timm.create_model(name, img_size=size, num_classes=0).eval().requires_grad_(False)


def convert(model: nn.Module, variant: str, plan: Plan | None, block: int) -> None:
    """Apply a variant to a model."""
    if variant == NO_ATTENTION:
        found = adapter.vit_of(model)
        found.handle(found, _values, found.layers)
    elif variant != UNPATCHED:
        elfatt.convert(model, plan, block=block)


def _calibrate(model, shape, budget):
    """Calibrate a plan without weighing layers, which is meaningless with random weights."""
    weight = next(model.parameters())
    image = torch.randn(1, *shape[1:], dtype=weight.dtype, device=weight.device)
    return adapter.calibrate(model, image, weigh=False).plan(cost=budget)


def _values(layer, q, k, v, size, **_):
    return v


def measure(name: str, size: tuple[int, int], args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Benchmark a model at one size and return the row of each variant."""
    how = RunSpec(args.device, args.precision, compile=args.compile, cuda_graph=args.cuda_graphs)
    shape = (args.batch_size, 3, *size)
    needed = count_memory(build(name, size, "meta"), shape, how.backend, how.dtype)
    if needed > (free := available_bytes(args.device)):
        text = f"skipped: it needs about {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"
        print(text, file=sys.stderr)
        return {variant: {"refused": text} for variant in args.variants}
    model = build(name, size, args.device).to(how.dtype)
    inside = not (args.compile or args.cuda_graphs)  # hooks break graphs
    rows: dict[str, dict[str, Any]] = {}
    passes: dict[str, Callable] = {}
    logs: dict[str, list] = {}
    for variant in args.variants:
        row = rows.setdefault(variant, {})
        try:
            plan = _calibrate(model, shape, args.budget) if variant == CALIBRATED else None
            row |= count(name, size, variant, plan, args)
            own = share_weights(model)
            convert(own, variant, plan, args.block)
            meter = Meter(adapter.vit_of(own).layers.values() if inside else [], clock_of(args.device))
            call = how.prepare(own, shape)
            call()
            logs[variant] = []
            passes[variant] = partial(log_call, call, meter, logs[variant])
            if args.memory:
                one = partial(_prepare, name, size, variant, plan, args.block, RunSpec(args.device, args.precision))
                row["peak_memory_mib"] = measure_memory(partial(one, shape), args.device)
        except (ValueError, *REFUSALS) as error:
            print(f"{variant} is not timed: {error}", file=sys.stderr)
            row["refused"] = str(error)
            passes.pop(variant, None)
    timings = time_in_turns(passes, args.repeats, args.warm_up, args.device)
    add_times("forward", timings, rows)
    for variant, timing in timings.items():
        rows[variant]["images_per_s"] = args.batch_size / timing.median
    if inside:
        add_times("attention", {v: summarize(map(total, logs[v][args.warm_up :])) for v in timings}, rows)
    return rows


def count(
    name: str, size: tuple[int, int], variant: str, plan: Plan | None, args: argparse.Namespace
) -> dict[str, float]:
    """Count the multiply-adds of one image and of its attention layers, and the live MiB of a forward pass."""
    model = build(name, size, "meta")
    convert(model, variant, plan, args.block)
    with count_true() as read:
        meter = Meter(adapter.vit_of(model).layers.values(), read)
        model(torch.empty(1, 3, *size, device="meta"))
        found = {"macs": read(), "attention_macs": total(meter.take())}
    how = RunSpec(args.device, args.precision)
    model = build(name, size, "meta")
    convert(model, variant, plan, args.block)
    memory = count_memory(model, (args.batch_size, 3, *size), how.backend, how.dtype)
    return found | {"counted_memory_mib": memory / 2**20}


def _prepare(name, size, variant, plan, block, how, shape):
    """Build and prepare in a fresh process, for memory measurement."""
    model = build(name, size, how.device)
    convert(model, variant, plan, block)
    return how.prepare(model, shape)


COLUMNS = {
    "images/s": lambda row: format_number(row.get("images_per_s")),
    "ms (quartiles)": lambda row: format_times(row, "forward"),
    "speed-up": lambda row: f"{row['forward_speedup']:.2f}×" if "forward_speedup" in row else "",
    "attention layers, ms (quartiles)": lambda row: format_times(row, "attention"),
    "speed-up of them": lambda row: f"{row['attention_speedup']:.2f}×" if "attention_speedup" in row else "",
    "GMACs": lambda row: format_number(row["macs"] / 1e9) if "macs" in row else "",
    "peak memory, MiB": lambda row: format_number(row.get("peak_memory_mib")),
    "counted, MiB": lambda row: format_number(row.get("counted_memory_mib")),
}


def format_rows(rows: list[dict[str, Any]]) -> str:
    """Format a Markdown table with one line per model, size and variant, then the break-even sizes."""
    lines = [
        [f"{row['model']} at {row['height']}×{row['width']}", row["variant"], *(c(row) for c in COLUMNS.values())]
        for row in rows
    ]
    return "\n".join([to_markdown(["model", "variant", *COLUMNS], lines), "", *pays_from(rows)])


def pays_from(rows: list[dict[str, Any]]) -> list[str]:
    """Return, per model, the size from which each variant beats the unconverted model, beyond the quartiles."""
    found: dict[str, dict[str, list]] = {}
    for row in rows:
        if "forward_ms" in row:
            found.setdefault(row["model"], {}).setdefault(row["variant"], []).append(row)
    lines = []
    for model, variants in found.items():
        unpatched = {(row["height"], row["width"]): row for row in variants.get(UNPATCHED, [])}
        texts = []
        for variant in (UNIFORM, CALIBRATED):
            faster = None
            for row in sorted(variants.get(variant, []), key=lambda row: row["height"] * row["width"]):
                other = unpatched[row["height"], row["width"]]
                wins = row["forward_ms_quartiles"][1] < other["forward_ms_quartiles"][0]
                faster = (faster or f"{row['height']}×{row['width']}") if wins else None
            if variant in variants:
                texts.append(f"{variant} from {faster} on" if faster else f"{variant} at none of these sizes")
        lines.append(f"{model} is faster with {', '.join(texts)}.")
    return lines
