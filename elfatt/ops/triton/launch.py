"""From tensors to launches: grids, tile sizes, buffers. Sizes depend on shapes and dtypes alone, never on values.

Sums over tokens are taken in two stages, a partial result for each program and one reduction, without atomics: the same
input gives the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
import triton

from elfatt.ops.triton import global_branch, local_branch
from elfatt.ops.triton.lepe import lepe_kernel, lepe_weight_gradient_kernel

WHOLE_BLOCK = 64  # tokens of a block up to which the backward pass needs nothing from the forward pass
TILE = 64  # tokens summed at a time
SIDE = 8  # of the square tiles with LePE over the map: the neighbourhoods of a square's tokens overlap most
ROWS = 4  # tokens of the strips that a thread sums LePE over
LANES = 32  # channels of a program that knows no heads
# Fewest programs, and most tiles of each. Sums over tokens: enough to fill the largest GPUs of today a few times over,
# for each leaves a partial result. Tiles with no more than a head in common: so many that the last ones are few.
SUMS = 512, 16
APART = 4096, 4


def new_buffers(
    qkv: torch.Tensor, heads: Sequence[int], global_channels: int, block: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The forward pass's results, unfilled: output, context, K's log-sum-exp, the scores' by token and head."""
    b, h, w, packed = qkv.shape
    width = global_channels // heads[0] if global_channels else 0
    tokens = block[0] * block[1]
    large = global_channels < packed // 3 and tokens > WHOLE_BLOCK
    blocks = -(-h // block[0]) * -(-w // block[1]) if large else 0
    return (
        qkv.new_empty(b, h, w, packed // 3),
        qkv.new_empty(b, heads[0], width, width, dtype=torch.float32),
        qkv.new_empty(b, heads[0], width, dtype=torch.float32),
        qkv.new_empty(b, heads[1], blocks, tokens, dtype=torch.float32),
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
    sums = [None, None]
    channels = dout.shape[-1]
    local_channels = channels - global_channels
    with _device(qkv):
        if global_channels:
            _global_gradients(qkv, dout, context, key_lse, weight_global, dqkv, heads[0])
            if weight_global is not None:
                sums[0] = _lepe_sums(qkv, 2 * channels, dout, 0, global_channels, qkv.shape[1:3])
        if local_channels:
            _local_gradients(qkv, dout, weight_local, row_lse, dqkv, heads[1], global_channels, block)
            if weight_local is not None:
                sums[1] = _lepe_sums(qkv, 2 * channels + global_channels, dout, global_channels, local_channels, block)
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
    b, h, w, channels = v.shape
    tiles = triton.cdiv(h, SIDE) * triton.cdiv(w, SIDE)
    with _device(v):
        launch(
            lepe_kernel, b * triton.cdiv(channels, LANES) * tiles, v, residual, weight, bias, out, h, w, channels,
            v.stride(2), tiles, SIDE=SIDE, ROWS=ROWS, LANES=LANES, TRANSPOSED=transposed,
            num_warps=4,
        )  # fmt: skip


def lepe_sums(v: torch.Tensor, dout: torch.Tensor) -> torch.Tensor:
    """Gradients ``[10, channels]`` in float32 of LePE's nine weights and bias."""
    with _device(v):
        return _lepe_sums(v, 0, dout, 0, v.shape[-1], v.shape[1:3])


def launch(kernel: triton.JITFunction, programs: int, *arguments, **constants) -> None:
    """Every launch goes through here."""
    kernel[(programs,)](*arguments, **constants)


def _context(qkv, context, key_lse, heads):
    (b, h, w, packed), width = qkv.shape, context.shape[-1]
    splits, steps = _groups(b * heads, triton.cdiv(h * w, TILE), *SUMS)
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
    groups, group = _groups(b * heads, triton.cdiv(h, SIDE) * triton.cdiv(w, SIDE), *APART)
    launch(
        global_branch.global_out_kernel, b * heads * groups, qkv, context, weight, bias, out, h, w, packed // 3, heads,
        groups, SIDE=SIDE, ROWS=ROWS, GROUP=group, **_head(qkv, width),
    )  # fmt: skip


def _global_gradients(qkv, dout, context, key_lse, weight, dqkv, heads):
    (b, h, w, packed), width = qkv.shape, context.shape[-1]
    splits, steps = _groups(b * heads, triton.cdiv(h * w, TILE), *SUMS)
    parts = qkv.new_empty(b, heads, splits, width, width, dtype=torch.float32)
    launch(
        global_branch.global_query_gradient_kernel, b * heads * splits, qkv, dout, context, dqkv, parts, h * w,
        packed // 3, heads, splits, BLOCK_N=TILE, STEPS=steps, **_head(qkv, width),
    )  # fmt: skip
    dcontext = parts.sum(2) if splits > 1 else parts
    groups, group = _groups(b * heads, triton.cdiv(h, SIDE) * triton.cdiv(w, SIDE), *APART)
    launch(
        global_branch.global_key_value_gradient_kernel, b * heads * groups, qkv, dout, context, dcontext, key_lse,
        weight, dqkv, h, w, packed // 3, heads, groups, SIDE=SIDE, ROWS=ROWS, GROUP=group, **_head(qkv, width),
    )  # fmt: skip


def _local_out(qkv, weight, bias, out, row_lse, heads, first, block):
    blocks, sizes, scale, constants = _local(qkv, heads, first, block)
    own, walked = _block_tiles(qkv, constants)
    tiles = blocks * triton.cdiv(constants["PLACES"], own)
    groups, group = _block_groups(qkv, heads, tiles)
    launch(
        local_branch.local_out_kernel, qkv.shape[0] * heads * groups, qkv, weight, bias, out,
        row_lse if row_lse.numel() else None, *sizes, blocks, groups, scale, BLOCK_M=own, BLOCK_N=walked, GROUP=group,
        **constants,
    )  # fmt: skip


def _local_gradients(qkv, dout, weight, row_lse, dqkv, heads, first, block):
    blocks, sizes, scale, constants = _local(qkv, heads, first, block)
    outer = qkv.shape[0] * heads
    if block[0] * block[1] <= WHOLE_BLOCK:
        groups, group = _block_groups(qkv, heads, blocks)
        launch(
            local_branch.local_gradient_kernel, outer * groups, qkv, dout, weight, dqkv, *sizes, groups, scale,
            BLOCK_T=_padded(constants["PLACES"]), GROUP=group, **constants,
        )  # fmt: skip
        return
    own, walked = _block_tiles(qkv, constants)
    programs = outer * blocks * triton.cdiv(constants["PLACES"], own)
    row_sum = torch.empty_like(row_lse)
    launch(
        local_branch.local_query_gradient_kernel, programs, qkv, dout, row_lse, row_sum, dqkv, *sizes, blocks, scale,
        BLOCK_M=own, BLOCK_N=walked, **constants,
    )  # fmt: skip
    launch(
        local_branch.local_key_value_gradient_kernel, programs, qkv, dout, row_lse, row_sum, weight, dqkv, *sizes,
        blocks, scale, BLOCK_M=walked, BLOCK_N=own, **constants,
    )  # fmt: skip


def _lepe_sums(v, v_first, dout, dout_first, channels, block):
    b, h, w, _ = v.shape
    if not v.numel():
        return v.new_zeros(10, channels, dtype=torch.float32)
    rows = min(ROWS, triton.next_power_of_2(block[0]))
    strips = triton.cdiv(h, block[0]) * triton.cdiv(block[0], rows)
    across, down = 8, 2
    parts = triton.cdiv(channels, LANES)
    groups, group = _groups(b * parts, triton.cdiv(strips, down) * triton.cdiv(w, across), *SUMS)
    sums = v.new_empty(b * groups, 10, channels, dtype=torch.float32)
    launch(
        lepe_weight_gradient_kernel, b * groups * parts, v, dout, sums, h, w, channels, v_first, v.stride(2),
        dout_first, dout.stride(2), groups, *block, ACROSS=across, DOWN=down, ROWS=rows, LANES=LANES,
        GROUP=group, num_warps=4,
    )  # fmt: skip
    return sums.sum(0)


def _local(qkv, heads, first, block):
    _, h, w, packed = qkv.shape
    width = (packed // 3 - first) // heads
    blocks = triton.cdiv(h, block[0]) * triton.cdiv(w, block[1])
    rows = ROWS
    while rows > 1 and _covered(_places(block, rows)) > _covered(block[0] * block[1]):
        rows //= 2
    constants = {"BH": block[0], "BW": block[1], "ROWS": rows, "PLACES": _places(block, rows)}
    return blocks, (h, w, packed // 3, first, heads), width**-0.5, constants | _head(qkv, width)


def _places(block, rows):
    """Of the strips that cover a block."""
    return triton.cdiv(block[0], rows) * rows * block[1]


def _covered(places):
    """Places of the tiles that cover so many."""
    return _padded(places) if places <= WHOLE_BLOCK else triton.cdiv(places, WHOLE_BLOCK) * WHOLE_BLOCK


def _head(qkv, width):
    """What every kernel is told of a head. Warps share the registers of wide rows, and repeat work on narrow ones."""
    lanes = _padded(width)
    warps = 8 if lanes * qkv.element_size() > 128 else 4
    return {"D": width, "BLOCK_D": lanes, "PRECISION": _precision(qkv), "num_warps": warps}


def _block_tiles(qkv, constants):
    """Places of a block that a program owns, and that it walks over at a time."""
    places, lanes = constants["PLACES"], constants["BLOCK_D"]
    if places <= WHOLE_BLOCK:
        return _padded(places), _padded(places)
    # 128 read the block half as often, where they waste no more of their last tile and registers allow
    return 128 if triton.cdiv(places, 64) % 2 == 0 and lanes * qkv.element_size() <= 64 else 64, 32


def _block_groups(qkv, heads, tiles):
    if qkv.dtype == torch.float32:  # which fills the registers with one
        return tiles, 1
    return _groups(qkv.shape[0] * heads, tiles, *APART)


def _groups(outer, inner, programs, most):
    """Into how many groups of how many the inner tiles go, one program each, for each of the outer items."""
    group = 1
    while group < min(most, inner) and outer * triton.cdiv(inner, 2 * group) >= programs:
        group *= 2
    groups = triton.cdiv(inner, group)
    return groups, triton.cdiv(inner, groups)


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
