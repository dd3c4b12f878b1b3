"""Approximation error of a mechanism against softmax attention on given queries, keys and values.

A mechanism is linear in V, so each head has an N × N matrix of weights, N = H · W tokens. It is compared with global
softmax attention in the same heads, ``softmax(q kᵀ / √d)`` with d channels per head; a channel split can change d and
thus the reference. Outputs are compared without LePE, other convolutions of V and the output projection. Errors are
relative, ``‖A − S‖ / ‖S‖``: map errors are averaged over channels (wide heads weigh more than narrow ones) and images,
errors of the concatenated outputs ``[N, C]`` over images. Everything runs in float64.

arXiv 2501.06098 bounds such an error; this module computes the errors themselves, not the bound.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from torch import nn

from elfatt.attention import create_attention
from elfatt.attention.base import QKVAttention
from elfatt.attention.elfatt import ELFATT
from elfatt.conversion.measures import NORMS, relative_error
from elfatt.ops import use_backend
from elfatt.ops.geometry import pad_to_multiple

COLUMNS = {
    "map_frobenius": "map error, Frobenius",
    "map_spectral": "map error, spectral",
    "output_frobenius": "output error, Frobenius",
    "output_spectral": "output error, spectral",
    "entropy": "entropy of the map / log N",
    "concentration": "mass on the top 10 % of keys",
}
MECHANISMS = {  # compared alongside ELFATT, with their options
    "vanilla": {},
    "effatt": {},
    "swin": {"window_size": 7},
    "cswin": {"stripe": 7},
    "flatten": {},
    "agent": {"agents": 7},
}


def bare_attention(name: str, dim: int, num_heads: int, **options: Any) -> QKVAttention:
    """Build a mechanism with all parameters zero: projections, convolutions and position terms.

    Args:
        name: A mechanism of ``elfatt.attention``.
        dim: Channels C.
        num_heads: Number of attention heads.
        **options: Keyword arguments of the mechanism.

    Raises:
        ValueError: Unknown name or invalid value.
    """
    attention = cast(QKVAttention, create_attention(name, dim=dim, num_heads=num_heads, **options))
    for parameter in attention.parameters():
        nn.init.zeros_(parameter)
    return attention


def attention_map(attention: QKVAttention, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Return the attention matrix of each head, computed by running the mechanism on the columns of the identity.

    Rows sum to one, or to less if zero padding enters a softmax (blocks, stripes or windows that do not divide the map)
    or if FLatten's 1e-6 outweighs the weights of a query.

    Args:
        attention: A mechanism, including its position terms; LePE is excluded.
        q: Queries ``[B, H, W, C]``.
        k: Keys ``[B, H, W, C]``.

    Returns:
        ``[B, heads, N, N]`` in float64; row n contains the weights of query n.

    Raises:
        ValueError: Invalid shape.
    """
    _check_shapes(attention, q, k)
    attention = _without_lepe(attention).to(q.device)
    q, k = q.double(), k.double()
    tokens = q.shape[1] * q.shape[2]
    widths = _head_widths(attention)
    width = torch.cat([torch.full((d,), d) for d in widths])
    channel = torch.cat([torch.arange(d) for d in widths])
    parts = []
    for i in range(-(-tokens // min(widths))):
        # a head of d channels takes d columns at a time; beyond the last column V is zero
        v = torch.arange(tokens)[:, None] == i * width + channel
        with torch.no_grad():
            out = _attend(attention, q, k, v.to(q).view(1, *q.shape[1:]).expand_as(q))
        parts.append(out.flatten(1, 2).split(widths, dim=-1))
    return torch.stack([torch.cat(head, dim=-1)[..., :tokens] for head in zip(*parts, strict=True)], dim=1)


def received_attention(
    attention: QKVAttention, q: torch.Tensor, k: torch.Tensor, query: int | None = None
) -> torch.Tensor:
    """Return one row of ``attention_map``, or the sum of all rows, in one backward pass and linear memory.

    The output is linear in V, so its gradient with respect to V gives the weights.

    Args:
        attention: A mechanism.
        q: Queries ``[B, H, W, C]``.
        k: Keys ``[B, H, W, C]``.
        query: Token of the row; None to sum over all.

    Returns:
        ``[B, heads, N]`` in float64: the weight each token receives.

    Raises:
        ValueError: Invalid shape.
    """
    _check_shapes(attention, q, k)
    attention = _without_lepe(attention).to(q.device)
    v = torch.zeros_like(q, dtype=torch.float64, requires_grad=True)
    widths = _head_widths(attention)
    first = torch.tensor([sum(widths[:i]) for i in range(len(widths))], device=q.device)  # one channel per head
    with torch.enable_grad():
        out = _attend(attention, q.double(), k.double(), v).flatten(1, 2)[..., first]
        (weights,) = torch.autograd.grad((out if query is None else out[:, query]).sum(), v)
    return weights.flatten(1, 2)[..., first].transpose(1, 2)


def softmax_map(attention: QKVAttention, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Return global softmax attention in the heads of ``attention``: ``[B, heads, N, N]`` in float64."""
    _check_shapes(attention, q, k)
    branches = _branches(attention)
    channels = [width for width, _ in branches]
    return torch.cat(
        [
            attention_map(bare_attention("vanilla", width, heads), *qk)
            for (width, heads), *qk in zip(branches, q.split(channels, -1), k.split(channels, -1), strict=True)
        ],
        dim=1,
    )


def entropy(weights: torch.Tensor) -> torch.Tensor:
    """Return the mean normalised entropy of the rows of ``[..., N, M]``: 0 for a single key, 1 for uniform weights."""
    rows = weights / weights.sum(-1, keepdim=True)
    return torch.special.entr(rows).sum(-1).mean(-1) / torch.tensor(weights.shape[-1]).to(rows).log()


def concentration(weights: torch.Tensor, share: float = 0.1) -> torch.Tensor:
    """Return the mean mass of the top ``share`` of keys (rounded) in the rows of ``[..., N, M]``."""
    top = weights.topk(max(1, round(share * weights.shape[-1])), dim=-1).values
    return (top.sum(-1) / weights.sum(-1)).mean(-1)


def compare(
    attention: QKVAttention, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, exact: torch.Tensor | None = None
) -> dict[str, float]:
    """Compare the map and output of a mechanism with those of softmax attention.

    Args:
        attention: A mechanism, e.g. from ``bare_attention``.
        q: Queries ``[B, H, W, C]``.
        k: Keys ``[B, H, W, C]``.
        v: Values ``[B, H, W, C]``.
        exact: ``softmax_map(attention, q, k)``, if already computed.

    Returns:
        A value for each of ``COLUMNS``.

    Raises:
        ValueError: Invalid shape.
    """
    _check_shapes(attention, q, k, v)
    found = attention_map(attention, q, k)
    exact = softmax_map(attention, q, k) if exact is None else exact
    widths = _head_widths(attention)
    values = v.double().flatten(1, 2).split(widths, dim=-1)
    out, truth = (
        torch.cat([a @ x for a, x in zip(maps.unbind(1), values, strict=True)], -1) for maps in (found, exact)
    )
    figures = {f"map_{name}": relative_error(found, exact, name) for name in NORMS}
    figures |= {"entropy": entropy(found), "concentration": concentration(found)}
    share = torch.tensor(widths).to(found) / attention.dim
    figures = {name: (per_head * share).sum(1) for name, per_head in figures.items()}
    figures |= {f"output_{name}": relative_error(out, truth, name) for name in NORMS}
    return {name: figures[name].mean().item() for name in COLUMNS}


def sweep(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    num_heads: int,
    blocks: Iterable[int] = (2, 4, 7, 14, 28),
    splits: Iterable[float] = (0, 0.25, 0.5, 0.75, 1),
) -> list[dict[str, Any]]:
    """Run ``compare`` on every mechanism, and on ELFATT over block sizes and channel splits.

    Args:
        q: Queries ``[B, H, W, C]``.
        k: Keys ``[B, H, W, C]``.
        v: Values ``[B, H, W, C]``.
        num_heads: Number of attention heads; each branch of ELFATT has half of them.
        blocks: Block sizes of ELFATT in tokens, clipped to the map.
        splits: Shares c1/c of channels in ELFATT's global branch; at 1 there are no blocks.

    Returns:
        A row per variant: ``mechanism``, ``block_size``, ``channel_split`` and ``COLUMNS``. Variants that do not
        support these channels and heads are skipped, with a line on stderr.

    Raises:
        ValueError: Invalid shape, or channels not divisible by the heads.
    """
    _check_shapes(None, q, k, v)
    bare_attention("vanilla", q.shape[-1], num_heads)  # fail early without a reference
    sides = sorted({min(side, max(q.shape[1:3])) for side in blocks})
    variants: list[tuple[str, int | None, float | None, Mapping[str, float]]] = [
        *((name, None, None, options) for name, options in MECHANISMS.items()),
        *(
            ("elfatt", None if split == 1 else side, split, {"block_size": side, "channel_split": split})
            for split in splits
            for side in (sides[:1] if split == 1 else sides)
        ),
    ]
    rows, exact = [], {}
    for name, side, split, options in variants:
        try:
            attention = bare_attention(name, q.shape[-1], num_heads, **options)
        except ValueError as error:
            print(f"skipped: {name}: {error}", file=sys.stderr)
            continue
        heads = tuple(_head_widths(attention))
        if heads not in exact:
            exact[heads] = softmax_map(attention, q, k)
        figures = compare(attention, q, k, v, exact[heads])
        rows.append({"mechanism": name, "block_size": side, "channel_split": split, **figures})
    return rows


def random_qkv(
    size: tuple[int, int], dim: int, *, images: int = 1, scale: float = 1.0, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return random normal q, k, v ``[B, H, W, C]`` in float64; q and k have standard deviation ``scale``."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, images, *size, dim, generator=generator, dtype=torch.float64)
    return q * scale, k * scale, v


def layer_qkv(model: nn.Module, layer: str, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the queries, keys and values of one attention layer, each ``[B, H, W, C]``.

    Args:
        model: A model of the package.
        layer: Name of the attention layer, e.g. ``stages.2.blocks.0.attn``.
        images: Normalised images ``[B, 3, H, W]``.

    Raises:
        ValueError: The model has no such layer.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, QKVAttention)}
    if layer not in layers:
        raise ValueError(f"no attention layer {layer!r}: choose one of {', '.join(layers)}")
    seen = []
    # the map before Swin's padding
    hook = layers[layer].register_forward_pre_hook(lambda module, inputs: seen.append(module.qkv(inputs[0])))
    try:
        with torch.no_grad():
            model.eval()(images)
    finally:
        hook.remove()
    return seen[0].chunk(3, dim=-1)


def _check_shapes(attention: QKVAttention | None, *tensors: torch.Tensor) -> None:
    shapes = [tuple(x.shape) for x in tensors]
    if len(set(shapes)) > 1 or len(shapes[0]) != 4 or shapes[0][1] * shapes[0][2] < 2:
        raise ValueError(f"q, k and v must be maps [B, H, W, C] of one shape with at least two tokens, got {shapes}")
    if attention is not None and shapes[0][-1] != attention.dim:
        raise ValueError(f"expected maps with {attention.dim} channels, got {shapes}")


def _branches(attention: QKVAttention) -> list[tuple[int, int]]:
    """Return the channels and heads of each branch, in channel order."""
    if not isinstance(attention, ELFATT):
        return [(attention.dim, attention.num_heads)]
    widths = attention.global_channels, attention.dim - attention.global_channels
    return [(width, heads) for width, heads in zip(widths, attention.branch_heads, strict=True) if width]


def _head_widths(attention: QKVAttention) -> list[int]:
    return [width // heads for width, heads in _branches(attention) for _ in range(heads)]


def _without_lepe(attention: QKVAttention) -> QKVAttention:
    attention = copy.deepcopy(attention).double()
    for lepe in (module for module in attention.modules() if isinstance(module, nn.Conv2d)):
        for parameter in lepe.parameters():
            nn.init.zeros_(parameter)
    return attention


def _attend(attention: QKVAttention, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    side = getattr(attention, "window_size", 1)  # Swin's forward pads to whole windows before attend
    qkv = pad_to_multiple(torch.cat([q, k, v], dim=-1), (side, side))
    with use_backend("math"):
        return attention.attend(qkv)[:, : q.shape[1], : q.shape[2]]
