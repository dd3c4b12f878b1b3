"""Depthwise convolution of a channels-last map: LePE (CSWin, arXiv 2107.00652, section 3.3) and its relatives."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from elfatt.ops.dispatch import fused_backend, is_slow_half, use_reference, without_autocast
from elfatt.ops.fused import fused_lepe

Kernel = tuple[torch.Tensor, torch.Tensor | None]  # weight [C, 1, k, k] and bias [C]


def depthwise_conv(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Convolve each channel with its own odd-sided kernel, zero-padded to keep the size.

    The map is handed to the convolution as a channels-last *view*, so a slice of a packed qkv is not copied.

    Args:
        x: Map ``[B, H, W, C]``, any strides.
        weight: Kernels ``[C, 1, k, k]``.
        bias: ``[C]`` or None.

    Returns:
        Map ``[B, H, W, C]``.
    """
    if use_reference():
        return _reference(x, weight, bias)
    if weight.shape[-1] == 3 and (backend := fused_backend(x)):
        return fused_lepe(x, weight, bias, backend=backend)
    if is_slow_half(x):
        with without_autocast(x):
            return _convolve(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)
    return _convolve(x, weight, bias)


def add_lepe(out: torch.Tensor, v: torch.Tensor, lepe: Kernel | None) -> torch.Tensor:
    """``out + L(v)`` on maps ``[B, H, W, C]``, or ``out`` where there is no LePE."""
    if lepe is None:
        return out
    if lepe[0].shape[-1] == 3 and (backend := fused_backend(v)):
        return fused_lepe(v, *lepe, residual=out, backend=backend)
    # in place of the convolution's result, which no backward pass needs
    return depthwise_conv(v, *lepe).add_(out)


def _convolve(x, weight, bias):
    x = x.permute(0, 3, 1, 2)
    return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2, groups=x.shape[1]).permute(0, 2, 3, 1)


def _reference(x, weight, bias):
    _, h, w, _ = x.shape
    k = weight.shape[-1]
    padded = F.pad(x, (0, 0, k // 2, k // 2, k // 2, k // 2))
    out = sum(padded[:, i : i + h, j : j + w] * weight[:, 0, i, j] for i in range(k) for j in range(k))
    return out if bias is None else out + bias
