"""What the kernels of both branches share: products, the depthwise 3×3 of LePE and its gradient.

A kernel addresses the packed qkv ``[B, N, 3C]`` and the output ``[B, N, C]`` by a token stride and a channel offset, so
that a branch and a head are offsets and nothing is cut, permuted or concatenated in memory. Head widths that are no
power of two are masked lanes. Everything between loads and stores is float32 but the operands of the products.
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
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def load_tile(base, token, stride, lane, mask):
    """Rows ``token`` of one head, zero where masked."""
    return tl.load(base + token[:, None] * stride + lane[None, :], mask=mask, other=0.0)


@triton.jit
def store_tile(base, token, stride, lane, mask, value):
    tl.store(base + token[:, None] * stride + lane[None, :], value.to(base.dtype.element_ty), mask=mask)


@triton.jit
def lepe(v, stride, y, x, top, left, bottom, right, width, weight, bias, lane, lanes):
    """``L(v)`` for the tokens (y, x), where V is zero outside the area [top, bottom) × [left, right).

    The nine shifted reads of V come from the cache: neighbouring tokens share them. They are summed apart from the
    attention, whose registers are laid out for the tensor cores: so one sum is laid out anew and not nine tiles.
    """
    out = tl.zeros([y.shape[0], lane.shape[0]], tl.float32)
    for dy in range(3):
        for dx in tl.static_range(3):
            ys, xs, tap = y + (dy - 1), x + (dx - 1), dy * 3 + dx
            inside = (ys >= top) & (ys < bottom) & (xs >= left) & (xs < right)
            shifted = load_tile(v, ys * width + xs, stride, lane, inside[:, None] & lanes[None, :])
            w = tl.load(weight + lane * 9 + tap, mask=lanes, other=0.0)
            out += shifted.to(tl.float32) * w.to(tl.float32)[None, :]
    if bias is not None:
        out += tl.load(bias + lane, mask=lanes, other=0.0).to(tl.float32)[None, :]
    return out


@triton.jit
def lepe_gradients(sums, v, dout, stride, y, x, top, left, bottom, right, width, weight, lane, lanes):
    """Gradient of V, and ``sums`` plus those of the weights; one read of the shifted gradient feeds both.

    ``sums[16, BLOCK_D]`` has the nine weights in rows 0 to 8 and the bias in row 9.
    """
    dv = tl.zeros([y.shape[0], lane.shape[0]], tl.float32)
    row = tl.arange(0, 16)[:, None]
    for dy in range(3):
        for dx in tl.static_range(3):
            ys, xs, tap = y - (dy - 1), x - (dx - 1), dy * 3 + dx
            inside = (ys >= top) & (ys < bottom) & (xs >= left) & (xs < right)
            shifted = load_tile(dout, ys * width + xs, stride, lane, inside[:, None] & lanes[None, :]).to(tl.float32)
            w = tl.load(weight + lane * 9 + tap, mask=lanes, other=0.0)
            dv += shifted * w.to(tl.float32)[None, :]
            sums = tl.where(row == tap, sums + tl.sum(shifted * v, axis=0)[None, :], sums)
            if dx == 1:
                centre = (row == 9) & (dy == 1)
                sums = tl.where(centre, sums + tl.sum(shifted, axis=0)[None, :], sums)
    return dv, sums


@triton.jit
def store_lepe_sums(partial, sums, channels, lane, lanes):
    """Rows 0 to 9 of ``sums`` into one program's ``[10, channels]``."""
    row = tl.arange(0, 16)[:, None]
    tl.store(partial + row * channels + lane[None, :], sums, mask=(row < 10) & lanes[None, :])
