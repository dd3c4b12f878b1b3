"""Products, tiles and loops shared by the kernels of both branches.

A kernel addresses the packed qkv ``[B, N, 3C]`` and the output ``[B, N, C]`` by a token stride and a channel offset, so
that a branch and a head are offsets and nothing is cut, permuted or concatenated in memory. Head widths that are no
power of two are masked lanes. Everything between loads and stores is float32 but the operands of the products. What
belongs to the model, as channels and heads, is a constant, and strides with it; what belongs to the image is not, and
no kernel is compiled for a size of its own. Loops over a program's tiles have one stage: pipelined, they hold the tiles
twice, more than some GPUs' shared memory.
"""

import os

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
LOG2_E = tl.constexpr(1.4426950408889634)  # exp2 is one instruction


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """``acc + a @ b``."""
    if INTERPRETED:  # numpy has no bfloat16: the interpreter multiplies its bits as integers
        a = a.to(tl.float32)
        b = b.to(tl.float32)
        if PRECISION == "tf32":
            a, b = round_to_tf32(a), round_to_tf32(b)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def round_to_tf32(x):
    """Float32 of ten bits of mantissa, toward zero; float16 and bfloat16 lose nothing."""
    return (x.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)


@triton.jit
def load_tile(base, token, stride, lane, mask):
    """Rows ``token`` of one head, zero where masked."""
    return tl.load(base + token[:, None] * stride + lane[None, :], mask=mask, other=0.0)


@triton.jit
def store_tile(base, token, stride, lane, mask, value):
    """Store rows of tokens in the dtype of the tensor."""
    tl.store(base + token[:, None] * stride + lane[None, :], value.to(base.dtype.element_ty), mask=mask)


@triton.jit
def widen(x):
    """To float32, by integers where two instructions for every other bfloat16 become one."""
    if x.dtype == tl.bfloat16:
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@triton.jit
def trips(count):
    """The end of a loop; given to ``tl.range`` at once, for the interpreter makes a tensor of what it assigns."""
    if INTERPRETED:  # holds a number as the only element of an array, of which numpy 2.4 makes no integer itself
        return count.handle.data.item()
    else:
        return count


@triton.jit
def advance(low, high, count):
    """What follows (low, high) where ``high`` grows after every ``count`` steps of ``low``: no division by a size."""
    over = low + 1 == count
    return tl.where(over, 0, low + 1), tl.where(over, high + 1, high)
