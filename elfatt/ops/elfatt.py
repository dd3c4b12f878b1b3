"""The ELFATT operation (arXiv 2501.06098): a linear global branch beside a softmax branch inside blocks."""

from __future__ import annotations

import torch

from elfatt.ops.block import attend_blocks, block_attention
from elfatt.ops.depthwise import Kernel, add_lepe
from elfatt.ops.dispatch import fused_backend
from elfatt.ops.efficient import efficient_attention
from elfatt.ops.fused import fused_attention
from elfatt.ops.geometry import cat_with_blocks, fit_block


def elfatt_attention(
    qkv: torch.Tensor,
    *,
    num_heads: tuple[int, int],
    global_channels: int,
    block_size: int,
    lepe_global: Kernel | None = None,
    lepe_local: Kernel | None = None,
) -> torch.Tensor:
    """Everything ELFATT computes between its two linear layers.

    Args:
        qkv: Packed queries, keys and values ``[B, H, W, 3C]``; within each C the channels are [global, local].
        num_heads: Heads of the global and of the local branch; a divisor of each branch's channels.
        global_channels: Channels of the global branch, from 0 (block attention) to C (efficient attention).
        block_size: Side of a block in tokens.
        lepe_global: Kernels ``[global_channels, 1, 3, 3]`` and bias over the whole map, or None.
        lepe_local: Kernels ``[C - global_channels, 1, 3, 3]`` and bias inside each block, or None.

    Returns:
        ``[B, H, W, C]``, the concatenation [global, local].

    Raises:
        ValueError: A shape does not fit.
    """
    channels = qkv.shape[-1] // 3
    if qkv.ndim != 4 or qkv.shape[-1] % 3:
        raise ValueError(f"qkv must be [B, H, W, 3C], got {tuple(qkv.shape)}")
    if 0 in qkv.shape[1:3]:
        raise ValueError(f"the map has no tokens: {tuple(qkv.shape)}")
    if not 0 <= global_channels <= channels:
        raise ValueError(f"global_channels={global_channels} must lie between 0 and C={channels}")
    if block_size < 1:
        raise ValueError(f"block_size={block_size} must be at least 1 token")
    branch_channels = (global_channels, channels - global_channels)
    for name, width, heads in zip(("global", "local"), branch_channels, num_heads, strict=True):
        if width and (heads < 1 or width % heads):
            raise ValueError(f"{width} {name} channels cannot be split into {heads} heads")

    block = fit_block((block_size, block_size), qkv.shape[1:3])
    widths = tuple(width // heads for width, heads in zip(branch_channels, num_heads, strict=True) if width)
    if backend := fused_backend(qkv, widths):
        return fused_attention(
            qkv,
            backend=backend,
            num_heads=num_heads,
            global_channels=global_channels,
            block=block,
            lepe_global=lepe_global,
            lepe_local=lepe_local,
        )
    qkv = qkv.unflatten(-1, (3, channels))
    bar, tilde = qkv.split(branch_channels, dim=-1)
    if global_channels == channels:
        return global_branch(bar, num_heads=num_heads[0], lepe=lepe_global)
    if global_channels == 0:
        return block_attention(tilde, num_heads=num_heads[1], block=block, lepe=lepe_local)
    out = global_branch(bar, num_heads=num_heads[0], lepe=lepe_global)
    return cat_with_blocks(out, attend_blocks(tilde, num_heads=num_heads[1], block=block, lepe=lepe_local))


def global_branch(qkv: torch.Tensor, *, num_heads: int, lepe: Kernel | None) -> torch.Tensor:
    """Efficient attention over the whole map plus LePE; ``[B, H, W, 3, C]`` to ``[B, H, W, C]``."""
    channels = qkv.shape[-1]
    if backend := fused_backend(qkv, (channels // num_heads,)):
        heads = (num_heads, num_heads)
        return fused_attention(
            qkv.flatten(3), backend=backend, num_heads=heads, global_channels=channels, block=(1, 1), lepe_global=lepe
        )
    q, k, v = qkv.unbind(3)
    tokens = (x.flatten(1, 2).unflatten(-1, (num_heads, -1)) for x in (q, k, v))
    return add_lepe(efficient_attention(*tokens).reshape(v.shape), v, lepe)
