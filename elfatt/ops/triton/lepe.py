"""LePE, the depthwise 3×3 of V, inside the kernels of both branches, and the gradients of its weights."""

import triton
import triton.language as tl

from elfatt.ops.triton.common import load_tile, store_tile


@triton.jit
def strip_tokens(index, COLUMNS: tl.constexpr, ROWS: tl.constexpr):
    """Row and column of tokens ``index`` of a tile, in the order of its strips of ROWS tokens, COLUMNS side by side."""
    strip = index // ROWS
    return strip // COLUMNS * ROWS + index % ROWS, strip % COLUMNS


@triton.jit
def lepe(
    v, stride, y, x, top, left, bottom, right, width, weight, bias, lane, lanes,
    ROWS: tl.constexpr, TRANSPOSED: tl.constexpr = False,
):  # fmt: skip
    """``L(v)``, or ``Lᵀ(v)``, for strips of ROWS tokens, the first of them (y, x), each below the one before.

    V is zero outside the area [top, bottom) × [left, right). A thread sums whole strips, so that a read serves up to
    three of its tokens: else addresses and conversions take longer than memory does. The sums are apart from those
    of the attention, whose registers are laid out for the tensor cores: one sum is laid out anew, not nine tiles.
    """
    zero = tl.zeros([y.shape[0], lane.shape[0]], tl.float32)
    if bias is not None:
        zero += tl.load(bias + lane, mask=lanes, other=0.0).to(tl.float32)[None, :]
    out = (zero,) * ROWS
    for dx in tl.range(3, loop_unroll_factor=1):
        xs = x + (dx - 1)
        column = (xs >= left) & (xs < right)
        above = strip_row(v, stride, y - 1, xs, column, top, bottom, width, lane, lanes)
        here = strip_row(v, stride, y, xs, column, top, bottom, width, lane, lanes)
        w_above = tap_weights(weight, dx, lane, lanes, TRANSPOSED)
        w_here = tap_weights(weight, 3 + dx, lane, lanes, TRANSPOSED)
        w_below = tap_weights(weight, 6 + dx, lane, lanes, TRANSPOSED)
        grown = ()
        for row in tl.static_range(ROWS):
            below = strip_row(v, stride, y + (row + 1), xs, column, top, bottom, width, lane, lanes)
            grown = grown + (out[row] + above * w_above + here * w_here + below * w_below,)
            above, here = here, below
        out = grown
    return stack(out, ROWS)


@triton.jit
def strip_row(v, stride, y, x, column, top, bottom, width, lane, lanes):
    mask = (column & (y >= top) & (y < bottom))[:, None] & lanes[None, :]
    return load_tile(v, y * width + x, stride, lane, mask).to(tl.float32)


@triton.jit
def tap_weights(weight, tap, lane, lanes, TRANSPOSED: tl.constexpr):
    w = tl.load(weight + lane * 9 + (8 - tap if TRANSPOSED else tap), mask=lanes, other=0.0)
    return w.to(tl.float32)[None, :]


@triton.jit
def map_tile(tile, height, width, SIDE: tl.constexpr, ROWS: tl.constexpr):
    """Top and left of a square tile of the map, its tokens in the order of its strips, and which of them exist."""
    columns = tl.cdiv(width, SIDE)
    top, left = tile // columns * SIDE, tile % columns * SIDE
    y, x = strip_tokens(tl.arange(0, SIDE * SIDE), SIDE, ROWS)
    return top, left, (top + y) * width + left + x, (top + y < height) & (left + x < width)


@triton.jit
def map_lepe(
    v, stride, top, left, height, width, weight, bias, lane, lanes,
    SIDE: tl.constexpr, ROWS: tl.constexpr, TRANSPOSED: tl.constexpr = False,
):  # fmt: skip
    """LePE over the map of a square tile's tokens."""
    y, x = strip_tokens(tl.arange(0, SIDE * SIDE // ROWS) * ROWS, SIDE, ROWS)
    return lepe(
        v, stride, top + y, left + x, 0, 0, height, width, width, weight, bias, lane, lanes, ROWS, TRANSPOSED
    )  # fmt: skip


@triton.jit
def stack(rows, ROWS: tl.constexpr):
    """One tile of the rows [strips, lanes] of its strips, by registers alone."""
    tl.static_assert(ROWS == 1 or ROWS == 2 or ROWS == 4)
    if ROWS == 1:
        tile = rows[0]
    elif ROWS == 2:
        tile = tl.join(rows[0], rows[1])
    else:
        tile = tl.join(tl.join(rows[0], rows[2]), tl.join(rows[1], rows[3]))
    strips: tl.constexpr = rows[0].shape[0]
    width: tl.constexpr = rows[0].shape[1]
    return tile.reshape(strips, width, ROWS).permute(0, 2, 1).reshape(strips * ROWS, width)


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
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    """LePE over the map, for attention that runs elsewhere."""
    pid = tl.program_id(0)
    parts = tl.cdiv(channels, LANES)
    tile, part, image = pid % tiles, pid // tiles % parts, (pid // tiles // parts).to(tl.int64)
    lane = part * LANES + tl.arange(0, LANES)
    lanes = lane < channels
    top, left, token, exists = map_tile(tile, height, width, SIDE, ROWS)
    mask = exists[:, None] & lanes[None, :]
    v_base = v + image * height * width * v_stride
    acc = map_lepe(v_base, v_stride, top, left, height, width, weight, bias, lane, lanes, SIDE, ROWS, TRANSPOSED)
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
    ACROSS: tl.constexpr,
    DOWN: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Sums over GROUP tiles of ACROSS × DOWN strips, each inside one block; LePE over the map is LePE in one block.

    A kernel of its own, although it reads V and the gradient once more: ten running sums would take the registers of
    the attention's gradients, and adding them up across threads, here done once at the end, costs as much as a tile.
    """
    pid = tl.program_id(0)
    parts = tl.cdiv(channels, LANES)
    part, group, image = pid % parts, pid // parts % groups, (pid // parts // groups).to(tl.int64)
    lane = part * LANES + tl.arange(0, LANES)
    lanes = lane < channels
    columns = tl.cdiv(width, ACROSS)
    in_block = tl.cdiv(block_height, ROWS)  # strips below one another
    place = tl.arange(0, ACROSS * DOWN)
    v_base = v + image * height * width * v_stride + v_first
    do_base = dout + image * height * width * dout_stride + dout_first
    zero = tl.zeros([ACROSS * DOWN, LANES], tl.float32)
    found = (zero, zero, zero, zero, zero, zero, zero, zero, zero)
    total = zero
    for step in range(GROUP):
        tile = group * GROUP + step  # past the last tile, y is past the last row
        strip = tile // columns * DOWN + place // ACROSS
        x = tile % columns * ACROSS + place % ACROSS
        top, left = strip // in_block * block_height, x // block_width * block_width
        bottom, right = tl.minimum(top + block_height, height), tl.minimum(left + block_width, width)
        y = top + strip % in_block * ROWS
        dos = ()
        for row in tl.static_range(ROWS):
            dos = dos + (strip_row(do_base, dout_stride, y + row, x, x < width, top, bottom, width, lane, lanes),)
            total += dos[row]
        grown = ()
        for dx in tl.static_range(3):
            xs = x + (dx - 1)
            column = (x < width) & (xs >= left) & (xs < right)
            above = strip_row(v_base, v_stride, y - 1, xs, column, top, bottom, width, lane, lanes)
            here = strip_row(v_base, v_stride, y, xs, column, top, bottom, width, lane, lanes)
            d_above, d_here, d_below = found[3 * dx], found[3 * dx + 1], found[3 * dx + 2]
            for row in tl.static_range(ROWS):
                below = strip_row(v_base, v_stride, y + (row + 1), xs, column, top, bottom, width, lane, lanes)
                d_above += dos[row] * above
                d_here += dos[row] * here
                d_below += dos[row] * below
                above, here = here, below
            grown = grown + (d_above, d_here, d_below)
        found = grown
    sums += (image * groups + group) * 10 * channels + lane
    for tap in tl.static_range(9):
        tl.store(sums + (tap % 3 * 3 + tap // 3) * channels, tl.sum(found[tap], axis=0), mask=lanes)
    tl.store(sums + 9 * channels, tl.sum(total, axis=0), mask=lanes)
