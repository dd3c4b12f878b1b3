"""EFFATT: efficient attention (Shen et al., arXiv 1812.01243) with LePE, ELFATT's global branch on all channels."""

from __future__ import annotations

import torch

from elfatt.attention.base import QKVAttention, unpack
from elfatt.attention.registry import register_attention
from elfatt.layers.lepe import LePE, kernel_of
from elfatt.ops import global_branch


@register_attention("effatt")
class EFFATT(QKVAttention):
    """Linear in the tokens.

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
        return global_branch(unpack(qkv), num_heads=self.num_heads, lepe=kernel_of(self.lepe))
