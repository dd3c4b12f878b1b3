"""Options of the speed benchmarks and their validation."""

from __future__ import annotations

import argparse
from typing import Any, NamedTuple

import torch

from elfatt.analysis.timing import PRECISIONS
from elfatt.ops import BACKENDS, active_backend, set_default_backend


class Protocol(NamedTuple):
    """Settings of a speed benchmark; a batch size of None means the row's own."""

    batch_size: int | None
    precision: str
    warm_up: int
    repeats: int


LEAST = {"threads": 1, "batch_size": 1, "repeats": 1, "warm_up": 0, "block": 1, "min_tokens": 0, "steps": 1}
PROTOCOLS = {"paper": Protocol(None, "amp", 10, 100), "timm": Protocol(256, "float32", 10, 40)}


def add_speed_arguments(parser: argparse.ArgumentParser, precision: bool = True) -> None:
    """Add the options of speed benchmarks, with or without ``--precision``."""
    add = parser.add_argument_group("speed").add_argument
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    add("--threads", type=int, help="number of CPU threads")
    text = "backend of the attention operations, except for nFA (default: %(default)s)"
    add("--backend", choices=BACKENDS, default=active_backend(), help=text)
    add("--protocol", choices=PROTOCOLS, default="paper", help="defaults of the next four options (default: paper)")
    add("--batch-size", type=int, help="batch size, halved until it fits in memory")
    if precision:
        add("--precision", choices=PRECISIONS, help="amp: float16 on a GPU, bfloat16 on a CPU")
    add("--warm-up", type=int, help="warm-up rounds")
    add("--repeats", type=int, help="timed rounds")
    add("--compile", action="store_true", help="torch.compile the models")
    add("--cuda-graphs", action="store_true", help="capture each forward pass in a CUDA graph and replay it")
    add("--tf32", action="store_true", help="use TF32 for float32 products on a GPU")
    add("--cudnn-benchmark", action="store_true", help="let cuDNN benchmark its algorithms")


def apply_speed_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """Apply the protocol's defaults, set the backend and threads, and return the settings for the results.

    Raises:
        ValueError: A number is too small, or the backend is not supported.
    """
    set_default_backend(args.backend, args.device)
    protocol = PROTOCOLS[args.protocol]._asdict()
    for name, value in protocol.items():
        if name in args and getattr(args, name) is None:
            setattr(args, name, value)
    check_numbers(args)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.tf32:
        torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = args.tf32
    torch.backends.cudnn.benchmark = args.cudnn_benchmark
    names = ("device", *protocol, "compile", "cuda_graphs", "tf32", "cudnn_benchmark")
    return {name: getattr(args, name) for name in names if name in args}


def check_numbers(args: argparse.Namespace) -> None:
    """Check the lower bounds of numeric options.

    Raises:
        ValueError: A number is too small; the message names the option.
    """
    for name, least in LEAST.items():
        value = getattr(args, name, None)
        if value is not None and value < least:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {least}, got {value}")
