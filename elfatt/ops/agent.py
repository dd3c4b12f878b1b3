"""Agent attention (Han et al., arXiv 2312.08874): pooled queries mediate between queries and keys."""

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
    """Compute ``softmax(s q aᵀ + broadcast_bias) · softmax(s a kᵀ + gather_bias) · v``.

    ``a`` are the queries, average-pooled to the agent grid; ``s = 1 / √d``.

    Args:
        q: Queries ``[B, H, W, C]``, any strides.
        k: Keys, same shape.
        v: Values, same shape.
        num_heads: Heads; must divide C.
        agents: Side of the agent grid, of ``agents²`` agents.
        gather_bias: ``[heads, agents², H * W]``.
        broadcast_bias: ``[heads, H * W, agents²]``.
        backend: One of ``BACKENDS``; None for the active one.

    Returns:
        ``[B, H, W, C]``.
    """
    return resolve(backend).agent_attention(
        q, k, v, num_heads=num_heads, agents=agents, gather_bias=gather_bias, broadcast_bias=broadcast_bias
    )
