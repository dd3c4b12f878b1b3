"""Softmax attention (Vaswani et al., arXiv 1706.03762, section 3.2.1)."""

from __future__ import annotations

import torch

from elfatt.ops.dispatch import resolve


def softmax_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    backend: str | None = None,
) -> torch.Tensor:
    """Compute ``softmax(q kᵀ / √d + bias) v`` per head.

    Args:
        q: Queries ``[B, N, heads, d]``.
        k: Keys ``[B, M, heads, d]``.
        v: Values ``[B, M, heads, d]``.
        bias: Bias on the scores, broadcastable to ``[B, heads, N, M]``.
        backend: One of ``BACKENDS``; None for the active one.

    Returns:
        ``[B, N, heads, d]``.

    Raises:
        ValueError: The backend does not support these tensors.
    """
    return resolve(backend).softmax_attention(q, k, v, bias)
