"""Block-wise softmax attention with LePE: ELFATT's local branch, CSWin's stripes, vanilla attention.

Source: ELFATT (arXiv 2501.06098), local branch ``g(softmax(f(Q) f(K)ᵀ / √d) f(V) + L(f(V)))``.
"""

from __future__ import annotations

import torch

from elfatt.ops.dispatch import resolve
from elfatt.ops.geometry import Filter, fit_block


def block_attention(
    qkv: torch.Tensor,
    *,
    num_heads: int,
    block: tuple[int, int],
    lepe: Filter | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Compute softmax attention and LePE within non-overlapping blocks; LePE is zero-padded at block borders.

    If the blocks do not divide the map, q, k and v are zero-padded on the right and bottom, and the padding is not
    masked. Blocks larger than the map are clipped to it.

    Args:
        qkv: Queries, keys and values ``[B, H, W, 3, C]``, any strides.
        num_heads: Heads; must divide C.
        block: Block height and width in tokens; 0 means the full side.
        lepe: Depthwise weight ``[C, 1, 3, 3]`` and bias ``[C]``, or None.
        backend: One of ``BACKENDS``; None for the active one.

    Returns:
        ``[B, H, W, C]``.

    Raises:
        ValueError: Invalid shapes, or tensors that the backend does not support.
    """
    if qkv.ndim != 5 or qkv.shape[3] != 3:
        raise ValueError(f"qkv must be [B, H, W, 3, C], got {tuple(qkv.shape)}")
    if 0 in qkv.shape[1:3]:
        raise ValueError(f"the map has no tokens: {tuple(qkv.shape)}")
    if num_heads < 1 or qkv.shape[-1] % num_heads:
        raise ValueError(f"{qkv.shape[-1]} channels cannot be split into {num_heads} heads")
    found = resolve(backend, None if lepe is None else qkv)
    return found.block_attention(qkv, num_heads=num_heads, block=fit_block(block, qkv.shape[1:3]), lepe=lepe)
