// Attention over a paged pool: its arguments, how they are cut into items, and where an item finds its K and V.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace seesaw {
namespace {

// Mirrored by `_Arguments` in attention/cpu.py. Strides count elements.
struct Arguments {
    const void* q;
    const void* k;
    const void* v;
    char* pool;
    void* out;
    const int32_t* query_starts;
    const int32_t* context_starts;
    const int32_t* block_tables;
    const int64_t* slot_mapping;
    int64_t q_stride, k_stride, v_stride;
    int64_t blocks, block_stride, table_width;
    int64_t tokens, queries, sequences, q_heads, kv_heads, block_size, head_dim;
    int64_t window;  // 0: none
    int32_t q_dtype, pool_dtype, threads;
    float scale;
};

constexpr int64_t CHUNK = 64;       // tokens looked at together
constexpr int64_t TILE_ROWS = 128;  // query rows that share a packed chunk

struct Item {
    int64_t sequence, kv_head, first, count;  // query tokens first .. first + count of the packed batch
};

template <class T>
struct Rows {
    const T *k[CHUNK], *v[CHUNK];
};

// The K and V that the queries of an item see.
template <class T>
class Context {
  public:
    Context(const Arguments& a, const Item& item) : a_(a), kv_head_(item.kv_head) {
        position = a.context_starts[item.sequence] + item.first - a.query_starts[item.sequence];
        end = position + item.count;
        visible_ = a.window ? std::max<int64_t>(0, position - a.window + 1) : 0;
        begin = visible_ / CHUNK * CHUNK;
        table_ = a.block_tables + item.sequence * a.table_width;
        plane_ = a.kv_heads * a.block_size * a.head_dim;
    }

    // Where the rows of the chunk at `start` lie. From the context's end on and before the window there is none, and
    // zeros stand in: what the pool holds there may be anything, NaN included, and blocks may be missing.
    bool find(int64_t start, const T* zeros, Rows<T>& rows) const {
        const int64_t from = std::clamp<int64_t>(visible_ - start, 0, CHUNK);
        const int64_t to = std::clamp<int64_t>(end - start, 0, CHUNK);
        for (int64_t t = 0; t < from; ++t) rows.k[t] = rows.v[t] = zeros;
        for (int64_t t = to; t < CHUNK; ++t) rows.k[t] = rows.v[t] = zeros;
        if (from >= to) return true;
        int64_t index = (start + from) / a_.block_size, offset = (start + from) % a_.block_size;
        for (int64_t t = from; t < to; ++index, offset = 0) {
            const int64_t block = index < a_.table_width ? table_[index] : -1;
            const int64_t stop = std::min(to, t + a_.block_size - offset);
            if (block < 0 || block >= a_.blocks) return false;
            for (const T* row = key_row(block, offset); t < stop; ++t, row += a_.head_dim)
                rows.k[t] = row, rows.v[t] = row + plane_;
        }
        return true;
    }

    int64_t position;    // of the first query
    int64_t begin, end;  // tokens: from a whole chunk on

  private:
    const T* key_row(int64_t block, int64_t offset) const {
        return (const T*)a_.pool + block * a_.block_stride + (kv_head_ * a_.block_size + offset) * a_.head_dim;
    }

    const Arguments& a_;
    int64_t kv_head_, visible_, plane_;
    const int32_t* table_;
};

inline bool consistent(const Arguments& a) {
    if (a.query_starts[0] != 0 || a.query_starts[a.sequences] != a.queries) return false;
    for (int64_t s = 0; s < a.sequences; ++s)
        if (a.query_starts[s + 1] < a.query_starts[s] || a.context_starts[s] < 0) return false;
    return true;
}

inline std::vector<Item> items_of(const Arguments& a) {
    const int64_t tile = std::max<int64_t>(1, TILE_ROWS / (a.q_heads / a.kv_heads));
    std::vector<Item> items;
    for (int64_t s = 0; s < a.sequences; ++s)
        for (int64_t h = 0; h < a.kv_heads; ++h)
            for (int64_t first = a.query_starts[s]; first < a.query_starts[s + 1]; first += tile)
                items.push_back({s, h, first, std::min<int64_t>(tile, a.query_starts[s + 1] - first)});
    return items;
}

}  // namespace
}  // namespace seesaw
