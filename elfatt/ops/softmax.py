"""Softmax attention (Vaswani et al., arXiv 1706.03762, section 3.2.1): the one operation whose backends differ."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from elfatt.ops.dispatch import active_backend, can_run_flash_attn


def softmax_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """``softmax(q kᵀ / √d + bias) v`` per head.

    Args:
        q: Queries ``[B, N, heads, d]``.
        k: Keys ``[B, M, heads, d]``.
        v: Values ``[B, M, heads, d]``.
        bias: Added to the scores, broadcastable to ``[B, heads, N, M]``.

    Returns:
        ``[B, N, heads, d]``.

    Raises:
        ValueError: The chosen backend cannot take these tensors.
    """
    return _IMPLEMENTATIONS[active_backend()](q, k, v, bias)


def _reference(q, k, v, bias):
    scores = torch.einsum("bnhd,bmhd->bhnm", q, k) / q.shape[-1] ** 0.5
    if bias is not None:
        scores = scores + bias
    weights = (scores - scores.amax(dim=-1, keepdim=True)).exp()
    return torch.einsum("bhnm,bmhd->bnhd", weights / weights.sum(dim=-1, keepdim=True), v)


def _math(q, k, v, bias):
    scores = (q.transpose(1, 2) * q.shape[-1] ** -0.5) @ k.permute(0, 2, 3, 1)
    if bias is not None:
        scores = scores + bias
    # an explicit dtype keeps autocast from storing the weights in float32; the sum runs in float32 either way
    return (scores.softmax(dim=-1, dtype=scores.dtype) @ v.transpose(1, 2)).transpose(1, 2)


def _sdpa(q, k, v, bias):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if bias is not None:
        bias = bias.to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2)


def _flash_attn(q, k, v, bias):
    can_run_flash_attn(q, bias, raise_error=True)
    from flash_attn import flash_attn_func

    return flash_attn_func(q, k, v)


_IMPLEMENTATIONS = {
    "auto": _sdpa,
    "reference": _reference,
    "math": _math,
    "sdpa": _sdpa,
    "flash_attn": _flash_attn,
    "triton": _sdpa,
    "cpp": _sdpa,
}
