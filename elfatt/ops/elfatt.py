"""ELFATT (arXiv 2501.06098): a linear global branch and block-wise softmax attention."""

from __future__ import annotations

import torch

from elfatt.ops.dispatch import resolve
from elfatt.ops.fused import head_widths
from elfatt.ops.geometry import Filter, fit_block


def elfatt_attention(
    qkv: torch.Tensor,
    *,
    num_heads: tuple[int, int],
    global_channels: int,
    block_size: int,
    lepe_global: Filter | None = None,
    lepe_local: Filter | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Compute ELFATT between its qkv and output projections.

    Args:
        qkv: Packed queries, keys and values ``[B, H, W, 3C]``; each C is ordered [global, local].
        num_heads: Heads of the global and local branches; each must divide its branch's channels.
        global_channels: Channels of the global branch, from 0 (block attention) to C (efficient attention).
        block_size: Block side in tokens.
        lepe_global: Weight ``[global_channels, 1, 3, 3]`` and bias of LePE over the whole map, or None.
        lepe_local: Weight ``[C - global_channels, 1, 3, 3]`` and bias of LePE inside each block, or None.
        backend: One of ``BACKENDS``; None for the active one.

    Returns:
        ``[B, H, W, C]``, ordered [global, local].

    Raises:
        ValueError: Invalid shapes, or tensors that the backend does not support.
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
    found = resolve(backend, qkv, head_widths(num_heads, branch_channels), block)
    return found.elfatt_attention(
        qkv,
        num_heads=num_heads,
        global_channels=global_channels,
        block=block,
        lepe_global=lepe_global,
        lepe_local=lepe_local,
    )


def global_branch(
    qkv: torch.Tensor, *, num_heads: int, lepe: Filter | None, backend: str | None = None
) -> torch.Tensor:
    """Compute efficient attention plus LePE over the whole map: ``elfatt_attention`` without a local branch.

    Args:
        qkv: Queries, keys and values ``[B, H, W, 3, C]``, any strides.
        num_heads: Heads; must divide C.
        lepe: Weight ``[C, 1, 3, 3]`` and bias ``[C]``, or None.
        backend: One of ``BACKENDS``; None for the active one.

    Returns:
        ``[B, H, W, C]``.
    """
    return elfatt_attention(
        qkv.flatten(3),
        num_heads=(num_heads, num_heads),
        global_channels=qkv.shape[-1],
        block_size=1,
        lepe_global=lepe,
        backend=backend,
    )
