"""Kernels of the global branch: ``softmax_features(Q) · (softmax_tokens(K)ᵀ V) + L(V)``.

Backward, with ``P = softmax(Q)``, ``N = softmax(K)``, ``A = NᵀV``, and dO the gradient of the output:
``dA = Pᵀ dO``, ``dP = dO Aᵀ``, ``dV = N dA``, ``dN = V dAᵀ``. The softmax of K needs the sums of ``N ⊙ dN`` over the
tokens; they equal the row sums of ``A ⊙ dA``, which saves a pass over K. ``lepe.py`` adds LePE's part of dV.
"""

import triton
import triton.language as tl

from elfatt.ops.triton.common import LOG2_E, advance, dot, load_tile, round_to_tf32, store_tile, trips, widen
from elfatt.ops.triton.lepe import load_taps, map_lepe, map_tile


@triton.jit
def feature_softmax(q, lanes):
    """Return the softmax over channels, in float32."""
    q = tl.where(lanes[None, :], widen(q), float("-inf"))
    p = tl.exp2(q * LOG2_E - (tl.max(q, axis=1) * LOG2_E)[:, None])
    return p * (1 / tl.sum(p, axis=1))[:, None]


@triton.jit(do_not_specialize=["tokens", "splits", "steps"])
def context_kernel(
    qkv,  # [B, N, 3C]
    context,  # [B, heads, splits, D, D] float32: softmax(K)ᵀV of each split
    key_lse,  # [B, heads, splits, D] float32: log2(sum(exp(K))) of each split
    tokens,
    splits,
    steps,
    C: tl.constexpr,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute the partial ``softmax(K)ᵀ V`` of one head over one split of the tokens."""
    pid = tl.program_id(0).to(tl.int64)
    split, head, image = (pid % splits).to(tl.int32), pid // splits % HEADS, pid // splits // HEADS
    lane = tl.arange(0, BLOCK_D)
    lanes = lane < D
    k_base = qkv + image * tokens * (3 * C) + C + head * D
    largest = tl.full([BLOCK_D], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    acc = tl.zeros([BLOCK_D, BLOCK_D], tl.float32)
    start = split * steps * BLOCK_N
    for step in tl.range(0, trips(tl.minimum(steps, tl.cdiv(tokens - start, BLOCK_N)))):
        token = start + step * BLOCK_N + tl.arange(0, BLOCK_N)
        mask = (token < tokens)[:, None] & lanes[None, :]
        v = load_tile(k_base + C, token, 3 * C, lane, mask)
        k = widen(load_tile(k_base, token, 3 * C, lane, mask))
        k = tl.where((token < tokens)[:, None], k, float("-inf"))
        # online softmax; the first step of each split has a token, so the maximum is finite
        larger = tl.maximum(largest, tl.max(k, axis=0) * LOG2_E)
        p = tl.exp2(k * LOG2_E - larger[None, :])
        shrink = tl.exp2(largest - larger)
        total = total * shrink[None, :] + p  # reduced across threads once, after the loop
        acc = dot(tl.trans(p).to(v.dtype), v, acc * shrink[:, None], PRECISION)
        largest = larger
    total = tl.sum(total, axis=0)
    square = lane[:, None] * D + lane[None, :]
    tl.store(context + pid * D * D + square, acc / total[:, None], mask=lanes[:, None] & lanes[None, :])
    tl.store(key_lse + pid * D + lane, largest + tl.log2(total), mask=lanes)


@triton.jit(do_not_specialize=["splits"])
def combine_kernel(
    parts,  # [B, heads, splits, D, D]
    parts_lse,  # [B, heads, splits, D]
    context,  # [B, heads, D, D]
    key_lse,  # [B, heads, D]
    splits,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SPLITS: tl.constexpr,  # at least ``splits``
    TILE: tl.constexpr,
):
    """Merge the splits, with one program per row of a head's context, so that few heads still fill the device."""
    pid = tl.program_id(0).to(tl.int64)
    feature, head = pid % D, pid // D
    lane = tl.arange(0, BLOCK_D)
    every = tl.arange(0, SPLITS)
    lse_base = parts_lse + head * splits * D + feature
    lse = tl.load(lse_base + every * D, mask=every < splits, other=float("-inf"))
    largest = tl.max(lse, axis=0)
    total = largest + tl.log2(tl.sum(tl.exp2(lse - largest), axis=0))
    acc = tl.zeros([BLOCK_D], tl.float32)
    for start in range(0, SPLITS, TILE):
        split = start + tl.arange(0, TILE)
        share = tl.exp2(tl.load(lse_base + split * D, mask=split < splits, other=float("-inf")) - total)
        mask = (split < splits)[:, None] & (lane < D)[None, :]
        part = load_tile(parts + (head * splits * D + feature) * D, split, D * D, lane, mask)
        acc += tl.sum(part * share[:, None], axis=0)
    tl.store(context + pid * D + lane, acc, mask=lane < D)
    tl.store(key_lse + pid, total)


@triton.jit(do_not_specialize=["height", "width", "groups", "group"])
def global_out_kernel(
    qkv,  # [B, N, 3C]
    context,  # [B, heads, D, D]
    weight,  # [heads * D, 9] or None
    bias,  # [heads * D] or None
    out,  # [B, N, C]
    height,
    width,
    groups,
    group,
    C: tl.constexpr,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SIDE: tl.constexpr,
    ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute ``softmax(Q)`` times the context, plus LePE over the map."""
    pid = tl.program_id(0)
    part, head, image = pid % groups, pid // groups % HEADS, (pid // groups // HEADS).to(tl.int64)
    lane = tl.arange(0, BLOCK_D)
    lanes = lane < D
    q_base = qkv + image * height * width * (3 * C) + head * D
    out += image * height * width * C + head * D
    half = qkv.dtype.element_ty
    a = load_tile(context + (image * HEADS + head) * D * D, lane, D, lane, lanes[:, None] & lanes[None, :]).to(half)
    if weight is not None:
        taps = load_taps(weight, bias, head * D + lane, lanes)
    columns = tl.cdiv(width, SIDE)
    row, column = part * group // columns, part * group % columns
    count = tl.minimum(group, tl.cdiv(height, SIDE) * columns - part * group)
    for _step in tl.range(0, trips(count), num_stages=1):
        token, exists = map_tile(row, column, height, width, SIDE, ROWS)
        mask = exists[:, None] & lanes[None, :]
        p = feature_softmax(load_tile(q_base, token, 3 * C, lane, mask), lanes)
        acc = dot(p.to(half), a, tl.zeros([SIDE * SIDE, BLOCK_D], tl.float32), PRECISION)
        if weight is not None:
            acc += map_lepe(q_base + 2 * C, row, column, height, width, taps, lane, lanes, 3 * C, SIDE, ROWS)
        store_tile(out, token, C, lane, mask, acc)
        column, row = advance(column, row, columns)


@triton.jit(do_not_specialize=["tokens", "splits", "steps"])
def global_query_gradient_kernel(
    qkv,  # [B, N, 3C]
    dout,  # [B, N, C]
    context,  # [B, heads, D, D]
    dqkv,  # [B, N, 3C]; Q's part is written
    dcontext,  # [B, heads, splits, D, D] float32: PᵀdO of each split
    tokens,
    splits,
    steps,
    C: tl.constexpr,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute dQ and the partial gradient of the context."""
    pid = tl.program_id(0).to(tl.int64)
    split, head, image = (pid % splits).to(tl.int32), pid // splits % HEADS, pid // splits // HEADS
    lane = tl.arange(0, BLOCK_D)
    lanes = lane < D
    square = lanes[:, None] & lanes[None, :]
    half = qkv.dtype.element_ty
    a = load_tile(context + (image * HEADS + head) * D * D, lane, D, lane, square).to(half)
    q_offset = image * tokens * (3 * C) + head * D
    do_base = dout + image * tokens * C + head * D
    acc = tl.zeros([BLOCK_D, BLOCK_D], tl.float32)
    start = split * steps * BLOCK_N
    count = tl.minimum(steps, tl.cdiv(tokens - start, BLOCK_N))
    for step in tl.range(0, trips(count), num_stages=1):
        token = start + step * BLOCK_N + tl.arange(0, BLOCK_N)
        mask = (token < tokens)[:, None] & lanes[None, :]
        do = load_tile(do_base, token, C, lane, mask)
        p = feature_softmax(load_tile(qkv + q_offset, token, 3 * C, lane, mask), lanes)
        dp = dot(do, tl.trans(a), tl.zeros([BLOCK_N, BLOCK_D], tl.float32), PRECISION)
        dq = p * (dp - tl.sum(p * dp, axis=1)[:, None])
        store_tile(dqkv + q_offset, token, 3 * C, lane, mask, dq)
        acc = dot(tl.trans(p).to(half), do, acc, PRECISION)
    tl.store(dcontext + pid * D * D + lane[:, None] * D + lane[None, :], acc, mask=square)


@triton.jit(do_not_specialize=["tokens", "parts", "splits", "steps"])
def global_key_value_gradient_kernel(
    qkv,  # [B, N, 3C]
    context,  # [B, heads, D, D]
    dcontext,  # [B, heads, parts, D, D], summed over parts here
    key_lse,  # [B, heads, D]
    dqkv,  # [B, N, 3C]; K's and V's parts are written
    tokens,
    parts,
    splits,
    steps,
    C: tl.constexpr,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute dK, and dV without LePE's part."""
    pid = tl.program_id(0).to(tl.int64)
    split, head, image = (pid % splits).to(tl.int32), pid // splits % HEADS, pid // splits // HEADS
    lane = tl.arange(0, BLOCK_D)
    lanes = lane < D
    square = lanes[:, None] & lanes[None, :]
    which = image * HEADS + head
    da = tl.zeros([BLOCK_D, BLOCK_D], tl.float32)
    for part in tl.range(0, trips(parts)):
        da += load_tile(dcontext + (which * parts + part) * D * D, lane, D, lane, square)
    a = load_tile(context + which * D * D, lane, D, lane, square)
    lse = tl.load(key_lse + which * D + lane, mask=lanes, other=0.0)
    k_offset = image * tokens * (3 * C) + C + head * D
    # dA is a sum over all tokens and N is about 1 / tokens: both exceed float16's range
    half: tl.constexpr = qkv.dtype.element_ty
    wide: tl.constexpr = tl.float32 if half == tl.float16 else half
    # round before summing, so that the sums cancel dN exactly if one token has all the weight
    if PRECISION == "tf32" and wide == tl.float32:
        da = round_to_tf32(da)
    da = da.to(wide)
    column_sum = tl.sum(a * widen(da), axis=1)
    start = split * steps * BLOCK_N
    count = tl.minimum(steps, tl.cdiv(tokens - start, BLOCK_N))
    for step in tl.range(0, trips(count), num_stages=1):
        token = start + step * BLOCK_N + tl.arange(0, BLOCK_N)
        mask = (token < tokens)[:, None] & lanes[None, :]
        k = widen(load_tile(qkv + k_offset, token, 3 * C, lane, mask))
        v = load_tile(qkv + k_offset + C, token, 3 * C, lane, mask)
        n = tl.exp2(k * LOG2_E - lse[None, :])
        zero = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        dn = dot(v.to(wide), tl.trans(da), zero, PRECISION)
        store_tile(dqkv + k_offset, token, 3 * C, lane, mask, n * (dn - column_sum[None, :]))
        store_tile(dqkv + k_offset + C, token, 3 * C, lane, mask, dot(n.to(wide), da, zero, PRECISION))
