"""Locally-enhanced positional encoding (CSWin, arXiv 2107.00652, section 3.3): a depthwise convolution of V."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from elfatt.ops import depthwise_conv
from elfatt.ops.geometry import Filter, fit_block, from_blocks, to_blocks


def make_lepe(channels: int, kernel_size: int = 3) -> nn.Conv2d:
    """Return the depthwise filter of LePE, which operations apply over the map or inside each block.

    A filter with hooks, offloaded, adapted or quantised weights is called as a module instead.

    Args:
        channels: Channels of V.
        kernel_size: Odd filter size in tokens.
    """
    return nn.Conv2d(channels, channels, kernel_size, padding=kernel_size // 2, groups=channels)


def is_fusible(conv: nn.Module | None) -> bool:
    """Return whether a convolution's call does nothing but apply its weight and bias to a zero-padded map."""
    return (
        type(conv) is nn.Conv2d
        and (conv.stride, conv.dilation, conv.padding_mode) == ((1, 1), (1, 1), "zeros")
        and conv.padding == tuple(side // 2 for side in conv.kernel_size)
        and "forward" not in conv.__dict__
        and not (conv._forward_hooks or conv._forward_pre_hooks or conv._backward_hooks or conv._backward_pre_hooks)
        and not is_traceable_wrapper_subclass(conv.weight)
    )


def filter_of(lepe: nn.Module | None) -> Filter | None:
    """Return the weight and bias of a LePE for an operation to apply; None without one, or if it must be called."""
    return (lepe.weight, lepe.bias) if isinstance(lepe, nn.Conv2d) and is_fusible(lepe) else None


def add_called(
    out: torch.Tensor, v: torch.Tensor, lepe: nn.Module | None, block: Sequence[int] = (0, 0)
) -> torch.Tensor:
    """Add LePE if ``filter_of`` left it out because it must be called.

    Args:
        out: Map ``[B, H, W, C]``.
        v: Values, same shape.
        lepe: The filter, or None.
        block: Height and width of the blocks inside which it is applied, in tokens; 0 means the full side.
    """
    if lepe is None or is_fusible(lepe):
        return out
    block = fit_block(block, v.shape[1:3])
    blocks = convolve(lepe, to_blocks(v, block))
    return out + from_blocks(blocks, v.shape[1:3])


def convolve(conv: nn.Module, x: torch.Tensor, *, backend: str | None = None) -> torch.Tensor:
    """Apply a depthwise convolution to a map ``[B, H, W, C]``."""
    found = filter_of(conv)
    if found is None:
        return conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    return depthwise_conv(x, *found, backend=backend)
