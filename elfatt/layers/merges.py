"""Downsampling between stages: ``[B, H, W, C]`` to ``[B, ⌈H/2⌉, ⌈W/2⌉, 2C]``."""

from __future__ import annotations

import torch
from timm.models import register_notrace_module
from torch import nn

from elfatt.ops.geometry import pad_to_multiple


@register_notrace_module  # padding depends on the map's size
class PatchMerge(nn.Module):
    """Swin's patch merging (arXiv 2103.14030): concatenated 2×2 patches, LayerNorm, linear; zero-pads odd maps.

    Args:
        dim: Input channels.
        out_dim: Output channels.
    """

    def __init__(self, dim: int, out_dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, out_dim, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Downsample ``[B, H, W, C]``; the four neighbours are ordered column by column, as in Swin."""
        x = pad_to_multiple(x, (2, 2))
        x = x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).permute(0, 1, 3, 4, 2, 5).flatten(3)
        return self.reduction(self.norm(x))


class ConvMerge(nn.Module):
    """CSWin's downsampling (official ``Merge_Block``): 3×3 stride-2 convolution, LayerNorm.

    Args:
        dim: Input channels.
        out_dim: Output channels.
    """

    def __init__(self, dim: int, out_dim: int):
        super().__init__()
        self.conv = nn.Conv2d(dim, out_dim, 3, stride=2, padding=1)
        self.norm = nn.LayerNorm(out_dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Downsample ``[B, H, W, C]``."""
        return self.norm(self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
