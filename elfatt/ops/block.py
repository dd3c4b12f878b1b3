"""Softmax attention inside blocks of a map, with LePE: ELFATT's local branch, CSWin's stripes, vanilla attention.

Source: ELFATT (arXiv 2501.06098), local branch ``g(softmax(f(Q) f(K)ᵀ / √d) f(V) + L(f(V)))``.
"""

from __future__ import annotations

import torch

from elfatt.ops.depthwise import Kernel, depthwise_conv
from elfatt.ops.dispatch import use_reference
from elfatt.ops.geometry import fit_block, from_blocks, to_blocks
from elfatt.ops.softmax import softmax_attention


def block_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    num_heads: int,
    block: tuple[int, int],
    lepe: Kernel | None = None,
) -> torch.Tensor:
    """Attention within non-overlapping blocks; LePE sees zeros beyond its block.

    Where the block does not divide the map, q, k and v are zero-padded on the right and at the bottom and the padding
    takes part without a mask. A block at least as large as the map is the map.

    Args:
        q: Queries ``[B, H, W, C]``, any strides; ``k`` and ``v`` alike.
        k: Keys.
        v: Values.
        num_heads: Heads, a divisor of C.
        block: Height and width of a block in tokens; 0 stands for the whole side.
        lepe: Depthwise kernels ``[C, 1, 3, 3]`` and bias ``[C]``, or None.

    Returns:
        ``[B, H, W, C]``.
    """
    size = q.shape[1:3]
    block = fit_block(block, size)
    if use_reference():
        return _reference(q, k, v, num_heads, block, lepe)
    return from_blocks(attend_blocks(q, k, v, num_heads=num_heads, block=block, lepe=lepe), size)


def attend_blocks(q, k, v, *, num_heads, block, lepe) -> torch.Tensor:
    """``block_attention`` before the blocks are put together: ``[B * rows * columns, bh, bw, C]``."""
    q, k, v = (to_blocks(x, block) for x in (q, k, v))
    out = softmax_attention(*(x.flatten(1, 2).unflatten(-1, (num_heads, -1)) for x in (q, k, v)))
    out = out.reshape(v.shape)
    return out if lepe is None else out + depthwise_conv(v, *lepe)


def _reference(q, k, v, num_heads, block, lepe):
    (bh, bw), (b, h, w, c) = block, q.shape
    padded = [x.new_zeros(b, h + -h % bh, w + -w % bw, c) for x in (q, k, v)]
    for target, x in zip(padded, (q, k, v), strict=True):
        target[:, :h, :w] = x
    out = torch.zeros_like(padded[0])
    for i in range(0, h, bh):
        for j in range(0, w, bw):
            tokens = [x[:, i : i + bh, j : j + bw] for x in padded]
            one = softmax_attention(*(x.reshape(b, bh * bw, num_heads, -1) for x in tokens)).reshape(b, bh, bw, c)
            out[:, i : i + bh, j : j + bw] = one if lepe is None else one + depthwise_conv(tokens[2], *lepe)
    return out[:, :h, :w]
