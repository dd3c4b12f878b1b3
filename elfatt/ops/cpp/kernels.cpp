// ELFATT on CPUs, forward and backward: C++17 with GCC's vector extensions and OpenMP.
//
// A task is one block, tile of the map or split of the tokens, for one head of one image. It reads its tokens into rows
// of floats, zero-padded to whole vectors, works in cache and writes its slice of the result. Sums over tasks have a
// separate buffer per task, so that results are bitwise the same on any number of threads. This file runs the tasks on
// all threads for elfatt/ops/cpp/launch.py.
#include <memory>
#include <new>

#include "global_branch.h"
#include "local_branch.h"

namespace {

constexpr int TURN = 8;                     // maximum tasks that a thread takes at a time
constexpr int TURNS = 8;                    // minimum turns per thread: some threads are slower
constexpr int TASKS = 64;                   // enough for the threads of a large CPU to share
constexpr int GROUPS[] = {32, 48, 24, 16};  // channels per task of standalone LePE

// Sizes of the map, the tasks and both branches; mirrors _Shape in elfatt/ops/cpp/launch.py.
struct Shape {
    int images, height, width, channels, threads, split, tile_height, tile_width;
    int heads_global, heads_local, global_channels, block_height, block_width;
    int local_channels() const { return channels - global_channels; }
};

// Calls `work` on every thread.
template <typename Work>
void parallel(int threads, const Work& work) {
    if (threads == 1) return work();
#pragma omp parallel num_threads(threads)
    work();
}

// Distributes the tasks over threads, several at a time if there are enough for all; threads that finish do not wait
// for the others.
template <typename Work>
void share(int64_t tasks, int threads, const Work& work) {
    if (threads == 1) {
        for (int64_t i = 0; i < tasks; i++) work(i);
        return;
    }
    const int64_t turn = std::clamp<int64_t>(tasks / threads / TURNS, 1, TURN);
#pragma omp for schedule(dynamic, turn) nowait
    for (int64_t i = 0; i < tasks; i++) work(i);
}

// Waits until all shared tasks are done.
inline void wait(int threads) {
    if (threads == 1) return;
#pragma omp barrier
}

typedef std::unique_ptr<float[]> Floats;

inline Floats floats(int64_t size) { return Floats(size ? new float[size] : nullptr); }

// LePE's nine weights and bias as rows over channels; null without LePE.
Floats lepe_rows(const float* weight, const float* bias, int channels) {
    if (!weight) return nullptr;
    Floats rows = floats(int64_t(TAPS + 1) * channels);
    for (int tap = 0; tap < TAPS; tap++)
        for (int i = 0; i < channels; i++) rows[tap * channels + i] = weight[i * TAPS + tap];
    float* last = rows.get() + TAPS * channels;
    if (bias)
        std::copy_n(bias, channels, last);
    else
        std::fill_n(last, channels, 0.f);
    return rows;
}

// One head of one part (a block, tile or split) of one image. Heads vary fastest, as they are adjacent in memory.
struct Task {
    int image, part, head;
    int64_t index;
};

// A branch of attention, or LePE alone.
struct Branch {
    int images, height, width, channels, threads, split;  // of the map
    int heads, d, first;                                   // of the branch: heads, channels per head, first channel
    int part_height, part_width;                           // of a block or a tile

    Branch(Shape s, int heads, int width, int first, int part_height, int part_width)
        : images(s.images), height(s.height), width(s.width), channels(s.channels), threads(s.threads), split(s.split),
          heads(heads), d(width ? width / heads : 0), first(first), part_height(part_height), part_width(part_width) {}
    static Branch over_map(Shape s) {
        return {s, s.heads_global, s.global_channels, 0, s.tile_height, s.tile_width};
    }
    static Branch in_blocks(Shape s) {
        return {s, s.heads_local, s.local_channels(), s.global_channels, s.block_height, s.block_width};
    }
    static Branch in_groups(Shape s) {
        const auto fits = [&](int group) { return s.channels % group == 0; };
        const int* group = std::find_if(std::begin(GROUPS), std::end(GROUPS), fits);
        const int heads = group == std::end(GROUPS) ? 1 : s.channels / *group;
        return {s, heads, s.channels, 0, s.tile_height, s.tile_width};
    }
    int parts() const { return (height + part_height - 1) / part_height * Block::columns(width, part_width); }
    int splits() const { return std::max(1, std::min(height * width / split, TASKS / std::max(1, images * heads))); }
    Block block(Task t) const { return {height, width, part_height, part_width, t.part}; }
    Tile tile(Task t) const {
        const Block part = block(t);
        return {part.y, part.y + part.height, part.x, part.x + part.width};
    }
    int64_t pair(Task t) const { return int64_t(t.image) * heads + t.head; }
    template <typename T>
    Map<T> map(T* data, int stride, Task t) const {
        if (data) data += int64_t(t.image) * height * width * stride + first + t.head * d;
        return {data, height, width, stride, width * stride, AHEAD * stride};
    }
    // A task's block; prefetches the next task's, which the same thread usually takes.
    template <typename T>
    Map<T> block_map(T* data, int stride, Task t) const {
        const Task next = task(t.index + 1, parts());
        Map<T> own = block(t).of(map(data, stride, t));
        own.ahead = block(next).of(map(data, stride, next)).data - own.data;
        return own;
    }
    template <typename T>
    Head<T> head(T* qkv, Task t) const {
        return {map(qkv, 3 * channels, t), map(qkv + channels, 3 * channels, t),
                map(qkv + 2 * channels, 3 * channels, t)};
    }
    template <typename T>
    Head<T> block_head(T* qkv, Task t) const {
        return {block_map(qkv, 3 * channels, t), block_map(qkv + channels, 3 * channels, t),
                block_map(qkv + 2 * channels, 3 * channels, t)};
    }
    Lepe kernels(const Floats& lepe, Task t) const { return {lepe ? lepe.get() + t.head * d : nullptr, heads * d}; }
    float* sums(const Floats& all, Task t) const { return all.get() + t.index * (TAPS + 1) * d; }
    Floats room_for_sums(bool needed) const {
        return floats(needed ? int64_t(images) * parts() * heads * (TAPS + 1) * d : 0);
    }
    Task task(int64_t index, int parts) const {
        return {int(index / heads / parts), int(index / heads % parts), int(index % heads), index};
    }
    template <typename Work>
    void run(int parts, const Work& work) const {
        share(int64_t(images) * parts * heads, threads, [&](int64_t i) { work(task(i, parts)); });
    }
    // Sums every task's [TAPS + 1, d] into [TAPS + 1, heads * d], in a fixed order.
    void add_sums(const Floats& tasks, float* sums) const {
        const int64_t rows = int64_t(TAPS + 1) * heads, count = int64_t(images) * parts();
        share(rows, threads, [&](int64_t row) {
            const int64_t tap = row / heads, head = row % heads;
            const float* from = tasks.get() + (head * (TAPS + 1) + tap) * d;
            std::vector<double> totals(d);
            for (int64_t i = 0; i < count; i++, from += rows * d)
                for (int j = 0; j < d; j++) totals[j] += from[j];
            std::copy(totals.begin(), totals.end(), sums + row * d);
        });
    }
};

template <typename T>
void forward(Shape shape, const T* qkv, const float* weight_global, const float* bias_global,
             const float* weight_local, const float* bias_local, T* out, float* context, float* key_lse) {
    const Branch g = Branch::over_map(shape), l = Branch::in_blocks(shape);
    const int64_t square = g.d * g.d;
    const int splits = g.splits();
    const Floats lepe_global = lepe_rows(weight_global, bias_global, shape.global_channels);
    const Floats lepe_local = lepe_rows(weight_local, bias_local, shape.local_channels());
    const Floats parts = floats(g.d ? g.images * splits * g.heads * Part::size(g.d) : 0);
    parallel(shape.threads, [&] {
        if (g.d)
            g.run(splits, [&](Task t) {
                context_part<T>(g.head(qkv, t), g.d, Tokens(g.height * g.width, splits, t.part),
                                Part(parts.get(), g.d, t.index));
            });
        if (l.d)
            l.run(l.parts(), [&](Task t) {
                local_out<T>(l.block_head(qkv, t), l.block_map(out, l.channels, t), l.d, l.block(t).zeros,
                             l.kernels(lepe_local, t));
            });
        if (!g.d) return;
        wait(shape.threads);
        g.run(1, [&](Task t) {
            combine_parts(Part(parts.get(), g.d, int64_t(t.image) * splits * g.heads + t.head), g.d, splits, g.heads,
                          context + g.pair(t) * square, key_lse + g.pair(t) * g.d);
        });
        wait(shape.threads);
        g.run(g.parts(), [&](Task t) {
            global_out<T>(g.head(qkv, t), g.map(out, g.channels, t), g.d, g.tile(t), context + g.pair(t) * square,
                          g.kernels(lepe_global, t));
        });
    });
}

template <typename T>
void backward(Shape shape, const T* qkv, const T* dout, const float* weight_global,
              const float* weight_local, const float* context, const float* key_lse, T* dqkv, float* sums_global,
              float* sums_local) {
    const Branch g = Branch::over_map(shape), l = Branch::in_blocks(shape);
    const int64_t square = g.d * g.d;
    const int splits = g.splits();
    const Floats lepe_global = lepe_rows(weight_global, nullptr, shape.global_channels);
    const Floats lepe_local = lepe_rows(weight_local, nullptr, shape.local_channels());
    const Floats tasks_global = g.room_for_sums(weight_global), tasks_local = l.room_for_sums(weight_local);
    const Floats parts = floats(g.images * splits * g.heads * square), dcontext = floats(g.images * g.heads * square);
    parallel(shape.threads, [&] {
        if (g.d)
            g.run(splits, [&](Task t) {
                global_query_gradient<T>(g.head(qkv, t), g.map(dout, g.channels, t), g.head(dqkv, t), g.d,
                                         Tokens(g.height * g.width, splits, t.part), context + g.pair(t) * square,
                                         parts.get() + t.index * square);
            });
        if (l.d)
            l.run(l.parts(), [&](Task t) {
                local_gradient<T>(l.block_head(qkv, t), l.block_map(dout, l.channels, t), l.block_head(dqkv, t), l.d,
                                  l.block(t).zeros, l.kernels(lepe_local, t), l.sums(tasks_local, t));
            });
        wait(shape.threads);
        if (weight_local) l.add_sums(tasks_local, sums_local);
        if (!g.d) return;
        g.run(1, [&](Task t) {
            float* total = dcontext.get() + g.pair(t) * square;
            std::fill_n(total, square, 0.f);
            for (int split = 0; split < splits; split++) {
                const float* part = parts.get() + ((int64_t(t.image) * splits + split) * g.heads + t.head) * square;
                for (int i = 0; i < square; i++) total[i] += part[i];
            }
        });
        wait(shape.threads);
        g.run(g.parts(), [&](Task t) {
            global_key_value_gradient<T>(g.head(qkv, t), g.map(dout, g.channels, t), g.head(dqkv, t), g.d, g.tile(t),
                                         context + g.pair(t) * square, dcontext.get() + g.pair(t) * square,
                                         key_lse + g.pair(t) * g.d, g.kernels(lepe_global, t),
                                         g.sums(tasks_global, t));
        });
        if (!weight_global) return;
        wait(shape.threads);
        g.add_sums(tasks_global, sums_global);
    });
}

template <typename T>
void lepe_forward(Shape shape, const T* v, int stride, const float* weight, const float* bias,
                  const T* residual, T* out, int transposed) {
    const Branch b = Branch::in_groups(shape);
    const Floats lepe = lepe_rows(weight, bias, shape.channels);
    parallel(shape.threads, [&] {
        b.run(b.parts(), [&](Task t) {
            convolve<T>(b.map(v, stride, t), b.map(residual, b.channels, t), b.map(out, b.channels, t), b.d, b.tile(t),
                        b.kernels(lepe, t), transposed);
        });
    });
}

template <typename T>
void lepe_backward(Shape shape, const T* v, int stride, const T* dout, float* sums) {
    const Branch b = Branch::in_groups(shape);
    const Floats tasks = b.room_for_sums(true);
    parallel(shape.threads, [&] {
        b.run(b.parts(), [&](Task t) {
            kernel_gradient<T>(b.map(v, stride, t), b.map(dout, b.channels, t), b.d, b.tile(t), b.sums(tasks, t));
        });
        wait(shape.threads);
        b.add_sums(tasks, sums);
    });
}

// Returns 0 if an allocation before the threads start fails, since no exception may leave the library.
template <typename Work>
int done(const Work& work) {
    try {
        work();
    } catch (const std::bad_alloc&) {
        return 0;
    }
    return 1;
}

}  // namespace

#define EXPORT(DTYPE, T)                                                                                              \
    int forward_##DTYPE(Shape s, const T* qkv, const float* weight_global, const float* bias_global,                  \
                        const float* weight_local, const float* bias_local, T* out, float* context,                   \
                        float* key_lse) {                                                                             \
        return done([&] {                                                                                             \
            forward(s, qkv, weight_global, bias_global, weight_local, bias_local, out, context, key_lse);             \
        });                                                                                                           \
    }                                                                                                                 \
    int backward_##DTYPE(Shape s, const T* qkv, const T* dout, const float* weight_global,                            \
                         const float* weight_local, const float* context, const float* key_lse, T* dqkv,              \
                         float* sums_global, float* sums_local) {                                                     \
        return done([&] {                                                                                             \
            backward(s, qkv, dout, weight_global, weight_local, context, key_lse, dqkv, sums_global, sums_local);     \
        });                                                                                                           \
    }                                                                                                                 \
    int lepe_forward_##DTYPE(Shape s, const T* v, int stride, const float* weight, const float* bias,                 \
                             const T* residual, T* out, int transposed) {                                             \
        return done([&] { lepe_forward(s, v, stride, weight, bias, residual, out, transposed); });                    \
    }                                                                                                                 \
    int lepe_backward_##DTYPE(Shape s, const T* v, int stride, const T* dout, float* sums) {                          \
        return done([&] { lepe_backward(s, v, stride, dout, sums); });                                                \
    }

extern "C" {
EXPORT(float32, float)
EXPORT(bfloat16, Brain)
}
