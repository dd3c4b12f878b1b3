"""Agent attention (Han et al., arXiv 2312.08874): a few pooled queries stand between the queries and the keys."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from elfatt.ops.dispatch import use_reference, without_autocast


def agent_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    num_heads: int,
    agents: int,
    gather_bias: torch.Tensor,
    broadcast_bias: torch.Tensor,
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

    Returns:
        ``[B, H, W, C]``.
    """
    b, h, w, c = q.shape
    if use_reference():
        pool = _pool_reference(q, agents)
    else:
        pool = F.adaptive_avg_pool2d(q.permute(0, 3, 1, 2), agents).flatten(2).transpose(1, 2)
    a = pool.reshape(b, -1, num_heads, c // num_heads).transpose(1, 2)
    q, k, v = (x.flatten(1, 2).unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in (q, k, v))
    out = _attend(q, a, _attend(a, k, v, gather_bias), broadcast_bias)
    return out.transpose(1, 2).reshape(b, h, w, c)


def _attend(q, k, v, bias):
    scale = q.shape[-1] ** -0.5
    if q.dtype == torch.float16:  # products of large activations pass float16's 65504
        with without_autocast(q):
            scores = (q.float() * scale) @ k.float().transpose(-2, -1) + bias.float()
        weights = scores.softmax(dim=-1).to(v.dtype)
    else:
        scores = (q * scale) @ k.transpose(-2, -1) + bias
        weights = scores.softmax(dim=-1).to(v.dtype)
    return weights @ v


def _pool_reference(q, agents):
    _, h, w, _ = q.shape
    edges = [[(i * n // agents, -(-(i + 1) * n // agents)) for i in range(agents)] for n in (h, w)]
    cells = [q[:, t:b, l:r].mean(dim=(1, 2)) for t, b in edges[0] for l, r in edges[1]]  # noqa: E741
    return torch.stack(cells, dim=1)
