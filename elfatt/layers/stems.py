"""Stems: image ``[B, 3, H, W]`` to tokens ``[B, H/4, W/4, C]``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.models import register_notrace_module
from torch import nn

from elfatt.ops.geometry import count_blocks

KINDS = {"patch": (4, 0), "conv": (7, 2)}  # filter size and padding in pixels; stride 4


@register_notrace_module  # padding depends on the image's size
class Stem(nn.Module):
    """Stride-4 convolution and LayerNorm.

    ``patch`` is Swin's 4×4 embedding, which zero-pads images to a multiple of 4; ``conv`` is CSWin's 7×7 one.

    Args:
        kind: ``patch`` or ``conv``.
        in_chans: Image channels.
        dim: Token channels.

    Raises:
        ValueError: Unknown kind; in ``forward``, an image too small for a token.
    """

    def __init__(self, kind: str, in_chans: int, dim: int):
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"unknown stem {kind!r}: choose one of {', '.join(KINDS)}")
        kernel, padding = KINDS[kind]
        self.pads_image = kind == "patch"
        self.conv = nn.Conv2d(in_chans, dim, kernel, stride=4, padding=padding)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Embed an image ``[B, in_chans, H, W]`` as ``[B, H', W', dim]``."""
        height, width = x.shape[-2:]
        if self.pads_image:
            x = F.pad(x, (0, count_blocks(width, 4) * 4 - width, 0, count_blocks(height, 4) * 4 - height))
        elif min(height, width) < 3:
            raise ValueError(f"image of {height}x{width} pixels is too small: use at least 3x3")
        return self.norm(self.conv(x).permute(0, 2, 3, 1))


class DoubleStem(nn.Module):
    """VMamba's stem (official ``patchembed_version="v2"``): two 3×3 stride-2 convolutions, each with a LayerNorm.

    Args:
        in_chans: Image channels.
        dim: Token channels; the first convolution has half as many.
    """

    def __init__(self, in_chans: int, dim: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, dim // 2, 3, stride=2, padding=1)
        self.norm1 = nn.LayerNorm(dim // 2)
        self.conv2 = nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1)
        self.norm2 = nn.LayerNorm(dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Embed an image ``[B, in_chans, H, W]`` as ``[B, ceil(H / 4), ceil(W / 4), dim]``."""
        x = F.gelu(self.norm1(self.conv1(x).permute(0, 2, 3, 1)))
        return self.norm2(self.conv2(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
