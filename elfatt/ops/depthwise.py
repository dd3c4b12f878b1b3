"""Depthwise convolution of channels-last maps: LePE (CSWin, arXiv 2107.00652, section 3.3) and variants."""

from __future__ import annotations

import torch

from elfatt.ops.dispatch import resolve
from elfatt.ops.geometry import Filter


def depthwise_conv(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *, backend: str | None = None
) -> torch.Tensor:
    """Apply a depthwise convolution with an odd filter size, zero-padded to keep the map's size.

    The map is passed on as a channels-last *view*, so a slice of a packed qkv is not copied.

    Args:
        x: Map ``[B, H, W, C]``, any strides.
        weight: ``[C, 1, k, k]``.
        bias: ``[C]`` or None.
        backend: One of ``BACKENDS``; None for the active one.

    Returns:
        Map ``[B, H, W, C]``.

    Raises:
        ValueError: ``x`` is not 4-D, or the backend does not support it.
    """
    _check_map(x)
    return resolve(backend, x).depthwise_conv(x, weight, bias)


def add_lepe(out: torch.Tensor, v: torch.Tensor, lepe: Filter | None, *, backend: str | None = None) -> torch.Tensor:
    """Return ``out + LePE(v)`` for maps ``[B, H, W, C]``, or ``out`` if ``lepe`` is None."""
    if lepe is None:
        return out
    _check_map(v)
    return resolve(backend, v).add_lepe(out, v, lepe)


def _check_map(x):
    if x.ndim != 4:
        raise ValueError(f"expected a map [B, H, W, C], got {tuple(x.shape)}")
