// The kernels behind `sums.h`: plain loops that the compiler turns into vectors of whatever width the CPU has.

#include "sums.h"

#if defined(__F16C__)
#include <immintrin.h>
#endif

#include "vectors.h"

namespace seesaw {
namespace {

constexpr int64_t BLOCK = 512;  // elements whose partial sums stay in the first-level cache

struct Float {
    using T = float;
    static float load(T x) { return x; }
    static T store(float x) { return x; }
};

// Rounds to nearest, ties to even, and keeps denormals: the same bits on every CPU, unlike the AVX-512 instruction.
struct Brain {
    using T = uint16_t;
    static float load(T x) {
        const uint32_t bits = (uint32_t)x << 16;
        float value;
        std::memcpy(&value, &bits, sizeof value);
        return value;
    }
    static T store(float x) {
        uint32_t bits;
        std::memcpy(&bits, &x, sizeof bits);
        const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
        return (T)((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
    }
};

// N sources, in one pass over all of them.
template <class S, int N>
void sum_few(typename S::T* out, typename S::T* copy, const typename S::T* const* sources, int64_t count) {
    const typename S::T* from[N];
    for (int m = 0; m < N; ++m) from[m] = sources[m];
#pragma GCC ivdep
    for (int64_t i = 0; i < count; ++i) {
        float sum = S::load(from[0][i]);
        for (int m = 1; m < N; ++m) sum += S::load(from[m][i]);
        out[i] = S::store(sum);
    }
    if (copy) std::memcpy(copy, out, (size_t)count * sizeof out[0]);
}

template <class S>
void sum_floats(void* out, void* copy, const void* const* sources, int members, int64_t count) {
    using T = typename S::T;
    float sums[BLOCK];
    const void* here[4];
    for (int64_t start = 0; start < count; start += BLOCK) {
        const int64_t n = count - start < BLOCK ? count - start : BLOCK;
        T* to = (T*)out + start;
        T* second = copy ? (T*)copy + start : nullptr;
        for (int m = 0; m < members && m < 4; ++m) here[m] = (const T*)sources[m] + start;
        const T* const* from = (const T* const*)here;
        if (members == 2) sum_few<S, 2>(to, second, from, n);
        if (members == 3) sum_few<S, 3>(to, second, from, n);
        if (members == 4) sum_few<S, 4>(to, second, from, n);
        if (members >= 2 && members <= 4) continue;
        for (int64_t i = 0; i < n; ++i) sums[i] = S::load(from[0][i]);
        for (int m = 1; m < members; ++m) {
            const T* p = (const T*)sources[m] + start;
            for (int64_t i = 0; i < n; ++i) sums[i] += S::load(p[i]);
        }
        for (int64_t i = 0; i < n; ++i) to[i] = S::store(sums[i]);
        if (second) std::memcpy(second, to, (size_t)n * sizeof(T));
    }
}

void load_halves(float* to, const uint16_t* from, int64_t n) {
    int64_t i = 0;
#if defined(__F16C__)
    for (; i + 8 <= n; i += 8) _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(from + i))));
#endif
    for (; i < n; ++i) to[i] = float_from_half(from[i]);
}

void store_halves(uint16_t* to, const float* from, int64_t n) {
    int64_t i = 0;
#if defined(__F16C__)
    for (; i + 8 <= n; i += 8)
        _mm_storeu_si128((__m128i*)(to + i), _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT));
#endif
    for (; i < n; ++i) to[i] = half_from_float(from[i]);
}

void sum_halves(uint16_t* out, uint16_t* copy, const void* const* sources, int members, int64_t count) {
    float sums[BLOCK], next[BLOCK];
    for (int64_t start = 0; start < count; start += BLOCK) {
        const int64_t n = count - start < BLOCK ? count - start : BLOCK;
        load_halves(sums, (const uint16_t*)sources[0] + start, n);
        for (int m = 1; m < members; ++m) {
            load_halves(next, (const uint16_t*)sources[m] + start, n);
            for (int64_t i = 0; i < n; ++i) sums[i] += next[i];
        }
        store_halves(out + start, sums, n);
        if (copy) std::memcpy(copy + start, out + start, (size_t)n * sizeof out[0]);
    }
}

// Types that only tests and bookkeeping add up. Integers are unsigned here: their sums wrap around.
template <class T>
void sum_plain(void* out, void* copy, const void* const* sources, int members, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
        T sum = ((const T*)sources[0])[i];
        for (int m = 1; m < members; ++m) sum = (T)(sum + ((const T*)sources[m])[i]);
        ((T*)out)[i] = sum;
        if (copy) ((T*)copy)[i] = sum;
    }
}

}  // namespace

int64_t sum_item_bytes(int32_t type) {
    static const int64_t bytes[SUM_TYPES] = {4, 2, 2, 8, 1, 1, 2, 4, 8};
    return bytes[type];
}

void sum_members(int32_t type, void* out, void* copy, const void* const* sources, int32_t members, int64_t count) {
    switch (type) {
        case SUM_F32: return sum_floats<Float>(out, copy, sources, members, count);
        case SUM_BF16: return sum_floats<Brain>(out, copy, sources, members, count);
        case SUM_F16: return sum_halves((uint16_t*)out, (uint16_t*)copy, sources, members, count);
        case SUM_F64: return sum_plain<double>(out, copy, sources, members, count);
        case SUM_I8:
        case SUM_U8: return sum_plain<uint8_t>(out, copy, sources, members, count);
        case SUM_I16: return sum_plain<uint16_t>(out, copy, sources, members, count);
        case SUM_I32: return sum_plain<uint32_t>(out, copy, sources, members, count);
        case SUM_I64: return sum_plain<uint64_t>(out, copy, sources, members, count);
        default: return;
    }
}

}  // namespace seesaw
