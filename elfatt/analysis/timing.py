"""Interleaved timing: variants take turns, so that background load affects them equally.

Results are medians and quartiles. Variants with wrong output are not timed, see ``check_numerics``.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Hashable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import lru_cache
from statistics import median, quantiles
from typing import TypeVar

import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

from elfatt.ops import active_backend, use_backend

PEAKED = 8  # scale of the q, k and v weights in check_numerics
PRECISIONS = ("float32", "amp", "float16", "bfloat16")
Name = TypeVar("Name", bound=Hashable)
Output = TypeVar("Output")


class WrongOutput(RuntimeError):
    """A variant's output is wrong, so its speed is meaningless."""


# reasons to skip a variant: wrong, too large, or not supported by the device in this precision
REFUSALS = (WrongOutput, MemoryError, RuntimeError, AssertionError)
NUMERICS_SIDE = 224  # maximum image size in check_numerics, in pixels


@dataclass(frozen=True)
class Timing:
    """Median and quartiles of the seconds of one call."""

    median: float
    low: float
    high: float


def time_in_turns(
    variants: Mapping[Name, Callable[[], object]],
    repeats: int,
    warm_up: int = 2,
    device: str = "cpu",
) -> dict[Name, Timing]:
    """Time every variant once per round.

    Args:
        variants: Functions to time, by name.
        repeats: Timed rounds.
        warm_up: Warm-up rounds.
        device: ``cpu``, or ``cuda`` to time with CUDA events, from the call to the end of the last kernel.
    """
    seconds = _device_seconds if device == "cuda" else _host_seconds
    times: dict[Name, list[float]] = {name: [] for name in variants}
    for turn in tqdm(range(repeats + warm_up), "rounds", disable=None, leave=False):
        for name, run in variants.items():
            taken = seconds(run)
            if turn >= warm_up:
                times[name].append(taken)
    return {name: summarize(values) for name, values in times.items()}


def _host_seconds(run):
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _device_seconds(run):
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def summarize(seconds: Iterable[float]) -> Timing:
    """Return the median and quartiles of seconds."""
    values = sorted(seconds)
    low, _, high = quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return Timing(median(values), low, high)


@dataclass(frozen=True)
class RunSpec:
    """How to run a model.

    Attributes:
        device: ``cpu`` or ``cuda``.
        precision: One of ``PRECISIONS``; ``amp`` is autocast to float16 on a GPU and bfloat16 on a CPU, the others
            are dtypes of weights and images.
        backend: One of ``elfatt.ops.BACKENDS``; the active one by default.
        compile: Use ``torch.compile``.
        cuda_graph: Capture a CUDA graph and replay it.
        backward: Compute the gradients of all weights, in training mode.
    """

    device: str = "cpu"
    precision: str = "float32"
    backend: str = field(default_factory=active_backend)
    compile: bool = False
    cuda_graph: bool = False
    backward: bool = False

    def __post_init__(self):
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision {self.precision!r} must be one of {', '.join(PRECISIONS)}")
        if self.cuda_graph and self.device != "cuda":
            raise ValueError(f"CUDA graphs need a GPU, not device {self.device!r}: disable them")

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of weights and images."""
        return torch.float32 if self.precision == "amp" else getattr(torch, self.precision)

    def prepare(self, model: nn.Module, shape: tuple[int, ...]) -> Callable[[], torch.Tensor]:
        """Return a function without arguments that runs the model on random images.

        Args:
            model: Model, moved to the device and dtype.
            shape: Image shape ``[B, 3, H, W]``.
        """
        model = model.train(self.backward).to(self.device, self.dtype)
        image = random_images(shape, self.device, self.dtype)
        forward = compile_for_timing(model) if self.compile else model

        def run():
            amp = torch.autocast(self.device, torch.float16 if self.device == "cuda" else torch.bfloat16)
            with use_backend(self.backend), torch.inference_mode(not self.backward):
                with amp if self.precision == "amp" else nullcontext():
                    out = forward(image)
                if self.backward:
                    torch.autograd.grad(out.float().square().mean(), list(model.parameters()), allow_unused=True)
            return out

        return record_graph(run) if self.cuda_graph else run


def compile_for_timing(function: Callable) -> Callable:
    """Compile for static shapes, raising instead of falling back to eager."""
    torch._dynamo.config.recompile_limit = 1000  # models of a run share code
    torch._dynamo.config.accumulated_recompile_limit = 10000
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    return torch.compile(function, dynamic=False)


def record_graph(run: Callable[[], Output]) -> Callable[[], Output]:
    """Capture a call in a CUDA graph and return a function that replays it."""
    stream = torch.cuda.Stream()  # capture needs a side stream and warm-up
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()

    def replay(_alive=run):  # keeps alive the weights and images that the graph reads
        graph.replay()
        return out

    return replay


@lru_cache(maxsize=2)
def random_images(shape: tuple[int, ...], device: str, dtype: torch.dtype) -> torch.Tensor:
    """Return normally distributed images, cached to be shared by all variants."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)


def numerics_shape(size: tuple[int, int]) -> tuple[int, ...]:
    """Return the shape of one image of the timed size, limited for the slow formula."""
    return (1, 3, *(min(side, NUMERICS_SIDE) for side in size))


def check_numerics(name: str, model: nn.Module, shape: tuple[int, ...], how: RunSpec) -> float:
    """Check a model's output against the reference formula.

    The truth is the formula in float64; the error may be at most twice that of the formula in the same precision, first
    in float32, which exposes wrong formulas, then in the timed precision. The weights of q, k and v are scaled up, as
    every softmax is nearly uniform with initial weights.

    Args:
        name: Name for the message.
        model: A float32 model, which is copied.
        shape: Image shape; keep it small, as the formula is slow.
        how: Run spec to be timed.

    Returns:
        The relative error.

    Raises:
        WrongOutput: The output is wrong or not finite.
    """
    model = copy.deepcopy(model).eval().to(how.device)
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if key.endswith("qkv.weight"):
                weight.mul_(PEAKED)
    double = copy.deepcopy(model).to(torch.float64)
    with torch.inference_mode(), use_backend("reference"):
        truth = _flat(double(random_images(shape, how.device, torch.float64)))
    del double
    for way in (RunSpec(how.device, "float32", how.backend), replace(how, cuda_graph=False, backward=False)):
        error, allowed = (
            ((_flat(variant.prepare(copy.deepcopy(model), shape)()) - truth).norm() / truth.norm()).item()
            for variant in (way, RunSpec(how.device, way.precision, "reference"))
        )
        if not error <= 2 * allowed + 10 * torch.finfo(torch.float32).eps:
            raise WrongOutput(f"{name} is off by {error:.1e} in {way.precision}, the formula by {allowed:.1e}")
    return error


def _flat(out) -> torch.Tensor:
    """Concatenate all tensors of an output into one float64 vector."""
    return torch.cat([tensor.double().flatten() for tensor in tree_leaves(out) if isinstance(tensor, torch.Tensor)])
