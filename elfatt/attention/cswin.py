"""CSWin's cross-shaped stripes (arXiv 2107.00652, official models/cswin.py): "LOCAL" on the CSWin backbone."""

from __future__ import annotations

import torch

from elfatt.attention.base import QKVAttention, check_positive, unpack
from elfatt.attention.registry import register_attention
from elfatt.layers.lepe import LePE, kernel_of
from elfatt.ops import block_attention


@register_attention("cswin")
class CSWinAttention(QKVAttention):
    """Half the heads attend in vertical stripes, half in horizontal ones; LePE stays inside each stripe.

    Args:
        dim: Channels C of the map.
        num_heads: Attention heads of both halves together, an even number.
        stripe: Width of a stripe in tokens.
        lepe: Add LePE.
        backend: One of ``elfatt.ops.BACKENDS``, or None for the ambient one.

    Raises:
        ValueError: Odd ``num_heads`` or ``stripe`` below 1.
    """

    shown = ("stripe",)

    def __init__(self, dim: int, num_heads: int, *, stripe: int = 7, lepe: bool = True, backend: str | None = None):
        super().__init__(dim, num_heads, backend=backend)
        check_positive(stripe=stripe)
        if num_heads % 2:
            raise ValueError(f"num_heads={num_heads} must be even: half of them see vertical stripes")
        self.stripe = stripe
        self.lepe_vertical, self.lepe_horizontal = (LePE(dim // 2) if lepe else None for _ in range(2))

    def attend(self, qkv: torch.Tensor) -> torch.Tensor:
        """From packed ``[B, H, W, 3C]`` to ``[B, H, W, C]``, channels [vertical, horizontal]."""
        halves = unpack(qkv).chunk(2, dim=-1)
        stripes = ((0, self.stripe), self.lepe_vertical), ((self.stripe, 0), self.lepe_horizontal)
        return torch.cat(
            [
                block_attention(
                    half, num_heads=self.num_heads // 2, block=block, lepe=kernel_of(lepe), backend=self.backend
                )
                for half, (block, lepe) in zip(halves, stripes, strict=True)
            ],
            dim=-1,
        )
