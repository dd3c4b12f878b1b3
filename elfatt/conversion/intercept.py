"""Intercept the softmax attention inside any module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

# q, k, v [B, N, heads, d], the scale and why the call is no plain self-attention, if so; None leaves the call as it is
Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float | None, str | None], torch.Tensor | None]
_SDPA = torch._C._nn.scaled_dot_product_attention  # torch.nn.functional's may have been replaced


class InterceptAttention(TorchFunctionMode):
    """Context manager that replaces self-attention by ``scaled_dot_product_attention`` with a function.

    Modules keep their own projections, norms, adapters and residuals. Cross-attention, with keys of another length than
    the queries, is not intercepted.

    Args:
        attend: Maps q, k, v ``[B, N, heads, d]``, the scale or None, and the reason against replacing the call or None,
            to ``[B, N, heads, d]``, or to None for PyTorch's result.
    """

    def __init__(self, attend: Attention):
        super().__init__()
        self.attend = attend

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is not _SDPA:
            return func(*args, **kwargs)
        (q, k, v), scale, refusal = _parse(*args, **kwargs)
        if q.ndim != 4 or not q.shape == k.shape == v.shape:
            return func(*args, **kwargs)
        out = self.attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), scale, refusal)
        return func(*args, **kwargs) if out is None else out.transpose(1, 2)


def _parse(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    reasons = {"dropout": dropout_p, "a mask": attn_mask is not None, "a causal mask": is_causal}
    return (query, key, value), scale, next((reason for reason, met in reasons.items() if met), None)
