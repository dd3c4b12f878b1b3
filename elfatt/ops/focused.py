"""Focused linear attention (FLatten, Han et al., arXiv 2308.00442)."""

from __future__ import annotations

import torch

from elfatt.ops.pytorch import without_autocast

EPSILON = 1e-6
POWER = 3


def focused_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: torch.Tensor, *, num_heads: int
) -> torch.Tensor:
    """Compute ``z · φ(q) · (φ(k)ᵀ v) / N`` per head, with ``z = 1 / (φ(q) · mean φ(k) + ε)``.

    ``φ(x) = ‖r‖ · r³ / ‖r³‖`` with ``r = (ReLU(x) + ε) / softplus(scale)``, norms over all C channels. Computed
    in float32 or wider, because cubes and sums over tokens overflow float16.

    Args:
        q: Queries ``[B, N, C]``, any strides.
        k: Keys, same shape, positional encoding included.
        v: Values, same shape.
        scale: ``[1, 1, C]``.
        num_heads: Heads; must divide C.

    Returns:
        ``[B, N, C]`` in the dtype of ``v``.
    """
    dtype = torch.promote_types(v.dtype, torch.float32)
    with without_autocast(v):
        scale = torch.nn.functional.softplus(scale.to(dtype))
        q, k = (_focus(x.to(dtype), scale) for x in (q, k))
        q, k, wide_v = (x.unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in (q, k, v.to(dtype)))
        normalizer = 1 / (q @ k.mean(dim=2, keepdim=True).transpose(-2, -1) + EPSILON)
        shrink = k.shape[2] ** -0.5
        context = (k.transpose(-2, -1) * shrink) @ (wide_v * shrink)
        out = q @ context * normalizer
    return out.transpose(1, 2).flatten(2).to(v.dtype)


def _focus(x, scale):
    r = (x.relu() + EPSILON) / scale
    cubed = r**POWER
    return cubed * (r.norm(dim=-1, keepdim=True) / cubed.norm(dim=-1, keepdim=True))
