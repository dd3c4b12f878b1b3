"""FLatten: focused linear attention (arXiv 2308.00442, official flatten_swin.py and flatten_cswin.py)."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn

from elfatt.attention.base import QKVAttention, check_positive, unpack
from elfatt.attention.registry import register_attention
from elfatt.layers.lepe import add_called, convolve, filter_of, make_lepe
from elfatt.layers.positions import resize_positions
from elfatt.ops import add_lepe, focused_attention


@register_attention("flatten")
class FocusedLinearAttention(QKVAttention):
    """Focused linear attention, linear in the number of tokens.

    Args:
        dim: Channels C.
        num_heads: Attention heads.
        feat_size: Training map height and width in tokens; the positional encoding is resized bicubically for other
            maps.
        kernel_size: Size of the depthwise filter on V, shared by all heads.
        lepe: Add LePE, as on the CSWin backbone.
        backend: One of ``elfatt.ops.BACKENDS``; None for the active one.

    Raises:
        ValueError: ``feat_size`` below 1.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        feat_size: tuple[int, int] = (14, 14),
        kernel_size: int = 5,
        lepe: bool = False,
        backend: str | None = None,
    ):
        super().__init__(dim, num_heads, backend=backend)
        height, width = feat_size
        check_positive(feat_height=height, feat_width=width)
        self.feat_size = (height, width)
        self.scale = nn.Parameter(torch.zeros(1, 1, dim))
        self.positional_encoding = nn.Parameter(torch.zeros(1, height * width, dim))
        self.dwc = make_lepe(dim // num_heads, kernel_size)
        self.lepe = make_lepe(dim) if lepe else None

    def attend(self, qkv: torch.Tensor) -> torch.Tensor:
        """Map packed ``[B, H, W, 3C]`` to ``[B, H, W, C]``."""
        q, k, v = unpack(qkv).unbind(3)
        table = self.positional_encoding.transpose(1, 2).unflatten(2, self.feat_size)
        positions = resize_positions(table, k.shape[1:3], "bicubic").flatten(2).transpose(1, 2)
        tokens = (x.flatten(1, 2) for x in (q, k, v))
        q, k, values = tokens
        out = focused_attention(q, k + positions, values, self.scale, num_heads=self.num_heads).view(v.shape)
        out = self._add_filtered(out, v)
        return add_called(add_lepe(out, v, filter_of(self.lepe), backend=self.backend), v, self.lepe)

    def _add_filtered(self, out: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Add V under the filter that all heads share."""
        if filter_of(self.dwc) is None:
            heads = v.unflatten(-1, (self.num_heads, -1)).movedim(3, 1).flatten(0, 1)
            return out + convolve(self.dwc, heads).unflatten(0, (-1, self.num_heads)).movedim(1, 3).flatten(3)
        weight, bias = self.dwc.weight, cast("nn.Parameter", self.dwc.bias)
        every_head = weight.repeat(self.num_heads, 1, 1, 1), bias.repeat(self.num_heads)
        return add_lepe(out, v, every_head, backend=self.backend)
