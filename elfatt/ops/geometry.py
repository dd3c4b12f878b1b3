"""Split maps of tokens into blocks and merge them back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch.fx.experimental.symbolic_shapes import statically_known_true

Filter = tuple[torch.Tensor, torch.Tensor | None]  # depthwise convolution: weight [C, 1, k, k] and bias [C]


def always(condition: bool | torch.SymBool) -> bool:
    """Return whether a condition on sizes holds; for symbolic sizes (``torch.export``), whether it always does."""
    return statically_known_true(condition) if isinstance(condition, torch.SymBool) else condition


def count_blocks(side: int, block: int) -> int:
    """Return ``ceil(side / block)``; not as ``-(-side // block)``, which ONNX rounds towards zero."""
    return 1 if always(block == side) else (side + block - 1) // block


def fit_block(block: Sequence[int], size: Sequence[int]) -> tuple[int, int]:
    """Return the block clipped to the map.

    Args:
        block: Height and width in tokens; 0 means the full side.
        size: Height and width of the map in tokens.
    """
    # min() of a symbolic side would stay in the graph even if its result is known
    height, width = (b if b and always(b <= s) else min(b or s, s) for b, s in zip(block, size, strict=True))
    return height, width


def pad_to_multiple(x: torch.Tensor, block: Sequence[int]) -> torch.Tensor:
    """Zero-pad ``[B, H, W, ...]`` on the right and bottom to whole blocks; a no-op if they fit."""
    bottom, right = (count_blocks(side, b) * b - side for side, b in zip(x.shape[1:3], block, strict=True))
    if always(bottom == 0) and always(right == 0):
        return x
    return F.pad(x, (0, 0) * (x.ndim - 3) + (0, right, 0, bottom))


def to_blocks(x: torch.Tensor, block: Sequence[int]) -> torch.Tensor:
    """Split a map into non-overlapping blocks, zero-padding it to whole blocks.

    Args:
        x: Map ``[B, H, W, ...]``, any strides.
        block: Block height and width in tokens.

    Returns:
        Blocks ``[B * rows * columns, bh, bw, ...]`` in row-major order; a view if one block is the whole map.
    """
    bh, bw = block
    x = pad_to_multiple(x, block)
    b, h, w, *channels = x.shape
    return x.view(b, h // bh, bh, w // bw, bw, *channels).transpose(2, 3).reshape(-1, bh, bw, *channels)


def from_blocks(blocks: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Undo ``to_blocks``: merge ``[B * rows * columns, bh, bw, C]`` into ``[B, H, W, C]`` and crop the padding."""
    x = _in_place(blocks, size)
    _, rows, bh, columns, bw, c = x.shape
    return x.reshape(-1, rows * bh, columns * bw, c)[:, : size[0], : size[1]]


def cat_with_blocks(x: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """Concatenate a map ``[B, H, W, C1]`` and blocks along channels: ``[B, H, W, C1 + C2]``.

    Unpadded blocks are merged by the concatenation itself, which saves a copy.
    """
    h, w = x.shape[1:3]
    local = _in_place(blocks, (h, w))
    _, rows, bh, columns, bw, _ = local.shape
    if not (always(rows * bh == h) and always(columns * bw == w)):
        return torch.cat([x, from_blocks(blocks, (h, w))], dim=-1)
    x = x.unflatten(2, (columns, bw)).unflatten(1, (rows, bh))
    return torch.cat([x, local], dim=-1).view(-1, h, w, x.shape[-1] + blocks.shape[-1])


def _in_place(blocks, size):
    """View blocks in the order of the padded map: ``[B, rows, bh, columns, bw, C]``."""
    _, bh, bw, c = blocks.shape
    return blocks.view(-1, count_blocks(size[0], bh), count_blocks(size[1], bw), bh, bw, c).transpose(2, 3)
