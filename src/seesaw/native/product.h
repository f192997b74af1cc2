// What both ways of computing a product share: its arguments, memory of threads, and how sums become results.
#pragma once

#include <algorithm>

#include "scratch.h"
#include "vectors.h"

namespace seesaw {
namespace {

// Lanes of a register.
#if defined(__AVX512F__)
constexpr int WIDTH = 16;
#elif defined(__AVX__)
constexpr int WIDTH = 8;
#else
constexpr int WIDTH = 4;
#endif
constexpr bool LARGE_CACHES = WIDTH == 16;  // processors with AVX-512 have second-level ones of 1 MiB and more
constexpr int64_t SMALL = 1 << 20;  // products that are not worth waking other threads

enum Status : int32_t { OK = 0, BAD_DTYPE = 1, NO_MEMORY = 2 };

// Strides count elements.
struct Arguments {
    const void* x;       // [rows, depth]
    const void* weight;  // [columns, depth]
    const void* bias;    // [columns], or null
    void* out;           // [rows, columns]
    int64_t rows, columns, depth;
    int64_t x_stride, weight_stride;
    int32_t threads;
};

// Keeps a value in a register, if it fits one, where the compiler would rather load it anew for each use.
template <class V>
inline void pin(V& v) {
    if constexpr (sizeof(V) <= 4 * WIDTH) {
#if defined(__AVX512F__)
        asm("" : "+v"(v));
#elif defined(__x86_64__)
        asm("" : "+x"(v));
#elif defined(__aarch64__)
        asm("" : "+w"(v));
#endif
    }
}

// Calls `work(i)` for i below `count` on up to `threads` threads; returns the worst status.
template <class Work>
Status each(int64_t count, int64_t threads, const Work& work) {
    int32_t worst = OK;
#if defined(_OPENMP)
    // workers are forked, and OpenMP threads do not survive a fork: with one thread stay clear of the runtime
    if (threads > 1 && count > 1) {
#pragma omp parallel for schedule(static) num_threads(threads) reduction(max : worst)
        for (int64_t i = 0; i < count; ++i) worst = std::max<int32_t>(worst, work(i));
        return (Status)worst;
    }
#endif
    for (int64_t i = 0; i < count; ++i) worst = std::max<int32_t>(worst, work(i));
    return (Status)worst;
}

// Rounds sums, of which rows lie `stride` apart, to rows `first` .. and columns `n` .. `stop` of the result.
template <class S>
void finish(const Arguments& a, int64_t first, int64_t rows, int64_t n, int64_t stop, const float* sums,
            int64_t stride) {
    using T = typename S::T;
    for (int64_t r = 0; r < rows; ++r) {
        T* to = (T*)a.out + (first + r) * a.columns;
        for (int64_t c = n; c < stop; c += LANES) {
            vf value = load_some<F32>(sums + r * stride + c - n, stop - c);
            if (a.bias) value += load_some<S>((const T*)a.bias + c, stop - c);
            store_some<S>(to + c, value, stop - c);
        }
    }
}

}  // namespace
}  // namespace seesaw
