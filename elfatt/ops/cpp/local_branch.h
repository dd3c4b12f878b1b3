// softmax(Q K^T / sqrt(d)) V + LePE inside a block.
#pragma once

#include "lepe.h"

namespace {

// The part of a block inside the map. The block's `zeros` tokens beyond it are keys of zero score and value.
struct Block {
    int y, x, height, width, zeros;
    Block(int map_height, int map_width, int bh, int bw, int index)
        : y(index / columns(map_width, bw) * bh),
          x(index % columns(map_width, bw) * bw),
          height(std::min(bh, map_height - y)),
          width(std::min(bw, map_width - x)),
          zeros(bh * bw - height * width) {}
    static int columns(int map_width, int bw) { return (map_width + bw - 1) / bw; }
    template <typename T>
    Map<T> of(Map<T> map) const {
        return map.part(y, x, height, width);
    }
};

template <typename T>
void local_out(const Head<const T>& in, Map<T> out, int d, int zeros, Lepe lepe) {
    const int lanes = whole(d), width = out.width, n = out.height * width, columns = whole(n);
    Scratch scratch;
    const float* kernels = lepe.rows(scratch, d);
    float *q = in.q.read_to(scratch.rows(n * lanes), d), *v = in.v.read_to(scratch.rows(n * lanes), d);
    const float* keys = transpose(scratch, in.k.read_to(scratch.rows(n * lanes), d), n, lanes);
    float *scores = scratch.rows(TOKENS * columns), *rows = scratch.rows(n * lanes), totals[TOKENS];
    for (int start = 0, count; start < n; start += count) {
        count = next_tokens(start, n);
        multiply(count, d, rows_of(q + start * lanes, lanes), keys, scores, columns);
        exponential_rows(scores, count, n, 1 / std::sqrt(float(d)), totals, zeros);
        multiply(count, n, rows_of(scores, columns), v, rows + start * lanes, lanes);
        for (int i = 0; i < count; i++) scale(rows + (start + i) * lanes, lanes, 1 / totals[i]);
    }
    if (kernels) {
        Window<T> window(scratch, in.v, d, {0, out.height, 0, width});
        for (int y = 0; y < out.height; y++)
            add_convolution<1>(window.at(y), width, lanes, kernels, rows + y * width * lanes);
    }
    out.write_from(rows, d);
}

// Computes dQ, dK, dV and this block's gradients of LePE's weights.
template <typename T>
void local_gradient(const Head<const T>& in, Map<const T> dout, const Head<T>& out, int d, int zeros, Lepe lepe,
                    float* sums) {
    const int lanes = whole(d), width = dout.width, n = dout.height * width, columns = whole(n);
    Scratch scratch;
    const float* kernels = lepe.rows(scratch, d);
    float *q = in.q.read_to(scratch.rows(n * lanes), d), *k = in.k.read_to(scratch.rows(n * lanes), d);
    float *v = in.v.read_to(scratch.rows(n * lanes), d), *up = dout.read_to(scratch.rows(n * lanes), d);
    const float *keys = transpose(scratch, k, n, lanes), *values = transpose(scratch, v, n, lanes);
    float *dq = scratch.rows(n * lanes), *dk = scratch.zeros(n * lanes), *dv = scratch.zeros(n * lanes);
    float *weights = scratch.rows(TOKENS * columns), *gradients = scratch.rows(TOKENS * columns);
    const float factor = 1 / std::sqrt(float(d));
    for (int start = 0, count; start < n; start += count) {
        count = next_tokens(start, n);
        const float *own = q + start * lanes, *upstream = up + start * lanes;
        multiply(count, d, rows_of(own, lanes), keys, weights, columns);
        softmax_rows(weights, count, n, factor, zeros);
        multiply(count, d, rows_of(upstream, lanes), values, gradients, columns);
        multiply(n, count, columns_of(weights, columns), upstream, dv, lanes, true);
        softmax_gradient_rows(weights, gradients, count, columns);
        multiply(n, count, columns_of(gradients, columns), own, dk, lanes, true);
        multiply(count, n, rows_of(gradients, columns), k, dq + start * lanes, lanes);
    }
    scale(dq, n * lanes, factor);
    scale(dk, n * lanes, factor);
    if (kernels) {
        float* totals = scratch.zeros((TAPS + 1) * lanes);
        Window<T> window(scratch, dout, d, {0, dout.height, 0, width});
        for (int y = 0; y < dout.height; y++) {
            const Neighbours near = window.at(y);
            add_convolution<-1>(near, width, lanes, kernels, dv + y * width * lanes);
            add_kernel_gradient(near, width, lanes, v + y * width * lanes, totals);
        }
        write_sums(totals, d, sums);
    }
    out.q.write_from(dq, d);
    out.k.write_from(dk, d);
    out.v.write_from(dv, d);
}

}  // namespace
