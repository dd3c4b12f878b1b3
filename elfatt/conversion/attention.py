"""Attention of trained multi-head layers with exact, linear or block-wise heads.

Source: ELFATT (arXiv 2501.06098), the double-head formula: heads run either the global branch
``softmax(Q) (softmax(K)ᵀ V)`` or block attention. Trained layers have no LePE.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch

from elfatt.conversion.plan import LayerPlan, Plan
from elfatt.ops import efficient_attention, elfatt_attention, softmax_attention
from elfatt.ops.geometry import fit_block, from_blocks, to_blocks


def hybrid_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    size: tuple[int, int] | None,
    plan: LayerPlan,
    *,
    prefix: int = 0,
    scale: float | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Attend over a map's tokens, optionally preceded by class, register or text tokens.

    Prefix tokens attend to all tokens exactly, and are keys in every branch. If the blocks do not divide the map, the
    last ones are shifted inwards and overlap their neighbours, so that every query sees a whole block.

    Args:
        q: Queries ``[B, N, heads, d]``, N = prefix + H · W, the map in row-major order.
        k: Keys, same shape.
        v: Values, same shape.
        size: Map height and width H, W in tokens. None if the tokens do not form a map, e.g. merged ones; ``block``
            heads are then exact.
        plan: Branch of each head.
        prefix: Number of tokens before the map.
        scale: Scale of the scores in the softmax branches (default: ``1 / √d``).
        backend: One of ``elfatt.ops.BACKENDS``; None for the active one.

    Returns:
        ``[B, N, heads, d]``.

    Raises:
        ValueError: Shapes do not match the map or the plan.
    """
    if size is None:
        size, plan = (1, q.shape[1] - prefix), plan.without_map()
    _check(q, k, v, size, plan, prefix)
    scaled = q if scale is None else q * (scale * q.shape[-1] ** 0.5)  # the operations scale by 1 / √d
    if plan.is_exact or q.shape[1] < plan.min_tokens:
        return softmax_attention(scaled, k, v, backend=backend)

    groups: dict[tuple[str, int], list[int]] = defaultdict(list)
    for index, head in enumerate(plan.heads):
        groups[head.branch, head.block].append(index)
    exact = groups.pop(("exact", 0), [])
    soft: tuple[torch.Tensor, ...] = q, k
    if any(head.temperature != 1 for head in plan.heads):
        soft = tuple(x / _column(x, [head.temperature for head in plan.heads]) for x in soft)

    parts: list[tuple[list[int], torch.Tensor]] = []  # heads and their outputs at the map's tokens
    if exact:
        parts.append((exact, softmax_attention(*_heads(exact, scaled[:, prefix:], k, v), backend=backend)))
    sides = [side for branch, side in groups if branch == "block"]
    if not prefix and len(sides) <= 1 and all(n % min(n, side) == 0 for side in sides for n in size):
        linear, local = (sum((h for (b, _), h in groups.items() if b == branch), []) for branch in ("linear", "block"))
        parts.append((linear + local, _fused(soft, scaled, k, v, size, linear, local, max(sides, default=1), backend)))
    else:
        for (branch, side), heads in groups.items():
            if branch == "linear":
                out = efficient_attention(*_heads(heads, soft[0][:, prefix:], soft[1], v), backend=backend)
            else:
                out = _attend_blocks(*_heads(heads, scaled, k, v), size=size, side=side, prefix=prefix, backend=backend)
            parts.append((heads, out))

    order = [head for heads, _ in parts for head in heads]
    out = torch.cat([part for _, part in parts], dim=2)
    if order != sorted(order):
        out = out[:, :, [order.index(head) for head in range(len(order))]]
    if any(head.shortcut for head in plan.heads):
        out = out + v[:, prefix:] * _column(v, [head.shortcut for head in plan.heads])
    if prefix:
        out = torch.cat([softmax_attention(scaled[:, :prefix], k, v, backend=backend), out], dim=1)
    return out


def run_plan(
    plan: Plan,
    layer: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    size: tuple[int, int] | None,
    *,
    prefix: int = 0,
    scale: float | None = None,
) -> torch.Tensor:
    """Run ``hybrid_attention`` for a plan's layer; an ``Attend`` once the plan is bound."""
    return hybrid_attention(q, k, v, size, plan.layers[layer], prefix=prefix, scale=scale)


def _fused(soft, scaled, k, v, size, linear, local, side, backend):
    """Run linear heads and heads of one block side as one ELFATT operation."""
    width = v.shape[-1]
    packed = [
        torch.cat([*_heads(linear, first), *_heads(local, second)], dim=2).flatten(2)
        for first, second in ((soft[0], scaled), (soft[1], k), (v, v))
    ]
    out = elfatt_attention(
        torch.cat(packed, dim=-1).unflatten(1, size),
        num_heads=(len(linear), len(local)),
        global_channels=len(linear) * width,
        block_size=side,
        backend=backend,
    )
    return out.flatten(1, 2).unflatten(-1, (-1, width))


def _attend_blocks(q, k, v, *, size, side, prefix, backend):
    """Attend from each map token to its block and the prefix: ``[B, H · W, heads, d]``."""
    block = fit_block((side, side), size)
    taken, kept = zip(*(_overlapping(length, b, q.device) for length, b in zip(size, block, strict=True)), strict=True)
    whole = len(taken[0]), len(taken[1])

    def cut(x):
        x = x[:, prefix:].unflatten(1, size).flatten(3)
        return to_blocks(x[:, taken[0]][:, :, taken[1]], block).flatten(1, 2).unflatten(-1, q.shape[2:])

    def with_prefix(x):
        blocks = cut(x)
        if not prefix:
            return blocks
        return torch.cat([x[:, :prefix].repeat_interleave(blocks.shape[0] // x.shape[0], dim=0), blocks], dim=1)

    out = softmax_attention(cut(q), with_prefix(k), with_prefix(v), backend=backend)
    out = from_blocks(out.flatten(2).unflatten(1, block), whole)[:, kept[0]][:, :, kept[1]]
    return out.flatten(1, 2).unflatten(-1, q.shape[2:])


def _overlapping(length: int, block: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the tokens of a side in whole blocks, the last one shifted inwards, and each token's place in them."""
    tokens = torch.arange(length, device=device)
    rest = length % block
    if not rest:
        return tokens, tokens
    full = length - rest
    return torch.cat([tokens[:full], tokens[-block:]]), torch.cat([tokens[:full], tokens[full:] + block - rest])


def _heads(heads: Sequence[int], *tensors: torch.Tensor) -> list[torch.Tensor]:
    """Select heads of ``[B, N, heads, d]``; views if they are adjacent."""
    first, count = (heads[0], len(heads)) if heads else (0, 0)
    if list(heads) == list(range(first, first + count)):
        return [x[:, :, first : first + count] for x in tensors]
    return [x[:, :, list(heads)] for x in tensors]


def _column(x: torch.Tensor, values: Sequence[float]) -> torch.Tensor:
    return x.new_tensor(values)[:, None]


def _check(q, k, v, size, plan, prefix):
    if q.ndim != 4 or any(x.shape != q.shape for x in (k, v)):  # no set: symbolic sizes have no hash
        shapes = [tuple(x.shape) for x in (q, k, v)]
        raise ValueError(f"q, k and v must have one shape [B, N, heads, d], got {shapes}")
    if prefix < 0 or q.shape[1] != prefix + size[0] * size[1]:
        raise ValueError(
            f"{q.shape[1]} tokens are not {prefix} plus a map of {size[0]} × {size[1]}: pass the map's size"
        )
    if q.shape[2] != len(plan.heads):
        raise ValueError(f"the plan has {len(plan.heads)} heads but the layer has {q.shape[2]}")
