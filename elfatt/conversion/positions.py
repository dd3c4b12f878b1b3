"""Relative position biases as query and key features, for use with any fused attention.

Source: decomposed relative positions of MViTv2 (arXiv 2112.01526), as used by SAM.
"""

from __future__ import annotations

import torch


def with_relative_positions(
    q: torch.Tensor, k: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Extend queries and keys so that their products are ``q·k / √d + q·rows[y, y'] + q·columns[x, x']``.

    Each query is extended by its products with the embeddings of all rows and columns, each key by the matching one-hot
    vectors. No ``N × N`` bias is materialised.

    Args:
        q: Queries ``[B, H · W, heads, d]``.
        k: Keys, same shape.
        rows: Embeddings ``[H, H, d]`` of a query's row relative to a key's.
        columns: Embeddings ``[W, W, d]`` of a query's column relative to a key's.

    Returns:
        Queries and keys ``[B, H · W, heads, d + H + W]``, for attention with a scale of 1.
    """
    height, width = len(rows), len(columns)
    grid = q.unflatten(1, (height, width))
    by_row = torch.einsum("bhwnc,hkc->bhwnk", grid, rows)
    by_column = torch.einsum("bhwnc,wkc->bhwnk", grid, columns)
    place = torch.cat([torch.eye(height).repeat_interleave(width, 0), torch.eye(width).repeat(height, 1)], dim=1).to(k)
    q = torch.cat([q * q.shape[-1] ** -0.5, by_row.flatten(1, 2), by_column.flatten(1, 2)], dim=-1)
    return q, torch.cat([k, place[:, None].expand(*k.shape[:3], -1)], dim=-1)
