"""LePE (3×3 depthwise convolution of V), fused into both branches' kernels, and its gradients."""

import triton
import triton.language as tl

from elfatt.ops.triton.common import advance, load_tile, store_tile, trips, widen


@triton.jit
def strip_tokens(index, COLUMNS: tl.constexpr, ROWS: tl.constexpr):
    """Return rows and columns of tokens ``index`` of a tile, in order of its strips: ROWS tokens, COLUMNS abreast."""
    strip = index // ROWS
    return strip // COLUMNS * ROWS + index % ROWS, strip % COLUMNS


@triton.jit
def within(place, first, end):
    """Return ``first <= place < end`` in one comparison; requires ``first <= end``."""
    return (place - first).to(tl.uint32) < (end - first).to(tl.uint32)


@triton.jit
def load_taps(weight, bias, lane, lanes, TRANSPOSED: tl.constexpr = False):
    """Load the nine weights, ``[1, lanes]`` each, and the bias or zeros, once for all of a program's tiles."""
    taps = ()
    for tap in tl.static_range(9):
        w = tl.load(weight + lane * 9 + (8 - tap if TRANSPOSED else tap), mask=lanes, other=0.0)
        taps = taps + (w.to(tl.float32)[None, :],)
    if bias is not None:
        offset = tl.load(bias + lane, mask=lanes, other=0.0).to(tl.float32)[None, :]
    else:
        offset = tl.zeros([1, lane.shape[0]], tl.float32)
    return taps + (offset,)


@triton.jit
def add_row(out, tokens, taps, ROW: tl.constexpr):
    """Add the weighted sum of three horizontal neighbours to ``out``."""
    return out + tokens[0] * taps[3 * ROW] + tokens[1] * taps[3 * ROW + 1] + tokens[2] * taps[3 * ROW + 2]


@triton.jit
def lepe(v, y, x, top, left, bottom, right, width, taps, lane, lanes, STRIDE: tl.constexpr, ROWS: tl.constexpr):
    """Return ``L(v)`` for vertical strips of ROWS tokens starting at (y, x).

    V is zero outside [top, bottom) × [left, right). A thread sums whole strips, so that a load serves up to three of
    its tokens; otherwise addressing and conversion would cost more than memory access. Sums are separate from the
    attention's, whose register layout suits the tensor cores, so that one sum changes layout instead of nine tiles.
    """
    out = (tl.zeros([y.shape[0], lane.shape[0]], tl.float32) + taps[9],) * ROWS
    place = v + ((y - 1) * width + x)[:, None] * STRIDE + lane[None, :]
    before, here, after = within(x - 1, left, right), within(x, left, right), within(x + 1, left, right)
    for row in tl.static_range(ROWS + 2):
        inside = within(y + (row - 1), top, bottom)
        one = widen(tl.load(place + (-STRIDE), mask=(inside & before)[:, None] & lanes[None, :], other=0.0))
        two = widen(tl.load(place, mask=(inside & here)[:, None] & lanes[None, :], other=0.0))
        three = widen(tl.load(place + STRIDE, mask=(inside & after)[:, None] & lanes[None, :], other=0.0))
        grown = ()
        for own in tl.static_range(ROWS):
            if (own <= row) & (row <= own + 2):
                grown = grown + (add_row(out[own], (one, two, three), taps, row - own),)
            else:
                grown = grown + (out[own],)
        out = grown
        place += width * STRIDE
    return stack(out, ROWS)


@triton.jit
def map_tile(row, column, height, width, SIDE: tl.constexpr, ROWS: tl.constexpr):
    """Return the tokens of a square tile of the map, in strip order, and a mask of those that exist."""
    y, x = strip_tokens(tl.arange(0, SIDE * SIDE), SIDE, ROWS)
    y, x = row * SIDE + y, column * SIDE + x
    return y * width + x, (y < height) & (x < width)


@triton.jit
def map_lepe(
    v, row, column, height, width, taps, lane, lanes, STRIDE: tl.constexpr, SIDE: tl.constexpr, ROWS: tl.constexpr
):
    """Return LePE over the map for the tokens of a square tile."""
    y, x = strip_tokens(tl.arange(0, SIDE * SIDE // ROWS) * ROWS, SIDE, ROWS)
    y, x = row * SIDE + y, column * SIDE + x
    return lepe(v, y, x, 0, 0, height, width, width, taps, lane, lanes, STRIDE, ROWS)


@triton.jit
def stack(rows, ROWS: tl.constexpr):
    """Interleave the strips' rows [strips, lanes] into one tile, in registers."""
    tl.static_assert(ROWS == 1 or (ROWS == 2 or ROWS == 4))  # Triton 3.3 does not support chains of three
    if ROWS == 1:
        tile = rows[0]
    elif ROWS == 2:
        tile = tl.join(rows[0], rows[1])
    else:
        tile = tl.join(tl.join(rows[0], rows[2]), tl.join(rows[1], rows[3]))
    strips: tl.constexpr = rows[0].shape[0]
    width: tl.constexpr = rows[0].shape[1]
    return tile.reshape(strips, width, ROWS).permute(0, 2, 1).reshape(strips * ROWS, width)


@triton.jit(do_not_specialize=["height", "width", "tiles"])
def lepe_kernel(
    v,  # [B, N, channels], tokens V_STRIDE apart
    residual,  # [B, N, channels] or None
    weight,  # [channels, 9]
    bias,  # [channels] or None
    out,  # [B, N, channels]: residual + L(v), or Lᵀ(v)
    height,
    width,
    tiles,
    C: tl.constexpr,
    V_STRIDE: tl.constexpr,
    SIDE: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    """Compute LePE over the map, for attention that runs elsewhere."""
    PARTS: tl.constexpr = (C + LANES - 1) // LANES
    pid = tl.program_id(0)
    tile, part, image = pid % tiles, pid // tiles % PARTS, (pid // tiles // PARTS).to(tl.int64)
    columns = tl.cdiv(width, SIDE)
    row, column = tile // columns, tile % columns
    lane = part * LANES + tl.arange(0, LANES)
    lanes = lane < C
    token, exists = map_tile(row, column, height, width, SIDE, ROWS)
    mask = exists[:, None] & lanes[None, :]
    taps = load_taps(weight, bias, lane, lanes, TRANSPOSED)
    acc = map_lepe(
        v + image * height * width * V_STRIDE, row, column, height, width, taps, lane, lanes, V_STRIDE, SIDE, ROWS
    )
    start = image * height * width * C
    if residual is not None:
        acc += widen(load_tile(residual + start, token, C, lane, mask))
    store_tile(out + start, token, C, lane, mask, acc)


@triton.jit(do_not_specialize=["height", "width", "groups", "map_group", "block_group"])
def lepe_gradient_kernel(
    v,  # [B, N, ...], tokens V_STRIDE apart
    dout,  # [B, N, C]
    weight_map,  # [SPLIT, 9] or None
    weight_block,  # [C - SPLIT, 9] or None
    dv,  # [B, N, ...], tokens V_STRIDE apart, or None; Lᵀ(dO) is added
    sums,  # [B * groups, 10, C] float32, written: gradients of the nine weights and bias
    height,
    width,
    groups,
    map_group,
    block_group,
    C: tl.constexpr,
    SPLIT: tl.constexpr,  # leading channels, with LePE over the map; the others have it in blocks
    MAP_PARTS: tl.constexpr,  # parts of LANES channels over the map; 0 without LePE
    PARTS: tl.constexpr,  # including parts in blocks
    V_STRIDE: tl.constexpr,
    BH: tl.constexpr,
    BW: tl.constexpr,
    ACROSS: tl.constexpr,
    DOWN: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
):
    """Sum LePE's gradients over tiles of ACROSS × DOWN strips, each strip inside one block or the map.

    A separate kernel, although it rereads V and the gradient: its weights and ten running sums would need the registers
    of the attention's gradients, and reducing them across threads, done once here, costs as much as a tile.
    """
    IN_BLOCK: tl.constexpr = (BH + ROWS - 1) // ROWS  # strips per block, vertically
    pid = tl.program_id(0)
    part, group, image = pid % PARTS, pid // PARTS % groups, (pid // PARTS // groups).to(tl.int64)
    in_map = part < MAP_PARTS
    lane = tl.where(in_map, part * LANES, SPLIT + (part - MAP_PARTS) * LANES) + tl.arange(0, LANES)
    lanes = lane < tl.where(in_map, SPLIT, C)
    zero = tl.zeros([ACROSS * DOWN, LANES], tl.float32)
    taps = ()
    if dv is not None:
        for tap in tl.static_range(9):
            w = tl.zeros([LANES], tl.float32)
            if weight_map is not None:
                w += tl.load(weight_map + lane * 9 + (8 - tap), mask=lanes & in_map, other=0.0).to(tl.float32)
            if weight_block is not None:
                w_place = weight_block + (lane - SPLIT) * 9 + (8 - tap)
                w += tl.load(w_place, mask=lanes & (part >= MAP_PARTS), other=0.0).to(tl.float32)
            taps = taps + (w[None, :],)
    strips = tl.where(in_map, tl.cdiv(height, ROWS), tl.cdiv(height, BH) * IN_BLOCK)
    columns = tl.cdiv(width, ACROSS)
    size = tl.where(in_map, map_group, block_group)
    row, column = group * size // columns, group * size % columns
    start = image * height * width
    index = tl.arange(0, ACROSS * DOWN)
    found = (zero, zero, zero, zero, zero, zero, zero, zero, zero)
    total = zero
    count = tl.minimum(size, tl.cdiv(strips, DOWN) * columns - group * size)
    for _step in tl.range(0, trips(count), num_stages=1):
        strip = row * DOWN + index // ACROSS  # may be past the last one, below the map
        x = column * ACROSS + index % ACROSS
        top, left = tl.where(in_map, 0, strip // IN_BLOCK * BH), tl.where(in_map, 0, x // BW * BW)
        y = tl.where(in_map, strip * ROWS, top + strip % IN_BLOCK * ROWS)
        bottom = tl.where(in_map, height, tl.maximum(tl.minimum(top + BH, height), top))
        right = tl.where(in_map, width, tl.maximum(tl.minimum(left + BW, width), left))
        token = y * width + x
        v_place = v + start * V_STRIDE + token[:, None] * V_STRIDE + lane[None, :]
        vs, out = (), ()
        for own in tl.static_range(ROWS):
            mask = ((y + own < bottom) & (x < right))[:, None] & lanes[None, :]
            vs = vs + (tl.load(v_place + own * width * V_STRIDE, mask=mask, other=0.0),)
            if dv is not None:
                dv_place = dv + start * V_STRIDE + token[:, None] * V_STRIDE + lane[None, :]
                out = out + (widen(tl.load(dv_place + own * width * V_STRIDE, mask=mask, other=0.0)),)
        place = dout + start * C + (token - width)[:, None] * C + lane[None, :]
        for near in tl.static_range(ROWS + 2):
            inside = within(y + (near - 1), top, bottom)
            dos = ()
            for dx in tl.static_range(3):
                mask = (inside & within(x + (dx - 1), left, right))[:, None] & lanes[None, :]
                dos = dos + (widen(tl.load(place + (dx - 1) * C, mask=mask, other=0.0)),)
            if (0 < near) & (near <= ROWS):
                total += dos[1]
            for own in tl.static_range(ROWS):
                if (own <= near) & (near <= own + 2):
                    found = replace(found, 3 * (near - own), widen(vs[own]), dos)
                    if dv is not None:
                        out = out[:own] + (add_row(out[own], dos, taps, near - own),) + out[own + 1 :]
            place += width * C
        if dv is not None:
            for own in tl.static_range(ROWS):
                mask = ((y + own < bottom) & (x < right))[:, None] & lanes[None, :]
                dv_place = dv + start * V_STRIDE + token[:, None] * V_STRIDE + lane[None, :]
                tl.store(dv_place + own * width * V_STRIDE, out[own].to(dv.dtype.element_ty), mask=mask)
        column, row = advance(column, row, columns)
    sums += (image * groups + group) * 10 * C + lane
    for tap in tl.static_range(9):
        tl.store(sums + (8 - tap) * C, tl.sum(found[tap], axis=0), mask=lanes)
    tl.store(sums + 9 * C, tl.sum(total, axis=0), mask=lanes)


@triton.jit
def replace(found, AT: tl.constexpr, here, dos):
    """Return ``found`` with three of its sums updated."""
    return (
        found[:AT]
        + (found[AT] + here * dos[0], found[AT + 1] + here * dos[1], found[AT + 2] + here * dos[2])
        + found[AT + 3 :]
    )
