// The ELFATT operation on a CPU, forward and backward: C++17 with GCC's vector extensions and OpenMP.
//
// A task is one head of one image: a block, a tile of the map or a split of its tokens. It reads its tokens into
// rows of floats, padded with zeros to whole vectors, works in the cache and writes its slice of the result. What is
// summed over tasks goes to a place of its own for each task, so that the same input gives the same bits on any number
// of threads. This file walks over the tasks, on all threads, for elfatt/ops/cpp/launch.py.
#include "global_branch.h"
#include "local_branch.h"

namespace {

constexpr int TURN = 8;   // tasks that a thread takes at a time, at most
constexpr int TURNS = 8;  // of each thread, at least: some are slower than others

// One head of one part (a block, a tile, a split) of one image. Heads come first: they lie side by side in memory.
struct Task {
    int image, part, head;
    int64_t index;
};

struct Sizes {
    int images, height, width, channels, heads, d, first;  // the branch's first channel
    int part_height, part_width, threads;                   // of a block or a tile; of the CPU
    int parts() const { return (height + part_height - 1) / part_height * Block::columns(width, part_width); }
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
    // Of a task's block; memory is asked for the next task's, which the same thread takes most often.
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
    Lepe kernels(const float* lepe, Task t) const { return {lepe ? lepe + t.head * d : nullptr, heads * d}; }
    float* sums(float* all, Task t) const { return all + t.index * (TAPS + 1) * d; }
    Task task(int64_t index, int parts) const {
        return {int(index / heads / parts), int(index / heads % parts), int(index % heads), index};
    }
    // Threads take several tasks in turn where there are enough for all.
    template <typename Work>
    void run(int parts, const Work& work) const {
        const int64_t tasks = int64_t(images) * parts * heads;
        const int64_t turn = std::clamp<int64_t>(tasks / threads / TURNS, 1, TURN);
#pragma omp parallel for schedule(dynamic, turn) num_threads(threads)
        for (int64_t i = 0; i < tasks; i++) work(task(i, parts));
    }
};

template <typename T>
void global_forward(Sizes s, const T* qkv, const float* lepe, T* out, float* context, float* key_lse, float* parts,
                    int splits) {
    const int64_t square = s.d * s.d;
    s.run(splits, [&](Task t) {
        context_part<T>(s.head(qkv, t), s.d, Tokens(s.height * s.width, splits, t.part), Part(parts, s.d, t.index));
    });
    s.run(1, [&](Task t) {
        combine_parts(Part(parts, s.d, int64_t(t.image) * splits * s.heads + t.head), s.d, splits, s.heads,
                      context + s.pair(t) * square, key_lse + s.pair(t) * s.d);
    });
    s.run(s.parts(), [&](Task t) {
        global_out<T>(s.head(qkv, t), s.map(out, s.channels, t), s.d, s.tile(t), context + s.pair(t) * square,
                      s.kernels(lepe, t));
    });
}

template <typename T>
void global_backward(Sizes s, const T* qkv, const T* dout, const float* lepe, const float* context,
                     const float* key_lse, T* dqkv, float* parts, float* dcontext, float* sums, int splits) {
    const int64_t square = s.d * s.d;
    s.run(splits, [&](Task t) {
        global_query_gradient<T>(s.head(qkv, t), s.map(dout, s.channels, t), s.head(dqkv, t), s.d,
                                 Tokens(s.height * s.width, splits, t.part), context + s.pair(t) * square,
                                 parts + t.index * square);
    });
    s.run(1, [&](Task t) {
        float* total = dcontext + s.pair(t) * square;
        std::fill_n(total, square, 0.f);
        for (int split = 0; split < splits; split++) {
            const float* part = parts + ((int64_t(t.image) * splits + split) * s.heads + t.head) * square;
            for (int i = 0; i < square; i++) total[i] += part[i];
        }
    });
    s.run(s.parts(), [&](Task t) {
        global_key_value_gradient<T>(s.head(qkv, t), s.map(dout, s.channels, t), s.head(dqkv, t), s.d, s.tile(t),
                                     context + s.pair(t) * square, dcontext + s.pair(t) * square,
                                     key_lse + s.pair(t) * s.d, s.kernels(lepe, t), s.sums(sums, t));
    });
}

template <typename T>
void local_forward(Sizes s, const T* qkv, const float* lepe, T* out) {
    s.run(s.parts(), [&](Task t) {
        local_out<T>(s.block_head(qkv, t), s.block_map(out, s.channels, t), s.d, s.block(t).zeros, s.kernels(lepe, t));
    });
}

template <typename T>
void local_backward(Sizes s, const T* qkv, const T* dout, const float* lepe, T* dqkv, float* sums) {
    s.run(s.parts(), [&](Task t) {
        local_gradient<T>(s.block_head(qkv, t), s.block_map(dout, s.channels, t), s.block_head(dqkv, t), s.d,
                          s.block(t).zeros, s.kernels(lepe, t), s.sums(sums, t));
    });
}

template <typename T>
void lepe_forward(Sizes s, const T* v, int stride, const float* lepe, const T* residual, T* out, int transposed) {
    s.run(s.parts(), [&](Task t) {
        convolve<T>(s.map(v, stride, t), s.map(residual, s.channels, t), s.map(out, s.channels, t), s.d, s.tile(t),
                    s.kernels(lepe, t), transposed);
    });
}

template <typename T>
void lepe_backward(Sizes s, const T* v, int stride, const T* dout, float* sums) {
    s.run(s.parts(), [&](Task t) {
        kernel_gradient<T>(s.map(v, stride, t), s.map(dout, s.channels, t), s.d, s.tile(t), s.sums(sums, t));
    });
}

}  // namespace

#define EXPORT(DTYPE, T)                                                                                              \
    void global_forward_##DTYPE(Sizes s, const T* qkv, const float* lepe, T* out, float* context, float* key_lse,     \
                                float* parts, int splits) {                                                           \
        global_forward(s, qkv, lepe, out, context, key_lse, parts, splits);                                           \
    }                                                                                                                 \
    void global_backward_##DTYPE(Sizes s, const T* qkv, const T* dout, const float* lepe, const float* context,       \
                                 const float* key_lse, T* dqkv, float* parts, float* dcontext, float* sums,           \
                                 int splits) {                                                                        \
        global_backward(s, qkv, dout, lepe, context, key_lse, dqkv, parts, dcontext, sums, splits);                   \
    }                                                                                                                 \
    void local_forward_##DTYPE(Sizes s, const T* qkv, const float* lepe, T* out) { local_forward(s, qkv, lepe, out); } \
    void local_backward_##DTYPE(Sizes s, const T* qkv, const T* dout, const float* lepe, T* dqkv, float* sums) {      \
        local_backward(s, qkv, dout, lepe, dqkv, sums);                                                               \
    }                                                                                                                 \
    void lepe_forward_##DTYPE(Sizes s, const T* v, int stride, const float* lepe, const T* residual, T* out,          \
                              int transposed) {                                                                       \
        lepe_forward(s, v, stride, lepe, residual, out, transposed);                                                  \
    }                                                                                                                 \
    void lepe_backward_##DTYPE(Sizes s, const T* v, int stride, const T* dout, float* sums) {                         \
        lepe_backward(s, v, stride, dout, sums);                                                                      \
    }

extern "C" {
EXPORT(float32, float)
EXPORT(bfloat16, Brain)
}
