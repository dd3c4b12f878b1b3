"""From tensors to launches: grids, tile sizes, buffers. Sizes depend on shapes and dtypes alone, never on values.

What a shape needs is worked out once and kept, so that a call does little more than allocate and launch. Sums over
tokens are taken in two stages, a partial result for each program and one reduction, without atomics: the same input
gives the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import lru_cache
from typing import NamedTuple

import torch
import triton

from elfatt.ops.triton import global_branch, local_branch
from elfatt.ops.triton.lepe import lepe_gradient_kernel, lepe_kernel

WHOLE_BLOCK = 64  # tokens of a block up to which the backward pass needs nothing from the forward pass
TILE = 64  # tokens summed at a time
SIDE = 8  # of the square tiles with LePE over the map: the neighbourhoods of a square's tokens overlap most
ROWS = 4  # tokens of the strips that a thread sums LePE over
ACROSS = 8  # strips side by side in the tiles of LePE's gradients
LANES = 32  # channels of a program that knows no heads
# Fewest programs, and most tiles of each. Sums over tokens: enough to fill the largest GPUs a few times over,
# since each leaves a partial result. Independent tiles: enough programs to keep the last wave small.
SUMS = 512, 16
APART = 3072, 8
COMBINED = 4, 16, 128, 1024, 2**14, 2**18  # partial contexts that a kernel of its own is compiled for
FEW_PARTS = 8  # partial sums that every program that needs them adds up itself
# Registers of a thread, by kernel and lanes of a row in half precision, where the compiler would take so many that too
# few programs share a multiprocessor
REGISTERS = {
    "global_out": {64: 168},
    "local_out": {16: 128, 32: 128, 64: 168},
    "local_out_large": {16: 168, 32: 168, 64: 168},  # of blocks that are walked over
    "lepe_gradient": {16: 168, 32: 168},
}


class Launch(NamedTuple):
    """A kernel with all but its tensors, which are its first arguments."""

    kernel: triton.JITFunction
    programs: int
    sizes: tuple[int, ...]
    constants: dict[str, object]

    def __call__(self, *tensors: torch.Tensor | None) -> None:
        """Launch on these tensors."""
        launch(self.kernel, self.programs, *tensors, *self.sizes, **self.constants)


def launch(kernel: triton.JITFunction, programs: int, *arguments, **constants) -> None:
    """Launch a kernel; the single launch site.

    Raises:
        RuntimeError: The kernel does not compile or start, with its name and Triton's reason.
    """
    try:
        kernel[(programs,)](*arguments, **constants)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise RuntimeError(f"{kernel.__name__}: {reason}") from error


def new_buffers(
    qkv: torch.Tensor, heads: Sequence[int], global_channels: int, block: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """What ``forward`` fills: output, context, K's log-sum-exp, and the scores' where ``backward`` needs it."""
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
    if not qkv.numel():
        return
    plan = _forward_plan(qkv.shape, qkv.dtype, tuple(heads), global_channels, tuple(block), _allows_tf32())
    with _device(qkv):
        if plan.context:
            parts, parts_lse = context, key_lse
            if plan.combine:
                parts = torch.empty(plan.parts, dtype=torch.float32, device=qkv.device)
                parts_lse = torch.empty(plan.parts[:-1], dtype=torch.float32, device=qkv.device)
            plan.context(qkv, parts, parts_lse)
            if plan.combine:
                plan.combine(parts, parts_lse, context, key_lse)
            plan.global_out(qkv, context, weight_global, bias_global, out)
        if plan.local_out:
            plan.local_out(qkv, weight_local, bias_local, out, row_lse if row_lse.numel() else None)


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
    channels = dout.shape[-1]
    sums = None
    lepes = weight_global is not None, weight_local is not None
    if qkv.numel():
        plan = _backward_plan(qkv.shape, qkv.dtype, tuple(heads), global_channels, tuple(block), lepes, _allows_tf32())
        with _device(qkv):
            if plan.global_query:
                dcontext = torch.empty(plan.parts, dtype=torch.float32, device=qkv.device)
                plan.global_query(qkv, dout, context, dqkv, dcontext)
                if plan.parts[2] > FEW_PARTS:
                    dcontext = dcontext.sum(2)
                plan.global_key_value(qkv, context, dcontext, key_lse, dqkv)
            if plan.local:
                plan.local(qkv, dout, dqkv)
            if plan.local_query:
                row_sum = torch.empty_like(row_lse)
                plan.local_query(qkv, dout, row_lse, row_sum, dqkv)
                plan.local_key_value(qkv, dout, row_lse, row_sum, dqkv)
            if plan.lepe:
                sums = torch.empty(plan.sums, dtype=torch.float32, device=qkv.device)
                v, dv = qkv[..., 2 * channels :], dqkv[..., 2 * channels :]
                plan.lepe(v, dout, weight_global, weight_local, dv, sums)
                sums = sums.sum(0)
    if sums is None and any(lepes):
        sums = qkv.new_zeros(10, channels, dtype=torch.float32)
    ends = (slice(global_channels), slice(global_channels, channels))
    sums_global, sums_local = (
        sums[:, end] if sums is not None and has else None for has, end in zip(lepes, ends, strict=True)
    )
    return dqkv, sums_global, sums_local


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
    if v.numel():
        with _device(v):
            _lepe_plan(v.shape, v.stride(2), transposed)(v, residual, weight, bias, out)


def lepe_sums(v: torch.Tensor, dout: torch.Tensor) -> torch.Tensor:
    """Gradients ``[10, channels]`` in float32 of LePE's nine weights and bias."""
    if not v.numel():
        return v.new_zeros(10, v.shape[-1], dtype=torch.float32)
    step, shape = _lepe_gradient(v.shape, v.dtype, v.stride(2), v.shape[-1], v.shape[1:3], (True, False))
    sums = torch.empty(shape, dtype=torch.float32, device=v.device)
    with _device(v):
        step(v, dout, None, None, None, sums)
    return sums.sum(0)


class _Forward(NamedTuple):
    context: Launch | None = None
    parts: tuple[int, ...] = ()  # shape of the contexts of the splits
    combine: Launch | None = None
    global_out: Launch | None = None
    local_out: Launch | None = None


class _Backward(NamedTuple):
    global_query: Launch | None = None
    parts: tuple[int, ...] = ()  # shape of the gradients of the context from the splits
    global_key_value: Launch | None = None
    local: Launch | None = None
    local_query: Launch | None = None
    local_key_value: Launch | None = None
    lepe: Launch | None = None
    sums: tuple[int, ...] = ()  # shape of the sums of LePE's gradients


@lru_cache(4096)
def _forward_plan(shape, dtype, heads, global_channels, block, tf32):
    b, h, w, packed = shape
    channels, plan = packed // 3, {}
    if global_channels:
        outer, width = b * heads[0], global_channels // heads[0]
        constants = {"C": channels, "HEADS": heads[0], **_head(dtype, width, tf32)}
        # maxima and shrunken sums are each step's: long steps, where two tiles of K and V fit
        tile = 2 * TILE if constants["BLOCK_D"] * dtype.itemsize <= 64 else TILE
        splits, steps = _groups(outer, _cdiv(h * w, tile), *SUMS)
        plan["parts"] = b, heads[0], splits, width, width
        plan["context"] = Launch(
            global_branch.context_kernel, outer * splits, (h * w, splits, steps), {**constants, "BLOCK_N": tile}
        )
        if splits > 1:
            most = next(n for n in COMBINED if splits <= n)
            plan["combine"] = Launch(
                global_branch.combine_kernel, outer * width, (splits,),
                {"D": width, "BLOCK_D": _padded(width), "SPLITS": most, "TILE": min(128, most),
                 "num_warps": 1 if most <= 16 else 4},
            )  # fmt: skip
        groups, group = _groups(outer, _cdiv(h, SIDE) * _cdiv(w, SIDE), *APART)
        plan["global_out"] = Launch(
            global_branch.global_out_kernel, outer * groups, (h, w, groups, group),
            {**constants, "SIDE": SIDE, "ROWS": ROWS, **_registers("global_out", dtype, _padded(width))},
        )  # fmt: skip
    if global_channels < channels:
        constants = _local(dtype, channels, heads[1], global_channels, block, tf32)
        own, walked = _block_tiles(dtype, constants)
        tiles = _cdiv(h, block[0]) * _cdiv(w, block[1]) * _cdiv(constants["PLACES"], own)
        groups, group = _block_groups(dtype, b * heads[1], tiles)
        registers = _registers("local_out" if own == walked else "local_out_large", dtype, constants["BLOCK_D"])
        plan["local_out"] = Launch(
            local_branch.local_out_kernel, b * heads[1] * groups, (h, w, groups, group),
            {**constants, "BLOCK_M": own, "BLOCK_N": walked, **registers},
        )  # fmt: skip
    return _Forward(**plan)


@lru_cache(4096)
def _backward_plan(shape, dtype, heads, global_channels, block, lepes, tf32):
    b, h, w, packed = shape
    channels, plan = packed // 3, {}
    if global_channels:
        outer, width, tiles = b * heads[0], global_channels // heads[0], _cdiv(h * w, TILE)
        constants = {"C": channels, "HEADS": heads[0], "BLOCK_N": TILE, **_head(dtype, width, tf32)}
        splits, steps = _groups(outer, tiles, *SUMS)
        plan["parts"] = b, heads[0], splits, width, width
        plan["global_query"] = Launch(
            global_branch.global_query_gradient_kernel, outer * splits, (h * w, splits, steps), constants
        )
        parts = splits if splits <= FEW_PARTS else 1
        splits, steps = _groups(outer, tiles, *APART)
        plan["global_key_value"] = Launch(
            global_branch.global_key_value_gradient_kernel, outer * splits, (h * w, parts, splits, steps), constants
        )
    if global_channels < channels:
        outer = b * heads[1]
        constants = _local(dtype, channels, heads[1], global_channels, block, tf32)
        blocks = _cdiv(h, block[0]) * _cdiv(w, block[1])
        if block[0] * block[1] <= WHOLE_BLOCK:
            groups, group = _block_groups(dtype, outer, blocks)
            tokens = _padded(constants.pop("PLACES"))
            plan["local"] = Launch(
                local_branch.local_gradient_kernel, outer * groups, (h, w, groups, group),
                {**constants, "BLOCK_T": tokens},
            )  # fmt: skip
        else:
            own, walked = _block_tiles(dtype, constants)
            programs = outer * blocks * _cdiv(constants["PLACES"], own)
            plan["local_query"] = Launch(
                local_branch.local_query_gradient_kernel, programs, (h, w),
                {**constants, "BLOCK_M": own, "BLOCK_N": walked},
            )  # fmt: skip
            plan["local_key_value"] = Launch(
                local_branch.local_key_value_gradient_kernel, programs, (h, w),
                {**constants, "BLOCK_M": walked, "BLOCK_N": own},
            )  # fmt: skip
    if any(lepes):
        plan["lepe"], plan["sums"] = _lepe_gradient((b, h, w, channels), dtype, packed, global_channels, block, lepes)
    return _Backward(**plan)


@lru_cache(4096)
def _lepe_plan(shape, stride, transposed):
    b, h, w, channels = shape
    tiles = _cdiv(h, SIDE) * _cdiv(w, SIDE)
    constants = {"C": channels, "V_STRIDE": stride, "SIDE": SIDE, "ROWS": ROWS, "LANES": LANES}
    return Launch(
        lepe_kernel, b * _cdiv(channels, LANES) * tiles, (h, w, tiles),
        {**constants, "TRANSPOSED": transposed, "num_warps": 4},
    )  # fmt: skip


@lru_cache(4096)
def _lepe_gradient(shape, dtype, stride, split, block, lepes):
    """The launch for the ``split`` first channels, with LePE over the map, and the others; the shape of its sums."""
    b, h, w, channels = shape
    lanes = 16 if any(n % 32 and not n % 16 for n in (split, channels - split)) else LANES
    across, down = ACROSS, 512 // lanes // ACROSS
    rows = min(ROWS, _power(block[0]))
    strips = _cdiv(h, rows), _cdiv(h, block[0]) * _cdiv(block[0], rows)
    tiles = [_cdiv(n, down) * _cdiv(w, across) for n in strips]
    parts = [_cdiv(n, lanes) if has else 0 for n, has in zip((split, channels - split), lepes, strict=True)]
    groups, _ = _groups(b * sum(parts), max(n for n, has in zip(tiles, lepes, strict=True) if has), *SUMS)
    constants = {
        "C": channels, "SPLIT": split, "MAP_PARTS": parts[0], "PARTS": sum(parts), "V_STRIDE": stride,
        "BH": block[0] if lepes[1] else 1, "BW": block[1] if lepes[1] else 1, "ACROSS": across, "DOWN": down,
        "ROWS": rows, "LANES": lanes, "num_warps": 4, **_registers("lepe_gradient", dtype, lanes),
    }  # fmt: skip
    sizes = h, w, groups, *(_cdiv(n, groups) for n in tiles)
    return Launch(lepe_gradient_kernel, b * groups * sum(parts), sizes, constants), (b * groups, 10, channels)


def _local(dtype, channels, heads, first, block, tf32):
    rows = ROWS
    while rows > 1 and _covered(_places(block, rows)) > _covered(block[0] * block[1]):
        rows //= 2
    sizes = {"BH": block[0], "BW": block[1], "ROWS": rows, "PLACES": _places(block, rows)}
    return {"C": channels, "FIRST": first, "HEADS": heads, **sizes, **_head(dtype, (channels - first) // heads, tf32)}


def _places(block, rows):
    """Of the strips that cover a block."""
    return _cdiv(block[0], rows) * rows * block[1]


def _covered(places):
    """Places of the tiles that cover so many."""
    return _padded(places) if places <= WHOLE_BLOCK else _cdiv(places, WHOLE_BLOCK) * WHOLE_BLOCK


def _head(dtype, width, tf32):
    """What every kernel is told of a head. Warps share the registers of wide rows, and repeat work on narrow ones.

    Float32 operands reach the tensor cores as TF32 only where PyTorch's products may use it, else as three TF32
    products each, as exact as float32's own; tensors in float16 have such operands in one kernel.
    """
    lanes = _padded(width)
    precision = "tf32" if dtype != torch.float32 or tf32 else "tf32x3"
    warps = 8 if lanes * dtype.itemsize > 128 else 4
    # asked for all registers, for ptxas settles for 32 and thousands of spilled bytes where three products do not fit
    most = {"maxnreg": 255} if precision == "tf32x3" else {}
    return {"D": width, "BLOCK_D": lanes, "PRECISION": precision, "num_warps": warps, **most}


def _registers(kernel, dtype, lanes):
    most = REGISTERS[kernel].get(lanes) if dtype.itemsize == 2 else None
    return {"maxnreg": most} if most else {}


def _block_tiles(dtype, constants):
    """Places of a block that a program owns, and that it walks over at a time."""
    places, lanes = constants["PLACES"], constants["BLOCK_D"]
    if places <= WHOLE_BLOCK:
        return _padded(places), _padded(places)
    # 128 read the block half as often, where they waste no more of their last tile and registers allow
    return 128 if _cdiv(places, 64) % 2 == 0 and lanes * dtype.itemsize <= 64 else 64, 32


def _block_groups(dtype, outer, tiles):
    if dtype == torch.float32:  # which fills the registers with one
        return tiles, 1
    return _groups(outer, tiles, *APART)


def _groups(outer, inner, programs, most):
    """Into how many groups of how many the inner tiles go, one program each, for each of the outer items."""
    group = 1
    while group < min(most, inner) and outer * _cdiv(inner, 2 * group) >= programs:
        group *= 2
    groups = _cdiv(inner, group)
    return groups, _cdiv(inner, groups)


def _cdiv(a, b):
    return -(-a // b)


def _power(length):
    """The next power of two."""
    return 1 << (length - 1).bit_length()


def _padded(length):
    return max(16, _power(length))  # the least side of a matrix product


def _allows_tf32():
    matmul = torch.backends.cuda.matmul
    # asking for the old flag fails once the new one (torch 2.9) was set
    return matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32


def _device(x):
    there = x.is_cuda and x.device.index != torch.cuda.current_device()
    return torch.cuda.device(x.device) if there else nullcontext()
