"""CSWin's cross-shaped stripes (arXiv 2107.00652): "LOCAL" on the CSWin backbone.

Follows the official code, including segmentation/backbone/cswin_transformer.py for maps not divisible into stripes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from elfatt.attention.base import QKVAttention, check_positive, unpack
from elfatt.attention.registry import register_attention
from elfatt.layers.lepe import add_called, filter_of, make_lepe
from elfatt.ops import block_attention

ROWS, COLUMNS = 1, 2  # axes of a map [B, H, W, ...]


@register_attention("cswin")
class CSWinAttention(QKVAttention):
    """Cross-shaped window attention: half the heads in vertical stripes, half in horizontal ones, with LePE per stripe.

    If the stripes do not divide the map, q, k and v are zero-padded on both sides (an odd token goes to the right or
    bottom), and the padding is not masked.

    Args:
        dim: Channels C.
        num_heads: Attention heads, both halves together; must be even.
        stripe: Stripe width in tokens.
        lepe: Add LePE.
        backend: One of ``elfatt.ops.BACKENDS``; None for the active one.

    Raises:
        ValueError: Odd ``num_heads`` or ``stripe`` below 1.
    """

    shown = ("stripe",)

    def __init__(self, dim: int, num_heads: int, *, stripe: int = 7, lepe: bool = True, backend: str | None = None):
        super().__init__(dim, num_heads, backend=backend)
        check_positive(stripe=stripe)
        if num_heads % 2:
            raise ValueError(f"num_heads={num_heads} must be even: half of them attend in vertical stripes")
        self.stripe = stripe
        self.lepe_vertical, self.lepe_horizontal = (make_lepe(dim // 2) if lepe else None for _ in range(2))

    def attend(self, qkv: torch.Tensor) -> torch.Tensor:
        """Map packed ``[B, H, W, 3C]`` to ``[B, H, W, C]``, channels [vertical, horizontal]."""
        vertical, horizontal = unpack(qkv).chunk(2, dim=-1)
        parts = (vertical, COLUMNS, self.lepe_vertical), (horizontal, ROWS, self.lepe_horizontal)
        return torch.cat([self._attend_stripes(*part) for part in parts], dim=-1)

    def _attend_stripes(self, qkv: torch.Tensor, axis: int, lepe: nn.Module | None) -> torch.Tensor:
        """Map ``[B, H, W, 3, C / 2]`` to ``[B, H, W, C / 2]`` in stripes stacked along the axis."""
        side = qkv.shape[axis]
        missing = -side % self.stripe
        before = missing // 2
        if missing:
            qkv = F.pad(qkv, (0, 0) * (qkv.ndim - 1 - axis) + (before, missing - before))
        block = (0, self.stripe) if axis == COLUMNS else (self.stripe, 0)
        out = block_attention(
            qkv, num_heads=self.num_heads // 2, block=block, lepe=filter_of(lepe), backend=self.backend
        )
        out = add_called(out, qkv[..., 2, :], lepe, block)
        return out.narrow(axis, before, side)
