"""From tensors to launches: grids, tile sizes, buffers. Sizes depend on shapes and dtypes alone, never on values.

Sums over tokens are taken in two stages, a partial result for each program and one reduction, without atomics: the same
input gives the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
import triton

from elfatt.ops.fused import WHOLE_BLOCK
from elfatt.ops.triton import global_branch, local_branch

TILE = 64  # tokens summed at a time
SIDE = 8  # of the square tiles with LePE over the map: the neighbourhoods of a square's tokens overlap most
PROGRAMS = 512  # enough to fill the largest GPUs of today a few times over; work is grouped only beyond it


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
    """Fill the last four tensors from the contiguous first five."""
    with _device(qkv):
        if global_channels:
            _context(qkv, context, key_lse, heads[0])
            _global_out(qkv, context, weight_global, bias_global, out, heads[0])
        if global_channels < out.shape[-1]:
            _local_out(qkv, weight_local, bias_local, out, row_lse, heads[1], global_channels, block)


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
    dqkv = torch.empty_like(qkv)
    sums_global = sums_local = None
    with _device(qkv):
        if global_channels:
            sums_global = _global_gradients(qkv, dout, context, key_lse, weight_global, dqkv, heads[0])
        if global_channels < dout.shape[-1]:
            sums_local = _local_gradients(qkv, dout, weight_local, row_lse, dqkv, heads[1], global_channels, block)
    return dqkv, sums_global, sums_local


def launch(kernel: triton.JITFunction, programs: int, *arguments, **constants) -> None:
    """Every launch goes through here."""
    kernel[(programs,)](*arguments, **constants)


def _context(qkv, context, key_lse, heads):
    (b, h, w, packed), width = qkv.shape, context.shape[-1]
    splits, steps = _splits(qkv, heads)
    parts = context if splits == 1 else qkv.new_empty(b, heads, splits, width, width, dtype=torch.float32)
    parts_lse = key_lse if splits == 1 else qkv.new_empty(b, heads, splits, width, dtype=torch.float32)
    launch(
        global_branch.context_kernel, b * heads * splits, qkv, parts, parts_lse, h * w, packed // 3, heads, splits,
        BLOCK_N=TILE, STEPS=steps, **_head(qkv, width),
    )  # fmt: skip
    if splits > 1:
        padded = triton.next_power_of_2(splits)
        launch(
            global_branch.combine_kernel, b * heads * width, parts, parts_lse, context, key_lse, splits, D=width,
            BLOCK_D=_padded(width), SPLITS=padded, TILE=min(128, padded),
            num_warps=1 if padded <= 16 else 4,
        )  # fmt: skip


def _global_out(qkv, context, weight, bias, out, heads):
    (b, h, w, packed), width = qkv.shape, context.shape[-1]
    tiles = triton.cdiv(h, SIDE) * triton.cdiv(w, SIDE)
    launch(
        global_branch.global_out_kernel, b * heads * tiles, qkv, context, weight, bias, out, h, w, packed // 3, heads,
        tiles, SIDE=SIDE, **_head(qkv, width),
    )  # fmt: skip


def _global_gradients(qkv, dout, context, key_lse, weight, dqkv, heads):
    (b, h, w, packed), width = qkv.shape, context.shape[-1]
    splits, steps = _splits(qkv, heads)
    parts = qkv.new_empty(b, heads, splits, width, width, dtype=torch.float32)
    launch(
        global_branch.global_query_gradient_kernel, b * heads * splits, qkv, dout, context, dqkv, parts, h * w,
        packed // 3, heads, splits, BLOCK_N=TILE, STEPS=steps, **_head(qkv, width),
    )  # fmt: skip
    dcontext = parts.sum(2) if splits > 1 else parts
    tiles = triton.cdiv(h, SIDE) * triton.cdiv(w, SIDE)
    group = _group(b * heads, tiles) if weight is not None else 1
    groups = triton.cdiv(tiles, group)
    sums = None if weight is None else qkv.new_empty(b * groups, 10, heads * width, dtype=torch.float32)
    launch(
        global_branch.global_key_value_gradient_kernel, b * heads * groups, qkv, dout, context, dcontext, key_lse,
        weight, dqkv, sums, h, w, packed // 3, heads, groups, SIDE=SIDE, GROUP=group, **_head(qkv, width),
    )  # fmt: skip
    return None if sums is None else sums.sum(0)


def _local_out(qkv, weight, bias, out, row_lse, heads, first, block):
    tokens, blocks, sizes, constants = _local(qkv, heads, first, block)
    own, walked = _block_tiles(tokens, constants["num_warps"])
    launch(
        local_branch.local_out_kernel, qkv.shape[0] * heads * blocks * triton.cdiv(tokens, own), qkv, weight, bias, out,
        row_lse if row_lse.numel() else None, *sizes, BLOCK_M=own, BLOCK_N=walked, **constants,
    )  # fmt: skip


def _local_gradients(qkv, dout, weight, row_lse, dqkv, heads, first, block):
    tokens, blocks, sizes, constants = _local(qkv, heads, first, block)
    units = qkv.shape[0] * blocks

    def partial_sums(programs):
        width = dout.shape[-1] - first
        return None if weight is None else qkv.new_empty(programs, 10, width, dtype=torch.float32)

    if tokens <= WHOLE_BLOCK:
        group = _group(heads, units) if weight is not None else 1
        groups = triton.cdiv(units, group)
        sums = partial_sums(groups)
        launch(
            local_branch.local_gradient_kernel, groups * heads, qkv, dout, weight, dqkv, sums, units, *sizes,
            BLOCK_T=_padded(tokens), GROUP=group, **constants,
        )  # fmt: skip
    else:
        own, walked = _block_tiles(tokens, constants["num_warps"])
        tiles = triton.cdiv(tokens, own)
        row_sum = torch.empty_like(row_lse)
        sums = partial_sums(units * tiles)
        launch(
            local_branch.local_query_gradient_kernel, units * heads * tiles, qkv, dout, row_lse, row_sum, dqkv, *sizes,
            BLOCK_M=own, BLOCK_N=walked, **constants,
        )  # fmt: skip
        launch(
            local_branch.local_key_value_gradient_kernel, units * heads * tiles, qkv, dout, row_lse, row_sum, weight,
            dqkv, sums, *sizes, BLOCK_M=walked, BLOCK_N=own, **constants,
        )  # fmt: skip
    return None if sums is None else sums.sum(0)


def _local(qkv, heads, first, block):
    _, h, w, packed = qkv.shape
    width = (packed // 3 - first) // heads
    blocks = triton.cdiv(h, block[0]) * triton.cdiv(w, block[1])
    sizes = (h, w, packed // 3, first, heads, blocks, width**-0.5)
    return block[0] * block[1], blocks, sizes, {"BH": block[0], "BW": block[1], **_head(qkv, width)}


def _head(qkv, width):
    """What every kernel is told of a head. Warps share the registers of wide rows: 8 spill less, found by compiling."""
    lanes = _padded(width)
    warps = 4 if lanes * qkv.element_size() <= 64 else 8
    return {"D": width, "BLOCK_D": lanes, "PRECISION": _precision(qkv), "num_warps": warps}


def _block_tiles(tokens, warps):
    """Tokens of a block that a program owns, and that it walks over at a time."""
    if tokens <= WHOLE_BLOCK:
        return _padded(tokens), _padded(tokens)
    # 128 read the block half as often, where they waste no more of their last tile and registers allow
    return 128 if triton.cdiv(tokens, 64) % 2 == 0 and warps == 4 else 64, 32


def _splits(qkv, heads):
    """Among how many programs the tokens are split, and how many tiles each sums over."""
    b, h, w, _ = qkv.shape
    tiles = triton.cdiv(h * w, TILE)
    steps = _group(b * heads, tiles)
    return triton.cdiv(tiles, steps), steps


def _group(outer, inner):
    """Power of two of inner items that one program takes in turn, as long as ``PROGRAMS`` programs remain."""
    group = 1
    while group < min(16, inner) and outer * triton.cdiv(inner, 2 * group) >= PROGRAMS:
        group *= 2
    return group


def _padded(length):
    return max(16, triton.next_power_of_2(length))  # the least side of a matrix product


def _precision(qkv):
    """How float32 operands reach the tensor cores; tensors in float16 have such operands in one kernel.

    Plain TF32 for float32 tensors only where PyTorch's products may use it, else three TF32 products for each, as exact
    as float32's own; those run without tensor cores and out of registers.
    """
    return "tf32" if qkv.dtype != torch.float32 or _allows_tf32() else "tf32x3"


def _allows_tf32():
    matmul = torch.backends.cuda.matmul
    # asking for the old flag fails once the new one (torch 2.9) was set
    return matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32


def _device(x):
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
