"""Softmax attention inside blocks of a map, with LePE: ELFATT's local branch, CSWin's stripes, vanilla attention.

Source: ELFATT (arXiv 2501.06098), local branch ``g(softmax(f(Q) f(K)ᵀ / √d) f(V) + L(f(V)))``.
"""

from __future__ import annotations

import torch

from elfatt.ops.depthwise import Kernel, add_lepe, depthwise_conv
from elfatt.ops.dispatch import use_reference
from elfatt.ops.geometry import fit_block, from_blocks, to_blocks
from elfatt.ops.softmax import softmax_attention


def block_attention(
    qkv: torch.Tensor, *, num_heads: int, block: tuple[int, int], lepe: Kernel | None = None
) -> torch.Tensor:
    """Attention within non-overlapping blocks; LePE sees zeros beyond its block.

    Where the block does not divide the map, q, k and v are zero-padded on the right and at the bottom and the padding
    takes part without a mask. A block at least as large as the map is the map.

    Args:
        qkv: Queries, keys and values ``[B, H, W, 3, C]``, any strides.
        num_heads: Heads, a divisor of C.
        block: Height and width of a block in tokens; 0 stands for the whole side.
        lepe: Depthwise kernels ``[C, 1, 3, 3]`` and bias ``[C]``, or None.

    Returns:
        ``[B, H, W, C]``.
    """
    size = qkv.shape[1:3]
    return from_blocks(attend_blocks(qkv, num_heads=num_heads, block=fit_block(block, size), lepe=lepe), size)


def attend_blocks(qkv: torch.Tensor, *, num_heads: int, block: tuple[int, int], lepe: Kernel | None) -> torch.Tensor:
    """``block_attention`` before its blocks are put together: ``[B * rows * columns, bh, bw, C]``."""
    if use_reference():
        return _reference(qkv, num_heads, block, lepe)
    q, k, v = (to_blocks(x, block) for x in qkv.unbind(3))
    tokens = (x.flatten(1, 2).unflatten(-1, (num_heads, -1)) for x in (q, k, v))
    return add_lepe(softmax_attention(*tokens).reshape(v.shape), v, lepe)


def _reference(qkv, num_heads, block, lepe):
    (bh, bw), (b, h, w, _, c) = block, qkv.shape
    padded = qkv.new_zeros(b, h + -h % bh, w + -w % bw, 3, c)
    padded[:, :h, :w] = qkv
    out = []
    for i in range(0, h, bh):
        for j in range(0, w, bw):
            q, k, v = (x.squeeze(3) for x in padded[:, i : i + bh, j : j + bw].split(1, dim=3))
            one = softmax_attention(*(x.reshape(b, bh * bw, num_heads, -1) for x in (q, k, v))).reshape(v.shape)
            out.append(one if lepe is None else one + depthwise_conv(v, *lepe))
    return torch.stack(out, dim=1).flatten(0, 1)
