"""Relative position indices and shift masks for Swin's windows, and resizing of learned position tables."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from elfatt.ops.geometry import always, to_blocks


def relative_position_index(window: int, device: torch.device | None = None) -> torch.Tensor:
    """Return the bias table's row for each pair of tokens in a square window: ``[window², window²]``, int64."""
    side = torch.arange(window, device=device)
    rows, columns = (axis.flatten() for axis in torch.meshgrid(side, side, indexing="ij"))
    offset = [axis[:, None] - axis[None, :] + window - 1 for axis in (rows, columns)]
    return offset[0] * (2 * window - 1) + offset[1]


def shift_mask(
    size: Sequence[int], window: int, shift: Sequence[int], device: torch.device, dtype: torch.dtype
) -> torch.Tensor:
    """Return the bias that masks attention between regions joined by the cyclic shift.

    Args:
        size: Height and width of the padded map in tokens, multiples of ``window``.
        window: Window side in tokens.
        shift: Cyclic shift in tokens along height and width.
        device: Device of the mask.
        dtype: Dtype of the mask.

    Returns:
        ``[windows, window², window²]``, 0 within regions and -100 across them, as in Swin.
    """
    regions = []
    for length, step in zip(size, shift, strict=True):
        position = torch.arange(length, device=device)
        regions.append((position >= length - window).long() + (position >= length - step).long())
    region = (3 * regions[0][:, None] + regions[1][None, :]).view(1, *size, 1)
    region = to_blocks(region, (window, window)).flatten(1)
    return (region[:, :, None] != region[:, None, :]).to(dtype) * -100


def resize_positions(table: torch.Tensor, size: Sequence[int], mode: str) -> torch.Tensor:
    """Interpolate a learned table ``[N, C, H, W]`` to another map size; a no-op if it fits.

    Args:
        table: Position table.
        size: Target height and width in tokens.
        mode: ``bilinear`` or ``bicubic``.
    """
    if all(always(have == want) for have, want in zip(table.shape[-2:], size, strict=True)):
        return table
    wide = torch.promote_types(table.dtype, torch.float32)
    return F.interpolate(table.to(wide), size=tuple(size), mode=mode).to(table.dtype)
