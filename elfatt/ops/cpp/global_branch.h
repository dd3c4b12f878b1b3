// softmax(Q) (softmax(K)^T V) + LePE over the map. Sums over tokens are split among tasks.
#pragma once

#include "lepe.h"

namespace {

struct Tokens {
    int begin, end;  // in row-major order
    Tokens(int total, int splits, int split)
        : begin(int64_t(total) * split / splits), end(int64_t(total) * (split + 1) / splits) {}
};

// One split's part of the context: exp(K)ᵀV and the sum of exp(K), both relative to the maximum of K.
struct Part {
    float *product, *top, *total;
    Part(float* parts, int d, int64_t index) : product(parts + index * size(d)), top(product + d * d), total(top + d) {}
    static int64_t size(int d) { return int64_t(d) * (d + 2); }
};

template <typename T>
void context_part(const Head<const T>& in, int d, Tokens tokens, Part part) {
    const int lanes = whole(d);
    Scratch scratch;
    float *k = scratch.rows(TOKENS * lanes), *v = scratch.rows(TOKENS * lanes);
    float *product = scratch.zeros(d * lanes), *total = scratch.zeros(lanes), *top = scratch.rows(lanes);
    std::fill(top, top + lanes, LOWEST);
    for (int start = tokens.begin, count; start < tokens.end; start += count) {
        count = next_tokens(start, tokens.end);
        in.k.tokens(start, count).read_to(k, d);
        in.v.tokens(start, count).read_to(v, d);
        for (int j = 0; j < lanes; j += LANES) {
            const Vec before = load(top + j);
            Vec now = before;
            for (int i = 0; i < count; i++) now = larger(now, load(k + i * lanes + j));
            const Vec shrink = exponential(before - now);
            Vec sums = load(total + j) * shrink;
            for (int i = 0; i < count; i++) {
                const Vec x = exponential(load(k + i * lanes + j) - now);
                store(k + i * lanes + j, x);
                sums += x;
            }
            store(top + j, now);
            store(total + j, sums);
            for (int i = j; i < std::min(j + LANES, d); i++) scale(product + i * lanes, lanes, shrink[i - j]);
        }
        multiply(d, count, columns_of(k, lanes), v, product, lanes, true);
    }
    for (int i = 0; i < d; i++) std::copy_n(product + i * lanes, d, part.product + i * d);
    std::copy_n(top, d, part.top);
    std::copy_n(total, d, part.total);
}

// Combines the splits' parts, `heads` parts apart, into the context and K's log-sum-exp.
void combine_parts(Part first, int d, int splits, int heads, float* context, float* key_lse) {
    for (int i = 0; i < d; i++) {
        float top = LOWEST, total = 0;
        for (int s = 0; s < splits; s++) top = std::max(top, Part(first.product, d, int64_t(s) * heads).top[i]);
        std::fill_n(context + i * d, d, 0.f);
        for (int s = 0; s < splits; s++) {
            const Part part(first.product, d, int64_t(s) * heads);
            const float weight = std::exp(part.top[i] - top);
            total += weight * part.total[i];
            for (int j = 0; j < d; j++) context[i * d + j] += weight * part.product[i * d + j];
        }
        for (int j = 0; j < d; j++) context[i * d + j] /= total;
        key_lse[i] = top + std::log(total);
    }
}

const float* matrix_rows(Scratch& scratch, const float* matrix, int d) {
    float* own = scratch.rows(d * whole(d));
    for (int i = 0; i < d; i++) read(matrix + i * d, d, own + i * whole(d));
    return own;
}

template <typename T>
void global_out(const Head<const T>& in, Map<T> out, int d, Tile tile, const float* context, Lepe lepe) {
    const int lanes = whole(d), width = tile.width();
    Scratch scratch;
    const float *own = matrix_rows(scratch, context, d), *kernels = lepe.rows(scratch, d);
    float *q = scratch.rows(width * lanes), *row = scratch.rows(width * lanes);
    Window<T> window(scratch, in.v, d, tile);
    for (int y = tile.top; y < tile.bottom; y++) {
        tile.row(in.q, y).read_to(q, d);
        softmax_rows(q, width, d);
        multiply(width, d, rows_of(q, lanes), own, row, lanes);
        if (kernels) add_convolution<1>(window.at(y), width, lanes, kernels, row);
        tile.row(out, y).write_from(row, d);
    }
}

// Computes dQ and this split's softmax(Q)ᵀ dO.
template <typename T>
void global_query_gradient(const Head<const T>& in, Map<const T> dout, const Head<T>& out, int d, Tokens tokens,
                           const float* context, float* dcontext) {
    const int lanes = whole(d);
    Scratch scratch;
    const float* turned = transpose(scratch, matrix_rows(scratch, context, d), d, lanes);
    float *product = scratch.zeros(d * lanes), *q = scratch.rows(TOKENS * lanes), *dq = scratch.rows(TOKENS * lanes);
    float* up = scratch.rows(TOKENS * lanes);
    for (int start = tokens.begin, count; start < tokens.end; start += count) {
        count = next_tokens(start, tokens.end);
        in.q.tokens(start, count).read_to(q, d);
        dout.tokens(start, count).read_to(up, d);
        softmax_rows(q, count, d);
        multiply(d, count, columns_of(q, lanes), up, product, lanes, true);
        multiply(count, d, rows_of(up, lanes), turned, dq, lanes);
        softmax_gradient_rows(q, dq, count, lanes);
        out.q.tokens(start, count).write_from(dq, d);
    }
    for (int i = 0; i < d; i++) std::copy_n(product + i * lanes, d, dcontext + i * d);
}

// Computes dK, dV and this tile's gradients of LePE's weights.
template <typename T>
void global_key_value_gradient(const Head<const T>& in, Map<const T> dout, const Head<T>& out, int d, Tile tile,
                               const float* context, const float* dcontext, const float* key_lse, Lepe lepe,
                               float* sums) {
    const int lanes = whole(d), width = tile.width();
    Scratch scratch;
    const float *own = matrix_rows(scratch, dcontext, d), *turned = transpose(scratch, own, d, lanes);
    const float* kernels = lepe.rows(scratch, d);
    float *lse = scratch.rows(lanes), *mean = scratch.zeros(lanes), *totals = scratch.zeros((TAPS + 1) * lanes);
    read(key_lse, d, lse);
    for (int i = 0; i < d; i++)
        for (int j = 0; j < d; j++) mean[i] += context[i * d + j] * dcontext[i * d + j];
    float *k = scratch.rows(width * lanes), *v = scratch.rows(width * lanes);
    float *dk = scratch.rows(width * lanes), *dv = scratch.rows(width * lanes);
    Window<T> window(scratch, dout, d, tile);
    for (int y = tile.top; y < tile.bottom; y++) {
        tile.row(in.k, y).read_to(k, d);
        tile.row(in.v, y).read_to(v, d);
        for (int x = 0; x < width * lanes; x += lanes)
            for (int i = 0; i < lanes; i += LANES) store(k + x + i, exponential(load(k + x + i) - load(lse + i)));
        multiply(width, d, rows_of(v, lanes), turned, dk, lanes);
        multiply(width, d, rows_of(k, lanes), own, dv, lanes);
        if (kernels) {
            const Neighbours near = window.at(y);
            add_convolution<-1>(near, width, lanes, kernels, dv);
            add_kernel_gradient(near, width, lanes, v, totals);
        }
        for (int x = 0; x < width * lanes; x += lanes)
            for (int i = 0; i < lanes; i += LANES)
                store(dk + x + i, load(k + x + i) * (load(dk + x + i) - load(mean + i)));
        tile.row(out.k, y).write_from(dk, d);
        tile.row(out.v, y).write_from(dv, d);
    }
    if (kernels) write_sums(totals, d, sums);
}

}  // namespace
