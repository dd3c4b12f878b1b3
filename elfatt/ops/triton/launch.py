"""Launch the Triton kernels: grids, tile sizes and buffers, which depend on shapes and dtypes only, never on values.

Launch plans are cached per shape, so that a call does little more than allocate and launch. Sums over tokens take two
stages, a partial result per program and one reduction, without atomics: results are deterministic.
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

WHOLE_BLOCK = 64  # largest block, in tokens, whose backward pass needs no log-sum-exp from the forward pass
TILE = 64  # tokens summed at a time
SIDE = 8  # side of the tiles with LePE over the map; squares share the most neighbours
ROWS = 4  # tokens per strip, over which a thread sums LePE
ACROSS = 8  # strips side by side in a tile of LePE's gradients
LANES = 32  # channels per program in kernels without heads
# Minimum programs and maximum tiles per program. Sums over tokens: only enough programs to fill the largest GPUs a few
# times over, since each leaves a partial result. Independent tiles: enough programs to keep the last wave small.
SUMS = 512, 16
APART = 3072, 8
COMBINED = 4, 16, 128, 1024, 2**14, 2**18  # maximum numbers of splits that ``combine_kernel`` is specialised for
FEW_PARTS = 8  # partial sums up to which each consumer reduces them itself
# Register limits per thread in half precision, by kernel and lanes per row, where the compiler would use so many that
# occupancy suffers
REGISTERS = {
    "global_out": {64: 168},
    "local_out": {16: 128, 32: 128, 64: 168},
    "local_out_large": {16: 168, 32: 168, 64: 168},  # blocks of more than one tile
    "lepe_gradient": {16: 168, 32: 168},
}


class Launch(NamedTuple):
    """A kernel bound to all arguments but its leading tensors."""

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
        RuntimeError: The kernel failed to compile or launch; the message has its name and Triton's error.
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
    """Allocate the output, the context, K's log-sum-exp and, if ``backward`` needs it, the scores'."""
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
    """Compute the last four tensors from the first five, which are contiguous."""
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
    """Return gradients of qkv and, per branch with LePE, of its nine weights and bias: float32 ``[10, channels]``."""
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
    """Write ``residual + L(v)`` or ``Lᵀ(v)`` to ``out``; maps are contiguous, except that ``v`` may be a slice."""
    if v.numel():
        with _device(v):
            _lepe_plan(v.shape, v.stride(2), transposed)(v, residual, weight, bias, out)


def lepe_sums(v: torch.Tensor, dout: torch.Tensor) -> torch.Tensor:
    """Return the float32 gradients ``[10, channels]`` of LePE's nine weights and bias."""
    if not v.numel():
        return v.new_zeros(10, v.shape[-1], dtype=torch.float32)
    step, shape = _lepe_gradient(v.shape, v.dtype, v.stride(2), v.shape[-1], v.shape[1:3], (True, False))
    sums = torch.empty(shape, dtype=torch.float32, device=v.device)
    with _device(v):
        step(v, dout, None, None, None, sums)
    return sums.sum(0)


class _Forward(NamedTuple):
    context: Launch | None = None
    parts: tuple[int, ...] = ()  # shape of the partial contexts
    combine: Launch | None = None
    global_out: Launch | None = None
    local_out: Launch | None = None


class _Backward(NamedTuple):
    global_query: Launch | None = None
    parts: tuple[int, ...] = ()  # shape of the partial context gradients
    global_key_value: Launch | None = None
    local: Launch | None = None
    local_query: Launch | None = None
    local_key_value: Launch | None = None
    lepe: Launch | None = None
    sums: tuple[int, ...] = ()  # shape of LePE's partial gradients


@lru_cache(4096)
def _forward_plan(shape, dtype, heads, global_channels, block, tf32):
    b, h, w, packed = shape
    channels, plan = packed // 3, {}
    if global_channels:
        outer, width = b * heads[0], global_channels // heads[0]
        constants = {"C": channels, "HEADS": heads[0], **_head(dtype, width, tf32)}
        # each step rescales the sums: use long steps if two tiles of K and V fit
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
    """Return the launch, for ``split`` channels with LePE over the map before those in blocks, and its sums' shape."""
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
    """Return the places in the strips that cover a block."""
    return _cdiv(block[0], rows) * rows * block[1]


def _covered(places):
    """Return the places in the tiles that cover ``places``."""
    return _padded(places) if places <= WHOLE_BLOCK else _cdiv(places, WHOLE_BLOCK) * WHOLE_BLOCK


def _head(dtype, width, tf32):
    """Return a head's kernel constants. More warps share the registers of wide rows but repeat work on narrow ones.

    Float32 matmuls use TF32 only if PyTorch's may, otherwise three TF32 products each, which are as accurate as
    float32. One kernel has such matmuls for float16 tensors too.
    """
    lanes = _padded(width)
    precision = "tf32" if dtype != torch.float32 or tf32 else "tf32x3"
    warps = 8 if lanes * dtype.itemsize > 128 else 4
    # request all registers: if three products do not fit, ptxas settles for 32 and spills kilobytes
    most = {"maxnreg": 255} if precision == "tf32x3" else {}
    return {"D": width, "BLOCK_D": lanes, "PRECISION": precision, "num_warps": warps, **most}


def _registers(kernel, dtype, lanes):
    most = REGISTERS[kernel].get(lanes) if dtype.itemsize == 2 else None
    return {"maxnreg": most} if most else {}


def _block_tiles(dtype, constants):
    """Return how many places of a block a program owns, and how many it loads per step."""
    places, lanes = constants["PLACES"], constants["BLOCK_D"]
    if places <= WHOLE_BLOCK:
        return _padded(places), _padded(places)
    # 128 rereads the block half as often, if the last tile wastes no more and registers allow
    return 128 if _cdiv(places, 64) % 2 == 0 and lanes * dtype.itemsize <= 64 else 64, 32


def _block_groups(dtype, outer, tiles):
    if dtype == torch.float32:  # one tile fills the registers
        return tiles, 1
    return _groups(outer, tiles, *APART)


def _groups(outer, inner, programs, most):
    """Return the number of groups (one program each, per outer item) and the inner tiles per group."""
    group = 1
    while group < min(most, inner) and outer * _cdiv(inner, 2 * group) >= programs:
        group *= 2
    groups = _cdiv(inner, group)
    return groups, _cdiv(inner, groups)


def _cdiv(a, b):
    return -(-a // b)


def _power(length):
    """Return the next power of two."""
    return 1 << (length - 1).bit_length()


def _padded(length):
    return max(16, _power(length))  # minimum side of ``tl.dot``


def _allows_tf32():
    matmul = torch.backends.cuda.matmul
    # reading the old flag fails once the new one (torch 2.9) is set
    return matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32


def _device(x):
    there = x.is_cuda and x.device.index != torch.cuda.current_device()
    return torch.cuda.device(x.device) if there else nullcontext()
