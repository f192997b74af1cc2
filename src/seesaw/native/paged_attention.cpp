// Causal attention over a paged KV pool: one kernel for decode, prefill and everything between.
//
// Work is cut into items: one sequence, one KV head, a tile of query rows (tokens x the query heads of the group).
// An item walks the context in chunks of 64 tokens. A chunk is packed once for all rows of the tile: K transposed
// to [unit][token], V to [token][unit], where a unit is 32 bits: one float, or a pair of bfloat16 that the dot
// instruction takes. So the pool is streamed once per tile, and both products are the same small matrix kernel.
// With few rows (decode) packing would cost more than it saves: V is taken as it lies in the pool, and units of
// bfloat16 pairs of K as they come out of the transposition.
//
// A row's result depends on its query, its context and the chunk size alone: each row sums in the same order in
// whatever tile it sits, and a chunk that a row does not see leaves its state as it was, bit for bit. Hence
// decode equals prefill, chunked equals whole, and the batch around a sequence makes no difference.

#include <algorithm>
#include <type_traits>
#include <utility>
#include <vector>

#include "paged_context.h"
#include "recordable.h"
#include "scratch.h"
#include "small_product.h"
#include "vectors.h"

namespace seesaw {
namespace {

constexpr int64_t PREFETCH_ROWS = 32;   // with more rows the products take longer than memory does
constexpr int64_t FEW_ROWS = 8;         // up to so many, keys and values are taken as they lie in the pool
constexpr float NOTHING_SEEN = -1e30f;  // finite, so that a difference to it is never NaN
constexpr float SLACK = 8.0f;           // how far scores may exceed what weights are relative to, in powers of two

enum Status : int32_t { OK = 0, BAD_SLOT = 1, BAD_BLOCK = 2, BAD_DTYPE = 3, BAD_BATCH = 4, NO_MEMORY = 5 };

// ---- what a thread works in -----------------------------------------------------------------------------------

class Workspace {
  public:
    uint32_t *q, *k, *v, *p, *zeros;
    float *scores, *out, *top, *total;

    // Room for `rows` query rows of `width` (padded) channels; false when there is no memory.
    bool reserve(int64_t rows, int64_t width) {
        const int64_t sizes[] = {rows * width, CHUNK * width, CHUNK * width, rows * CHUNK, rows * CHUNK,
                                 rows * width, rows,          rows * LANES,  width};
        int64_t starts[9], words = 0;
        for (int i = 0; i < 9; ++i) starts[i] = words, words += round_up(sizes[i], LANES);
        uint32_t* base = memory_.reserve(words);
        if (!base) return false;
        q = base + starts[0], k = base + starts[1], v = base + starts[2], p = base + starts[3];
        scores = (float*)(base + starts[4]), out = (float*)(base + starts[5]);
        top = (float*)(base + starts[6]), total = (float*)(base + starts[7]);
        zeros = base + starts[8];
        std::fill_n(zeros, width, 0);
        return true;
    }

  private:
    Scratch<uint32_t> memory_;
};

// ---- one item -------------------------------------------------------------------------------------------------

template <class S, bool Pair>
class Attention {
    using T = typename S::T;

  public:
    // What `next` sees is asked for in time, if there is a next item.
    Attention(const Arguments& a, const Item& item, const Item* next, Workspace& space)
        : a_(a), item_(item), next_(next), s_(space), context_(a, item), position_(context_.position) {
        group_ = a.q_heads / a.kv_heads;
        rows_ = item.count * group_;
        width_ = round_up(a.head_dim, LANES);
        units_ = Pair ? width_ / 2 : width_;
    }

    Status run() {
        if (!s_.reserve(rows_, width_)) return NO_MEMORY;
        load_queries();
        const int64_t end = context_.end;
        const T* zeros = (const T*)s_.zeros;
        prefetch_ = rows_ <= PREFETCH_ROWS;
        few_ = rows_ <= FEW_ROWS && a_.head_dim % (4 * LANES) == 0;
        if (!context_.find(context_.begin, zeros, *rows_ahead_)) return BAD_BLOCK;
        for (int64_t start = context_.begin; start < end; start += CHUNK) {
            std::swap(rows_at_, rows_ahead_);
            if (!context_.find(start + CHUNK, zeros, *rows_ahead_)) return BAD_BLOCK;
            if (start + CHUNK >= end && next_ && prefetch_) look_further(zeros);
            const int64_t columns = std::min(CHUNK, round_up(end - start, LANES));  // what lies behind weighs nothing
            if (!(Pair && few_)) pack_keys(columns);
            if (!few_) pack_values(columns);
            attend(start, columns);
            if (prefetch_) want_rows(columns);
        }
        store_result();
        return OK;
    }

  private:
    void look_further(const T* zeros) {
        const Context<T> context(a_, *next_);
        context.find(context.begin, zeros, *rows_ahead_);  // where a block is missing, the next item will say so
    }

    void load_queries() {
        for (int64_t r = 0; r < rows_; ++r) {
            const int64_t at = (item_.first + r / group_) * a_.q_stride +
                               (item_.kv_head * group_ + r % group_) * a_.head_dim;
            if constexpr (Pair) {
                uint32_t* row = s_.q + r * units_;
                std::memset(row, 0, (size_t)units_ * 4);
                std::memcpy(row, (const uint16_t*)a_.q + at, (size_t)a_.head_dim * 2);
            } else {
                for (int64_t d = 0; d < width_; d += LANES)
                    store(s_.q + r * units_ + d, query(at + d, a_.head_dim - d));
            }
            std::fill_n(s_.out + r * width_, width_, 0.0f);
            std::fill_n(s_.total + r * LANES, LANES, 0.0f);
            s_.top[r] = NOTHING_SEEN;
        }
    }

    vf query(int64_t at, int64_t n) const {
        if (a_.q_dtype == FLOAT32) return load_some<F32>((const float*)a_.q + at, n);
        if (a_.q_dtype == BFLOAT16) return load_some<BF16>((const uint16_t*)a_.q + at, n);
        return load_some<F16>((const uint16_t*)a_.q + at, n);
    }

    // LANES units of a row from unit `u` on; the row is whole up to `head_dim`.
    vu row_units(const T* row, int64_t u) const {
        if constexpr (!Pair) return (vu)load_some<S>(row + u, a_.head_dim - u);
        uint32_t part[LANES] = {};
        std::memcpy(part, row + 2 * u, (size_t)(a_.head_dim / 2 - u) * 4);
        return load<vu>(part);
    }

    // Asks for a cache line of the next chunk. Into the second-level cache: the first level can wait for some
    // twenty lines only, and packing would stall behind them.
    static void want(const T* p) { __builtin_prefetch(p, 0, 2); }

    // What packing and adding so many tokens has not asked for. Inline, or GCC takes it for a function without effect.
    __attribute__((always_inline)) void want_rows(int64_t from) const {
        for (int64_t t = from; t < CHUNK; ++t)
            for (int64_t d = 0; d < a_.head_dim; d += LINE / sizeof(T))
                want(rows_ahead_->k[t] + d), want(rows_ahead_->v[t] + d);
    }

    void pack_keys(int64_t columns) {
        for (int64_t t = 0; t < columns; t += LANES) {
            int64_t u = 0;
            if constexpr (std::is_same_v<S, BF16> && !Pair)
                for (; u + 2 * LANES <= a_.head_dim; u += 2 * LANES) pack_pairs(t, u);
            for (; u < units_; u += LANES) pack_units(t, u);
        }
    }

    // LANES units of LANES keys. Inline, as is `transpose`, or the square would go through memory.
    __attribute__((always_inline)) void load_units(int64_t t, int64_t u, vu (&square)[LANES]) const {
        const int64_t whole = Pair ? a_.head_dim / 2 : a_.head_dim;
        const T* const* keys = rows_at_->k + t;
        if (prefetch_)
            for (int i = 0; i < LANES; ++i) want(rows_ahead_->k[t + i] + u * (4 / sizeof(T)));
        if (u + LANES <= whole) {
            for (int i = 0; i < LANES; ++i)
                square[i] = Pair ? load<vu>(keys[i] + 2 * u) : (vu)S::read(keys[i] + u);
        } else {
            for (int i = 0; i < LANES; ++i) square[i] = row_units(keys[i], u);
        }
    }

    void pack_units(int64_t t, int64_t u) {
        vu square[LANES];
        load_units(t, u, square);
        transpose(square);
        uint32_t* to = s_.k + u * CHUNK + t;
        const int count = u + LANES <= units_ ? LANES : LANES / 2;
        for (int i = 0; i < count; ++i) store(to + i * CHUNK, square[i]);
    }

    // Twice as many bfloat16 units: transposed in pairs and widened afterwards.
    void pack_pairs(int64_t t, int64_t u) {
        const T* const* keys = rows_at_->k + t;
        vu square[LANES];
        if (prefetch_)
            for (int i = 0; i < LANES; ++i) want(rows_ahead_->k[t + i] + u);
        for (int i = 0; i < LANES; ++i) square[i] = load<vu>(keys[i] + u);
        transpose(square);
        uint32_t* to = s_.k + u * CHUNK + t;
        for (int i = 0; i < LANES; ++i) {
            store(to + 2 * i * CHUNK, square[i] << 16);
            store(to + (2 * i + 1) * CHUNK, square[i] & 0xffff0000u);
        }
    }

    void pack_values(int64_t columns) {
        const int64_t head_dim = a_.head_dim, width = width_;  // else read anew after each store
        const bool prefetch = prefetch_;
        for (int64_t t = 0; t < columns; t += Pair ? 2 : 1) {
            const T *row = rows_at_->v[t], *ahead = rows_ahead_->v[t];
            const T *other = rows_at_->v[t + Pair], *other_ahead = rows_ahead_->v[t + Pair];
            uint32_t* to = s_.v + (Pair ? t / 2 : t) * width;
            int64_t d = 0;
            if constexpr (Pair)
                for (; d + 2 * LANES <= head_dim; d += 2 * LANES) {
                    if (prefetch) want(ahead + d), want(other_ahead + d);
                    vu low, high;
                    interleave(load<vu>(row + d), load<vu>(other + d), low, high);
                    store(to + d, low), store(to + d + LANES, high);
                }
            for (; d < head_dim; d += LANES) {
                if (prefetch) want(ahead + d);
                if (Pair && prefetch) want(other_ahead + d);
                if constexpr (Pair) store(to + d, halves(row + d, head_dim - d) | halves(other + d, head_dim - d) << 16);
                else store(to + d, load_some<S>(row + d, head_dim - d));
            }
        }
    }

    // The sixteen-bit elements of `a` and `b` in turn.
    static void interleave(vu a, vu b, vu& low, vu& high) {
#if SEESAW_BF16_DOT
        uint16_t from[2][2 * LANES];
        for (int i = 0; i < 2 * LANES; ++i)
            from[0][i] = (uint16_t)(i / 2 + i % 2 * 2 * LANES), from[1][i] = (uint16_t)(from[0][i] + LANES);
        low = (vu)_mm512_permutex2var_epi16((__m512i)a, load<__m512i>(from[0]), (__m512i)b);
        high = (vu)_mm512_permutex2var_epi16((__m512i)a, load<__m512i>(from[1]), (__m512i)b);
#endif
    }

    static vu halves(const T* p, int64_t n) {
        if (n >= LANES) return widen(load<vh>(p));
        uint16_t part[LANES] = {};
        std::memcpy(part, p, (size_t)n * sizeof part[0]);
        return widen(load<vh>(part));
    }

    void attend(int64_t start, int64_t columns) {
        // rows before `from` see only earlier tokens than this chunk's, rows from `to` on only later ones
        const int64_t from = std::max<int64_t>(0, start - position_) * group_;
        const int64_t last = start + CHUNK - 1 + a_.window - 1;
        const int64_t to = a_.window ? std::min(rows_, (last - position_ + 1) * group_) : rows_;
        if (from >= to) return;
        if (Pair && few_)
            score<FEW_ROWS>(from, to - from, columns);
        else
            product<Pair>(s_.q + from * units_, units_, s_.k, CHUNK, s_.scores + from * CHUNK, CHUNK, to - from,
                          columns, units_, false);
        for (int64_t r = from; r < to; ++r) soften(r, start);
        if (few_) return add_values(from, to, columns);
        constexpr int64_t steps = Pair ? CHUNK / 2 : CHUNK;
        product<Pair>(s_.p + from * steps, steps, s_.v, width_, s_.out + from * width_, width_, to - from, width_,
                      columns * steps / CHUNK, true);
    }

    // What the first product does, in the same order, with keys that are not packed. Few rows leave few sums for the keys
    // of one square, each of which waits for the one before: several squares take turns.
    template <int ROWS>
    void score(int64_t row, int64_t rows, int64_t columns) {
        if constexpr (ROWS > 1)
            if (rows < ROWS) return score<ROWS - 1>(row, rows, columns);
        constexpr int SQUARES = ROWS <= 2 ? 4 : ROWS <= 4 ? 2 : 1;
        int64_t t = 0;
        for (; t + SQUARES * LANES <= columns; t += SQUARES * LANES) score_keys<ROWS, SQUARES>(row, t);
        for (; t < columns; t += LANES) score_keys<ROWS, 1>(row, t);
    }

    template <int ROWS, int SQUARES>
    void score_keys(int64_t row, int64_t t) {
        const uint32_t* q = s_.q + row * units_;
        const int64_t units = units_;
        vf sum[ROWS][SQUARES] = {};
        for (int64_t u = 0; u < units; u += LANES) {
            vu square[SQUARES][LANES];
            for (int s = 0; s < SQUARES; ++s) {
                load_units(t + s * LANES, u, square[s]);
                transpose(square[s]);
            }
#pragma GCC unroll 16
            for (int i = 0; i < LANES; ++i)
#pragma GCC unroll 8
                for (int r = 0; r < ROWS; ++r) {
                    const vu query = splat(q[r * units + u + i]);
#pragma GCC unroll 4
                    for (int s = 0; s < SQUARES; ++s) sum[r][s] = multiply_add<Pair>(query, square[s][i], sum[r][s]);
                }
        }
        for (int r = 0; r < ROWS; ++r)
            for (int s = 0; s < SQUARES; ++s) store(s_.scores + (row + r) * CHUNK + t + s * LANES, sum[r][s]);
    }

    // What the second product does, in the same order, with V where it lies.
    void add_values(int64_t from, int64_t to, int64_t columns) {
        int64_t r = from;
        for (; r + 4 <= to; r += 4) add_values_to<4, 2>(r, columns);
        for (; r + 2 <= to; r += 2) add_values_to<2, 4>(r, columns);
        if (r < to) add_values_to<1, 4>(r, columns);
    }

    template <int ROWS, int VECTORS>
    void add_values_to(int64_t row, int64_t columns) {
        constexpr int LINE_VECTORS = std::max<int>(1, LINE / (LANES * sizeof(T)));  // vectors that share a cache line
        constexpr int64_t STEP = Pair ? 2 : 1;                                      // tokens of a unit
        const int64_t width = width_;
        const uint32_t* weights = s_.p + row * (CHUNK / STEP);
        for (int64_t d = 0; d < width; d += VECTORS * LANES) {
            float* out = s_.out + row * width + d;
            vf sum[ROWS][VECTORS];
            for (int r = 0; r < ROWS; ++r)
                for (int j = 0; j < VECTORS; ++j) sum[r][j] = load<vf>(out + r * width + j * LANES);
            for (int64_t t = 0; t < columns; t += STEP) {
                for (int s = 0; s < STEP; ++s)
                    for (int j = 0; j < VECTORS; j += LINE_VECTORS) want(rows_ahead_->v[t + s] + d + j * LANES);
                vu values[VECTORS];
                load_values<VECTORS>(t, d, values);
                for (int j = 0; j < VECTORS; ++j)
                    for (int r = 0; r < ROWS; ++r)
                        sum[r][j] = multiply_add<Pair>(splat(weights[r * (CHUNK / STEP) + t / STEP]), values[j], sum[r][j]);
            }
            for (int r = 0; r < ROWS; ++r)
                for (int j = 0; j < VECTORS; ++j) store(out + r * width + j * LANES, sum[r][j]);
        }
    }

    // Units of V of token t, or of a pair of tokens, from channel d on.
    template <int VECTORS>
    void load_values(int64_t t, int64_t d, vu (&to)[VECTORS]) const {
        if constexpr (Pair)
            for (int j = 0; j < VECTORS; j += 2)
                interleave(load<vu>(rows_at_->v[t] + d + j * LANES), load<vu>(rows_at_->v[t + 1] + d + j * LANES), to[j],
                           to[j + 1]);
        else
            for (int j = 0; j < VECTORS; ++j) to[j] = (vu)S::read(rows_at_->v[t] + d + j * LANES);
    }

    // Turns the scores of a row into weights in base 2, relative to a score that none so far exceeds by more than SLACK.
    void soften(int64_t r, int64_t start) {
        constexpr int PARTS = CHUNK / LANES;
        const int64_t position = position_ + r / group_;
        const int64_t high = position - start;  // largest visible token of the chunk
        const int64_t low = a_.window ? position - a_.window + 1 - start : 0;
        const vf factor = splat(a_.scale * 1.44269504088896341f);
        const float* scores = s_.scores + r * CHUNK;
        vf x[PARTS];
        for (int j = 0; j < PARTS; ++j) x[j] = load<vf>(scores + j * LANES) * factor;
        if (high < CHUNK - 1 || low > 0) {
            vi lane;
            for (int i = 0; i < LANES; ++i) lane[i] = i;
            for (int j = 0; j < PARTS; ++j) {
                const vi token = lane + j * LANES;
                x[j] = (token <= (int32_t)high) & (token >= (int32_t)low) ? x[j] : splat(-__builtin_inff());
            }
        }
        vf best = x[0];
        for (int j = 1; j < PARTS; ++j) best = x[j] > best ? x[j] : best;
        const float best_score = max_lane(best);
        if (best_score > s_.top[r] + SLACK) rescale(r, best_score);
        const float top = s_.top[r];
        vf sum = load<vf>(s_.total + r * LANES);
        for (int j = 0; j < PARTS; ++j) {
            x[j] = power_of_two(x[j] - splat(top));
            sum += x[j];
        }
        store(s_.total + r * LANES, sum);
        for (int j = 0; j < PARTS; ++j) {
            if constexpr (Pair) store(s_.p + r * CHUNK / 2 + j * LANES / 2, bf16_from_floats(x[j]));
            else store(s_.p + r * CHUNK + j * LANES, x[j]);
        }
    }

    void rescale(int64_t r, float top) {
        if (s_.top[r] == NOTHING_SEEN) {
            s_.top[r] = top;
            return;
        }
        const vf shrink = power_of_two(splat(s_.top[r] - top));
        s_.top[r] = top;
        store(s_.total + r * LANES, load<vf>(s_.total + r * LANES) * shrink);
        float* out = s_.out + r * width_;
        for (int64_t d = 0; d < width_; d += LANES) store(out + d, load<vf>(out + d) * shrink);
    }

    void store_result() {
        for (int64_t r = 0; r < rows_; ++r) {
            const vf inverse = splat(1.0f / sum_lanes(load<vf>(s_.total + r * LANES)));
            const int64_t at = ((item_.first + r / group_) * a_.q_heads + item_.kv_head * group_ + r % group_) *
                               a_.head_dim;
            for (int64_t d = 0; d < width_; d += LANES) {
                const vf value = load<vf>(s_.out + r * width_ + d) * inverse;
                const int64_t n = a_.head_dim - d;
                if (a_.q_dtype == FLOAT32) store_some<F32>((float*)a_.out + at + d, value, n);
                else if (a_.q_dtype == BFLOAT16) store_some<BF16>((uint16_t*)a_.out + at + d, value, n);
                else store_some<F16>((uint16_t*)a_.out + at + d, value, n);
            }
        }
    }

    const Arguments& a_;
    const Item& item_;
    const Item* next_;
    Workspace& s_;
    const Context<T> context_;
    const int64_t position_;
    int64_t group_, rows_, width_, units_;
    bool prefetch_, few_;
    Rows<T> rows_of_chunks_[2];
    Rows<T> *rows_at_ = &rows_of_chunks_[0], *rows_ahead_ = &rows_of_chunks_[1];  // the chunk at hand and the next one
};

// ---- the batch ------------------------------------------------------------------------------------------------

Status run_item(const Arguments& a, const std::vector<Item>& items, int64_t i) {
    static thread_local Workspace space;
    const Item &item = items[i], *next = i + 1 < (int64_t)items.size() ? &item + 1 : nullptr;
    if (a.pool_dtype == FLOAT32) return Attention<F32, false>(a, item, next, space).run();
    if (a.pool_dtype == FLOAT16) return Attention<F16, false>(a, item, next, space).run();
#if SEESAW_BF16_DOT
    if (a.q_dtype == BFLOAT16) return Attention<BF16, true>(a, item, next, space).run();
#endif
    return Attention<BF16, false>(a, item, next, space).run();
}

// `bytes` is a multiple of 16: eight channels are, of any type. Too short for a call of memcpy.
inline void copy_row(char* to, const char* from, int64_t bytes) {
    int64_t i = 0;
    for (; i + 4 * LANES <= bytes; i += 4 * LANES) store(to + i, load<vu>(from + i));
    for (; i < bytes; i += 16) std::memcpy(to + i, from + i, 16);
}

// Copies K and V of each new token (of the pool's type) to the token's slot.
Status write_tokens(const Arguments& a) {
    const int64_t bytes = a.pool_dtype == FLOAT32 ? 4 : 2, row = a.head_dim * bytes;
    const int64_t plane = a.kv_heads * a.block_size * row;
    for (int64_t n = 0; n < a.tokens; ++n) {
        const int64_t slot = a.slot_mapping[n], block = slot / a.block_size;
        if (slot < 0 || block >= a.blocks) return BAD_SLOT;
        char* to = a.pool + block * a.block_stride * bytes + slot % a.block_size * row;
        const char* k = (const char*)a.k + n * a.k_stride * bytes;
        const char* v = (const char*)a.v + n * a.v_stride * bytes;
        for (int64_t h = 0; h < a.kv_heads; ++h) {
            copy_row(to + h * a.block_size * row, k + h * row, row);
            copy_row(to + h * a.block_size * row + plane, v + h * row, row);
        }
    }
    return OK;
}

}  // namespace
}  // namespace seesaw

// Writes the new K and V into the pool, then attends. Returns a `Status`.
extern "C" int32_t seesaw_attend(const void* q, const void* k, const void* v, char* pool, void* out,
                                 const int32_t* query_starts, const int32_t* context_starts,
                                 const int32_t* block_tables, const int64_t* slot_mapping, int64_t q_stride,
                                 int64_t k_stride, int64_t v_stride, int64_t blocks, int64_t block_stride,
                                 int64_t table_width, int64_t tokens, int64_t queries, int64_t sequences,
                                 int64_t q_heads, int64_t kv_heads, int64_t block_size, int64_t head_dim,
                                 int64_t window, int32_t q_dtype, int32_t pool_dtype, int32_t threads, float scale) {
    using namespace seesaw;
    const Arguments a{q,           k,          v,        pool,     out,        query_starts, context_starts,
                      block_tables, slot_mapping, q_stride, k_stride, v_stride,   blocks,       block_stride,
                      table_width, tokens,     queries,  sequences, q_heads,   kv_heads,     block_size,
                      head_dim,    window,     q_dtype,  pool_dtype, threads,  scale};
    for (const int32_t dtype : {a.q_dtype, a.pool_dtype})
        if (dtype < FLOAT32 || dtype > FLOAT16) return BAD_DTYPE;
    if (!consistent(a)) return BAD_BATCH;
    if (const Status status = write_tokens(a)) return status;
    const std::vector<Item> items = items_of(a);
    const int64_t count = (int64_t)items.size();
    int32_t worst = OK;
#if defined(_OPENMP)
    // workers are forked, and OpenMP threads do not survive a fork: with one thread stay clear of the runtime
    if (a.threads > 1 && count > 1) {
#pragma omp parallel for schedule(dynamic) num_threads(a.threads) reduction(max : worst)
        for (int64_t i = 0; i < count; ++i) worst = std::max<int32_t>(worst, run_item(a, items, i));
        return worst;
    }
#endif
    for (int64_t i = 0; i < count; ++i) worst = std::max<int32_t>(worst, run_item(a, items, i));
    return worst;
}
SEESAW_RECORDABLE(seesaw_attend);
