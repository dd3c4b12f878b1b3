"""Efficient attention (Shen et al., arXiv 1812.01243): linear in the tokens. ELFATT's global branch, all of EFFATT."""

from __future__ import annotations

import torch

from elfatt.ops.dispatch import is_slow_half, use_reference, without_autocast


def efficient_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """``softmax_features(q) · (softmax_tokens(k)ᵀ · v)`` per head, without a scale.

    Finite for any finite input in any dtype: both factors are averages.

    Args:
        q: Queries ``[B, N, heads, d]``, any strides; ``k`` and ``v`` alike.
        k: Keys.
        v: Values.

    Returns:
        ``[B, N, heads, d]``.
    """
    if use_reference():
        return _reference(q, k, v)
    if is_slow_half(v):
        with without_autocast(v):
            return efficient_attention(q.float(), k.float(), v.float()).to(v.dtype)
    # an explicit dtype keeps autocast from storing the weights in float32; the sums run in float32 either way
    q = q.softmax(dim=-1, dtype=q.dtype)
    k = k.softmax(dim=1, dtype=k.dtype)
    context = k.permute(0, 2, 3, 1) @ v.transpose(1, 2)
    return (q.transpose(1, 2) @ context).transpose(1, 2)


def _reference(q, k, v):
    q, k = (q - q.amax(dim=-1, keepdim=True)).exp(), (k - k.amax(dim=1, keepdim=True)).exp()
    q, k = q / q.sum(dim=-1, keepdim=True), k / k.sum(dim=1, keepdim=True)
    context = torch.einsum("bnhd,bnhe->bhde", k, v)
    return torch.einsum("bnhd,bhde->bnhe", q, context)
