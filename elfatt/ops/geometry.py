"""Cutting a map of tokens into blocks and putting it together again.

It lives below the operations because the ELFATT operation cuts blocks itself; every module uses these too.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def fit_block(block: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """The block actually used on a map: a block side at least as long as the map's side is the map's side.

    Args:
        block: Height and width in tokens; 0 stands for the whole side.
        size: Height and width of the map in tokens.
    """
    return tuple(min(b, s) if b else s for b, s in zip(block, size, strict=True))


def pad_to_multiple(x: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """Zero-pad ``[B, H, W, C]`` on the right and at the bottom to whole blocks; a view when nothing is missing."""
    bottom, right = -x.shape[1] % block[0], -x.shape[2] % block[1]
    return F.pad(x, (0, 0, 0, right, 0, bottom)) if bottom or right else x


def to_blocks(x: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """Cut a map into non-overlapping blocks, zero-padding what the block does not divide.

    Args:
        x: Map ``[B, H, W, C]``.
        block: Height and width of a block in tokens.

    Returns:
        Blocks ``[B * rows * columns, bh, bw, C]`` in row-major order.
    """
    bh, bw = block
    x = pad_to_multiple(x, block)
    b, h, w, c = x.shape
    return x.view(b, h // bh, bh, w // bw, bw, c).transpose(2, 3).reshape(-1, bh, bw, c)


def from_blocks(blocks: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Undo ``to_blocks``: blocks ``[B * rows * columns, bh, bw, C]`` to the map ``[B, H, W, C]``, padding cropped."""
    h, w = size
    _, bh, bw, c = blocks.shape
    rows, columns = -(-h // bh), -(-w // bw)
    x = blocks.view(-1, rows, columns, bh, bw, c).transpose(2, 3).reshape(-1, rows * bh, columns * bw, c)
    return x[:, :h, :w]
