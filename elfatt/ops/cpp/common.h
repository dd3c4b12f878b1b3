// Vectors, rows of floats, small matrix products and maps for the kernels.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>

namespace {

#ifdef __AVX512F__
constexpr int LOG2_LANES = 4;
#else
constexpr int LOG2_LANES = 3;
#endif
constexpr int LANES = 1 << LOG2_LANES;
constexpr int SUMS = 12;    // accumulators of a product that fit in sixteen registers with its operands
constexpr int ROWS = 6;     // maximum rows of a product at a time
constexpr int LINE = 64;    // bytes per cache line
constexpr int AHEAD = 16;   // prefetch distance along a map, in tokens
constexpr int TOKENS = 64;  // tokens per step
constexpr int TAPS = 9;     // weights per channel of LePE; its bias is row TAPS
constexpr float LOWEST = -std::numeric_limits<float>::infinity();

// ---- vectors ----

// Calls with the constants 0, ..., N - 1, so that arrays indexed by them stay in registers.
template <typename Call, int... I>
__attribute__((always_inline)) inline void each(Call call, std::integer_sequence<int, I...>) {
    (call(std::integral_constant<int, I>{}), ...);
}

template <int N, typename Call>
__attribute__((always_inline)) inline void each(Call call) {
    each(call, std::make_integer_sequence<int, N>{});
}

typedef float Vec __attribute__((vector_size(4 * LANES)));
typedef int32_t Int __attribute__((vector_size(4 * LANES)));

// Number of tokens in the next step; steps are of nearly equal size.
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

// Keeps x in a register; GCC would reload it at each use.
inline Vec pinned(Vec x) {
#ifdef __AVX__
    asm("" : "+v"(x));
#endif
    return x;
}

inline void store(float* to, Vec x) { std::memcpy(to, &x, sizeof x); }

// Reduces over all lanes, by halving.
template <typename Operation>
inline float reduce(Vec x, Operation operation) {
    each<LOG2_LANES>([&](auto step) {
        Int other;
        for (int i = 0; i < LANES; i++) other[i] = i ^ (LANES >> 1 >> step);
        x = operation(x, __builtin_shuffle(x, other));
    });
    return x[0];
}

inline float sum(Vec x) {
    return reduce(x, [](Vec a, Vec b) { return a + b; });
}

constexpr float LOG2_E = 1.44269504f;

// 2^x for x <= 0, at least the smallest normal number: the integer part goes to the exponent bits, the rest is a
// polynomial. Relative error below 2e-7.
inline Vec power(Vec x) {
    const Vec round = spread(12582912 + 127);  // 1.5 * 2^23: adding it rounds to an integer
    x = larger(spread(-126), x);
    const Vec shifted = x + round;
    const Vec r = x - (shifted - round);
    Vec p = r * 0.0013264726934f + 0.0096715127017f;
    p = p * r + 0.055507337445f;
    p = p * r + 0.24022242084f;
    p = p * r + 0.6931469776f;
    p = p * r + 1.f;
    return p * (Vec)((Int)shifted << 23);
}

inline Vec exponential(Vec x) { return power(x * LOG2_E); }

// ---- rows of floats ----

// Scratch memory of a task, reused by its thread for the next one.
class Scratch {
public:
    float* rows(size_t size) {
        thread_local std::vector<std::vector<Vec>> memory;  // aligned, so that no vector straddles a cache line
        if (memory.size() == used_) memory.emplace_back();
        std::vector<Vec>& own = memory[used_++];
        if (own.size() * LANES < size) own.resize((size + LANES - 1) / LANES);
        return reinterpret_cast<float*>(own.data());
    }
    float* zeros(size_t size) {
        float* start = rows(size);
        std::fill(start, start + size, 0.f);
        return start;
    }

private:
    size_t used_ = 0;
};

typedef uint16_t Brain;  // bfloat16: the upper half of a float32
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
    const Int rounded = (bits + 0x7fff + odd) >> 16;  // round to even
    const Brains y = __builtin_convertvector(x == x ? rounded : Int{} + 0x7fc0, Brains);
    std::memcpy(to, &y, sizeof y);
}

template <typename T>
inline void read(const T* __restrict from, int d, float* __restrict to) {
    int i = 0;
#pragma GCC unroll 4
    for (; i + LANES <= d; i += LANES) store(to + i, widen(from + i));
    if (i == d) return;
    T last[LANES] = {};
    std::copy(from + i, from + d, last);
    store(to + i, widen(last));
}

template <typename T>
inline void write(const float* __restrict from, int d, T* __restrict to) {
    int i = 0;
#pragma GCC unroll 4
    for (; i + LANES <= d; i += LANES) narrow(load(from + i), to + i);
    if (i == d) return;
    T last[LANES];
    narrow(load(from + i), last);
    std::copy(last, last + d - i, to + i);
}

inline void scale(float* row, int lanes, float factor) {
#pragma GCC unroll 4
    for (int i = 0; i < lanes; i += LANES) store(row + i, load(row + i) * factor);
}

// rows = exp(factor * (rows - row maximum)). Row sums go to `totals`; without it, rows are divided by them. Each row
// counts as having `zeros` additional zeros. Not inlined, so that its constants stay in registers.
__attribute__((noinline)) void exponential_rows(float* rows, int count, int n, float factor, float* totals,
                                                int zeros = 0) {
    const int lanes = whole(n), last = lanes - LANES;
    Int inside;
    for (int i = 0; i < LANES; i++) inside[i] = last + i < n ? -1 : 0;
    factor *= LOG2_E;
    for (int r = 0; r < count; r++, rows += lanes) {
        const Vec end = inside ? load(rows + last) : spread(LOWEST);
        Vec most = end;
#pragma GCC unroll 4
        for (int i = 0; i < last; i += LANES) most = larger(most, load(rows + i));
        const float top = std::max(reduce(most, larger), zeros ? 0 : LOWEST);
        Vec sums{};
#pragma GCC unroll 2
        for (int i = 0; i < last; i += LANES) {
            const Vec x = power((load(rows + i) - top) * factor);
            sums += x;
            store(rows + i, x);
        }
        const Vec x = inside ? power((end - top) * factor) : Vec{};
        store(rows + last, x);
        const float total = sum(sums + x) + (zeros ? zeros * std::exp2(-factor * top) : 0);
        if (totals)
            totals[r] = total;
        else
            scale(rows, lanes, 1 / total);
    }
}

inline void softmax_rows(float* rows, int count, int n, float factor = 1, int zeros = 0) {
    exponential_rows(rows, count, n, factor, nullptr, zeros);
}

// Softmax backward: gradients = weights * (gradients - row sum of weights * gradients).
inline void softmax_gradient_rows(const float* weights, float* gradients, int count, int lanes) {
    for (int row = 0; row < count; row++, weights += lanes, gradients += lanes) {
        Vec total{};
        for (int i = 0; i < lanes; i += LANES) total += load(weights + i) * load(gradients + i);
        const float mean = sum(total);
        for (int i = 0; i < lanes; i += LANES) store(gradients + i, load(weights + i) * (load(gradients + i) - mean));
    }
}

// ---- products ----

// First operand of a product, strided: element (i, j) is data[i * row + j * column].
struct Factor {
    const float* data;
    int row, column;
};

inline Factor rows_of(const float* data, int lanes) { return {data, lanes, 1}; }
inline Factor columns_of(const float* data, int lanes) { return {data, 1, lanes}; }

template <int R, int V>
void multiply_tile(int depth, Factor a, const float* b, float* c, int lanes, bool add) {
    Vec sums[R][V];
    each<R>([&](auto r) {
        each<V>([&](auto v) { sums[r][v] = add ? load(c + r * lanes + v * LANES) : Vec{}; });
    });
    for (int k = 0; k < depth; k++, b += lanes) {
        Vec row[V];
        each<V>([&](auto v) { row[v] = pinned(load(b + v * LANES)); });
        each<R>([&](auto r) {
            const Vec factor = spread(a.data[r * a.row + k * a.column]);
            each<V>([&](auto v) { sums[r][v] += factor * row[v]; });
        });
    }
    each<R>([&](auto r) { each<V>([&](auto v) { store(c + r * lanes + v * LANES, sums[r][v]); }); });
}

template <int V, int... R>
void multiply_rows(int rows, int depth, Factor a, const float* b, float* c, int lanes, bool add,
                   std::integer_sequence<int, R...>) {
    ((rows == R + 1 ? multiply_tile<R + 1, V>(depth, a, b, c, lanes, add) : void()), ...);
}

// One panel of V vectors of columns.
template <int V>
void multiply_panel(int count, int depth, Factor a, const float* b, float* c, int lanes, bool add) {
    constexpr int limit = std::min(SUMS / V, ROWS);
    int groups = (count + limit - 1) / limit;  // nearly equal sizes: a single leftover row would be slow
    for (int rows; count > 0; count -= rows, groups--) {
        rows = (count + groups - 1) / groups;
        multiply_rows<V>(rows, depth, a, b, c, lanes, add, std::make_integer_sequence<int, limit>{});
        a.data += int64_t(rows) * a.row;
        c += rows * lanes;
    }
}

// c[count, lanes] = a[count, depth] b[depth, lanes], or c += a b; lanes is a multiple of LANES.
void multiply(int count, int depth, Factor a, const float* b, float* c, int lanes, bool add = false) {
    for (int j = 0, vectors = lanes / LANES, panel; vectors; vectors -= panel, j += panel * LANES) {
        panel = vectors == 1 ? 1 : vectors % 2 ? 3 : 2;
        const auto product = panel == 1 ? multiply_panel<1> : panel == 2 ? multiply_panel<2> : multiply_panel<3>;
        product(count, depth, a, b + j, c + j, lanes, add);
    }
}

// Transposes LANES vectors in place, by swapping blocks of doubling size.
inline void transpose_square(Vec (&square)[LANES]) {
    each<LOG2_LANES>([&](auto step) {
        constexpr int side = 1 << step;
        Int upper, lower;
        for (int i = 0; i < LANES; i++) {
            upper[i] = i & side ? LANES + i - side : i;
            lower[i] = i & side ? LANES + i : i + side;
        }
        each<LANES / 2>([&](auto pair) {
            constexpr int row = pair / side * 2 * side + pair % side;
            Vec &x = square[row], &y = square[row + side];
            const Vec above = __builtin_shuffle(x, y, upper), below = __builtin_shuffle(x, y, lower);
            x = above, y = below;
        });
    });
}

// Transposes rows[count, lanes] to [lanes, whole(count)], zero-padded.
const float* transpose(Scratch& scratch, const float* rows, int count, int lanes) {
    const int columns = whole(count);
    float* turned = scratch.rows(size_t(lanes) * columns);
    for (int i = 0; i < columns; i += LANES)
        for (int j = 0; j < lanes; j += LANES) {
            Vec square[LANES];
            each<LANES>([&](auto k) { square[k] = i + k < count ? load(rows + (i + k) * lanes + j) : Vec{}; });
            transpose_square(square);
            each<LANES>([&](auto k) { store(turned + (j + k) * columns + i, square[k]); });
        }
    return turned;
}

// ---- maps ----

// Part of an image and its channels; `stride` and `pitch` are the strides in elements along x and y.
template <typename T>
struct Map {
    T* data;
    int height, width, stride, pitch;
    int64_t ahead;  // prefetch distance in elements
    T* at(int y, int x) const { return data + int64_t(y) * pitch + x * stride; }
    Map part(int y, int x, int part_height, int part_width) const {
        return {at(y, x), part_height, part_width, stride, pitch, ahead};
    }
    // A range of tokens of a whole map, in row-major order.
    Map tokens(int start, int count) const { return {data + int64_t(start) * stride, 1, count, stride, 0, ahead}; }
    float* read_to(float* rows, int d) const {
        for (int y = 0; y < height; y++)
            for (int x = 0; x < width; x++) {
                const T* from = at(y, x);
                // prefetching past the last token is harmless
                for (int i = 0; i < d; i += LINE / int(sizeof(T))) __builtin_prefetch(from + ahead + i);
                read(from, d, rows + (y * width + x) * whole(d));
            }
        return rows;
    }
    void write_from(const float* rows, int d) const {
        for (int y = 0; y < height; y++)
            for (int x = 0; x < width; x++) write(rows + (y * width + x) * whole(d), d, at(y, x));
    }
};

// Maps of the packed queries, keys and values, or of their gradients.
template <typename T>
struct Head {
    Map<T> q, k, v;
};

}  // namespace
