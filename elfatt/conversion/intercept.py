"""Intercept the softmax attention inside any module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float | None], torch.Tensor]


class InterceptAttention(TorchFunctionMode):
    """Context manager that replaces self-attention by ``scaled_dot_product_attention`` with a function.

    Modules keep their own projections, norms, adapters and residuals. Calls with a mask, dropout, causal attention or
    keys of another length than the queries are not intercepted.

    Args:
        attend: Maps q, k, v ``[B, N, heads, d]`` and the scale or None to ``[B, N, heads, d]``.
    """

    def __init__(self, attend: Attention):
        super().__init__()
        self.attend = attend

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention or not _is_self_attention(*args, **kwargs):
            return func(*args, **kwargs)
        q, k, v = (x.transpose(1, 2) for x in _qkv(*args, **kwargs))
        return self.attend(q, k, v, kwargs.get("scale")).transpose(1, 2)


def _qkv(query, key, value, *_, **__):
    return query, key, value


def _is_self_attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    plain = attn_mask is None and not dropout_p and not is_causal and not enable_gqa
    return plain and query.ndim == 4 and query.shape == key.shape == value.shape
