"""Agent attention for trained diffusion models, a baseline in which heavily merged queries serve as agents.

Source: Agent Attention (Han et al., arXiv 2312.08874), AgentSD: formula, constants and step schedule.
"""

from __future__ import annotations

from functools import partial

import torch

from elfatt.conversion.merging import Matching, Tokens
from elfatt.ops import softmax_attention

EARLY = 0.4  # fraction of steps with agents: 20 of 50
MERGED = 0.4  # fraction of tokens merged before a layer, in all steps
MERGED_INTO_AGENTS = 0.95  # upper bound: each cell keeps a token
STRIDES = {True: 4, False: 2}  # cell side in early and later steps


def agent_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    agents: torch.Tensor,
    *,
    scale: float | None = None,
    spread: float = 0.3,
    shortcut: float = 0.075,
) -> torch.Tensor:
    """Compute ``softmax(scaleˢ q aᵀ) softmax(scale a kᵀ) v + shortcut · v``, with ``s`` the ``spread``.

    Args:
        q: Queries ``[B, N, heads, d]``.
        k: Keys ``[B, N, heads, d]``.
        v: Values ``[B, N, heads, d]``.
        agents: Agents ``[B, A, heads, d]``.
        scale: Scale of the scores (default: ``1 / √d``).
        spread: Exponent of the scale between queries and agents.
        shortcut: Coefficient of V, which is added to the output.

    Returns:
        ``[B, N, heads, d]``.
    """
    root = q.shape[-1] ** 0.5  # softmax_attention divides by it
    scale = 1 / root if scale is None else scale
    features = softmax_attention(agents * (scale * root), k, v)
    return softmax_attention(q * (scale**spread * root), agents, features) + shortcut * v


class Agent:
    """AgentSD as an ``Attend`` that merges its own tokens: agents in the first 40 % of steps, then plain ToMe.

    Layers without merged tokens stay exact.
    """

    def merge(self, x: torch.Tensor, size: tuple[int, int], done: float, generator: torch.Generator) -> Tokens:
        """Implement ``elfatt.conversion.merging.Merge``."""
        early, count = done < EARLY, int(MERGED * x.shape[1])
        # not random for odd batches, as guidance's halves would differ
        matching = Matching(x, size, STRIDES[early], generator if len(x) % 2 == 0 else None)
        attend = partial(_attend_by_agents, matching, count) if early else None
        return Tokens(lambda t: matching.merge(t, count), lambda t: matching.unmerge(t, count), attend)

    def __call__(self, layer, q, k, v, size, *, prefix=0, scale=None) -> torch.Tensor:
        """Attend exactly."""
        return softmax_attention(q if scale is None else q * (scale * q.shape[-1] ** 0.5), k, v)


def _attend_by_agents(matching, count, layer, q, k, v, size, *, prefix=0, scale=None):
    """Attend over merged tokens by agents, or exactly if that is cheaper."""
    further = min(matching.rest.shape[1], int(MERGED_INTO_AGENTS * matching.tokens))
    agents = matching.merge_further(q.flatten(2), count, further).unflatten(-1, q.shape[2:])
    if 2 * agents.shape[1] < q.shape[1]:
        return agent_attention(q, k, v, agents, scale=scale)
    return softmax_attention(q if scale is None else q * (scale * q.shape[-1] ** 0.5), k, v)
