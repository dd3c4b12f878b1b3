// Vectors, rows of floats, products of small matrices and maps, for the kernels.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

namespace {

#ifdef __AVX512F__
constexpr int LANES = 16;
#else
constexpr int LANES = 8;
#endif
constexpr int ROWS = 6;     // by two vectors: the tile of a product that sixteen registers hold
constexpr int TOKENS = 64;  // handled at a time
constexpr int TAPS = 9;     // of LePE; its bias is row TAPS of its kernels
constexpr float LOWEST = -std::numeric_limits<float>::infinity();

// ---- vectors ----

typedef float Vec __attribute__((vector_size(4 * LANES)));
typedef int32_t Int __attribute__((vector_size(4 * LANES)));

// How many tokens to take next: nearly the same number each time.
inline int next_tokens(int start, int end) {
    const int times = (end - start + TOKENS - 1) / TOKENS;
    return (end - start + times - 1) / times;
}

inline int whole(int n) { return (n + LANES - 1) / LANES * LANES; }
inline Vec spread(float x) { return x - Vec{}; }
inline Vec larger(Vec x, Vec y) { return x > y ? x : y; }

inline Vec load(const float* from) {
    Vec x;
    std::memcpy(&x, from, sizeof x);
    return x;
}

inline void store(float* to, Vec x) { std::memcpy(to, &x, sizeof x); }

inline float sum(Vec x) {
    float total = 0;
    for (int i = 0; i < LANES; i++) total += x[i];
    return total;
}

constexpr float LOG2_E = 1.44269504f;

// 2^x for x <= 0, where smaller than the least normal number that number: an integer's power from the exponent's bits,
// the rest from a polynomial of a relative error of 2e-8.
inline Vec power(Vec x) {
    const Vec least = spread(-126), round = spread(12582912 + 127);  // 1.5 * 2^23: adding it leaves an integer
    x = x < least ? least : x;
    const Vec shifted = x + round;
    const Vec r = x - (shifted - round);
    Vec p = r * 0.00015345799f + 0.00133999309f;
    p = p * r + 0.00961848907f;
    p = p * r + 0.05550328642f;
    p = p * r + 0.24022646248f;
    p = p * r + 0.69314718246f;
    p = p * r + 1.f;
    return p * (Vec)((Int)shifted << 23);
}

inline Vec exponential(Vec x) { return power(x * LOG2_E); }

// ---- rows of floats ----

// Memory of a task, kept by its thread for the next one.
class Scratch {
public:
    float* rows(size_t size) {
        thread_local std::vector<std::vector<float>> memory;
        if (memory.size() == used_) memory.emplace_back();
        std::vector<float>& own = memory[used_++];
        if (own.size() < size) own.resize(size);
        return own.data();
    }
    float* zeros(size_t size) {
        float* start = rows(size);
        std::fill(start, start + size, 0.f);
        return start;
    }

private:
    size_t used_ = 0;
};

typedef uint16_t Brain;  // bfloat16: the upper half of a float
typedef Brain Brains __attribute__((vector_size(2 * LANES)));

inline Vec widen(const float* from) { return load(from); }
inline Vec widen(const Brain* from) {
    Brains x;
    std::memcpy(&x, from, sizeof x);
    return (Vec)(__builtin_convertvector(x, Int) << 16);
}

inline void narrow(Vec x, float* to) { store(to, x); }
inline void narrow(Vec x, Brain* to) {
    const Int bits = (Int)x, odd = bits >> 16 & 1;
    const Int rounded = (bits + 0x7fff + odd) >> 16;  // to even
    const Brains y = __builtin_convertvector(x == x ? rounded : Int{} + 0x7fc0, Brains);
    std::memcpy(to, &y, sizeof y);
}

template <typename T>
inline void read(const T* __restrict from, int d, float* __restrict to) {
    int i = 0;
    for (; i + LANES <= d; i += LANES) store(to + i, widen(from + i));
    if (i == d) return;
    T last[LANES] = {};
    std::copy(from + i, from + d, last);
    store(to + i, widen(last));
}

template <typename T>
inline void write(const float* __restrict from, int d, T* __restrict to) {
    int i = 0;
    for (; i + LANES <= d; i += LANES) narrow(load(from + i), to + i);
    if (i == d) return;
    T last[LANES];
    narrow(load(from + i), last);
    std::copy(last, last + d - i, to + i);
}

inline void scale(float* row, int lanes, float factor) {
    for (int i = 0; i < lanes; i += LANES) store(row + i, load(row + i) * factor);
}

// row = 2^(row - its largest), and its sum; `zeros` more zeros count as of the row.
inline float power_row(float* row, int n, int zeros = 0) {
    const int lanes = whole(n);
    for (int i = n; i < lanes; i++) row[i] = LOWEST;
    Vec most = load(row);
    for (int i = LANES; i < lanes; i += LANES) most = larger(most, load(row + i));
    float top = zeros ? 0 : LOWEST;
    for (int i = 0; i < LANES; i++) top = std::max(top, most[i]);
    Vec total{};
    for (int i = 0; i < lanes; i += LANES) {
        const Vec x = power(load(row + i) - top);
        total += x;
        store(row + i, x);
    }
    for (int i = n; i < lanes; i++) row[i] = 0;
    return sum(total) + (zeros ? zeros * std::exp2(-top) : 0);
}

// Softmax of rows that were multiplied by LOG2_E.
inline void softmax_rows(float* rows, int count, int n, int zeros = 0) {
    const int lanes = whole(n);
    for (int i = 0; i < count; i++) {
        const float total = power_row(rows + i * lanes, n, zeros);
        scale(rows + i * lanes, lanes, 1 / total);
    }
}

// Backward through softmax: gradients = weights * (gradients - the row's sum of weights * gradients).
inline void softmax_gradient_rows(const float* weights, float* gradients, int count, int lanes) {
    for (int row = 0; row < count; row++, weights += lanes, gradients += lanes) {
        Vec total{};
        for (int i = 0; i < lanes; i += LANES) total += load(weights + i) * load(gradients + i);
        const float mean = sum(total);
        for (int i = 0; i < lanes; i += LANES) store(gradients + i, load(weights + i) * (load(gradients + i) - mean));
    }
}

// ---- products ----

// A rows by columns; element (i, j) of the first factor lies at data[i * row + j * column].
struct Factor {
    const float* data;
    int row, column;
};

inline Factor rows_of(const float* data, int lanes) { return {data, lanes, 1}; }
inline Factor columns_of(const float* data, int lanes) { return {data, 1, lanes}; }

template <int R, int V>
inline void multiply_tile(int depth, Factor a, const float* b, float* c, int lanes, bool add) {
    Vec sums[R][V];
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) sums[r][v] = add ? load(c + r * lanes + v * LANES) : Vec{};
    for (int k = 0; k < depth; k++, b += lanes) {
        Vec row[V];
        for (int v = 0; v < V; v++) row[v] = load(b + v * LANES);
        for (int r = 0; r < R; r++) {
            const Vec factor = spread(a.data[r * a.row + k * a.column]);
            for (int v = 0; v < V; v++) sums[r][v] += factor * row[v];
        }
    }
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) store(c + r * lanes + v * LANES, sums[r][v]);
}

template <int V>
inline void multiply_rows(int count, int depth, Factor a, const float* b, float* c, int lanes, bool add) {
    switch (count) {
        case 1:
            return multiply_tile<1, V>(depth, a, b, c, lanes, add);
        case 2:
            return multiply_tile<2, V>(depth, a, b, c, lanes, add);
        case 3:
            return multiply_tile<3, V>(depth, a, b, c, lanes, add);
        case 4:
            return multiply_tile<4, V>(depth, a, b, c, lanes, add);
        case 5:
            return multiply_tile<5, V>(depth, a, b, c, lanes, add);
        default:
            return multiply_tile<ROWS, V>(depth, a, b, c, lanes, add);
    }
}

// c[count, lanes] = a[count, depth] b[depth, lanes], or c + a b; lanes a whole number of vectors.
void multiply(int count, int depth, Factor a, const float* b, float* c, int lanes, bool add = false) {
    for (int j = 0; j < lanes; j += 2 * LANES) {
        int groups = (count + ROWS - 1) / ROWS;  // of nearly equal size: a single row left over would be slow
        for (int i = 0, rows; i < count; i += rows, groups--) {
            rows = (count - i + groups - 1) / groups;
            const Factor from{a.data + int64_t(i) * a.row, a.row, a.column};
            if (lanes - j > LANES)
                multiply_rows<2>(rows, depth, from, b + j, c + i * lanes + j, lanes, add);
            else
                multiply_rows<1>(rows, depth, from, b + j, c + i * lanes + j, lanes, add);
        }
    }
}

// Columns of rows[count, ...] as rows of whole vectors.
const float* transpose(Scratch& scratch, const float* rows, int count, int d, int lanes) {
    const int columns = whole(count);
    float* turned = scratch.rows(size_t(d) * columns);
    for (int i = 0; i < columns; i += LANES)
        for (int j = 0; j < d; j++) {
            Vec column{};
            if (i + LANES <= count)  // known to be whole, it is gathered in registers
                for (int lane = 0; lane < LANES; lane++) column[lane] = rows[(i + lane) * lanes + j];
            else
                for (int lane = 0; lane < count - i; lane++) column[lane] = rows[(i + lane) * lanes + j];
            store(turned + j * columns + i, column);
        }
    return turned;
}

// ---- maps ----

// Part of an image and of its channels; neighbours along a row lie `stride` elements apart, along a column `pitch`.
template <typename T>
struct Map {
    T* data;
    int height, width, stride, pitch;
    T* at(int y, int x) const { return data + int64_t(y) * pitch + x * stride; }
    Map part(int y, int x, int part_height, int part_width) const {
        return {at(y, x), part_height, part_width, stride, pitch};
    }
    // Of a whole map, read row by row.
    Map tokens(int start, int count) const { return {data + int64_t(start) * stride, 1, count, stride, 0}; }
    float* read_to(float* rows, int d) const {
        for (int y = 0; y < height; y++)
            for (int x = 0; x < width; x++) read(at(y, x), d, rows + (y * width + x) * whole(d));
        return rows;
    }
    void write_from(const float* rows, int d) const {
        for (int y = 0; y < height; y++)
            for (int x = 0; x < width; x++) write(rows + (y * width + x) * whole(d), d, at(y, x));
    }
};

// The maps of the packed queries, keys and values, or of their gradients.
template <typename T>
struct Head {
    Map<T> q, k, v;
};

}  // namespace
