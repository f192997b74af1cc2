// Vectors as wide as the target's registers, on GCC vector extensions: sixteen lanes with AVX-512, eight elsewhere.
// (Wider ones GCC takes apart element by element wherever they are compared or converted.)
//
// Storage types are float, bfloat16 and float16. Arithmetic is float32, except that products of bfloat16 may use
// the dot instruction, which multiplies pairs and accumulates in float32.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
#define SEESAW_WIDE 1
#elif defined(__AVX2__) && defined(__F16C__)
#define SEESAW_AVX2 1
#endif
#if SEESAW_WIDE || SEESAW_AVX2
#include <immintrin.h>
#endif
#if defined(__AVX512BF16__) && defined(__AVX512F__) && defined(__AVX512BW__)
#define SEESAW_BF16_DOT 1
#else
#define SEESAW_BF16_DOT 0
#endif

namespace seesaw {

#if SEESAW_WIDE
constexpr int LANES = 16;
#else
constexpr int LANES = 8;
#endif

typedef float vf __attribute__((vector_size(4 * LANES), may_alias));
typedef int32_t vi __attribute__((vector_size(4 * LANES), may_alias));
typedef uint32_t vu __attribute__((vector_size(4 * LANES), may_alias));
typedef uint16_t vh __attribute__((vector_size(2 * LANES), may_alias));

template <class V, class T>
inline V load(const T* p) {
    V v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
template <class V, class T>
inline void store(T* p, const V& v) {
    std::memcpy(p, &v, sizeof v);
}

// Adding to an integer zero lets the compiler see a broadcast; a float zero would have to turn -0 into +0.
inline vu splat(uint32_t x) { return vu{} + x; }
inline vf splat(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return (vf)splat(bits);
}

// a * b + c, rounded once where the target can: left to itself the compiler fuses here and not there, and a result
// would depend on the shape of the loop around it.
inline vf fused(vf a, vf b, vf c) {
#if SEESAW_WIDE
    return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif SEESAW_AVX2 && defined(__FMA__)
    return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return a * b + c;
#endif
}

// a * b + c of 32-bit units: floats, or pairs of bfloat16 for the dot instruction.
template <bool Pair>
inline vf multiply_add(vu a, vu b, vf c) {
#if SEESAW_BF16_DOT
    if constexpr (Pair) return (vf)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
#endif
    return fused((vf)a, (vf)b, c);
}

inline float max_lane(vf v) {
#if SEESAW_WIDE
    return _mm512_reduce_max_ps((__m512)v);
#elif SEESAW_AVX2
    __m128 best = _mm_max_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
    best = _mm_max_ps(best, _mm_movehl_ps(best, best));
    return _mm_cvtss_f32(_mm_max_ss(best, _mm_movehdup_ps(best)));
#else
    float best = v[0];
    for (int i = 1; i < LANES; ++i) best = v[i] > best ? v[i] : best;
    return best;
#endif
}

inline float sum_lanes(vf v) {
#if SEESAW_WIDE
    return _mm512_reduce_add_ps((__m512)v);
#elif SEESAW_AVX2
    __m128 sum = _mm_add_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
    sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
    return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
#else
    float sum = v[0];
    for (int i = 1; i < LANES; ++i) sum += v[i];
    return sum;
#endif
}

// 2^x for x <= 127 to about one unit in the last place; 2^0 is exactly 1, anything below 2^-126 is 0, NaN stays NaN.
inline vf power_of_two(vf x) {
    x = x < -127.0f ? splat(-127.0f) : x;
    const vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer in the low bits
    const vf shifted = x + magic;
    const vf f = x - (shifted - magic);
    vf y = splat(1.535336188319500e-4f);
    y = y * f + 1.339887440266574e-3f;
    y = y * f + 9.618437357674640e-3f;
    y = y * f + 5.550332471162809e-2f;
    y = y * f + 2.402264791363012e-1f;
    y = y * f + 6.931472028550421e-1f;
    y = y * f + 1.0f;
    const vi power = ((vi)shifted - (vi)magic + 127) << 23;
    return y * (vf)power;
}

// ---- storage types ------------------------------------------------------------------------------------------

inline vu widen(vh h) {
#if SEESAW_AVX2
    return (vu)_mm256_cvtepu16_epi32((__m128i)h);  // GCC takes four steps
#else
    return __builtin_convertvector(h, vu);
#endif
}

inline vh bf16_from_floats(vf v) {
#if SEESAW_BF16_DOT
    // the instruction flushes denormals to zero, which the dot instruction would do anyway
    return (vh)_mm512_cvtneps_pbh((__m512)v);
#else
    const vu bits = (vu)v;
    const vu rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return __builtin_convertvector(v == v ? rounded : splat(0x7fc0u), vh);
#endif
}

inline float float_from_half(uint16_t h) {
    const uint32_t sign = (uint32_t)(h & 0x8000u) << 16, magnitude = h & 0x7fffu;
    uint32_t bits = (magnitude << 13) + (112u << 23);
    float x;
    if (magnitude >= 0x7c00u) bits += 112u << 23;  // infinity, NaN
    if (magnitude < 0x0400u) {                     // zero, denormal
        x = (float)magnitude * 5.9604644775390625e-8f;
        std::memcpy(&bits, &x, sizeof bits);
    }
    bits |= sign;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

inline uint16_t half_from_float(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    const uint32_t sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return (uint16_t)(sign | 0x7e00u);
    if (magnitude >= 0x477ff000u) return (uint16_t)(sign | 0x7c00u);  // rounds beyond 65504
    if (magnitude < 0x38800000u) {                                    // denormal: let the addition round
        float y;
        std::memcpy(&y, &magnitude, sizeof y);
        y += 0.5f;
        std::memcpy(&bits, &y, sizeof bits);
        return (uint16_t)(sign | (bits - 0x3f000000u));
    }
    return (uint16_t)(sign | ((magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13));
}

// How callers name a storage type.
enum DType : int32_t { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

struct F32 {
    using T = float;
    static vf read(const T* p) { return load<vf>(p); }
    static void write(T* p, vf v) { store(p, v); }
};

struct BF16 {
    using T = uint16_t;
    static vf read(const T* p) { return (vf)(widen(load<vh>(p)) << 16); }
    static void write(T* p, vf v) { store(p, bf16_from_floats(v)); }
};

struct F16 {
    using T = uint16_t;
    static vf read(const T* p) {
#if SEESAW_WIDE
        return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif SEESAW_AVX2
        return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
        vf v;
        for (int i = 0; i < LANES; ++i) v[i] = float_from_half(p[i]);
        return v;
#endif
    }
    static void write(T* p, vf v) {
#if SEESAW_WIDE
        _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif SEESAW_AVX2
        _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
        for (int i = 0; i < LANES; ++i) p[i] = half_from_float(v[i]);
#endif
    }
};

// LANES elements, or the first `n` of them and zeros: rows need not be a multiple of LANES long, and reading past the
// last row of the pool would leave the arena.
template <class S>
inline vf load_some(const typename S::T* p, int64_t n) {
    if (n >= LANES) return S::read(p);
    typename S::T part[LANES] = {};
    std::memcpy(part, p, (size_t)n * sizeof part[0]);
    return S::read(part);
}
template <class S>
inline void store_some(typename S::T* p, vf v, int64_t n) {
    if (n >= LANES) return S::write(p, v);
    typename S::T part[LANES];
    S::write(part, v);
    std::memcpy(p, part, (size_t)n * sizeof part[0]);
}

// Transposes LANES rows of LANES 32-bit units in place.
__attribute__((always_inline)) inline void transpose(vu (&r)[LANES]) {
#if SEESAW_WIDE
    __m512i t[LANES], u[LANES];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32((__m512i)r[i], (__m512i)r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32((__m512i)r[i], (__m512i)r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; ++j) {
            u[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + j + 2]);
            u[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + j + 2]);
        }
    // u[4*g + c]: in each 128-bit lane k, column 4*k + c of rows 4*g .. 4*g + 3
    for (int c = 0; c < 4; ++c) {
        const __m512i low01 = _mm512_shuffle_i32x4(u[c], u[4 + c], 0x44);
        const __m512i high01 = _mm512_shuffle_i32x4(u[c], u[4 + c], 0xee);
        const __m512i low23 = _mm512_shuffle_i32x4(u[8 + c], u[12 + c], 0x44);
        const __m512i high23 = _mm512_shuffle_i32x4(u[8 + c], u[12 + c], 0xee);
        r[c] = (vu)_mm512_shuffle_i32x4(low01, low23, 0x88);
        r[4 + c] = (vu)_mm512_shuffle_i32x4(low01, low23, 0xdd);
        r[8 + c] = (vu)_mm512_shuffle_i32x4(high01, high23, 0x88);
        r[12 + c] = (vu)_mm512_shuffle_i32x4(high01, high23, 0xdd);
    }
#elif SEESAW_AVX2
    __m256i t[LANES], u[LANES];
    for (int i = 0; i < 8; i += 2) {
        t[i] = _mm256_unpacklo_epi32((__m256i)r[i], (__m256i)r[i + 1]);
        t[i + 1] = _mm256_unpackhi_epi32((__m256i)r[i], (__m256i)r[i + 1]);
    }
    for (int i = 0; i < 8; i += 4)
        for (int j = 0; j < 2; ++j) {
            u[i + 2 * j] = _mm256_unpacklo_epi64(t[i + j], t[i + j + 2]);
            u[i + 2 * j + 1] = _mm256_unpackhi_epi64(t[i + j], t[i + j + 2]);
        }
    // u[4*g + c]: in each 128-bit half k, column 4*k + c of rows 4*g .. 4*g + 3
    for (int c = 0; c < 4; ++c) {
        r[c] = (vu)_mm256_permute2x128_si256(u[c], u[4 + c], 0x20);
        r[4 + c] = (vu)_mm256_permute2x128_si256(u[c], u[4 + c], 0x31);
    }
#else
    for (int i = 0; i < LANES; ++i)
        for (int j = 0; j < i; ++j) {
            const uint32_t x = r[i][j];
            r[i][j] = r[j][i];
            r[j][i] = x;
        }
#endif
}

}  // namespace seesaw
