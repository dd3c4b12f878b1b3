"""Agent attention (Han et al., arXiv 2312.08874): a few pooled queries stand between the queries and the keys."""

from __future__ import annotations

import torch

from elfatt.ops.dispatch import resolve


def agent_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    num_heads: int,
    agents: int,
    gather_bias: torch.Tensor,
    broadcast_bias: torch.Tensor,
    backend: str | None = None,
) -> torch.Tensor:
    """``softmax(s q aᵀ + broadcast_bias) · softmax(s a kᵀ + gather_bias) · v`` with ``a`` the pooled queries.

    Args:
        q: Queries ``[B, H, W, C]``, any strides; ``k`` and ``v`` alike.
        k: Keys.
        v: Values.
        num_heads: Heads, a divisor of C.
        agents: Side of the pooled grid; there are ``agents²`` agents.
        gather_bias: ``[heads, agents², H * W]``.
        broadcast_bias: ``[heads, H * W, agents²]``.
        backend: One of ``BACKENDS``, or None for the ambient one.

    Returns:
        ``[B, H, W, C]``.
    """
    return resolve(backend).agent_attention(
        q, k, v, num_heads=num_heads, agents=agents, gather_bias=gather_bias, broadcast_bias=broadcast_bias
    )
