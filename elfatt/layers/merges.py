"""Downsampling between stages: ``[B, H, W, C]`` to ``[B, ⌈H/2⌉, ⌈W/2⌉, 2C]``."""

from __future__ import annotations

import torch
from timm.models import register_notrace_module
from torch import nn

from elfatt.ops.geometry import pad_to_multiple


@register_notrace_module  # the padding depends on the map's size
class PatchMerge(nn.Module):
    """Swin's merge (arXiv 2103.14030): 2×2 neighbours side by side, LayerNorm, linear. Odd maps are zero-padded.

    Args:
        dim: Channels in.
        out_dim: Channels out.
    """

    def __init__(self, dim: int, out_dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, out_dim, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Merge ``[B, H, W, C]``; the four neighbours are ordered by column, then row."""
        x = pad_to_multiple(x, (2, 2))
        x = x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).permute(0, 1, 3, 4, 2, 5).flatten(3)
        return self.reduction(self.norm(x))


class ConvMerge(nn.Module):
    """CSWin's merge (official ``Merge_Block``): 3×3 stride-2 convolution, LayerNorm.

    Args:
        dim: Channels in.
        out_dim: Channels out.
    """

    def __init__(self, dim: int, out_dim: int):
        super().__init__()
        self.conv = nn.Conv2d(dim, out_dim, 3, stride=2, padding=1)
        self.norm = nn.LayerNorm(out_dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Merge ``[B, H, W, C]``."""
        return self.norm(self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
