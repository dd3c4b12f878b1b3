"""Kernels of the global branch: ``softmax_features(Q) · (softmax_tokens(K)ᵀ V) + L(V)``.

Backward, with ``P = softmax(Q)``, ``N = softmax(K)``, ``A = NᵀV``, and dO the gradient of the output:
``dA = Pᵀ dO``, ``dP = dO Aᵀ``, ``dV = N dA + Lᵀ(dO)``, ``dN = V dAᵀ``; the sums of ``N ⊙ dN`` over
the tokens, which the softmax of K needs, are the row sums of ``A ⊙ dA``, so K needs no pass of its own.
"""

import triton
import triton.language as tl

from elfatt.ops.triton.common import LOG2_E, dot, load_tile, store_tile
from elfatt.ops.triton.lepe import map_lepe, map_tile


@triton.jit
def feature_softmax(q, lanes):
    q = tl.where(lanes[None, :], q.to(tl.float32), float("-inf"))
    p = tl.exp2(q * LOG2_E - (tl.max(q, axis=1) * LOG2_E)[:, None])
    return p * (1 / tl.sum(p, axis=1))[:, None]


@triton.jit
def context_kernel(
    qkv,  # [B, N, 3C]
    context,  # [B, heads, splits, D, D] float32: softmax(K)ᵀV over the tokens of each split
    key_lse,  # [B, heads, splits, D] float32: log2 of the sum of exp(K) over them
    tokens,
    channels,
    heads,
    splits,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STEPS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    split, head, image = pid % splits, pid // splits % heads, pid // splits // heads
    lane = tl.arange(0, BLOCK_D)
    lanes = lane < D
    stride = 3 * channels
    k_base = qkv + image * tokens * stride + channels + head * D
    largest = tl.full([BLOCK_D], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    acc = tl.zeros([BLOCK_D, BLOCK_D], tl.float32)
    start = (split * STEPS * BLOCK_N).to(tl.int32)
    for step in range(STEPS):
        token = start + step * BLOCK_N + tl.arange(0, BLOCK_N)
        mask = (token < tokens)[:, None] & lanes[None, :]
        v = load_tile(k_base + channels, token, stride, lane, mask)
        k = load_tile(k_base, token, stride, lane, mask).to(tl.float32)
        k = tl.where((token < tokens)[:, None], k, float("-inf"))
        # online softmax; the first step of a split has a token, so the maximum is finite from there on
        larger = tl.maximum(largest, tl.max(k, axis=0) * LOG2_E)
        p = tl.exp2(k * LOG2_E - larger[None, :])
        shrink = tl.exp2(largest - larger)
        total = total * shrink[None, :] + p  # added up across threads once, at the end
        acc = dot(tl.trans(p).to(v.dtype), v, acc * shrink[:, None], PRECISION)
        largest = larger
    total = tl.sum(total, axis=0)
    square = lane[:, None] * D + lane[None, :]
    tl.store(context + pid * D * D + square, acc / total[:, None], mask=lanes[:, None] & lanes[None, :])
    tl.store(key_lse + pid * D + lane, largest + tl.log2(total), mask=lanes)


@triton.jit
def combine_kernel(
    parts,  # [B, heads, splits, D, D]
    parts_lse,  # [B, heads, splits, D]
    context,  # [B, heads, D, D]
    key_lse,  # [B, heads, D]
    splits,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SPLITS: tl.constexpr,  # next power of two
    TILE: tl.constexpr,
):
    """Merge the splits: one program for one row of one head's context, so that few heads still fill the device."""
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


@triton.jit
def global_out_kernel(
    qkv,  # [B, N, 3C]
    context,  # [B, heads, D, D]
    weight,  # [heads * D, 9] or None
    bias,  # [heads * D] or None
    out,  # [B, N, C]
    height,
    width,
    channels,
    heads,
    groups,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SIDE: tl.constexpr,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    pid = tl.program_id(0)
    group, head, image = pid % groups, pid // groups % heads, (pid // groups // heads).to(tl.int64)
    lane = tl.arange(0, BLOCK_D)
    lanes = lane < D
    stride = 3 * channels
    q_base = qkv + image * height * width * stride + head * D
    out += image * height * width * channels + head * D
    half = qkv.dtype.element_ty
    a = load_tile(context + (image * heads + head) * D * D, lane, D, lane, lanes[:, None] & lanes[None, :]).to(half)
    if weight is not None:
        weight += head * D * 9
        if bias is not None:
            bias += head * D
    for step in tl.range(GROUP, num_stages=1):
        # past the last tile, below the map
        top, left, token, exists = map_tile(group * GROUP + step, height, width, SIDE, ROWS)
        mask = exists[:, None] & lanes[None, :]
        p = feature_softmax(load_tile(q_base, token, stride, lane, mask), lanes)
        acc = dot(p.to(half), a, tl.zeros([SIDE * SIDE, BLOCK_D], tl.float32), PRECISION)
        if weight is not None:
            v_base = q_base + 2 * channels
            acc += map_lepe(v_base, stride, top, left, height, width, weight, bias, lane, lanes, SIDE, ROWS)
        store_tile(out, token, channels, lane, mask, acc)


@triton.jit
def global_query_gradient_kernel(
    qkv,  # [B, N, 3C]
    dout,  # [B, N, C]
    context,  # [B, heads, D, D]
    dqkv,  # [B, N, 3C]: the part of Q is written
    dcontext,  # [B, heads, splits, D, D] float32: PᵀdO over the tokens of each split
    tokens,
    channels,
    heads,
    splits,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STEPS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    split, head, image = pid % splits, pid // splits % heads, pid // splits // heads
    lane = tl.arange(0, BLOCK_D)
    lanes = lane < D
    square = lanes[:, None] & lanes[None, :]
    half = qkv.dtype.element_ty
    a = load_tile(context + (image * heads + head) * D * D, lane, D, lane, square).to(half)
    q_offset = image * tokens * 3 * channels + head * D
    do_base = dout + image * tokens * channels + head * D
    acc = tl.zeros([BLOCK_D, BLOCK_D], tl.float32)
    start = (split * STEPS * BLOCK_N).to(tl.int32)
    for step in range(STEPS):
        token = start + step * BLOCK_N + tl.arange(0, BLOCK_N)
        mask = (token < tokens)[:, None] & lanes[None, :]
        do = load_tile(do_base, token, channels, lane, mask)
        p = feature_softmax(load_tile(qkv + q_offset, token, 3 * channels, lane, mask), lanes)
        dp = dot(do, tl.trans(a), tl.zeros([BLOCK_N, BLOCK_D], tl.float32), PRECISION)
        dq = p * (dp - tl.sum(p * dp, axis=1)[:, None])
        store_tile(dqkv + q_offset, token, 3 * channels, lane, mask, dq)
        acc = dot(tl.trans(p).to(half), do, acc, PRECISION)
    tl.store(dcontext + pid * D * D + lane[:, None] * D + lane[None, :], acc, mask=square)


@triton.jit
def global_key_value_gradient_kernel(
    qkv,  # [B, N, 3C]
    dout,  # [B, N, C]
    context,  # [B, heads, D, D]
    dcontext,  # [B, heads, D, D]
    key_lse,  # [B, heads, D]
    weight,  # [heads * D, 9] or None
    dqkv,  # [B, N, 3C]: the parts of K and V are written
    height,
    width,
    channels,
    heads,
    groups,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SIDE: tl.constexpr,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    pid = tl.program_id(0)
    group, head, image = pid % groups, pid // groups % heads, (pid // groups // heads).to(tl.int64)
    lane = tl.arange(0, BLOCK_D)
    lanes = lane < D
    stride = 3 * channels
    square = lanes[:, None] & lanes[None, :]
    which = image * heads + head
    da = load_tile(dcontext + which * D * D, lane, D, lane, square)
    a = load_tile(context + which * D * D, lane, D, lane, square)
    column_sum = tl.sum(a * da, axis=1)
    lse = tl.load(key_lse + which * D + lane, mask=lanes, other=0.0)
    k_offset = image * height * width * stride + channels + head * D
    do_base = dout + image * height * width * channels + head * D
    # dA sums over every token and N is about one over their number: both leave the range of float16
    half: tl.constexpr = qkv.dtype.element_ty
    wide: tl.constexpr = tl.float32 if half == tl.float16 else half
    da = da.to(wide)
    if weight is not None:
        weight += head * D * 9
    for step in tl.range(GROUP, num_stages=1):
        # past the last tile, below the map
        top, left, token, exists = map_tile(group * GROUP + step, height, width, SIDE, ROWS)
        mask = exists[:, None] & lanes[None, :]
        k = load_tile(qkv + k_offset, token, stride, lane, mask).to(tl.float32)
        v = load_tile(qkv + k_offset + channels, token, stride, lane, mask)
        n = tl.where(mask, tl.exp2(k * LOG2_E - lse[None, :]), 0.0)
        zero = tl.zeros([SIDE * SIDE, BLOCK_D], tl.float32)
        dn = dot(v.to(wide), tl.trans(da), zero, PRECISION)
        dv = dot(n.to(wide), da, zero, PRECISION)
        if weight is not None:
            dv += map_lepe(do_base, channels, top, left, height, width, weight, None, lane, lanes, SIDE, ROWS, True)
        store_tile(dqkv + k_offset, token, stride, lane, mask, n * (dn - column_sum[None, :]))
        store_tile(dqkv + k_offset + channels, token, stride, lane, mask, dv)
