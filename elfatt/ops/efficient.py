"""Efficient attention (Shen et al., arXiv 1812.01243): linear in the number of tokens.

ELFATT's global branch, and all of EFFATT.
"""

from __future__ import annotations

import torch

from elfatt.ops.dispatch import resolve


def efficient_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, backend: str | None = None
) -> torch.Tensor:
    """Compute ``softmax_features(q) · (softmax_tokens(k)ᵀ · v)`` per head, without scaling.

    Finite for finite inputs in any dtype, as both products are weighted averages.

    Args:
        q: Queries ``[B, N, heads, d]``, any strides.
        k: Keys, same shape.
        v: Values, same shape.
        backend: One of ``BACKENDS``; None for the active one.

    Returns:
        ``[B, N, heads, d]``.
    """
    return resolve(backend).efficient_attention(q, k, v)
