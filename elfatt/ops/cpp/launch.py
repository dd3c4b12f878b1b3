"""From tensors to calls of the C++ kernels: sizes, buffers, sums over tasks."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch

from elfatt.ops.cpp.build import library

TILE = (8, 64)  # of the map in a task, so that its rows stay in the cache
SPLIT = 512  # tokens that a task of their own is worth
TASKS = 64  # enough for the threads of a large CPU to share
GROUPS = (32, 48, 24, 16)  # channels of a task of LePE alone


def new_buffers(
    qkv: torch.Tensor, heads: Sequence[int], global_channels: int, block: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The forward pass's results, unfilled: output, context, K's log-sum-exp, and nothing."""
    b, h, w, packed = qkv.shape
    width = global_channels // heads[0] if global_channels else 0
    return (
        qkv.new_empty(b, h, w, packed // 3),
        qkv.new_empty(b, heads[0], width, width, dtype=torch.float32),
        qkv.new_empty(b, heads[0], width, dtype=torch.float32),
        qkv.new_empty(0, dtype=torch.float32),
    )


def forward(
    qkv: torch.Tensor,
    weight_global: torch.Tensor | None,
    bias_global: torch.Tensor | None,
    weight_local: torch.Tensor | None,
    bias_local: torch.Tensor | None,
    out: torch.Tensor,
    context: torch.Tensor,
    key_lse: torch.Tensor,
    row_lse: torch.Tensor,
    heads: Sequence[int],
    global_channels: int,
    block: Sequence[int],
) -> None:
    """Fill ``out``, ``context`` and ``key_lse`` from the contiguous first five; ``row_lse`` is not needed."""
    map_sizes, block_sizes = _branches(out, heads, global_channels, block)
    if map_sizes:
        splits, lepe = _splits(map_sizes), _rows(weight_global, bias_global)
        parts = _floats(qkv, map_sizes.images * heads[0] * splits, map_sizes.d * (map_sizes.d + 2))
        _call("global_forward", qkv, map_sizes, qkv, lepe, out, context, key_lse, parts, splits)
    if block_sizes:
        _call("local_forward", qkv, block_sizes, qkv, _rows(weight_local, bias_local), out)


def backward(
    dout: torch.Tensor,
    qkv: torch.Tensor,
    weight_global: torch.Tensor | None,
    weight_local: torch.Tensor | None,
    context: torch.Tensor,
    key_lse: torch.Tensor,
    row_lse: torch.Tensor,
    heads: Sequence[int],
    global_channels: int,
    block: Sequence[int],
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Gradients of qkv and, ``[10, channels]`` in float32 for each branch with LePE, of its nine weights and bias."""
    dqkv, sums = torch.empty_like(qkv), [None, None]
    map_sizes, block_sizes = _branches(dout, heads, global_channels, block)
    if map_sizes:
        splits, lepe = _splits(map_sizes), _rows(weight_global, None)
        parts = _floats(qkv, map_sizes.images * heads[0] * splits, map_sizes.d**2)
        dcontext = torch.empty_like(context)
        tasks = None if lepe is None else _tasks(qkv, map_sizes)
        _call(
            "global_backward", qkv, map_sizes, qkv, dout, lepe, context, key_lse, dqkv, parts, dcontext, tasks, splits
        )  # fmt: skip
        sums[0] = _add(tasks)
    if block_sizes:
        lepe = _rows(weight_local, None)
        tasks = None if lepe is None else _tasks(qkv, block_sizes)
        _call("local_backward", qkv, block_sizes, qkv, dout, lepe, dqkv, tasks)
        sums[1] = _add(tasks)
    return dqkv, *sums


def lepe(
    v: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    out: torch.Tensor,
    *,
    transposed: bool = False,
) -> None:
    """Fill ``out`` with ``residual + L(v)``, or with ``Lᵀ(v)``. All maps are contiguous but ``v``, a slice of one."""
    rows = _rows(weight, bias)
    _call("lepe_forward", v, _grouped(v), v, v.stride(2), rows, residual, out, transposed)


def lepe_sums(v: torch.Tensor, dout: torch.Tensor) -> torch.Tensor:
    """Gradients ``[10, channels]`` in float32 of LePE's nine weights and bias."""
    sizes = _grouped(v)
    tasks = _tasks(v, sizes)
    _call("lepe_backward", v, sizes, v, v.stride(2), dout, tasks)
    return _add(tasks)


class _Sizes(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_int)
        for name in (
            "images",
            "height",
            "width",
            "channels",
            "heads",
            "d",
            "first",
            "part_height",
            "part_width",
            "threads",
        )
    ]


def _branches(x, heads, global_channels, block):
    """Sizes of the global and of the local branch of a map ``[B, H, W, C]``; None for one without channels."""
    widths = (global_channels, x.shape[-1] - global_channels)
    return tuple(
        _Sizes(*x.shape, branch_heads, width // branch_heads, first, *part) if width else None
        for width, branch_heads, first, part in zip(widths, heads, (0, global_channels), (TILE, block), strict=True)
    )


def _call(name, like, sizes, *arguments):
    """Tensors are passed by address; those made in an argument list live until the call returns."""
    function = getattr(library(), f"{name}_{str(like.dtype).removeprefix('torch.')}")
    sizes.threads = torch.get_num_threads()  # those of this Python thread
    function(sizes, *(ctypes.c_int(x) if isinstance(x, int) else _address(x) for x in arguments))


def _address(x):
    return ctypes.c_void_p(None if x is None else x.data_ptr())


def _floats(like, *shape):
    return like.new_empty(shape, dtype=torch.float32)


def _rows(weight, bias):
    """Nine weights and the bias of each channel: ``[10, channels]`` in float32."""
    if weight is None:
        return None
    bias = torch.zeros_like(weight[:, 0, 0, 0]) if bias is None else bias
    return torch.cat([weight.flatten(1).t().float(), bias[None].float()])


def _add(tasks):
    """From ``[B, parts, heads, 10, d]`` to ``[10, channels]``."""
    return None if tasks is None else tasks.sum((0, 1)).transpose(0, 1).flatten(1)


def _grouped(v):
    channels = v.shape[-1]
    d = next((d for d in GROUPS if channels % d == 0), channels)
    return _Sizes(*v.shape, channels // d, d, 0, *TILE)


def _tasks(like, sizes):
    """Room for each task's sums for LePE's kernels: ``[B, parts, heads, 10, d]``."""
    parts = -(-sizes.height // sizes.part_height) * -(-sizes.width // sizes.part_width)
    return _floats(like, sizes.images, parts, sizes.heads, 10, sizes.d)


def _splits(sizes):
    return max(1, min(sizes.height * sizes.width // SPLIT, TASKS // max(1, sizes.images * sizes.heads)))
