// LePE: a 3x3 depthwise convolution, its transpose and its weight gradients.
#pragma once

#include "common.h"

namespace {

// LePE's weights and bias for one head, as rows of whole vectors; null without LePE.
struct Lepe {
    const float* data;  // [10, stride]
    int stride;
    const float* rows(Scratch& scratch, int d) const {
        if (!data) return nullptr;
        float* own = scratch.rows((TAPS + 1) * whole(d));
        for (int tap = 0; tap <= TAPS; tap++) read(data + tap * stride, d, own + tap * whole(d));
        return own;
    }
};

// The part of a map that a task processes, row by row.
struct Tile {
    int top, bottom, left, right;
    int width() const { return right - left; }
    template <typename T>
    Map<T> row(Map<T> map, int y) const {
        return map.part(y, left, 1, width());
    }
};

// Three rows of tokens in floats, as pointers to their first tokens; each row has a neighbour before and after it.
// Passed by value, so that no store can alias it.
struct Neighbours {
    const float* rows[3];
};

// Sliding window over a tile's rows and their neighbours, each row read once; zero outside the map.
template <typename T>
class Window {
public:
    Window(Scratch& scratch, Map<const T> map, int d, Tile tile) : map_(map), tile_(tile), d_(d), lanes_(whole(d)) {
        for (auto& row : ring_) row = scratch.zeros(row_size());
        zeros_ = scratch.zeros(row_size());
        read_row(tile.top - 1);
        read_row(tile.top);
    }
    Neighbours at(int y) {
        read_row(y + 1);
        return {{start(y - 1), start(y), start(y + 1)}};
    }

private:
    size_t row_size() const { return size_t(tile_.width() + 2) * lanes_; }
    bool holds(int y) const { return y >= 0 && y < map_.height; }
    const float* start(int y) const { return (holds(y) ? ring_[y % 3] : zeros_) + lanes_; }
    void read_row(int y) {
        if (!holds(y)) return;
        const int left = std::max(tile_.left - 1, 0), right = std::min(tile_.right + 1, map_.width);
        map_.part(y, left, 1, right - left).read_to(ring_[y % 3] + (left - tile_.left + 1) * lanes_, d_);
    }

    Map<const T> map_;
    Tile tile_;
    int d_, lanes_;
    float *ring_[3], *zeros_;
};

// out += L(v), or its transpose, for one row of tokens.
template <int DIRECTION>
void add_convolution(Neighbours near, int width, int lanes, const float* kernels, float* out) {
    for (int i = 0; i < lanes; i += LANES) {
        Vec kernel[TAPS];
        each<TAPS>([&](auto tap) { kernel[tap] = load(kernels + tap * lanes + i); });
        const Vec bias = DIRECTION > 0 ? load(kernels + TAPS * lanes + i) : Vec{};
        for (int x = 0; x < width; x++) {
            Vec total = load(out + x * lanes + i) + bias;
            each<TAPS>([&](auto tap) {
                const float* row = near.rows[1 + DIRECTION * (tap / 3 - 1)];
                total += kernel[tap] * load(row + (x + DIRECTION * (tap % 3 - 1)) * lanes + i);
            });
            store(out + x * lanes + i, total);
        }
    }
}

// Adds weight and bias gradients from one row of v and three of the output's gradient.
void add_kernel_gradient(Neighbours gradient, int width, int lanes, const float* v, float* sums) {
    for (int i = 0; i < lanes; i += LANES) {
        Vec totals[TAPS + 1];
        for (int tap = 0; tap <= TAPS; tap++) totals[tap] = load(sums + tap * lanes + i);
        for (int x = 0; x < width; x++) {
            const Vec value = load(v + x * lanes + i);
            for (int tap = 0; tap < TAPS; tap++)
                totals[tap] += value * load(gradient.rows[2 - tap / 3] + (x + 1 - tap % 3) * lanes + i);
            totals[TAPS] += load(gradient.rows[1] + x * lanes + i);
        }
        for (int tap = 0; tap <= TAPS; tap++) store(sums + tap * lanes + i, totals[tap]);
    }
}

void write_sums(const float* totals, int d, float* sums) {
    for (int tap = 0; tap <= TAPS; tap++) std::copy_n(totals + tap * whole(d), d, sums + tap * d);
}

template <typename T>
void convolve(Map<const T> v, Map<const T> residual, Map<T> out, int d, Tile tile, Lepe lepe, bool transposed) {
    const int lanes = whole(d), width = tile.width();
    Scratch scratch;
    const float* kernels = lepe.rows(scratch, d);
    float* row = scratch.rows(width * lanes);
    Window<T> window(scratch, v, d, tile);
    for (int y = tile.top; y < tile.bottom; y++) {
        if (residual.data)
            tile.row(residual, y).read_to(row, d);
        else
            std::fill_n(row, width * lanes, 0.f);
        if (transposed)
            add_convolution<-1>(window.at(y), width, lanes, kernels, row);
        else
            add_convolution<1>(window.at(y), width, lanes, kernels, row);
        tile.row(out, y).write_from(row, d);
    }
}

template <typename T>
void kernel_gradient(Map<const T> v, Map<const T> dout, int d, Tile tile, float* sums) {
    const int lanes = whole(d), width = tile.width();
    Scratch scratch;
    float *totals = scratch.zeros((TAPS + 1) * lanes), *row = scratch.rows(width * lanes);
    Window<T> window(scratch, dout, d, tile);
    for (int y = tile.top; y < tile.bottom; y++) {
        tile.row(v, y).read_to(row, d);
        add_kernel_gradient(window.at(y), width, lanes, row, totals);
    }
    write_sums(totals, d, sums);
}

}  // namespace
