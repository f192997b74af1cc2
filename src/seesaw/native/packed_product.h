// y = x W^T (+ bias) for many rows: both sides are widened and packed into panels, and a tile is a sum of outer products.
// Where there is an instruction that multiplies pairs of bfloat16, those are not widened, and a unit is a pair.
//
// A tile is ROWS rows of x by COLUMNS rows of W. Of a panel of W, COLUMNS units with the same k lie side by side, so that
// a step along K is a broadcast of each x times a few vectors of W, without any conversion or sum over lanes. On the
// way there W is transposed, which costs as much as some ten rows of x do: with few rows dot products are faster.
//
// K is cut into spans, so that a panel of W stays in the first-level cache while the panels of x of a GROUP pass, which
// stay in the second-level one. Rows and columns are cut into even blocks, so that what is packed and the sums stay
// within a few megabytes.
//
// An element of the result sums its products in the order of k, span by span, in whatever tile it sits.
#pragma once

#include <type_traits>

#include "product.h"

namespace seesaw {
namespace {

// Rows of x in a tile, by the registers that two vectors of sums for each take.
#if SEESAW_WIDE
constexpr int PACKED_ROWS = 12;  // 24 of 32
#elif defined(__AVX__) || defined(__aarch64__)
constexpr int PACKED_ROWS = 6;  // 12 of 16, or twice as many of half the size
#else
constexpr int PACKED_ROWS = 2;  // 8 of 16
#endif
static_assert(PACKED_ROWS <= LANES, "a panel of x is made by squares");

template <class S>
class PackedProduct {
    using T = typename S::T;
    static constexpr bool PAIRS = SEESAW_BF16_DOT && std::is_same_v<S, BF16>;
    static constexpr int64_t OF_UNIT = PAIRS ? 2 : 1;  // elements
    static constexpr int64_t SQUARE = LANES * OF_UNIT;  // elements of each of LANES rows that are transposed at a time
    static constexpr int ROWS = PACKED_ROWS, VECTORS = 2, COLUMNS = VECTORS * LANES;
    static constexpr int64_t SPAN = 256, GROUP = (LARGE_CACHES ? 192 : 96) / ROWS;       // units of K, panels of x
    static constexpr int64_t MOST_ROWS = 516, MOST_COLUMNS = LARGE_CACHES ? 512 : 1024;  // of a block
    static constexpr int64_t ROWS_OF_THREAD = 192;              // with fewer, threads rather share columns
    static constexpr int64_t OF_LINE = LINE / sizeof(T);        // elements of a cache line
    static constexpr int64_t LINES = LANES * SQUARE / OF_LINE;  // of a square

  public:
    explicit PackedProduct(const Arguments& a) : a_(a) {}

    Status run() const {
        const int64_t threads = a_.rows * a_.columns * a_.depth < SMALL ? 1 : std::max<int64_t>(1, a_.threads);
        const int64_t down = std::min(threads, std::max<int64_t>(1, a_.rows / ROWS_OF_THREAD));
        const int64_t across = threads / down;
        const int64_t rows = share(a_.rows, down, ROWS), columns = share(a_.columns, across, COLUMNS);
        return each(down * across, threads, [&](int64_t i) {
            const int64_t r = i / across * rows, n = i % across * columns;
            return part(r, std::min(a_.rows, r + rows), n, std::min(a_.columns, n + columns));
        });
    }

  private:
    // The size of `count` even parts of `of`, a multiple of `step`.
    static int64_t share(int64_t of, int64_t count, int64_t step) { return round_up((of + count - 1) / count, step); }

    // The size of even parts of `of` that are at most `most`, a multiple of `step` as well.
    static int64_t even(int64_t of, int64_t most, int64_t step) { return share(of, (of + most - 1) / most, step); }

    // Rows and columns of the result, and where what they need is packed and summed.
    struct Block {
        int64_t first, rows, n, columns;
        float *x, *w, *sums;
        int64_t stride;  // of sums
    };

    Status part(int64_t first, int64_t last, int64_t begin, int64_t end) const {
        if (first >= last || begin >= end) return OK;
        const int64_t rows = even(last - first, MOST_ROWS, ROWS), columns = even(end - begin, MOST_COLUMNS, COLUMNS);
        static thread_local Scratch<float> scratch;
        const int64_t of_x = round_up(rows * SPAN + LANES, COLUMNS), of_w = columns * SPAN;
        float* x = scratch.reserve(of_x + of_w + rows * columns);
        if (!x) return NO_MEMORY;
        float *w = x + of_x, *sums = w + of_w;
        for (int64_t r = first; r < last; r += rows)
            for (int64_t n = begin; n < end; n += columns)
                block({r, std::min(rows, last - r), n, std::min(columns, end - n), x, w, sums, columns});
        return OK;
    }

    void block(const Block& b) const {
        for (int64_t k = 0; k < a_.depth; k += SPAN * OF_UNIT) {
            const int64_t depth = std::min(SPAN * OF_UNIT, a_.depth - k);
            for (int64_t r = 0; r < b.rows; r += ROWS)
                pack_x(b.first + r, std::min<int64_t>(ROWS, b.rows - r), k, depth, b.x + r * SPAN);
            for (int64_t c = 0; c < b.columns; c += COLUMNS) pack_weight(b.n + c, k, depth, b.w + c * SPAN);
            for (int64_t r = 0; r < b.rows; r += GROUP * ROWS)
                for (int64_t c = 0; c < b.columns; c += COLUMNS)
                    column(b, r, std::min(b.rows, r + GROUP * ROWS), c, k, depth);
        }
    }

    // The tiles of a group of rows and a panel of W, which are rounded as soon as they are whole.
    void column(const Block& b, int64_t from, int64_t to, int64_t c, int64_t k, int64_t depth) const {
        const int64_t stop = b.n + std::min(b.columns, c + COLUMNS);
        for (int64_t r = from; r < to; r += ROWS) {
            float* sums = b.sums + r * b.stride + c;
            const int64_t units = (depth + OF_UNIT - 1) / OF_UNIT;
            tile<ROWS>(to - r, b.x + r * SPAN, b.w + c * SPAN, units, sums, b.stride, k > 0);
            if (k + depth == a_.depth)
                finish<S>(a_, b.first + r, std::min<int64_t>(ROWS, to - r), b.n + c, stop, sums, b.stride);
        }
    }

    // A panel of x. Overwrites up to LANES floats behind it.
    void pack_x(int64_t first, int64_t rows, int64_t k, int64_t depth, float* to) const {
        const T* from = (const T*)a_.x + first * a_.x_stride + k;
        pack(from, a_.x_stride, std::min<int64_t>(LANES, a_.rows - first), depth, to, rows);
    }

    // A panel of W; rows that there are not are zeros.
    void pack_weight(int64_t first, int64_t k, int64_t depth, float* to) const {
        const T* from = (const T*)a_.weight + first * a_.weight_stride + k;
        for (int64_t c = 0; c < COLUMNS; c += LANES, from += LANES * a_.weight_stride)
            pack(from, a_.weight_stride, std::min<int64_t>(LANES, a_.columns - first - c), depth, to + c, COLUMNS);
    }

    // LANES units, of the first `n` elements and zeros.
    static vu read(const T* p, int64_t n = SQUARE) {
        if constexpr (!PAIRS) return (vu)load_some<S>(p, n);
        if (n >= SQUARE) return load<vu>(p);
        T part[SQUARE] = {};
        std::memcpy(part, p, (size_t)n * sizeof part[0]);
        return load<vu>(part);
    }

    // `depth` elements of up to LANES rows: units of the same k side by side, and `step` floats from one to the next.
    static void pack(const T* from, int64_t stride, int64_t rows, int64_t depth, float* to, int64_t step) {
        int64_t k = 0;
        if (rows == LANES)
            for (; k + SQUARE <= depth; k += SQUARE) {
                vu square[LANES];
#pragma GCC unroll 16
                for (int r = 0; r < LANES; ++r) square[r] = read(from + r * stride + k);
                const T* next = from + (LANES + k % OF_LINE / SQUARE * LINES) * stride + k / OF_LINE * OF_LINE;
#pragma GCC unroll 16
                for (int r = 0; r < LINES; ++r) __builtin_prefetch(next + r * stride);
                transpose(square);
#pragma GCC unroll 16
                for (int i = 0; i < LANES; ++i) store(to + (k / OF_UNIT + i) * step, square[i]);
            }
        for (; k < depth; k += SQUARE) {
            vu square[LANES] = {};
            for (int r = 0; r < rows; ++r) square[r] = read(from + r * stride + k, depth - k);
            transpose(square);
            for (int i = 0; i < LANES && k + i * OF_UNIT < depth; ++i)
                store(to + (k / OF_UNIT + i) * step, square[i]);
        }
    }

    template <int R>
    static void tile(int64_t rows, const float* x, const float* w, int64_t units, float* sums, int64_t stride,
                     bool add) {
        if constexpr (R > 1)
            if (rows < R) return tile<R - 1>(rows, x, w, units, sums, stride, add);
        outer_products<R>(x, w, units, sums, stride, add);
    }

    template <int R>
    __attribute__((noinline)) static void outer_products(const float* x, const float* w, int64_t units, float* to,
                                                         int64_t stride, bool add) {
        vf sum[R][VECTORS] = {};
        for (int r = 0; r < R; ++r) __builtin_prefetch(to + r * stride, 1);
#pragma GCC unroll 4
        for (int64_t k = 0; k < units; ++k) {
            vf columns[VECTORS];
#pragma GCC unroll 2
            for (int v = 0; v < VECTORS; ++v) pin(columns[v] = load<vf>(w + k * COLUMNS + v * LANES));
#pragma GCC unroll 16
            for (int r = 0; r < R; ++r) {
                vf value = splat(x[k * R + r]);
                pin(value);
#pragma GCC unroll 2
                for (int v = 0; v < VECTORS; ++v) sum[r][v] = multiply_add<PAIRS>((vu)value, (vu)columns[v], sum[r][v]);
            }
        }
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
            for (int v = 0; v < VECTORS; ++v) {
                float* place = to + r * stride + v * LANES;
                store(place, add ? load<vf>(place) + sum[r][v] : sum[r][v]);
            }
    }

    const Arguments& a_;
};

}  // namespace
}  // namespace seesaw
