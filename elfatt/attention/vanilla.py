"""Vanilla attention ("GLOBAL" in the paper's tables): softmax attention over the whole map, plus LePE on V."""

from __future__ import annotations

import torch

from elfatt.attention.base import QKVAttention, unpack
from elfatt.attention.registry import register_attention
from elfatt.layers.lepe import LePE, kernel_of
from elfatt.ops import block_attention


@register_attention("vanilla")
class VanillaAttention(QKVAttention):
    """Quadratic in the tokens.

    Args:
        dim: Channels C of the map.
        num_heads: Attention heads.
        lepe: Add LePE.
    """

    def __init__(self, dim: int, num_heads: int, *, lepe: bool = True):
        super().__init__(dim, num_heads)
        self.lepe = LePE(dim) if lepe else None

    def attend(self, qkv: torch.Tensor) -> torch.Tensor:
        """From packed ``[B, H, W, 3C]`` to ``[B, H, W, C]``."""
        return block_attention(unpack(qkv), num_heads=self.num_heads, block=(0, 0), lepe=kernel_of(self.lepe))
