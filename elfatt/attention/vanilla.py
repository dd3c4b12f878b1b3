"""Vanilla attention ("GLOBAL" in the paper's tables): softmax attention over the whole map, with LePE."""

from __future__ import annotations

import torch

from elfatt.attention.base import LePEAttention, unpack
from elfatt.attention.registry import register_attention
from elfatt.layers.lepe import add_called, filter_of
from elfatt.ops import block_attention


@register_attention("vanilla")
class VanillaAttention(LePEAttention):
    """Softmax attention, quadratic in the number of tokens; arguments as in ``LePEAttention``."""

    def attend(self, qkv: torch.Tensor) -> torch.Tensor:
        """Map packed ``[B, H, W, 3C]`` to ``[B, H, W, C]``."""
        qkv = unpack(qkv)
        out = block_attention(
            qkv, num_heads=self.num_heads, block=(0, 0), lepe=filter_of(self.lepe), backend=self.backend
        )
        return add_called(out, qkv[..., 2, :], self.lepe)
