"""LePE, the depthwise 3×3 of V, inside the kernels of both branches, and the gradients of its weights."""

import triton
import triton.language as tl

from elfatt.ops.triton.common import load_tile, store_tile


@triton.jit
def lepe(v, stride, y, x, top, left, bottom, right, width, weight, bias, lane, lanes, TRANSPOSED: tl.constexpr = False):
    """``L(v)`` for the tokens (y, x), or ``Lᵀ(v)``, where V is zero outside the area [top, bottom) × [left, right).

    The nine shifted reads of V come from the cache: neighbouring tokens share them. They are summed apart from the
    attention, whose registers are laid out for the tensor cores: so one sum is laid out anew and not nine tiles. A
    loop over the rows keeps the reads in flight to three, which halves the registers.
    """
    out = tl.zeros([y.shape[0], lane.shape[0]], tl.float32)
    for dy in range(3):
        for dx in tl.static_range(3):
            ys, xs, tap = y + (dy - 1), x + (dx - 1), dy * 3 + dx
            inside = (ys >= top) & (ys < bottom) & (xs >= left) & (xs < right)
            shifted = load_tile(v, ys * width + xs, stride, lane, inside[:, None] & lanes[None, :])
            w = tl.load(weight + lane * 9 + (8 - tap if TRANSPOSED else tap), mask=lanes, other=0.0)
            out += shifted.to(tl.float32) * w.to(tl.float32)[None, :]
    if bias is not None:
        out += tl.load(bias + lane, mask=lanes, other=0.0).to(tl.float32)[None, :]
    return out


@triton.jit
def lepe_kernel(
    v,  # [B, N, channels], tokens ``v_stride`` apart
    residual,  # [B, N, channels] or None
    weight,  # [channels, 9]
    bias,  # [channels] or None
    out,  # [B, N, channels]: residual + L(v), or Lᵀ(v)
    height,
    width,
    channels,
    v_stride,
    tiles,
    SIDE: tl.constexpr,
    LANES: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    """LePE over the map, for attention that runs elsewhere."""
    pid = tl.program_id(0)
    parts = tl.cdiv(channels, LANES)
    tile, part, image = pid % tiles, pid // tiles % parts, (pid // tiles // parts).to(tl.int64)
    lane = part * LANES + tl.arange(0, LANES)
    lanes = lane < channels
    columns = tl.cdiv(width, SIDE)
    place = tl.arange(0, SIDE * SIDE)
    y = tile // columns * SIDE + place // SIDE
    x = tile % columns * SIDE + place % SIDE
    token = y * width + x
    mask = ((y < height) & (x < width))[:, None] & lanes[None, :]
    v_base = v + image * height * width * v_stride
    acc = lepe(v_base, v_stride, y, x, 0, 0, height, width, width, weight, bias, lane, lanes, TRANSPOSED)
    start = image * height * width * channels
    if residual is not None:
        acc += load_tile(residual + start, token, channels, lane, mask).to(tl.float32)
    store_tile(out + start, token, channels, lane, mask, acc)


@triton.jit
def lepe_weight_gradient_kernel(
    v,  # [B, N, v_stride], of which the channels from ``v_first`` on are V
    dout,  # [B, N, dout_stride], of which the channels from ``dout_first`` on are the gradient
    sums,  # [B * groups, 10, channels] float32, written: the nine weights and the bias
    height,
    width,
    channels,
    v_first,
    v_stride,
    dout_first,
    dout_stride,
    groups,
    block_height,
    block_width,
    SIDE_H: tl.constexpr,
    SIDE_W: tl.constexpr,
    LANES: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Sums over GROUP tiles of tokens; heads do not matter here, and LePE over the map is LePE in one block.

    A kernel of its own, although it reads V and the gradient once more: ten running sums would take the registers of
    the attention's gradients, and adding them up across threads, here done once at the end, costs as much as a tile.
    """
    pid = tl.program_id(0)
    parts = tl.cdiv(channels, LANES)
    part, group, image = pid % parts, pid // parts % groups, (pid // parts // groups).to(tl.int64)
    lane = part * LANES + tl.arange(0, LANES)
    lanes = lane < channels
    columns = tl.cdiv(width, SIDE_W)
    place = tl.arange(0, SIDE_H * SIDE_W)
    v_base = v + image * height * width * v_stride + v_first
    do_base = dout + image * height * width * dout_stride + dout_first
    zero = tl.zeros([SIDE_H * SIDE_W, LANES], tl.float32)
    found = (zero, zero, zero, zero, zero, zero, zero, zero, zero, zero)
    for step in range(GROUP):
        tile = group * GROUP + step  # past the last tile, y is past the last row
        y = tile // columns * SIDE_H + place // SIDE_W
        x = tile % columns * SIDE_W + place % SIDE_W
        top, left = y // block_height * block_height, x // block_width * block_width
        bottom, right = tl.minimum(top + block_height, height), tl.minimum(left + block_width, width)
        exists = (y < height) & (x < width)
        do = load_tile(do_base, y * width + x, dout_stride, lane, exists[:, None] & lanes[None, :]).to(tl.float32)
        grown = ()
        for tap in tl.static_range(9):
            ys, xs = y + (tap // 3 - 1), x + (tap % 3 - 1)
            inside = exists & (ys >= top) & (ys < bottom) & (xs >= left) & (xs < right)
            shifted = load_tile(v_base, ys * width + xs, v_stride, lane, inside[:, None] & lanes[None, :])
            grown = grown + (found[tap] + do * shifted.to(tl.float32),)
        found = grown + (found[9] + do,)
    sums += (image * groups + group) * 10 * channels
    for row in tl.static_range(10):
        tl.store(sums + row * channels + lane, tl.sum(found[row], axis=0), mask=lanes)
