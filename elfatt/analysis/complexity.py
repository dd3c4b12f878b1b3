"""Count parameters and multiply-adds by the rules of the paper's tables, which are fvcore's.

A multiply-add counts 1, LayerNorm 5 per element, batch norm 2 per element, adaptive pooling 1 per input element,
bilinear resizing 4 and nearest 1 per output element; softmax, GELU and bicubic resizing count 0. Counting uses
PyTorch's ``FlopCounterMode``, so a model on the ``meta`` device costs neither memory nor time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from elfatt.ops import selective_scan, use_backend

aten = torch.ops.aten

# PyTorch's counter counts 2 per multiply-add, so the rules here are doubled
_ELEMENTWISE = {
    aten.native_layer_norm: lambda shape, *_, out_shape, **__: 10 * shape.numel(),
    aten.native_batch_norm: lambda shape, *_, out_shape, **__: 4 * shape.numel(),
    aten._native_batch_norm_legit_no_training: lambda shape, *_, out_shape, **__: 4 * shape.numel(),
    aten._adaptive_avg_pool2d: lambda shape, *_, out_shape, **__: 2 * shape.numel(),
    aten.upsample_bilinear2d: lambda *_, out_shape, **__: 8 * out_shape.numel(),
}


@dataclass(frozen=True)
class Complexity:
    """Complexity of a model at one image size.

    Attributes:
        params: Trainable and frozen parameters.
        macs_nfa: Multiply-adds with explicit softmax attention ("nFA").
        macs_fa: Multiply-adds with fused softmax attention, which the paper does not count ("FA").
        macs_true: Multiply-adds including fused attention and, unlike the other two, VMamba's selective scan.
    """

    params: int
    macs_nfa: int
    macs_fa: int
    macs_true: int


def count_parameters(model: nn.Module) -> int:
    """Return the number of parameters."""
    return sum(p.numel() for p in model.parameters())


def measure_complexity(model: nn.Module, img_size: tuple[int, int], in_chans: int = 3) -> Complexity:
    """Count a model's parameters and the multiply-adds of one image.

    Args:
        model: A model on any device, including ``meta``.
        img_size: Height and width of the image in pixels.
        in_chans: Channels of the image.
    """
    weight = next(model.parameters())
    image = torch.zeros(1, in_chans, *img_size, dtype=weight.dtype, device=weight.device)
    training = model.training
    model.eval()
    with torch.no_grad():
        with use_backend("math"), _count() as nfa:
            model(image)
        with FusedAttention() as fused, _SelectiveScans() as scans, use_backend("sdpa"), _count() as fa:
            model(image)
    model.train(training)
    return Complexity(count_parameters(model), nfa(), fa(), fa() + fused.macs + scans.macs)


@contextmanager
def count_true() -> Iterator[Callable[[], int]]:
    """Count multiply-adds inside the context, as in ``Complexity.macs_true``.

    Yields:
        A function that returns the count so far.
    """
    with torch.no_grad(), FusedAttention() as fused, _SelectiveScans() as scans, use_backend("sdpa"), _count() as rest:
        yield lambda: rest() + fused.macs + scans.macs


@contextmanager
def _count():
    counter = FlopCounterMode(display=False, custom_mapping=_ELEMENTWISE)
    with counter, _NearestResizing() as nearest:
        yield lambda: counter.get_total_flops() // 2 + nearest.outputs


class FusedAttention(TorchFunctionMode):
    """Count fused attention separately from PyTorch's FLOP counter."""

    def __init__(self):
        super().__init__()
        self.macs = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        q, k, v = args[:3]
        self.macs += q.numel() * k.shape[-2] + q.shape[:-1].numel() * v.shape[-2] * v.shape[-1]
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
        return out + 0 * q.sum() if q.requires_grad else out  # keeps q in the graph, for memory counts in training


class _SelectiveScans(TorchFunctionMode):
    """Count selective scans as VMamba's authors do, 9 per state and 1 for the skip, without computing them."""

    def __init__(self):
        super().__init__()
        self.macs = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not selective_scan:
            return func(*args, **(kwargs or {}))
        x, _, rates, *_ = args
        self.macs += x.numel() * (9 * rates.shape[-1] + 1)
        return torch.empty_like(x)


class _NearestResizing(TorchFunctionMode):
    """Count the outputs of nearest-neighbour resizing, which reaches PyTorch's counter as indexing."""

    def __init__(self):
        super().__init__()
        self.outputs = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is F.interpolate and (kwargs or {}).get("mode", "nearest") == "nearest":
            self.outputs += out.numel()
        return out
