// The decoder's small operators and the argmax of logits, over rows of float, bfloat16 or float16.
//
// All arithmetic is float32, and a result is rounded once. A row's result depends on that row alone: it sums in the
// same order whatever lies beside it and however many threads there are.

#include <algorithm>
#include <cmath>
#include <cstring>

#include "recordable.h"
#include "vectors.h"

namespace seesaw {
namespace {

constexpr int64_t PARALLEL_ELEMENTS = 1 << 16;  // with fewer, waking threads takes longer than the work
constexpr int64_t BLOCK = 1024;                 // elements of a row that argmax looks at together

// Calls `row(i)` for every row.
template <class Row>
void for_rows(int64_t rows, int64_t elements, int32_t threads, const Row& row) {
#if defined(_OPENMP)
    // workers are forked, and OpenMP threads do not survive a fork: with one thread stay clear of the runtime
    if (threads > 1 && rows > 1 && rows * elements >= PARALLEL_ELEMENTS) {
#pragma omp parallel for schedule(static) num_threads(threads)
        for (int64_t i = 0; i < rows; ++i) row(i);
        return;
    }
#endif
    for (int64_t i = 0; i < rows; ++i) row(i);
}

// Calls `run(S{})` with the storage type `dtype`.
template <class Run>
void with_type(int32_t dtype, const Run& run) {
    if (dtype == FLOAT32) run(F32{});
    else if (dtype == BFLOAT16) run(BF16{});
    else run(F16{});
}

// Calls `whole(i)` for each whole vector of `n` elements from 0 on, `part(i, left)` for the rest.
template <class Whole, class Part>
inline void for_vectors(int64_t n, const Whole& whole, const Part& part) {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) whole(i);
    if (i < n) part(i, n - i);
}

// ---- norms ----------------------------------------------------------------------------------------------------

// What divides `n` elements by their root mean square. Four sums, so that additions need not wait for each other.
template <class S>
inline float norm_scale(const typename S::T* x, int64_t n, float eps) {
    vf a = {}, b = {}, c = {}, d = {};
    int64_t i = 0;
    for (; i + 4 * LANES <= n; i += 4 * LANES) {
        const vf v = S::read(x + i), w = S::read(x + i + LANES);
        const vf y = S::read(x + i + 2 * LANES), z = S::read(x + i + 3 * LANES);
        a = fused(v, v, a), b = fused(w, w, b), c = fused(y, y, c), d = fused(z, z, d);
    }
    const auto add = [&a](vf v) { a = fused(v, v, a); };
    for_vectors(
        n - i, [&](int64_t j) { add(S::read(x + i + j)); },
        [&](int64_t j, int64_t left) { add(load_some<S>(x + i + j, left)); });
    return 1.0f / std::sqrt(sum_lanes((a + b) + (c + d)) / (float)n + eps);
}

template <class S>
inline void normalise(const typename S::T* x, const typename S::T* weight, typename S::T* out, int64_t n,
                      float scale) {
    for_vectors(
        n, [&](int64_t i) { S::write(out + i, S::read(x + i) * scale * S::read(weight + i)); },
        [&](int64_t i, int64_t left) {
            const vf v = load_some<S>(x + i, left) * scale * load_some<S>(weight + i, left);
            store_some<S>(out + i, v, left);
        });
}

template <class S>
inline void add_to(typename S::T* x, const typename S::T* delta, int64_t n) {
    for_vectors(
        n, [&](int64_t i) { S::write(x + i, S::read(x + i) + S::read(delta + i)); },
        [&](int64_t i, int64_t left) {
            store_some<S>(x + i, load_some<S>(x + i, left) + load_some<S>(delta + i, left), left);
        });
}

// ---- rotation -------------------------------------------------------------------------------------------------

inline vf cross(vf a, vf b, vf c, vf d) { return fused(a, b, c * d); }  // a b + c d

template <class S>
inline void rotate_head(typename S::T* x, const float* cos, const float* sin, int64_t half) {
    for_vectors(
        half,
        [&](int64_t i) {
            const vf a = S::read(x + i), b = S::read(x + half + i);
            const vf c = F32::read(cos + i), s = F32::read(sin + i);
            S::write(x + i, cross(a, c, -b, s));
            S::write(x + half + i, cross(b, c, a, s));
        },
        [&](int64_t i, int64_t left) {
            const vf a = load_some<S>(x + i, left), b = load_some<S>(x + half + i, left);
            const vf c = load_some<F32>(cos + i, left), s = load_some<F32>(sin + i, left);
            store_some<S>(x + i, cross(a, c, -b, s), left);
            store_some<S>(x + half + i, cross(b, c, a, s), left);
        });
}

// ---- activation -----------------------------------------------------------------------------------------------

// e^x for x <= 0 to about one unit in the last place, also far from 0; results below 2^-126 are 0, NaN stays NaN.
inline vf exp_nonpositive(vf x) {
    x = x < -88.0f ? splat(-88.0f) : x;  // there the power below is 0
    const vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer in the low bits
    const vf shifted = fused(x, splat(1.44269504088896341f), magic);
    const vf n = shifted - magic;
    // ln 2 in two parts, the first short enough for exact products
    const vf r = fused(n, splat(2.12194440e-4f), fused(n, splat(-0.693359375f), x));
    vf y = splat(1.9875691500e-4f);
    for (const float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
        y = fused(y, r, splat(c));
    y = fused(y, r * r, r) + 1.0f;
    const vi power = ((vi)shifted - (vi)magic + 127) << 23;
    return y * (vf)power;
}

// x / (1 + e^-x), with the exponential of a number that is not positive, so that it cannot overflow.
inline vf silu(vf x) {
    const vf e = exp_nonpositive(-(vf)((vi)x & 0x7fffffff));
    return (x < 0.0f ? x * e : x) / (1.0f + e);
}

// ---- argmax ---------------------------------------------------------------------------------------------------

inline bool any_lane(vi v) {
#if SEESAW_WIDE
    return _mm512_test_epi32_mask((__m512i)v, (__m512i)v) != 0;
#elif SEESAW_AVX2
    return !_mm256_testz_si256((__m256i)v, (__m256i)v);
#else
    int32_t any = 0;
    for (int i = 0; i < LANES; ++i) any |= v[i];
    return any != 0;
#endif
}

// The largest of `n` elements from `x` on; NaN if one of them is.
template <class S>
inline float largest(const typename S::T* x, int64_t n) {
    const float lowest = -__builtin_inff();
    vf best[4] = {splat(lowest), splat(lowest), splat(lowest), splat(lowest)};
    vi nan[4] = {};
    int64_t i = 0;
    for (; i + 4 * LANES <= n; i += 4 * LANES)
        for (int64_t j = 0; j < 4; ++j) {
            const vf v = S::read(x + i + j * LANES);
            best[j] = v > best[j] ? v : best[j];
            nan[j] |= v != v;
        }
    if (any_lane((nan[0] | nan[1]) | (nan[2] | nan[3]))) return __builtin_nanf("");
    float top = lowest;
    for (const vf b : best) top = std::max(top, max_lane(b));
    for (; i < n; i += LANES) {
        float part[LANES];
        F32::write(part, load_some<S>(x + i, n - i));
        for (int64_t j = 0; j < std::min<int64_t>(LANES, n - i); ++j) {
            if (part[j] != part[j]) return part[j];
            top = std::max(top, part[j]);
        }
    }
    return top;
}

// The first of the largest elements, or the first NaN if there is one.
template <class S>
int64_t argmax_row(const typename S::T* x, int64_t n) {
    float top = -__builtin_inff();
    int64_t block = 0;
    for (int64_t i = 0; i < n; i += BLOCK) {
        const float best = largest<S>(x + i, std::min(BLOCK, n - i));
        if (best > top || best != best) top = best, block = i;
        if (best != best) break;
    }
    for (int64_t i = block;; i += LANES) {
        float part[LANES];
        const int64_t left = std::min<int64_t>(LANES, n - i);
        F32::write(part, load_some<S>(x + i, left));
        for (int64_t j = 0; j < left; ++j)
            if (part[j] == top || (top != top && part[j] != part[j])) return i + j;
    }
}

}  // namespace
}  // namespace seesaw

// Strides count elements. Results are contiguous.

extern "C" void seesaw_rms_norm(const void* x, const void* weight, void* out, int64_t rows, int64_t columns,
                                int64_t x_stride, float eps, int32_t dtype, int32_t threads) {
    using namespace seesaw;
    with_type(dtype, [&](auto type) {
        using S = decltype(type);
        using T = typename S::T;
        for_rows(rows, columns, threads, [&](int64_t m) {
            const T* from = (const T*)x + m * x_stride;
            normalise<S>(from, (const T*)weight, (T*)out + m * columns, columns, norm_scale<S>(from, columns, eps));
        });
    });
}

extern "C" void seesaw_add_rms_norm(void* hidden, const void* delta, const void* weight, void* out, int64_t rows,
                                    int64_t columns, int64_t hidden_stride, int64_t delta_stride, float eps,
                                    int32_t dtype, int32_t threads) {
    using namespace seesaw;
    with_type(dtype, [&](auto type) {
        using S = decltype(type);
        using T = typename S::T;
        for_rows(rows, columns, threads, [&](int64_t m) {
            T* sum = (T*)hidden + m * hidden_stride;
            add_to<S>(sum, (const T*)delta + m * delta_stride, columns);
            normalise<S>(sum, (const T*)weight, (T*)out + m * columns, columns, norm_scale<S>(sum, columns, eps));
        });
    });
}

// `q_weight` and `k_weight` may be null: no norms.
extern "C" void seesaw_rotate(void* heads, const float* cos, const float* sin, const void* q_weight,
                              const void* k_weight, int64_t rows, int64_t count, int64_t q_heads, int64_t head_dim,
                              int64_t stride, float eps, int32_t dtype, int32_t threads) {
    using namespace seesaw;
    with_type(dtype, [&](auto type) {
        using S = decltype(type);
        using T = typename S::T;
        const int64_t half = head_dim / 2;
        for_rows(rows, count * head_dim, threads, [&](int64_t m) {
            for (int64_t h = 0; h < count; ++h) {
                T* x = (T*)heads + m * stride + h * head_dim;
                const T* weight = (const T*)(h < q_heads ? q_weight : k_weight);
                if (weight) normalise<S>(x, weight, x, head_dim, norm_scale<S>(x, head_dim, eps));
                rotate_head<S>(x, cos + m * half, sin + m * half, half);
            }
        });
    });
}

extern "C" void seesaw_silu_mul(const void* gate_up, void* out, int64_t rows, int64_t columns, int64_t stride,
                                int32_t dtype, int32_t threads) {
    using namespace seesaw;
    with_type(dtype, [&](auto type) {
        using S = decltype(type);
        using T = typename S::T;
        for_rows(rows, columns, threads, [&](int64_t m) {
            const T *gate = (const T*)gate_up + m * stride, *up = gate + columns;
            T* to = (T*)out + m * columns;
            for_vectors(
                columns, [&](int64_t i) { S::write(to + i, silu(S::read(gate + i)) * S::read(up + i)); },
                [&](int64_t i, int64_t left) {
                    const vf v = silu(load_some<S>(gate + i, left)) * load_some<S>(up + i, left);
                    store_some<S>(to + i, v, left);
                });
        });
    });
}

extern "C" void seesaw_argmax(const void* logits, int64_t* out, int64_t rows, int64_t columns, int64_t stride,
                              int32_t dtype, int32_t threads) {
    using namespace seesaw;
    with_type(dtype, [&](auto type) {
        using S = decltype(type);
        using T = typename S::T;
        for_rows(rows, columns, threads,
                 [&](int64_t m) { out[m] = argmax_row<S>((const T*)logits + m * stride, columns); });
    });
}

// Side by side: part i of `parts`, which lie one behind the other, has the columns from `bounds[i]` to `bounds[i + 1]`.
extern "C" void seesaw_join_columns(const char* parts, char* out, int64_t rows, const int64_t* bounds, int64_t count,
                                    int64_t item_bytes) {
    const int64_t columns = bounds[count] * item_bytes;
    for (int64_t i = 0; i < count; ++i) {
        const int64_t width = (bounds[i + 1] - bounds[i]) * item_bytes;
        for (int64_t m = 0; m < rows; ++m, parts += width)
            std::memcpy(out + m * columns + bounds[i] * item_bytes, parts, (size_t)width);
    }
}

SEESAW_RECORDABLE(seesaw_rms_norm);
SEESAW_RECORDABLE(seesaw_add_rms_norm);
SEESAW_RECORDABLE(seesaw_rotate);
SEESAW_RECORDABLE(seesaw_silu_mul);
SEESAW_RECORDABLE(seesaw_join_columns);
