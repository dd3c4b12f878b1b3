"""Swin's shifted windows (arXiv 2103.14030): "LOCAL" on the Swin backbone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from elfatt.attention.base import QKVAttention, check_positive
from elfatt.attention.registry import register_attention
from elfatt.layers.positions import relative_position_index, shift_mask
from elfatt.ops import softmax_attention
from elfatt.ops.geometry import from_blocks, pad_to_multiple, to_blocks


@register_attention("swin")
class SwinAttention(QKVAttention):
    """Softmax attention in square windows with a learned relative position bias.

    Maps are zero-padded to whole windows before the qkv projection, as in mmdetection and mmsegmentation. A side that
    fits in one window is not shifted.

    Args:
        dim: Channels C.
        num_heads: Attention heads.
        window_size: Window side in tokens.
        shifted: Shift the windows by half their side.
        backend: One of ``elfatt.ops.BACKENDS``; None for the active one.

    Raises:
        ValueError: ``window_size`` below 1.
    """

    shown = ("window_size", "shifted")

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        window_size: int = 7,
        shifted: bool = False,
        backend: str | None = None,
    ):
        super().__init__(dim, num_heads, backend=backend)
        check_positive(window_size=window_size)
        self.window_size = window_size
        self.shifted = shifted
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * window_size - 1) ** 2, num_heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Attend over a map ``[B, H, W, C]`` of any height and width."""
        self.check_map(x)
        height, width = x.shape[1:3]
        return super().forward(pad_to_multiple(x, (self.window_size, self.window_size)))[:, :height, :width]

    def attend(self, qkv: torch.Tensor) -> torch.Tensor:
        """Map packed ``[B, H, W, 3C]``, padded to whole windows, to ``[B, H, W, C]``."""
        batch, *size, _ = qkv.shape
        window = self.window_size
        shift = tuple(window // 2 if self.shifted and side > window else 0 for side in size)
        if any(shift):
            qkv = qkv.roll((-shift[0], -shift[1]), dims=(1, 2))
        tokens = to_blocks(qkv, (window, window)).flatten(1, 2)
        q, k, v = tokens.unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        out = softmax_attention(q, k, v, self._bias(batch, size, shift), backend=self.backend)
        out = from_blocks(out.reshape(-1, window, window, self.dim), size)
        return out.roll(shift, dims=(1, 2)) if any(shift) else out

    def _bias(self, batch: int, size: Sequence[int], shift: Sequence[int]) -> torch.Tensor:
        table = self.relative_position_bias_table
        bias = table[relative_position_index(self.window_size, table.device)].permute(2, 0, 1)
        if not any(shift):
            return bias[None]
        mask = shift_mask(size, self.window_size, shift, bias.device, bias.dtype)
        return (bias + mask[:, None]).expand(batch, -1, -1, -1, -1).flatten(0, 1)
