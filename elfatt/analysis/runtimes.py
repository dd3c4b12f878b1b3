"""Benchmark the models of Tables VIII and IX in other runtimes against eager and compiled PyTorch.

They are timed in turns in float32 with the same number of threads, except TensorRT, which is timed by ``trtexec``.
Speed-ups are over GLOBAL in the same runtime.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from elfatt import __version__
from elfatt.analysis.arguments import add_speed_arguments, apply_speed_arguments
from elfatt.analysis.edge import set_mode
from elfatt.analysis.environment import describe_environment, machine_name
from elfatt.analysis.results import RESULTS, format_number, save_rows, to_markdown
from elfatt.analysis.rows import Row, select_rows
from elfatt.analysis.tables import fit_row
from elfatt.analysis.timing import RunSpec, check_numerics, numerics_shape, random_images, time_in_turns
from elfatt.export import RUNTIMES, export
from elfatt.export.runtimes import trtexec

KEY = ("table", "name", "runtime", "mode")
PYTORCH: dict[str, dict[str, Any]] = {  # eager PyTorch ops, this package's kernels, and both compiled
    "eager": {"backend": "sdpa"},
    "kernels": {},
    "compiled": {"backend": "sdpa", "compile": True},
    "compiled kernels": {"compile": True},
}
EXPORTED = ("onnx", "openvino", "tensorrt")
TRT_MEDIAN = re.compile(r"GPU Compute Time:.*?median = ([\d.]+) ms")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the ``runtimes`` command."""
    add = parser.add_argument
    add("table", type=int, choices=(8, 9), help="8: batch 128; 9: batch 1")
    add("--rows", nargs="+", metavar="PATTERN", help="models, such as '*-ELFATT' (default: all)")
    add("--runtimes", nargs="+", choices=(*PYTORCH, *EXPORTED), help="default: all available on this device")
    add("--modes", nargs="+", type=int, help="nvpmodel modes of a Jetson (default: the current one)")
    add("--folder", type=Path, default=Path("runs/exports"), help="exported files, reused (default: %(default)s)")
    add("--results", type=Path, help=f"results file to add to (default: {RESULTS}/MACHINE.json)")
    add_speed_arguments(parser, precision=False)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Export the models and time every runtime at every mode.

    Raises:
        ValueError: Jetson modes on another machine, ``--compile`` or ``--cuda-graphs``.
    """
    if args.modes and not shutil.which("nvpmodel"):
        raise ValueError(f"--modes {args.modes} needs a Jetson's nvpmodel: omit it")
    if args.compile or args.cuda_graphs:
        raise ValueError("--compile and --cuda-graphs do not apply: choose columns with --runtimes")
    settings = {**apply_speed_arguments(args), "table": args.table}
    path = args.results or RESULTS / f"{machine_name(args.device)}.json"
    chosen = args.runtimes or [*PYTORCH, *EXPORTED]
    rows: list[dict[str, Any]] = []
    for mode in args.modes or [None]:
        name = set_mode(mode, bool(args.modes))
        done = measure(select_rows([args.table], args.rows), chosen, name, args)
        head = {"kind": "runtimes", "settings": settings, "environment": describe_environment(args.device)}
        save_rows(path, head, done, KEY)
        rows += done
    print(format_rows(rows))
    print(f"\nadded to {path}", file=sys.stderr)


def measure(models: list[Row], runtimes: list[str], mode: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Benchmark every model in every runtime; rows that cannot run contain the reason instead."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    passes: dict[tuple[str, str], Callable[[], Any]] = {}
    said: set[str] = set()
    for model in models:
        for runtime in runtimes:
            key = model.name, runtime
            rows[key] = {"table": model.table, "name": model.name, "runtime": runtime, "mode": mode}
            # exported models use explicit attention
            how = RunSpec(args.device, **PYTORCH.get(runtime, {"backend": "math"}))
            try:
                batch = rows[key]["batch_size"] = fit_row(model, how, args)[0]
                passes[key] = prepare(model, runtime, batch, args)
                if runtime != "tensorrt":  # trtexec warms up by itself
                    passes[key]()
            except Exception as error:  # runtimes raise types of their own
                rows[key]["refused"] = reason = " ".join(str(error).split()) or type(error).__name__
                passes.pop(key, None)
                if reason not in said:  # one line per missing runtime
                    print(f"{runtime}: {reason}", file=sys.stderr)
                    said.add(reason)
    engines = {key: passes.pop(key) for key in list(passes) if key[1] == "tensorrt"}
    timings = time_in_turns(passes, args.repeats, args.warm_up, args.device)
    for key, timing in timings.items():
        batch = rows[key]["batch_size"]
        rows[key]["images_per_s"] = batch / timing.median
        rows[key]["images_per_s_quartiles"] = [batch / timing.high, batch / timing.low]
    for key, engine in engines.items():
        try:
            rows[key]["images_per_s"] = rows[key]["batch_size"] / engine()
        except RuntimeError as error:
            rows[key]["refused"] = str(error)
            print(f"tensorrt: {error}", file=sys.stderr)
    for (_, runtime), row in rows.items():
        vanilla = next((rows[m.name, runtime] for m in models if m.is_vanilla), {})
        if "images_per_s" in row and "images_per_s" in vanilla and row["batch_size"] == vanilla["batch_size"]:
            row["speedup"] = row["images_per_s"] / vanilla["images_per_s"]
    return list(rows.values())


def prepare(model: Row, runtime: str, batch: int, args: argparse.Namespace) -> Callable[[], object]:
    """Return a function that runs a model once; for TensorRT it returns the seconds of a forward pass."""
    shape = (batch, 3, *model.img_size)
    if runtime in PYTORCH:
        how = RunSpec(args.device, **PYTORCH[runtime])
        module = model.build(args.device)
        check_numerics(model.name, module, numerics_shape(model.img_size), how)
        return how.prepare(module, shape)
    if args.device == "cuda" and runtime in ("onnx", "openvino"):
        raise ValueError(f"{runtime} runs on the CPU: pass --device cpu")
    if runtime == "tensorrt" and args.device != "cuda":
        raise ValueError("tensorrt runs on the GPU: pass --device cuda")
    RUNTIMES[runtime].check()
    tuned = f"-batch{batch}" if runtime == "tensorrt" else ""
    path = args.folder / f"{model.config}-{__version__}-torch{torch.__version__}{tuned}{RUNTIMES[runtime].suffix}"
    if path.exists():
        print(f"{path} is reused: delete it to export again", file=sys.stderr)
    else:
        torch.manual_seed(0)
        export(model.build("cpu"), runtime, path, model.img_size, batch_size=batch)
    if runtime == "tensorrt":
        return partial(engine_seconds, path, shape)
    return partial(RUNTIMES[runtime].load(path), random_images(shape, "cpu", torch.float32))


def engine_seconds(path: Path, shape: tuple[int, ...]) -> float:
    """Return the median seconds of a TensorRT engine's forward pass, measured by ``trtexec``."""
    found = TRT_MEDIAN.search(trtexec([f"--loadEngine={path}", f"--shapes=image:{'x'.join(map(str, shape))}"]))
    if not found:
        raise RuntimeError(f"trtexec printed no median GPU compute time for {path}")
    return float(found[1]) / 1e3


def format_rows(rows: list[dict[str, Any]]) -> str:
    """Format a Markdown table of images/s and speed-ups, a line per model and mode, a column per runtime."""
    runtimes = list(dict.fromkeys(row["runtime"] for row in rows if "images_per_s" in row))
    cells = {(row["name"], row["mode"], row["runtime"]): row for row in rows}
    lines = []
    for name, mode in dict.fromkeys((row["name"], row["mode"]) for row in rows):
        found = [cells.get((name, mode, runtime), {}) for runtime in runtimes]
        lines.append([name, mode, *map(_cell, found)])
    return to_markdown(["model, images/s", "mode", *runtimes], lines)


def _cell(row: dict[str, Any]) -> str:
    if "images_per_s" not in row:
        return ""
    low, high = row.get("images_per_s_quartiles", (None, None))
    spread = f" ({format_number(low)}–{format_number(high)})" if low else ""
    return format_number(row["images_per_s"]) + spread + (f", {row['speedup']:.2f}×" if "speedup" in row else "")
