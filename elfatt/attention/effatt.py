"""EFFATT: efficient attention (Shen et al., arXiv 1812.01243) with LePE; ELFATT's global branch on all channels."""

from __future__ import annotations

import torch

from elfatt.attention.base import LePEAttention, unpack
from elfatt.attention.registry import register_attention
from elfatt.layers.lepe import add_called, filter_of
from elfatt.ops import global_branch


@register_attention("effatt")
class EFFATT(LePEAttention):
    """EFFATT, linear in the number of tokens; arguments as in ``LePEAttention``."""

    def attend(self, qkv: torch.Tensor) -> torch.Tensor:
        """Map packed ``[B, H, W, 3C]`` to ``[B, H, W, C]``."""
        qkv = unpack(qkv)
        out = global_branch(qkv, num_heads=self.num_heads, lepe=filter_of(self.lepe), backend=self.backend)
        return add_called(out, qkv[..., 2, :], self.lepe)
