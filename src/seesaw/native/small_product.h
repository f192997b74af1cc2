// C[rows, columns] = A[rows, k] B[k, columns], optionally added to C, for matrices that fit a first-level cache.
// Elements are 32-bit units: floats, or pairs of bfloat16 that the dot instruction takes.
//
// An element of C sums over k in order in whatever tile it is computed, so that shapes make no difference.
#pragma once

#include "vectors.h"

namespace seesaw {
namespace {

constexpr int TILE = LANES == 16 ? 4 : 2;

// All loops over sums are unrolled, or the compiler keeps the sums in memory.
template <bool Pair, int ROWS, int VECTORS>
inline void product_block(const uint32_t* a, int64_t lda, const uint32_t* b, int64_t ldb, float* c, int64_t ldc,
                          int64_t k, bool add) {
    vf sum[ROWS][VECTORS];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
        for (int j = 0; j < VECTORS; ++j) sum[r][j] = add ? load<vf>(c + r * ldc + j * LANES) : vf{};
    for (int64_t i = 0; i < k; ++i) {
        vu columns[VECTORS];
#pragma GCC unroll 8
        for (int j = 0; j < VECTORS; ++j) columns[j] = load<vu>(b + i * ldb + j * LANES);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) {
            const vu x = splat(a[r * lda + i]);
#pragma GCC unroll 8
            for (int j = 0; j < VECTORS; ++j) sum[r][j] = multiply_add<Pair>(x, columns[j], sum[r][j]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
        for (int j = 0; j < VECTORS; ++j) store(c + r * ldc + j * LANES, sum[r][j]);
}

template <bool Pair, int VECTORS>
void product_columns(const uint32_t* a, int64_t lda, const uint32_t* b, int64_t ldb, float* c, int64_t ldc,
                     int64_t rows, int64_t k, bool add) {
    int64_t r = 0;
    for (; r + 6 <= rows && rows - r != 8; r += 6)  // two tiles of four keep more sums going than six and two
        product_block<Pair, 6, VECTORS>(a + r * lda, lda, b, ldb, c + r * ldc, ldc, k, add);
    for (; r + 4 <= rows; r += 4)
        product_block<Pair, 4, VECTORS>(a + r * lda, lda, b, ldb, c + r * ldc, ldc, k, add);
    for (; r + 2 <= rows; r += 2)
        product_block<Pair, 2, VECTORS>(a + r * lda, lda, b, ldb, c + r * ldc, ldc, k, add);
    if (r < rows) product_block<Pair, 1, VECTORS>(a + r * lda, lda, b, ldb, c + r * ldc, ldc, k, add);
}

// `columns` is a multiple of LANES. A tile of 6 rows by TILE vectors of sums fills the registers.
template <bool Pair>
void product(const uint32_t* a, int64_t lda, const uint32_t* b, int64_t ldb, float* c, int64_t ldc, int64_t rows,
             int64_t columns, int64_t k, bool add) {
    int64_t j = 0;
    if (LANES == 8 && rows <= 2)  // few rows alone would keep few sums going
        for (; j + 2 * TILE * LANES <= columns; j += 2 * TILE * LANES)
            product_columns<Pair, 2 * TILE>(a, lda, b + j, ldb, c + j, ldc, rows, k, add);
    for (; j + TILE * LANES <= columns; j += TILE * LANES)
        product_columns<Pair, TILE>(a, lda, b + j, ldb, c + j, ldc, rows, k, add);
    switch ((columns - j) / LANES) {
        case 3: return product_columns<Pair, 3>(a, lda, b + j, ldb, c + j, ldc, rows, k, add);
        case 2: return product_columns<Pair, 2>(a, lda, b + j, ldb, c + j, ldc, rows, k, add);
        case 1: return product_columns<Pair, 1>(a, lda, b + j, ldb, c + j, ldc, rows, k, add);
    }
}

}  // namespace
}  // namespace seesaw
