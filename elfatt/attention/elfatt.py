"""ELFATT (arXiv 2501.06098): half the channels use global linear attention, half block-wise softmax attention."""

from __future__ import annotations

import torch

from elfatt.attention.base import QKVAttention, check_positive, unpack
from elfatt.attention.registry import register_attention
from elfatt.layers.lepe import add_called, filter_of, is_fusible, make_lepe
from elfatt.ops import elfatt_attention


@register_attention("elfatt")
class ELFATT(QKVAttention):
    """ELFATT, linear in the number of tokens.

    Each branch has ``num_heads // 2`` heads whatever its share of the channels; a single branch has all heads.

    Args:
        dim: Channels C.
        num_heads: Attention heads, both branches together.
        block_size: Local block side in tokens; clipped to the map.
        channel_split: Fraction c1/c of channels in the global branch, from 0 to 1.
        lepe: Add LePE in both branches.
        backend: One of ``elfatt.ops.BACKENDS``; None for the active one.

    Raises:
        ValueError: ``block_size`` or ``channel_split`` is out of range, or a branch's heads do not divide its channels.
    """

    shown = ("block_size", "channel_split")

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        block_size: int = 14,
        channel_split: float = 0.5,
        lepe: bool = True,
        backend: str | None = None,
    ):
        super().__init__(dim, num_heads, backend=backend)
        check_positive(block_size=block_size)
        if not 0 <= channel_split <= 1:
            raise ValueError(f"channel_split={channel_split} must lie between 0 (all local) and 1 (all global)")
        self.block_size, self.channel_split = block_size, channel_split
        self.global_channels = round(dim * channel_split)
        widths = (self.global_channels, dim - self.global_channels)
        half = max(1, num_heads // 2)
        self.branch_heads = (half, half) if all(widths) else (num_heads, num_heads)
        for width, heads in zip(widths, self.branch_heads, strict=True):
            if width % heads:
                raise ValueError(
                    f"channel_split={channel_split} of dim={dim} leaves {width} channels for {heads} heads: "
                    f"choose a split that {heads} divides"
                )
        self.lepe_global, self.lepe_local = (make_lepe(width) if lepe and width else None for width in widths)

    def attend(self, qkv: torch.Tensor) -> torch.Tensor:
        """Map packed ``[B, H, W, 3C]`` to ``[B, H, W, C]``, channels [global, local]."""
        out = elfatt_attention(
            qkv,
            num_heads=self.branch_heads,
            global_channels=self.global_channels,
            block_size=self.block_size,
            lepe_global=filter_of(self.lepe_global),
            lepe_local=filter_of(self.lepe_local),
            backend=self.backend,
        )
        branches = (self.lepe_global, (0, 0)), (self.lepe_local, (self.block_size, self.block_size))
        if all(lepe is None or is_fusible(lepe) for lepe, _ in branches):
            return out
        widths = (self.global_channels, self.dim - self.global_channels)
        parts = zip(out.split(widths, dim=-1), unpack(qkv)[..., 2, :].split(widths, dim=-1), branches, strict=True)
        return torch.cat([add_called(part, v, *branch) for part, v, branch in parts], dim=-1)
