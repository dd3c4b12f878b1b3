"""Matmul, tile and loop helpers shared by the kernels of both branches.

Kernels address the packed qkv ``[B, N, 3C]`` and the output ``[B, N, C]`` by token stride and channel offset, so that
branches and heads are mere offsets and nothing is split, permuted or concatenated in memory. Head widths are padded to
a power of two and masked. Computation is in float32, except for matmul operands. Model sizes (channels, heads, strides)
are compile-time constants; image sizes are not, so no kernel is recompiled for an image size. Loops over a program's
tiles use one stage: pipelining keeps two copies of the tiles, too much for some GPUs' shared memory.
"""

import os

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
LOG2_E = tl.constexpr(1.4426950408889634)  # exp2 is one instruction


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """Return ``acc + a @ b``."""
    if INTERPRETED:  # NumPy has no bfloat16: the interpreter would multiply its bits as integers
        a = a.to(tl.float32)
        b = b.to(tl.float32)
        if PRECISION == "tf32":
            a, b = round_to_tf32(a), round_to_tf32(b)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def round_to_tf32(x):
    """Truncate float32 to TF32's ten mantissa bits; lossless for float16 and bfloat16 values."""
    return (x.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)


@triton.jit
def load_tile(base, token, stride, lane, mask):
    """Load rows ``token`` of one head, zero where masked."""
    return tl.load(base + token[:, None] * stride + lane[None, :], mask=mask, other=0.0)


@triton.jit
def store_tile(base, token, stride, lane, mask, value):
    """Store rows ``token`` of one head in the tensor's dtype."""
    tl.store(base + token[:, None] * stride + lane[None, :], value.to(base.dtype.element_ty), mask=mask)


@triton.jit
def widen(x):
    """Convert to float32; for bfloat16 by integer shifts, which save an instruction for every other element."""
    if x.dtype == tl.bfloat16:
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@triton.jit
def trips(count):
    """Return a loop bound; pass it to ``tl.range`` directly, as the interpreter turns variables into tensors."""
    if INTERPRETED:  # a one-element array there, which NumPy 2.4 does not convert to int
        return count.handle.data.item()
    else:
        return count


@triton.jit
def advance(low, high, count):
    """Advance (low, high), where ``high`` counts every ``count`` steps of ``low``, without a division."""
    over = low + 1 == count
    return tl.where(over, 0, low + 1), tl.where(over, high + 1, high)
