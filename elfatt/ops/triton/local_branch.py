"""Kernels of the local branch: ``softmax(Q Kᵀ / √d) V + L(V)`` inside blocks of ``BH × BW`` tokens.

Blocks are zero-padded beyond the map: padding keys take part in the softmax, padding queries have no output and no
gradient. Blocks of up to 64 tokens use one backward kernel with a whole block per program; larger ones use two, as in
FlashAttention-2 (Dao, arXiv 2307.08691). ``lepe.py`` adds LePE's part of dV.
"""

import triton
import triton.language as tl

from elfatt.ops.triton.common import LOG2_E, advance, dot, load_tile, store_tile, trips
from elfatt.ops.triton.lepe import lepe, load_taps, strip_tokens


@triton.jit
def block_tokens(index, row, column, height, width, BH: tl.constexpr, BW: tl.constexpr, ROWS: tl.constexpr):
    """Locate places of a block, in strip order.

    Returns:
        Tokens in the map, a mask of those inside the map, a mask of those inside the block, and tokens in the block.
    """
    y, x = strip_tokens(index, BW, ROWS)
    top, left = row * BH, column * BW
    exists = (y < tl.minimum(BH, height - top)) & (x < width - left)
    return (top + y) * width + left + x, exists, y < BH, y * BW + x


@triton.jit
def block_lepe(
    v, start, row, column, height, width, taps, lane, lanes,
    STRIDE: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr, ROWS: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """Return LePE of COUNT places of a block, from ``start`` on."""
    top, left = row * BH, column * BW
    bottom, right = tl.minimum(top + BH, height), tl.minimum(left + BW, width)
    y, x = strip_tokens(start + tl.arange(0, COUNT // ROWS) * ROWS, BW, ROWS)
    return lepe(v, top + y, left + x, top, left, bottom, right, width, taps, lane, lanes, STRIDE, ROWS)


@triton.jit
def scores(q, k, inside, PRECISION: tl.constexpr):
    """Return unscaled scores, -inf for keys not ``inside`` the block."""
    s = dot(q, tl.trans(k), tl.zeros([q.shape[0], k.shape[0]], tl.float32), PRECISION)
    return tl.where(inside[None, :], s, float("-inf"))


@triton.jit(do_not_specialize=["height", "width", "groups", "group"])
def local_out_kernel(
    qkv,  # [B, N, 3C]
    weight,  # [heads * D, 9] or None
    bias,  # [heads * D] or None
    out,  # [B, N, C]
    row_lse,  # [B, heads, blocks, BH * BW] float32 or None: log2(sum(exp(scores)))
    height,
    width,
    groups,
    group,
    C: tl.constexpr,
    FIRST: tl.constexpr,  # the branch's first channel
    HEADS: tl.constexpr,
    BH: tl.constexpr,
    BW: tl.constexpr,
    ROWS: tl.constexpr,
    PLACES: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute softmax attention plus LePE in each block."""
    TILES: tl.constexpr = (PLACES + BLOCK_M - 1) // BLOCK_M
    pid = tl.program_id(0)
    part, head, image = pid % groups, pid // groups % HEADS, (pid // groups // HEADS).to(tl.int64)
    lane = tl.arange(0, BLOCK_D)
    lanes = lane < D
    base2: tl.constexpr = D**-0.5 * LOG2_E
    q_base = qkv + image * height * width * (3 * C) + FIRST + head * D
    v_base = q_base + 2 * C
    out += image * height * width * C + FIRST + head * D
    WHOLE: tl.constexpr = PLACES <= BLOCK_N  # one tile holds the block
    if WHOLE and weight is not None:  # the loop over keys has no registers left for them
        taps = load_taps(weight, bias, head * D + lane, lanes)
    columns = tl.cdiv(width, BW)
    blocks = tl.cdiv(height, BH) * columns
    block, query_tile = part * group // TILES, part * group % TILES
    row, column = block // columns, block % columns
    for _step in tl.range(0, trips(tl.minimum(group, blocks * TILES - part * group)), num_stages=1):
        own = query_tile * BLOCK_M + tl.arange(0, BLOCK_M)
        token, exists, q_inside, number = block_tokens(own, row, column, height, width, BH, BW, ROWS)
        mask = exists[:, None] & lanes[None, :]
        q = load_tile(q_base, token, 3 * C, lane, mask)
        if WHOLE:
            other, there, k_inside, _ = block_tokens(tl.arange(0, BLOCK_N), row, column, height, width, BH, BW, ROWS)
            k = load_tile(q_base + C, other, 3 * C, lane, there[:, None] & lanes[None, :])
            v = load_tile(v_base, other, 3 * C, lane, there[:, None] & lanes[None, :])
            s = scores(q, k, k_inside, PRECISION)
            largest = tl.max(s, axis=1) * base2
            p = tl.exp2(s * base2 - largest[:, None])
            total = tl.sum(p, axis=1)
            acc = dot(p.to(v.dtype), v, tl.zeros([BLOCK_M, BLOCK_D], tl.float32), PRECISION)
        else:
            largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
            total = tl.zeros([BLOCK_M], tl.float32)
            acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
            for start in range(0, PLACES, BLOCK_N):
                index = start + tl.arange(0, BLOCK_N)
                other, there, k_inside, _ = block_tokens(index, row, column, height, width, BH, BW, ROWS)
                k = load_tile(q_base + C, other, 3 * C, lane, there[:, None] & lanes[None, :])
                v = load_tile(v_base, other, 3 * C, lane, there[:, None] & lanes[None, :])
                s = scores(q, k, k_inside, PRECISION)
                larger = tl.maximum(largest, tl.max(s, axis=1) * base2)
                p = tl.exp2(s * base2 - larger[:, None])
                shrink = tl.exp2(largest - larger)
                total = total * shrink + tl.sum(p, axis=1)
                acc = dot(p.to(v.dtype), v, acc * shrink[:, None], PRECISION)
                largest = larger
        acc = acc * (1 / total)[:, None]
        if row_lse is not None:
            lse_base = row_lse + ((image * HEADS + head) * blocks + row * columns + column) * (BH * BW)
            tl.store(lse_base + number, largest + tl.log2(total), mask=q_inside)
        if weight is not None:
            if not WHOLE:
                taps = load_taps(weight, bias, head * D + lane, lanes)
            first = query_tile * BLOCK_M
            acc += block_lepe(
                v_base, first, row, column, height, width, taps, lane, lanes, 3 * C, BH, BW, ROWS, BLOCK_M
            )
        store_tile(out, token, C, lane, mask, acc)
        query_tile, following = advance(query_tile, 0, TILES)
        column, row = advance(column + following - 1, row, columns)


@triton.jit(do_not_specialize=["height", "width", "groups", "group"])
def local_gradient_kernel(
    qkv,  # [B, N, 3C]
    dout,  # [B, N, C]
    dqkv,  # [B, N, 3C]
    height,
    width,
    groups,
    group,
    C: tl.constexpr,
    FIRST: tl.constexpr,
    HEADS: tl.constexpr,
    BH: tl.constexpr,
    BW: tl.constexpr,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,  # places per block, padded to a power of two
    PRECISION: tl.constexpr,
):
    """Compute all gradients of one block and head; the softmax is recomputed."""
    pid = tl.program_id(0)
    part, head, image = pid % groups, pid // groups % HEADS, (pid // groups // HEADS).to(tl.int64)
    lane = tl.arange(0, BLOCK_D)
    lanes = lane < D
    scale: tl.constexpr = D**-0.5
    base2: tl.constexpr = scale * LOG2_E
    half = qkv.dtype.element_ty
    q_offset = image * height * width * (3 * C) + FIRST + head * D
    do_base = dout + image * height * width * C + FIRST + head * D
    index = tl.arange(0, BLOCK_T)
    columns = tl.cdiv(width, BW)
    row, column = part * group // columns, part * group % columns
    for _step in tl.range(0, trips(tl.minimum(group, tl.cdiv(height, BH) * columns - part * group)), num_stages=1):
        token, exists, inside, _ = block_tokens(index, row, column, height, width, BH, BW, ROWS)
        mask = exists[:, None] & lanes[None, :]
        q = load_tile(qkv + q_offset, token, 3 * C, lane, mask)
        k = load_tile(qkv + q_offset + C, token, 3 * C, lane, mask)
        v = load_tile(qkv + q_offset + 2 * C, token, 3 * C, lane, mask)
        do = load_tile(do_base, token, C, lane, mask)
        s = scores(q, k, inside, PRECISION)
        p = tl.exp2(s * base2 - (tl.max(s, axis=1) * base2)[:, None])
        p = p * (1 / tl.sum(p, axis=1))[:, None]
        zero = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
        dp = dot(do, tl.trans(v), tl.zeros([BLOCK_T, BLOCK_T], tl.float32), PRECISION)
        ds = (p * (dp - tl.sum(p * dp, axis=1)[:, None])).to(half)
        store_tile(dqkv + q_offset, token, 3 * C, lane, mask, dot(ds, k, zero, PRECISION) * scale)
        dk = dot(tl.trans(ds), q, zero, PRECISION) * scale
        store_tile(dqkv + q_offset + C, token, 3 * C, lane, mask, dk)
        store_tile(dqkv + q_offset + 2 * C, token, 3 * C, lane, mask, dot(tl.trans(p.to(half)), do, zero, PRECISION))
        column, row = advance(column, row, columns)


@triton.jit(do_not_specialize=["height", "width"])
def local_query_gradient_kernel(
    qkv,  # [B, N, 3C]
    dout,  # [B, N, C]
    row_lse,  # [B, heads, blocks, BH * BW]
    row_sum,  # [B, heads, blocks, BH * BW] float32, written: row sums of P ⊙ dP
    dqkv,  # [B, N, 3C]; Q's part is written
    height,
    width,
    C: tl.constexpr,
    FIRST: tl.constexpr,
    HEADS: tl.constexpr,
    BH: tl.constexpr,
    BW: tl.constexpr,
    ROWS: tl.constexpr,
    PLACES: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute dQ in two passes over the keys: the output includes LePE, so row sums of P ⊙ dP need their own."""
    TILES: tl.constexpr = (PLACES + BLOCK_M - 1) // BLOCK_M
    columns = tl.cdiv(width, BW)
    blocks = tl.cdiv(height, BH) * columns
    pid = tl.program_id(0)
    query_tile, block, head = pid % TILES, pid // TILES % blocks, pid // TILES // blocks % HEADS
    image = (pid // TILES // blocks // HEADS).to(tl.int64)
    row, column = block // columns, block % columns
    lane = tl.arange(0, BLOCK_D)
    lanes = lane < D
    scale: tl.constexpr = D**-0.5
    base2: tl.constexpr = scale * LOG2_E
    q_offset = image * height * width * (3 * C) + FIRST + head * D
    k_base = qkv + q_offset + C
    do_base = dout + image * height * width * C + FIRST + head * D
    rows = ((image * HEADS + head) * blocks + block) * (BH * BW)
    own = query_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    token, exists, q_inside, number = block_tokens(own, row, column, height, width, BH, BW, ROWS)
    mask = exists[:, None] & lanes[None, :]
    q = load_tile(qkv + q_offset, token, 3 * C, lane, mask)
    do = load_tile(do_base, token, C, lane, mask)
    lse = tl.load(row_lse + rows + number, mask=q_inside, other=0.0)
    total = tl.zeros([BLOCK_M], tl.float32)
    for start in range(0, PLACES, BLOCK_N):
        index = start + tl.arange(0, BLOCK_N)
        other, there, k_inside, _ = block_tokens(index, row, column, height, width, BH, BW, ROWS)
        k = load_tile(k_base, other, 3 * C, lane, there[:, None] & lanes[None, :])
        v = load_tile(k_base + C, other, 3 * C, lane, there[:, None] & lanes[None, :])
        p = tl.exp2(scores(q, k, k_inside, PRECISION) * base2 - lse[:, None])
        dp = dot(do, tl.trans(v), tl.zeros([BLOCK_M, BLOCK_N], tl.float32), PRECISION)
        total += tl.sum(p * dp, axis=1)
    tl.store(row_sum + rows + number, total, mask=q_inside)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(0, PLACES, BLOCK_N):
        index = start + tl.arange(0, BLOCK_N)
        other, there, k_inside, _ = block_tokens(index, row, column, height, width, BH, BW, ROWS)
        k = load_tile(k_base, other, 3 * C, lane, there[:, None] & lanes[None, :])
        v = load_tile(k_base + C, other, 3 * C, lane, there[:, None] & lanes[None, :])
        p = tl.exp2(scores(q, k, k_inside, PRECISION) * base2 - lse[:, None])
        dp = dot(do, tl.trans(v), tl.zeros([BLOCK_M, BLOCK_N], tl.float32), PRECISION)
        dq = dot((p * (dp - total[:, None])).to(k.dtype), k, dq, PRECISION)
    store_tile(dqkv + q_offset, token, 3 * C, lane, mask, dq * scale)


@triton.jit(do_not_specialize=["height", "width"])
def local_key_value_gradient_kernel(
    qkv,  # [B, N, 3C]
    dout,  # [B, N, C]
    row_lse,  # [B, heads, blocks, BH * BW]
    row_sum,  # [B, heads, blocks, BH * BW]
    dqkv,  # [B, N, 3C]; K's and V's parts are written
    height,
    width,
    C: tl.constexpr,
    FIRST: tl.constexpr,
    HEADS: tl.constexpr,
    BH: tl.constexpr,
    BW: tl.constexpr,
    ROWS: tl.constexpr,
    PLACES: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute dK, and dV without LePE's part, for blocks of more than 64 tokens."""
    TILES: tl.constexpr = (PLACES + BLOCK_N - 1) // BLOCK_N
    columns = tl.cdiv(width, BW)
    blocks = tl.cdiv(height, BH) * columns
    pid = tl.program_id(0)
    key_tile, block, head = pid % TILES, pid // TILES % blocks, pid // TILES // blocks % HEADS
    image = (pid // TILES // blocks // HEADS).to(tl.int64)
    row, column = block // columns, block % columns
    lane = tl.arange(0, BLOCK_D)
    lanes = lane < D
    scale: tl.constexpr = D**-0.5
    base2: tl.constexpr = scale * LOG2_E
    q_base = qkv + image * height * width * (3 * C) + FIRST + head * D
    k_offset = image * height * width * (3 * C) + C + FIRST + head * D
    do_base = dout + image * height * width * C + FIRST + head * D
    rows = ((image * HEADS + head) * blocks + block) * (BH * BW)
    own = key_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    token, exists, k_inside, _ = block_tokens(own, row, column, height, width, BH, BW, ROWS)
    mask = exists[:, None] & lanes[None, :]
    k = load_tile(qkv + k_offset, token, 3 * C, lane, mask)
    v = load_tile(qkv + k_offset + C, token, 3 * C, lane, mask)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for start in range(0, PLACES, BLOCK_M):
        index = start + tl.arange(0, BLOCK_M)
        other, there, q_inside, number = block_tokens(index, row, column, height, width, BH, BW, ROWS)
        q = load_tile(q_base, other, 3 * C, lane, there[:, None] & lanes[None, :])
        do = load_tile(do_base, other, C, lane, there[:, None] & lanes[None, :])
        lse = tl.load(row_lse + rows + number, mask=q_inside, other=0.0)
        total = tl.load(row_sum + rows + number, mask=q_inside, other=0.0)
        p = tl.exp2(scores(q, k, k_inside, PRECISION) * base2 - lse[:, None])
        dp = dot(do, tl.trans(v), tl.zeros([BLOCK_M, BLOCK_N], tl.float32), PRECISION)
        dv = dot(tl.trans(p.to(k.dtype)), do, dv, PRECISION)
        dk = dot(tl.trans((p * (dp - total[:, None])).to(k.dtype)), q, dk, PRECISION)
    store_tile(dqkv + k_offset, token, 3 * C, lane, mask, dk * scale)
    store_tile(dqkv + k_offset + C, token, 3 * C, lane, mask, dv)
