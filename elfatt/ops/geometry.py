"""Cutting a map of tokens into blocks and putting it together again.

It lives below the operations because the ELFATT operation cuts blocks itself; every module uses these too.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch.fx.experimental.symbolic_shapes import statically_known_true

Kernel = tuple[torch.Tensor, torch.Tensor | None]  # of a depthwise convolution: weight [C, 1, k, k] and bias [C]


def always(condition: bool | torch.SymBool) -> bool:
    """Whether a condition on sizes holds; on symbolic ones (``torch.export``), whether it holds for all of them."""
    return statically_known_true(condition) if isinstance(condition, torch.SymBool) else condition


def count_blocks(side: int, block: int) -> int:
    """Number of blocks that cover a side; not ``-(-side // block)``, which ONNX rounds towards zero."""
    return 1 if always(block == side) else (side + block - 1) // block


def fit_block(block: Sequence[int], size: Sequence[int]) -> tuple[int, int]:
    """The block actually used on a map: a block side at least as long as the map's side is the map's side.

    Args:
        block: Height and width in tokens; 0 stands for the whole side.
        size: Height and width of the map in tokens.
    """
    # min() of a symbolic side would stay in the graph, even where the outcome is known
    height, width = (b if b and always(b <= s) else min(b or s, s) for b, s in zip(block, size, strict=True))
    return height, width


def pad_to_multiple(x: torch.Tensor, block: Sequence[int]) -> torch.Tensor:
    """Zero-pad ``[B, H, W, ...]`` on the right and at the bottom to whole blocks; untouched when nothing is missing."""
    bottom, right = (count_blocks(side, b) * b - side for side, b in zip(x.shape[1:3], block, strict=True))
    if always(bottom == 0) and always(right == 0):
        return x
    return F.pad(x, (0, 0) * (x.ndim - 3) + (0, right, 0, bottom))


def to_blocks(x: torch.Tensor, block: Sequence[int]) -> torch.Tensor:
    """Cut a map into non-overlapping blocks, zero-padding what the block does not divide.

    Args:
        x: Map ``[B, H, W, ...]``, any strides.
        block: Height and width of a block in tokens.

    Returns:
        Blocks ``[B * rows * columns, bh, bw, ...]`` in row-major order; a view where one block is the whole map.
    """
    bh, bw = block
    x = pad_to_multiple(x, block)
    b, h, w, *channels = x.shape
    return x.view(b, h // bh, bh, w // bw, bw, *channels).transpose(2, 3).reshape(-1, bh, bw, *channels)


def from_blocks(blocks: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Undo ``to_blocks``: blocks ``[B * rows * columns, bh, bw, C]`` to the map ``[B, H, W, C]``, padding cropped."""
    x = _in_place(blocks, size)
    _, rows, bh, columns, bw, c = x.shape
    return x.reshape(-1, rows * bh, columns * bw, c)[:, : size[0], : size[1]]


def cat_with_blocks(x: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """Concatenate the channels of a map ``[B, H, W, C1]`` and of blocks: ``[B, H, W, C1 + C2]``.

    Whole blocks go to their place within the concatenation, which saves a copy of them.
    """
    h, w = x.shape[1:3]
    local = _in_place(blocks, (h, w))
    _, rows, bh, columns, bw, _ = local.shape
    if not (always(rows * bh == h) and always(columns * bw == w)):
        return torch.cat([x, from_blocks(blocks, (h, w))], dim=-1)
    x = x.unflatten(2, (columns, bw)).unflatten(1, (rows, bh))
    return torch.cat([x, local], dim=-1).view(-1, h, w, x.shape[-1] + blocks.shape[-1])


def _in_place(blocks, size):
    """View of blocks in the order of the padded map: ``[B, rows, bh, columns, bw, C]``."""
    _, bh, bw, c = blocks.shape
    return blocks.view(-1, count_blocks(size[0], bh), count_blocks(size[1], bw), bh, bw, c).transpose(2, 3)
