"""Kernels of the local branch: ``softmax(Q Kᵀ / √d) V + L(V)`` inside blocks of ``BH × BW`` tokens.

A block that leaves the map is zero there and its zero keys take part in the softmax; its zero queries have neither an
output nor a gradient. Blocks of up to 64 tokens have one backward kernel, in which a program holds its whole block;
larger ones have two, as in FlashAttention-2 (Dao, arXiv 2307.08691).
"""

import triton
import triton.language as tl

from elfatt.ops.triton.common import LOG2_E, dot, load_tile, store_tile
from elfatt.ops.triton.lepe import lepe, strip_tokens


@triton.jit
def block_tokens(index, block, height, width, BH: tl.constexpr, BW: tl.constexpr, ROWS: tl.constexpr):
    """Of the places ``index`` of a block, in the order of its strips: the token in the map and whether it exists there,
    whether it exists in the block and the token there."""
    columns = tl.cdiv(width, BW)
    row, column = strip_tokens(index, BW, ROWS)
    y, x = block // columns * BH + row, block % columns * BW + column
    return y * width + x, (row < BH) & (y < height) & (x < width), row < BH, row * BW + column


@triton.jit
def block_lepe(
    v, stride, start, block, height, width, weight, bias, lane, lanes,
    BH: tl.constexpr, BW: tl.constexpr, ROWS: tl.constexpr, COUNT: tl.constexpr, TRANSPOSED: tl.constexpr = False,
):  # fmt: skip
    """LePE of COUNT places of a block, from ``start`` on."""
    top, left, bottom, right = block_area(block, height, width, BH, BW)
    y, x = strip_tokens(start + tl.arange(0, COUNT // ROWS) * ROWS, BW, ROWS)
    return lepe(
        v, stride, top + y, left + x, top, left, bottom, right, width, weight, bias, lane, lanes, ROWS, TRANSPOSED
    )


@triton.jit
def block_area(block, height, width, BH: tl.constexpr, BW: tl.constexpr):
    """The part of the map that a block covers: top, left, bottom, right."""
    columns = tl.cdiv(width, BW)
    top, left = block // columns * BH, block % columns * BW
    return top, left, tl.minimum(top + BH, height), tl.minimum(left + BW, width)


@triton.jit
def scores(q, k, inside, PRECISION: tl.constexpr):
    """Scores, not yet scaled, of all queries and the keys, of which only those ``inside`` the block exist."""
    s = dot(q, tl.trans(k), tl.zeros([q.shape[0], k.shape[0]], tl.float32), PRECISION)
    return tl.where(inside[None, :], s, float("-inf"))


@triton.jit
def local_out_kernel(
    qkv,  # [B, N, 3C]
    weight,  # [heads * D, 9] or None
    bias,  # [heads * D] or None
    out,  # [B, N, C]
    row_lse,  # [B, heads, blocks, BH * BW] float32 or None: log2 of the sum of exp(scores)
    height,
    width,
    channels,
    first,  # the branch's first channel
    heads,
    blocks,
    groups,
    scale,
    BH: tl.constexpr,
    BW: tl.constexpr,
    ROWS: tl.constexpr,
    PLACES: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    TILES: tl.constexpr = (PLACES + BLOCK_M - 1) // BLOCK_M
    pid = tl.program_id(0)
    group, head, image = pid % groups, pid // groups % heads, (pid // groups // heads).to(tl.int64)
    lane = tl.arange(0, BLOCK_D)
    lanes = lane < D
    stride = 3 * channels
    base2 = scale * LOG2_E
    q_base = qkv + image * height * width * stride + first + head * D
    v_base = q_base + 2 * channels
    out += image * height * width * channels + first + head * D
    if weight is not None:
        weight += head * D * 9
        if bias is not None:
            bias += head * D
    for step in tl.range(GROUP, num_stages=1):
        tile = group * GROUP + step
        block, query_tile = tile // TILES, tile % TILES  # past the last block, below the map
        row = query_tile * BLOCK_M + tl.arange(0, BLOCK_M)
        token, exists, q_inside, number = block_tokens(row, block, height, width, BH, BW, ROWS)
        mask = exists[:, None] & lanes[None, :]
        q = load_tile(q_base, token, stride, lane, mask)
        largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        for start in range(0, PLACES, BLOCK_N):
            index = start + tl.arange(0, BLOCK_N)
            other, there, k_inside, _ = block_tokens(index, block, height, width, BH, BW, ROWS)
            k = load_tile(q_base + channels, other, stride, lane, there[:, None] & lanes[None, :])
            v = load_tile(v_base, other, stride, lane, there[:, None] & lanes[None, :])
            s = scores(q, k, k_inside, PRECISION)
            larger = tl.maximum(largest, tl.max(s, axis=1) * base2)
            p = tl.exp2(s * base2 - larger[:, None])
            shrink = tl.exp2(largest - larger)
            total = total * shrink + tl.sum(p, axis=1)
            acc = dot(p.to(v.dtype), v, acc * shrink[:, None], PRECISION)
            largest = larger
        acc = acc * (1 / total)[:, None]
        if row_lse is not None:
            lse_base = row_lse + ((image * heads + head) * blocks + block) * BH * BW
            tl.store(lse_base + number, largest + tl.log2(total), mask=q_inside & (block < blocks))
        if weight is not None:
            acc += block_lepe(
                v_base, stride, query_tile * BLOCK_M, block, height, width, weight, bias, lane, lanes,
                BH, BW, ROWS, BLOCK_M,
            )  # fmt: skip
        store_tile(out, token, channels, lane, mask, acc)


@triton.jit
def local_gradient_kernel(
    qkv,  # [B, N, 3C]
    dout,  # [B, N, C]
    weight,  # [heads * D, 9] or None
    dqkv,  # [B, N, 3C]
    height,
    width,
    channels,
    first,
    heads,
    groups,
    scale,
    BH: tl.constexpr,
    BW: tl.constexpr,
    ROWS: tl.constexpr,
    PLACES: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,  # PLACES, to the next power of two
    PRECISION: tl.constexpr,
):
    """The whole gradient of one block and head; softmax is recomputed, nothing kept from the forward pass."""
    pid = tl.program_id(0)
    group, head, image = pid % groups, pid // groups % heads, (pid // groups // heads).to(tl.int64)
    lane = tl.arange(0, BLOCK_D)
    lanes = lane < D
    stride = 3 * channels
    base2 = scale * LOG2_E
    half = qkv.dtype.element_ty
    q_offset = image * height * width * stride + first + head * D
    do_base = dout + image * height * width * channels + first + head * D
    index = tl.arange(0, BLOCK_T)
    if weight is not None:
        weight += head * D * 9
    for step in tl.range(GROUP, num_stages=1):
        block = group * GROUP + step  # past the last, below the map
        token, exists, inside, _ = block_tokens(index, block, height, width, BH, BW, ROWS)
        mask = exists[:, None] & lanes[None, :]
        q = load_tile(qkv + q_offset, token, stride, lane, mask)
        k = load_tile(qkv + q_offset + channels, token, stride, lane, mask)
        v = load_tile(qkv + q_offset + 2 * channels, token, stride, lane, mask)
        do = load_tile(do_base, token, channels, lane, mask)
        s = scores(q, k, inside, PRECISION)
        p = tl.exp2(s * base2 - (tl.max(s, axis=1) * base2)[:, None])
        p = p * (1 / tl.sum(p, axis=1))[:, None]
        zero = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
        dp = dot(do, tl.trans(v), tl.zeros([BLOCK_T, BLOCK_T], tl.float32), PRECISION)
        ds = (p * (dp - tl.sum(p * dp, axis=1)[:, None])).to(half)
        store_tile(dqkv + q_offset, token, stride, lane, mask, dot(ds, k, zero, PRECISION) * scale)
        dk = dot(tl.trans(ds), q, zero, PRECISION) * scale
        store_tile(dqkv + q_offset + channels, token, stride, lane, mask, dk)
        dv = dot(tl.trans(p.to(half)), do, zero, PRECISION)
        if weight is not None:
            dv += block_lepe(
                do_base, channels, 0, block, height, width, weight, None, lane, lanes, BH, BW, ROWS, BLOCK_T, True
            )
        store_tile(dqkv + q_offset + 2 * channels, token, stride, lane, mask, dv)


@triton.jit
def local_query_gradient_kernel(
    qkv,  # [B, N, 3C]
    dout,  # [B, N, C]
    row_lse,  # [B, heads, blocks, BH * BW]
    row_sum,  # [B, heads, blocks, BH * BW] float32, written: the rows' sums of P ⊙ dP
    dqkv,  # [B, N, 3C]: the part of Q is written
    height,
    width,
    channels,
    first,
    heads,
    blocks,
    scale,
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
    TILES: tl.constexpr = (PLACES + BLOCK_M - 1) // BLOCK_M
    pid = tl.program_id(0)
    query_tile, block, head = pid % TILES, pid // TILES % blocks, pid // TILES // blocks % heads
    image = (pid // TILES // blocks // heads).to(tl.int64)
    lane = tl.arange(0, BLOCK_D)
    lanes = lane < D
    stride = 3 * channels
    base2 = scale * LOG2_E
    q_offset = image * height * width * stride + first + head * D
    k_base = qkv + q_offset + channels
    do_base = dout + image * height * width * channels + first + head * D
    rows = ((image * heads + head) * blocks + block) * BH * BW
    row = query_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    token, exists, q_inside, number = block_tokens(row, block, height, width, BH, BW, ROWS)
    mask = exists[:, None] & lanes[None, :]
    q = load_tile(qkv + q_offset, token, stride, lane, mask)
    do = load_tile(do_base, token, channels, lane, mask)
    lse = tl.load(row_lse + rows + number, mask=q_inside, other=0.0)
    # The rows' sums of P ⊙ dP cannot come from the output, which holds LePE too, and end with the walk over the keys.
    # So dQ = (P ⊙ dP) K - sum · P K, and dP is taken against a rough mean of V lest the difference cancel.
    index = tl.arange(0, BLOCK_N)
    other, there, k_inside, _ = block_tokens(index, block, height, width, BH, BW, ROWS)
    v = load_tile(k_base + channels, other, stride, lane, there[:, None] & lanes[None, :])
    mean_v = tl.sum(v.to(tl.float32), axis=0) / BLOCK_N
    shift = tl.sum(do.to(tl.float32) * mean_v[None, :], axis=1)
    total = tl.zeros([BLOCK_M], tl.float32)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    mean_k = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(0, PLACES, BLOCK_N):
        index = start + tl.arange(0, BLOCK_N)
        other, there, k_inside, _ = block_tokens(index, block, height, width, BH, BW, ROWS)
        k = load_tile(k_base, other, stride, lane, there[:, None] & lanes[None, :])
        v = load_tile(k_base + channels, other, stride, lane, there[:, None] & lanes[None, :])
        p = tl.exp2(scores(q, k, k_inside, PRECISION) * base2 - lse[:, None])
        dp = dot(do, tl.trans(v), tl.zeros([BLOCK_M, BLOCK_N], tl.float32), PRECISION) - shift[:, None]
        total += tl.sum(p * dp, axis=1)
        dq = dot((p * dp).to(k.dtype), k, dq, PRECISION)
        mean_k = dot(p.to(k.dtype), k, mean_k, PRECISION)
    dq -= total[:, None] * mean_k
    total += shift
    tl.store(row_sum + rows + number, total, mask=q_inside)
    store_tile(dqkv + q_offset, token, stride, lane, mask, dq * scale)


@triton.jit
def local_key_value_gradient_kernel(
    qkv,  # [B, N, 3C]
    dout,  # [B, N, C]
    row_lse,  # [B, heads, blocks, BH * BW]
    row_sum,  # [B, heads, blocks, BH * BW]
    weight,  # [heads * D, 9] or None
    dqkv,  # [B, N, 3C]: the parts of K and V are written
    height,
    width,
    channels,
    first,
    heads,
    blocks,
    scale,
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
    TILES: tl.constexpr = (PLACES + BLOCK_N - 1) // BLOCK_N
    pid = tl.program_id(0)
    key_tile, block, head = pid % TILES, pid // TILES % blocks, pid // TILES // blocks % heads
    image = (pid // TILES // blocks // heads).to(tl.int64)
    lane = tl.arange(0, BLOCK_D)
    lanes = lane < D
    stride = 3 * channels
    base2 = scale * LOG2_E
    q_base = qkv + image * height * width * stride + first + head * D
    k_offset = image * height * width * stride + channels + first + head * D
    do_base = dout + image * height * width * channels + first + head * D
    rows = ((image * heads + head) * blocks + block) * BH * BW
    index = key_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    token, exists, k_inside, _ = block_tokens(index, block, height, width, BH, BW, ROWS)
    mask = exists[:, None] & lanes[None, :]
    k = load_tile(qkv + k_offset, token, stride, lane, mask)
    v = load_tile(qkv + k_offset + channels, token, stride, lane, mask)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for start in range(0, PLACES, BLOCK_M):
        row = start + tl.arange(0, BLOCK_M)
        other, there, q_inside, number = block_tokens(row, block, height, width, BH, BW, ROWS)
        q = load_tile(q_base, other, stride, lane, there[:, None] & lanes[None, :])
        do = load_tile(do_base, other, channels, lane, there[:, None] & lanes[None, :])
        lse = tl.load(row_lse + rows + number, mask=q_inside, other=0.0)
        total = tl.load(row_sum + rows + number, mask=q_inside, other=0.0)
        p = tl.exp2(scores(q, k, k_inside, PRECISION) * base2 - lse[:, None])
        dp = dot(do, tl.trans(v), tl.zeros([BLOCK_M, BLOCK_N], tl.float32), PRECISION)
        dv = dot(tl.trans(p.to(k.dtype)), do, dv, PRECISION)
        dk = dot(tl.trans((p * (dp - total[:, None])).to(k.dtype)), q, dk, PRECISION)
    if weight is not None:
        dv += block_lepe(
            do_base, channels, key_tile * BLOCK_N, block, height, width, weight + head * D * 9, None, lane, lanes,
            BH, BW, ROWS, BLOCK_N, True,
        )  # fmt: skip
    store_tile(dqkv + k_offset, token, stride, lane, mask, dk * scale)
    store_tile(dqkv + k_offset + channels, token, stride, lane, mask, dv)
