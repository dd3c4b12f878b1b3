"""Interleaved timing: variants take turns, so background load affects them all alike.

Results are medians with quartiles. Variants with wrong output are not timed, see ``check_numerics``.
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

PEAKED = 8  # factor of the weights of q, k and v in the check of the numerics
PRECISIONS = ("float32", "amp", "float16", "bfloat16")
Name = TypeVar("Name", bound=Hashable)
Output = TypeVar("Output")


class WrongOutput(RuntimeError):
    """A variant's output is wrong, so its speed is meaningless."""


# reasons to leave one variant out: wrong, too large, or not supported by the device in this precision
REFUSALS = (WrongOutput, MemoryError, RuntimeError, AssertionError)
NUMERICS_SIDE = 224  # pixels of the largest image on which a model's output is compared with the formula's


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: the median over the turns, and the quartiles."""

    median: float
    low: float
    high: float


def time_in_turns(
    variants: Mapping[Name, Callable[[], object]],
    repeats: int,
    warm_up: int = 2,
    device: str = "cpu",
) -> dict[Name, Timing]:
    """Time every variant once a turn.

    Args:
        variants: What to call, by name.
        repeats: Turns that count.
        warm_up: Turns before them.
        device: ``cpu``, or ``cuda``, which is timed by its own events, from the call to the end of its last kernel.
    """
    seconds = _device_seconds if device == "cuda" else _host_seconds
    times: dict[Name, list[float]] = {name: [] for name in variants}
    for turn in tqdm(range(repeats + warm_up), "turns", disable=None, leave=False):
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
    """Median and quartiles of seconds."""
    values = sorted(seconds)
    low, _, high = quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return Timing(median(values), low, high)


@dataclass(frozen=True)
class RunSpec:
    """How a model runs.

    Attributes:
        device: ``cpu`` or ``cuda``.
        precision: One of ``PRECISIONS``; ``amp`` is autocast, to float16 on a GPU and to bfloat16 on a CPU, the others
            are the dtype of weights and images.
        backend: Of the operations, one of ``elfatt.ops.BACKENDS``; by default the ambient one.
        compile: Through ``torch.compile``.
        cuda_graph: Recorded once as a CUDA graph and replayed.
        backward: With the gradients of all weights, in training mode.
    """

    device: str = "cpu"
    precision: str = "float32"
    backend: str = field(default_factory=active_backend)
    compile: bool = False
    cuda_graph: bool = False
    backward: bool = False

    def __post_init__(self):
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision {self.precision!r} is none of {', '.join(PRECISIONS)}")
        if self.cuda_graph and self.device != "cuda":
            raise ValueError(f"CUDA graphs need a GPU, not device {self.device!r}: leave them out")

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of weights and images."""
        return torch.float32 if self.precision == "amp" else getattr(torch, self.precision)

    def prepare(self, model: nn.Module, shape: tuple[int, ...]) -> Callable[[], torch.Tensor]:
        """A call without arguments that runs the model on random images.

        Args:
            model: It is moved to the device and the dtype.
            shape: ``[B, 3, H, W]``.
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
    """``torch.compile`` for a static shape; raises instead of falling back to eager."""
    torch._dynamo.config.recompile_limit = 1000  # the models of a run share their code
    torch._dynamo.config.accumulated_recompile_limit = 10000
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    return torch.compile(function, dynamic=False)


def record_graph(run: Callable[[], Output]) -> Callable[[], Output]:
    """Capture a call in a CUDA graph and return a function that replays it."""
    stream = torch.cuda.Stream()  # a graph is recorded beside the default stream, warm
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()

    def replay(_alive=run):  # the graph reads the memory of its weights and images, but does not own it
        graph.replay()
        return out

    return replay


@lru_cache(maxsize=2)
def random_images(shape: tuple[int, ...], device: str, dtype: torch.dtype) -> torch.Tensor:
    """Normally distributed images, shared by all variants."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)


def numerics_shape(size: tuple[int, int]) -> tuple[int, ...]:
    """One image of the size that is timed, or of what the formula can take."""
    return (1, 3, *(min(side, NUMERICS_SIDE) for side in size))


def check_numerics(name: str, model: nn.Module, shape: tuple[int, ...], how: RunSpec) -> float:
    """Raise if a model's output differs from the reference formula.

    The formula in float64 is the truth; the error may be twice that of the formula in the precision at hand, first in
    float32, where a wrong formula shows, then in the precision that is timed. Weights of q, k and v are enlarged on the
    way, for with initial ones every softmax is nearly uniform.

    Args:
        name: For the message.
        model: A float32 model; it is copied.
        shape: Of few and small images: the formula is slow.
        how: The way that is to be timed.

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
    """Concatenate all tensors of an output as one float64 vector."""
    return torch.cat([tensor.double().flatten() for tensor in tree_leaves(out) if isinstance(tensor, torch.Tensor)])
