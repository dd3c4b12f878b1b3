"""Benchmark the ELFATT operation: speed-up of each backend over plain PyTorch, and share of the copy bandwidth."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map

from elfatt.analysis.arguments import check_numbers
from elfatt.analysis.environment import describe_environment, machine_name
from elfatt.analysis.results import RESULTS, save_rows, to_markdown
from elfatt.analysis.timing import WrongOutput, compile_for_timing, record_graph, time_in_turns
from elfatt.ops import BACKENDS, elfatt_attention, use_backend

# height, width, channels, heads per branch, block size: CSWin-T's stages at 224² and 512×2048
SHAPES = {
    "224 level 1": (56, 56, 64, 1, 7),
    "224 level 2": (28, 28, 128, 2, 7),
    "224 level 3": (14, 14, 256, 4, 14),
    "dense level 1": (128, 512, 64, 1, 14),
    "dense level 2": (64, 256, 128, 2, 14),
    "dense level 3": (32, 128, 256, 4, 14),
}
# minimum traffic of a fused op in units of one branch's q, k or v, by backward
FUSED_UNITS = {False: 9, True: 25}
COPY_BYTES = 2**28
CHECKED = ("output", "gradient of qkv", *("gradient of LePE",) * 4)
KEY = ("shape", "variant")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the ``op`` command."""
    add = parser.add_argument
    add(
        "--backends",
        nargs="+",
        default=["auto", "sdpa", "math"],
        choices=[name for name in BACKENDS if name != "plain"],
        help="backends to compare with plain PyTorch",
    )
    add("--shapes", nargs="+", default=list(SHAPES), choices=SHAPES, metavar="NAME", help=", ".join(SHAPES))
    add("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    add("--threads", type=int, help="number of CPU threads")
    add("--batch-size", type=int, default=8, help="batch size of the 224² shapes; 1 for dense ones")
    add("--backward", action="store_true", help="include the backward pass")
    add("--compile", action="store_true", help="torch.compile every variant, including plain")
    add("--cuda-graphs", action="store_true", help="capture each call in a CUDA graph and replay it")
    add("--repeats", type=int, default=20, help="timed rounds")
    add("--results", type=Path, help=f"results file to add to (default: {RESULTS}/MACHINE.json)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Benchmark every shape and print the table."""
    check_numbers(args)
    if args.threads:
        torch.set_num_threads(args.threads)
    names = ("dtype", "batch_size", "backward", "compile", "cuda_graphs", "repeats", "device")
    settings = {name: getattr(args, name) for name in names}
    path = args.results or RESULTS / f"{machine_name(args.device)}.json"
    head = {"kind": "op", "settings": settings, "environment": describe_environment(args.device)}
    rows = []
    for shape in args.shapes:
        done = measure_shape(shape, args)
        save_rows(path, head, done, KEY)
        rows += done
    print(format_rows(rows))
    print(f"\nadded to {path}", file=sys.stderr)


def measure_shape(shape: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Benchmark one shape: plain PyTorch, then the backends whose error is at most twice that of plain PyTorch.

    Raises:
        WrongOutput: No backend has correct outputs and gradients.
    """
    h, w, c, heads, side = SHAPES[shape]
    batch = 1 if shape.startswith("dense") else args.batch_size
    dtype, generator = getattr(torch, args.dtype), torch.Generator().manual_seed(0)

    def draw(*size):
        return torch.randn(*size, generator=generator).to(args.device, dtype)

    qkv = draw(batch, h, w, 3 * c)
    options = {"num_heads": (heads, heads), "global_channels": c // 2, "block_size": side}
    lepe = {name: (draw(c // 2, 1, 3, 3), draw(c // 2)) for name in ("lepe_global", "lepe_local")}
    upstream = draw(batch, h, w, c)

    def prepare(backend: str, dtype: torch.dtype = dtype) -> Callable[[], list[torch.Tensor]]:
        call = compile_for_timing(elfatt_attention) if args.compile else elfatt_attention
        x, own = tree_map(lambda t: t.to(dtype).detach().requires_grad_(args.backward), (qkv, lepe))
        inputs, grad = tree_leaves((x, own)), upstream.to(dtype)

        def run():
            with use_backend(backend), torch.set_grad_enabled(args.backward):
                out = call(x, **options, **own)
                return [out, *torch.autograd.grad(out, inputs, grad)] if args.backward else [out]

        return record_graph(run) if args.cuda_graphs else run

    truth = prepare("plain", torch.float64)()
    variants = {"plain": prepare("plain")}
    allowed = [error_of(*pair) for pair in zip(variants["plain"](), truth, strict=True)]
    for backend in args.backends:
        call = prepare(backend)
        errors = [error_of(*pair) for pair in zip(call(), truth, strict=True)]
        wrong = [
            f"{what} of {backend} at {shape} is off by {error:.1e} in {args.dtype}, plain PyTorch by {limit:.1e}"
            for what, error, limit in zip(CHECKED, errors, allowed, strict=False)
            if not error <= 2 * limit + 10 * torch.finfo(torch.float32).eps
        ]
        if wrong:
            print(f"{wrong[0]}: not timed", file=sys.stderr)
        else:
            variants[backend] = call
    if len(variants) == 1:
        raise WrongOutput(f"no backend to compare with plain PyTorch at {shape}")
    del truth
    source = torch.ones(COPY_BYTES, dtype=torch.uint8, device=args.device)
    target = torch.empty_like(source)
    calls = {**variants, "copy": lambda: target.copy_(source)}
    timings = time_in_turns(calls, args.repeats, device=args.device)
    bandwidth = 2 * COPY_BYTES / timings.pop("copy").median
    moved = FUSED_UNITS[args.backward] * batch * h * w * (c // 2) * dtype.itemsize
    return [
        {
            "shape": shape,
            "variant": name,
            "microseconds": 1e6 * timing.median,
            "microseconds_quartiles": [1e6 * timing.low, 1e6 * timing.high],
            "speedup": timings["plain"].median / timing.median,
            "fused_bytes": moved,
            "share_of_copy_bandwidth": moved / timing.median / bandwidth,
        }
        for name, timing in timings.items()
    ]


def error_of(found: torch.Tensor, truth: torch.Tensor) -> float:
    """Return the relative error in the Frobenius norm."""
    return ((found.double() - truth).norm() / truth.norm()).item()


def format_rows(rows: list[dict[str, Any]]) -> str:
    """Format a Markdown table with one line per shape and variant."""
    header = ["shape", "variant", "µs", "quartiles", "over plain", "share of the copy bandwidth"]
    lines = []
    for row in rows:
        low, high = row["microseconds_quartiles"]
        share = f"{row['share_of_copy_bandwidth']:.0%}"
        figures = [f"{row['microseconds']:.0f}", f"{low:.0f}–{high:.0f}", f"{row['speedup']:.2f}×", share]
        lines.append([row["shape"], row["variant"], *figures])
    return to_markdown(header, lines)
