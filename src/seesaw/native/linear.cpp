// y = x W^T (+ bias), for weights that lie as they are used: row-major, and nothing packed between calls. Here for few
// rows; for many see packed_product.h.
//
// A tile of the result is a few rows of x times a few rows of W. Both run along K, so a tile is so many dot
// products, each summed in the lanes of one vector register. Where there is an instruction that multiplies pairs of
// bfloat16, it takes them as they are. Other sixteen-bit weights are widened on the way, which hides behind the
// multiplications: of a vector of bfloat16 pairs, the even elements by a shift and the odd ones by a mask. x is
// widened and reordered to match, once per call.
//
// K is cut into equal spans, so that the rows of x of a tile stay in the first-level cache, and N into blocks, so
// that the rows of W stay in the second-level one while all rows of x pass. Meanwhile the next block is fetched, at an
// even pace: memory that is asked for in bursts keeps the tile's own loads waiting. With few rows, blocks are small, and
// the next one is fetched along whole rows.
//
// An element of the result depends on its row of x, its row of W and K alone: it sums in the same order in
// whatever tile it sits. Hence neither the rows beside it nor the number of threads make a difference.

#include "packed_product.h"
#include "product.h"
#include "recordable.h"

#if defined(__AVX__)
#include <immintrin.h>
#endif

namespace seesaw {
namespace {

// The shapes of tiles: `COLUMNS[r]` rows of W with `r` rows of x.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int ROWS = 8, COLUMNS[] = {0, 12, 8, 6, 6, 4, 4, 3, 3};  // 32 registers
#else
constexpr int ROWS = 4, COLUMNS[] = {0, 6, 4, 3, 3};  // 16 registers
#endif
// LONGEST_SPAN of K, in floats: the rows of x of a tile leave room for others in the first-level cache. BLOCK_BYTES of
// W: at hand, and as much again that is being fetched.
constexpr int64_t LONGEST_SPAN = LARGE_CACHES ? 512 : 1024, BLOCK_BYTES = (LARGE_CACHES ? 192 : 96) << 10;
constexpr int64_t STEP = 2 * WIDTH;       // elements of K that a tile takes at a time
constexpr int64_t PANEL_BYTES = 1 << 20;  // of x, widened
constexpr int64_t FEWEST_ROWS = 64;       // to widen at a time, however long: W is streamed once for them
constexpr int64_t GRAIN = 24;             // columns that a thread takes are a multiple
typedef float wf __attribute__((vector_size(4 * WIDTH), may_alias));
typedef uint32_t wu __attribute__((vector_size(4 * WIDTH), may_alias));

// ---- storage types: `part(p, i)` is one of PARTS vectors made of the STEP elements at `p`, alike for x and for W --

// Fused wherever the CPU can: left to contract by itself, the compiler does so in some tiles and not in others.
struct ByLane {
    static constexpr int PARTS = 2;
    static wf multiply_add(wf a, wf b, wf sum) {
#if defined(__AVX512F__)
        return (wf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)sum);
#elif defined(__FMA__)
        return (wf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)sum);
#else
        return a * b + sum;
#endif
    }
};

struct Wide32 : F32, ByLane {
    static wf part(const T* p, int i) { return load<wf>(p + i * WIDTH); }
};

#if SEESAW_BF16_DOT
// Pairs stay pairs: an instruction multiplies and adds both.
struct WideB16 : BF16 {
    static constexpr int PARTS = 1;
    static wf multiply_add(wf a, wf b, wf sum) {
        return (wf)seesaw::multiply_add<true>((vu)a, (vu)b, (vf)sum);
    }
    static wf part(const T* p, int) { return load<wf>(p); }
};
#else
struct WideB16 : BF16, ByLane {
    static wf part(const T* p, int i) {
        const wu pairs = load<wu>(p);
        return (wf)(i ? pairs & 0xffff0000u : pairs << 16);
    }
};
#endif

struct Wide16 : F16, ByLane {
    static wf part(const T* p, int i) {
#if defined(__AVX512F__)
        return (wf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)(p + i * WIDTH)));
#elif defined(__F16C__)
        return (wf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + i * WIDTH)));
#else
        wf v;
        for (int j = 0; j < WIDTH; ++j) v[j] = float_from_half(p[i * WIDTH + j]);
        return v;
#endif
    }
};

// ---- a tile ---------------------------------------------------------------------------------------------------

// The floats that so many elements of x take: one each, or one for a pair.
template <class S>
constexpr int64_t floats(int64_t elements) {
    return elements * S::PARTS * WIDTH / STEP;
}

// sum[r][c] += x[r] * w[c], with row r of x at `x + r * S::PARTS * WIDTH`.
template <class S, int R, int C>
inline void multiply_add_rows(const float* x, const wf (&w)[C], wf (&sum)[R][C]) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
        wf a = load<wf>(x + r * S::PARTS * WIDTH);
        pin(a);
#pragma GCC unroll 16
        for (int c = 0; c < C; ++c) sum[r][c] = S::multiply_add(a, w[c], sum[r][c]);
    }
}

#if defined(__FMA__) && !defined(__AVX512F__)
// The largest tile takes all sixteen registers, and compilers would spill some.
template <class S>
inline void multiply_add_rows(const float* x, const wf (&w)[3], wf (&sum)[4][3]) {
#define SEESAW_ROW(offset, row)                          \
    "vmovups " offset "(%[x]), %%ymm15\n\t"              \
    "vfmadd231ps %[w0], %%ymm15, %[s" row "0]\n\t"       \
    "vfmadd231ps %[w1], %%ymm15, %[s" row "1]\n\t"       \
    "vfmadd231ps %[w2], %%ymm15, %[s" row "2]\n\t"
    asm(SEESAW_ROW("0", "0") SEESAW_ROW("64", "1") SEESAW_ROW("128", "2") SEESAW_ROW("192", "3")
        : [s00] "+x"(sum[0][0]), [s01] "+x"(sum[0][1]), [s02] "+x"(sum[0][2]), [s10] "+x"(sum[1][0]),
          [s11] "+x"(sum[1][1]), [s12] "+x"(sum[1][2]), [s20] "+x"(sum[2][0]), [s21] "+x"(sum[2][1]),
          [s22] "+x"(sum[2][2]), [s30] "+x"(sum[3][0]), [s31] "+x"(sum[3][1]), [s32] "+x"(sum[3][2])
        : [w0] "x"(w[0]), [w1] "x"(w[1]), [w2] "x"(w[2]), [x] "r"(x), "m"(*(const float(*)[7 * WIDTH])x)
        : "ymm15");
#undef SEESAW_ROW
}
#endif

template <class S, int R, int C>
inline void step(const float* x, const typename S::T* w, int64_t stride, wf (&sum)[R][C]) {
#pragma GCC unroll 2
    for (int i = 0; i < S::PARTS; ++i) {
        asm("" : "+r"(w));  // else the pairs would be kept for the second half, in registers that there are not
        if constexpr (R < C) {
            wf a[R];
#pragma GCC unroll 16
            for (int r = 0; r < R; ++r) pin(a[r] = load<wf>(x + (r * S::PARTS + i) * WIDTH));
#pragma GCC unroll 16
            for (int c = 0; c < C; ++c) {
                wf b = S::part(w + c * stride, i);
                pin(b);
#pragma GCC unroll 16
                for (int r = 0; r < R; ++r) sum[r][c] = S::multiply_add(a[r], b, sum[r][c]);
            }
        } else {
            wf b[C];
#pragma GCC unroll 16
            for (int c = 0; c < C; ++c) pin(b[c] = S::part(w + c * stride, i));
            multiply_add_rows<S>(x + i * WIDTH, b, sum);
        }
    }
}

// The sum over the lanes of each of four vectors.
inline void lane_sums(wf a, wf b, wf c, wf d, float* to) {
#if defined(__AVX512F__)
    const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps((__m512)a, (__m512)b), _mm512_unpackhi_ps((__m512)a, (__m512)b));
    const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps((__m512)c, (__m512)d), _mm512_unpackhi_ps((__m512)c, (__m512)d));
    const __m512d low = _mm512_unpacklo_pd((__m512d)ab, (__m512d)cd), high = _mm512_unpackhi_pd((__m512d)ab, (__m512d)cd);
    const __m512 quarters = _mm512_add_ps((__m512)low, (__m512)high);
    const __m256 halves = _mm256_add_ps(
        _mm512_castps512_ps256(quarters), (__m256)_mm512_extractf64x4_pd((__m512d)quarters, 1));
    _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1)));
#elif defined(__AVX__)
    const __m256 ab = _mm256_hadd_ps((__m256)a, (__m256)b), cd = _mm256_hadd_ps((__m256)c, (__m256)d);
    const __m256 halves = _mm256_hadd_ps(ab, cd);
    _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1)));
#else
    const wf v[4] = {a, b, c, d};
    for (int i = 0; i < 4; ++i) to[i] = (v[i][0] + v[i][2]) + (v[i][1] + v[i][3]);
#endif
}

// Memory to fetch while tiles are computed: rows one after the other, which is how processors recognise a stream and
// fetch more of it by themselves.
class Stream {
  public:
    // `rows` of so many bytes, `stride` bytes apart, in about as many goes.
    Stream(const void* start, int64_t stride, int64_t bytes, int64_t rows, int64_t goes)
        : next_((const char*)start), row_(bytes), stride_(stride), end_(next_ + bytes), rows_(bytes > 0 ? rows : 0),
          pace_((rows * ((bytes + LINE - 1) / LINE) * ONE + goes - 1) / std::max<int64_t>(1, goes)) {
        if (2 * pace_ > ONE) pace_ = std::max(pace_, ONE);  // a line in most goes costs more than one in each
    }

    void go() {
        for (due_ += pace_; due_ >= ONE && rows_ > 0; due_ -= ONE) {
            __builtin_prefetch(next_, 0, 2);
            next_ += LINE;
            if (next_ >= end_) next_ = end_ += stride_, next_ -= row_, --rows_;
        }
    }

  private:
    // Whole lines each time, where tiles take so long that nothing better was measured.
    static constexpr int64_t ONE = LANES == 16 ? 1 << 10 : 1;
    const char* next_;
    int64_t row_, stride_;
    const char* end_;         // of the row
    int64_t rows_;            // left, this one included
    int64_t pace_, due_ = 0;  // lines each time, and now, in parts of ONE
};

// Elements of K between two goes.
template <class S>
constexpr int64_t GO = std::max<int64_t>(LINE / sizeof(typename S::T), STEP);

// Sums over `depth` elements of K; added to `out` if `add`.
template <class S, int R, int C>
__attribute__((noinline)) void tile(const float* x, const typename S::T* w, int64_t stride, int64_t depth,
                                    float* out, int64_t out_stride, bool add, Stream& ahead) {
    wf sum[R][C] = {};
    int64_t k = 0;
    for (; k + GO<S> <= depth; k += GO<S>) {
        ahead.go();
#pragma GCC unroll 2
        for (int64_t j = 0; j < GO<S>; j += STEP) step<S, R, C>(x + R * floats<S>(k + j), w + k + j, stride, sum);
    }
    for (; k + STEP <= depth; k += STEP) step<S, R, C>(x + R * floats<S>(k), w + k, stride, sum);
    if (k < depth) {  // what follows a row may be anything, NaN included
        typename S::T part[C * STEP] = {};
        for (int c = 0; c < C; ++c)
            std::memcpy(part + c * STEP, w + c * stride + k, (size_t)(depth - k) * sizeof part[0]);
        step<S, R, C>(x + R * floats<S>(k), part, STEP, sum);
    }
    constexpr int LAST = R * C - 1;
    const auto nth = [&](int i) { return i < LAST ? sum[i / C][i % C] : sum[R - 1][C - 1]; };
    float sums[R * C + 3];
#pragma GCC unroll 16
    for (int i = 0; i <= LAST; i += 4) lane_sums(nth(i), nth(i + 1), nth(i + 2), nth(i + 3), sums + i);
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c) {
            float& to = out[r * out_stride + c];
            to = add ? to + sums[r * C + c] : sums[r * C + c];
        }
}

// ---- the product ----------------------------------------------------------------------------------------------

template <class S>
class Product {
    using T = typename S::T;
    static constexpr int64_t SIZE = sizeof(T);

  public:
    explicit Product(const Arguments& a) : a_(a) {
        padded_ = floats<S>(round_up(a.depth, STEP));
        const int64_t spans = (padded_ + LONGEST_SPAN - 1) / LONGEST_SPAN;
        span_ = round_up((a.depth + spans - 1) / spans, STEP);
        const int64_t most = std::max(FEWEST_ROWS, PANEL_BYTES / (padded_ * 4)), batches = (a.rows + most - 1) / most;
        batch_ = std::min(a.rows, round_up((a.rows + batches - 1) / batches, ROWS));
        const int64_t fit = BLOCK_BYTES / (span_ * SIZE);
        block_ = whole_rows() ? (batch_ + ROWS - 1) / ROWS * GRAIN : std::max<int64_t>(1, fit / GRAIN) * GRAIN;
        threads_ = a.rows * a.columns * a.depth < SMALL ? 1 : std::max<int64_t>(1, a.threads);
    }

    Status run() {
        static thread_local Scratch<float> scratch;
        x_ = scratch.reserve(batch_ * padded_);
        if (!x_) return NO_MEMORY;
        const int64_t share = round_up((a_.columns + threads_ - 1) / threads_, GRAIN);
        for (first_ = 0; first_ < a_.rows; first_ += batch_) {
            count_ = std::min(batch_, a_.rows - first_);
            panels_ = (count_ + ROWS - 1) / ROWS;
            each(panels_, threads_, [&](int64_t i) { return widen(top(i), top(i + 1) - top(i)); });
            const Status status = each((a_.columns + share - 1) / share, threads_, [&](int64_t i) {
                return columns(i * share, std::min(a_.columns, (i + 1) * share));
            });
            if (status != OK) return status;
        }
        return OK;
    }

  private:
    // How the next block is fetched.
    bool whole_rows() const { return batch_ <= 2 * ROWS; }

    // The first row of a panel. Panels differ by a row at most: tiles of one or two rows keep few sums going.
    int64_t top(int64_t panel) const { return count_ * panel / panels_; }

    // A panel holds up to ROWS rows of x, STEP elements of K of each in turn.
    Status widen(int64_t first, int64_t rows) const {
        float* to = x_ + first * padded_;
        for (int64_t r = 0; r < rows; ++r) {
            const T* from = (const T*)a_.x + (first_ + first + r) * a_.x_stride;
            for (int64_t k = 0; k < a_.depth; k += STEP) {
                T part[STEP] = {};
                const T* p = from + k;
                if (k + STEP > a_.depth) p = (const T*)std::memcpy(part, p, (size_t)(a_.depth - k) * sizeof(T));
                for (int i = 0; i < S::PARTS; ++i)
                    store(to + floats<S>(k) * rows + (r * S::PARTS + i) * WIDTH, S::part(p, i));
            }
        }
        return OK;
    }

    Status columns(int64_t begin, int64_t end) const {
        static thread_local Scratch<float> scratch;
        float* sums = scratch.reserve((span_ < a_.depth ? count_ : ROWS) * block_);
        if (!sums) return NO_MEMORY;
        for (int64_t n = begin; n < end; n += block_) {
            const int64_t stop = std::min(end, n + block_), rest = std::min(end, stop + block_) - stop;
            Stream rows = ahead(stop, rest, 0, a_.depth);
            for (int64_t k = 0; k < a_.depth; k += span_) {
                const bool last = k + span_ >= a_.depth;
                Stream span = last ? ahead(stop, rest, 0, span_) : ahead(n, stop - n, k + span_, span_);
                block(n, stop, k, sums, whole_rows() ? rows : span);
            }
        }
        return OK;
    }

    // The rows of W from n on, so many elements of each from k on, to be fetched while as many are multiplied.
    Stream ahead(int64_t n, int64_t rows, int64_t k, int64_t depth) const {
        depth = std::min(depth, a_.depth - k);
        const int64_t tiles = block_ / COLUMNS[std::min<int64_t>(ROWS, top(1))];
        return {weight(n, k), a_.weight_stride * SIZE, depth * SIZE, rows, panels_ * tiles * (depth / GO<S>)};
    }

    // Columns n .. stop and one span of K, for all rows.
    void block(int64_t n, int64_t stop, int64_t k, float* sums, Stream& ahead) const {
        const int64_t depth = std::min(span_, a_.depth - k);
        for (int64_t p = 0; p < panels_; ++p) {
            const int64_t r = top(p), rows = top(p + 1) - r;
            float* part = sums + (span_ < a_.depth ? r * block_ : 0);
            panel<ROWS>(rows, x_ + r * padded_ + floats<S>(k) * rows, n, stop, k, depth, part, ahead);
            if (k + depth == a_.depth) finish<S>(a_, first_ + r, rows, n, stop, part, block_);
        }
    }

    const T* weight(int64_t n, int64_t k) const { return (const T*)a_.weight + n * a_.weight_stride + k; }

    template <int R>
    void panel(int64_t rows, const float* x, int64_t n, int64_t stop, int64_t k, int64_t depth, float* sums,
               Stream& ahead) const {
        if constexpr (R > 1)
            if (rows < R) return panel<R - 1>(rows, x, n, stop, k, depth, sums, ahead);
        constexpr int C = COLUMNS[R];
        const int64_t stride = a_.weight_stride, width = stop - n;
        int64_t c = 0;
        for (; c + C <= width; c += C)
            tile<S, R, C>(x, weight(n + c, k), stride, depth, sums + c, block_, k > 0, ahead);
        for (; c < width; ++c)
            tile<S, R, 1>(x, weight(n + c, k), stride, depth, sums + c, block_, k > 0, ahead);
    }

    const Arguments& a_;
    int64_t span_;           // of K
    int64_t padded_;         // floats of a row of x
    int64_t batch_, block_;  // rows of x and of W that pass together
    int64_t threads_;
    int64_t first_, count_;  // the batch at hand
    int64_t panels_;         // that it is cut into
    float* x_;               // its panels
};

}  // namespace
}  // namespace seesaw

// Bit `1 << type` is set where the CPU that this was compiled for has better means than the code above.
extern "C" int32_t seesaw_linear_better() {
    using namespace seesaw;
    int32_t better = 0;
#if defined(__AVX512F__)
    if (__builtin_cpu_is("intel")) better |= 1 << FLOAT32;  // its vendor's library is made for it; not measured
#endif
#if defined(__AMX_BF16__) || defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
    better |= 1 << BFLOAT16;  // instructions of its own
#endif
#if defined(__AVX512FP16__) || defined(__AMX_FP16__) || !(defined(__F16C__) || defined(__AVX512F__))
    better |= 1 << FLOAT16;  // instructions of its own, or none that would widen it here
#endif
    return better;
}

// The fewest rows for which packing both sides into panels is faster.
extern "C" int64_t seesaw_linear_packed_rows() {
#if defined(__AVX512F__)
    return 256;
#else
    return 96;
#endif
}

// `out` is contiguous, nothing is empty, `bias` may be null; `packed` is which way. Returns a `Status`.
extern "C" int32_t seesaw_linear(const void* x, const void* weight, const void* bias, void* out, int64_t rows,
                                 int64_t columns, int64_t depth, int64_t x_stride, int64_t weight_stride,
                                 int32_t dtype, int32_t packed, int32_t threads) {
    using namespace seesaw;
    const Arguments a{x, weight, bias, out, rows, columns, depth, x_stride, weight_stride, threads};
    if (dtype == FLOAT32) return packed ? PackedProduct<F32>(a).run() : Product<Wide32>(a).run();
    if (dtype == BFLOAT16) return packed ? PackedProduct<BF16>(a).run() : Product<WideB16>(a).run();
    if (dtype == FLOAT16) return packed ? PackedProduct<F16>(a).run() : Product<Wide16>(a).run();
    return BAD_DTYPE;
}
SEESAW_RECORDABLE(seesaw_linear);
