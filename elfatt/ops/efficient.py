"""Efficient attention (Shen et al., arXiv 1812.01243): linear in the tokens. ELFATT's global branch, all of EFFATT."""

from __future__ import annotations

import torch

from elfatt.ops.dispatch import resolve


def efficient_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, backend: str | None = None
) -> torch.Tensor:
    """``softmax_features(q) · (softmax_tokens(k)ᵀ · v)`` per head, without a scale.

    Finite for any finite input in any dtype: both factors are averages.

    Args:
        q: Queries ``[B, N, heads, d]``, any strides; ``k`` and ``v`` alike.
        k: Keys.
        v: Values.
        backend: One of ``BACKENDS``, or None for the ambient one.

    Returns:
        ``[B, N, heads, d]``.
    """
    return resolve(backend).efficient_attention(q, k, v)
