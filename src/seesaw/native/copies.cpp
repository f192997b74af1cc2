// Copies between tiers of memory: KV slabs between a device pool and the host buffer, boxes of weights.
//
// What is copied is not used soon, and there is much of it. So it is written past the caches: a plain store would first
// read the line that it overwrites, which makes three transfers of two, and would drive out what is in use.

#include <cstdint>
#include <cstring>

#if defined(__AVX__)
#include <immintrin.h>
#endif

#include "lines.h"

namespace {

constexpr size_t LINE = seesaw::LINE;
constexpr size_t AHEAD = 8 * LINE;  // bytes that are asked for before they are copied
constexpr size_t SHORT = 512;       // bytes that are not worth aligning for

// `next` is what will be copied after this piece: pieces are a few kilobytes, and each would begin with waiting.
void copy_past_caches(char* to, const char* from, size_t bytes, const char* next) {
#if defined(__AVX__)
    if (bytes >= SHORT) {
        const size_t head = (size_t)(-(intptr_t)to & (LINE - 1));
        std::memcpy(to, from, head);
        to += head, from += head, bytes -= head;
        for (; bytes >= LINE; to += LINE, from += LINE, bytes -= LINE) {
            _mm_prefetch(bytes > AHEAD ? from + AHEAD : next + (AHEAD - bytes), _MM_HINT_NTA);
            const __m256i low = _mm256_loadu_si256((const __m256i*)from);
            const __m256i high = _mm256_loadu_si256((const __m256i*)(from + 32));
            _mm256_stream_si256((__m256i*)to, low);
            _mm256_stream_si256((__m256i*)(to + 32), high);
        }
    }
#endif
    std::memcpy(to, from, bytes);
}

// Others may look as soon as they are told that a copy is done.
void finish_copies() {
#if defined(__AVX__)
    _mm_sfence();
#endif
}

}  // namespace

// Copies `rows` pieces of `bytes` bytes; strides count bytes.
extern "C" void seesaw_copy_rows(char* to, const char* from, int64_t rows, int64_t bytes, int64_t to_stride,
                                 int64_t from_stride) {
    if (bytes == to_stride && bytes == from_stride) bytes *= rows, rows = 1;
    for (int64_t r = 0; r < rows; ++r) {
        const char* row = from + r * from_stride;
        copy_past_caches(to + r * to_stride, row, (size_t)bytes, row + from_stride);
    }
    finish_copies();
}

// Copies, for each (device block, host block) pair, `slabs` pieces of `bytes` bytes. Piece i of block b lies at
// `base + b * block_stride + i * slab_stride` on either side; all strides count bytes. `to_host` is the direction.
//
// Returns the first pair that names a block outside, having copied nothing, or -1.
extern "C" int64_t seesaw_copy_slabs(char* device, char* host, const int64_t* pairs, int64_t count, int64_t slabs,
                                     int64_t bytes, int64_t device_block_stride, int64_t device_slab_stride,
                                     int64_t host_block_stride, int64_t host_slab_stride,
                                     int64_t device_blocks, int64_t host_blocks, int32_t to_host) {
    for (int64_t n = 0; n < count; ++n)
        if (pairs[2 * n] < 0 || pairs[2 * n] >= device_blocks || pairs[2 * n + 1] < 0 ||
            pairs[2 * n + 1] >= host_blocks)
            return n;
    if (bytes == device_slab_stride && bytes == host_slab_stride) bytes *= slabs, slabs = 1;
    for (int64_t n = 0; n < count; ++n) {
        char* near = device + pairs[2 * n] * device_block_stride;
        char* far = host + pairs[2 * n + 1] * host_block_stride;
        for (int64_t i = 0; i < slabs; ++i) {
            char* d = near + i * device_slab_stride;
            char* h = far + i * host_slab_stride;
            copy_past_caches(to_host ? h : d, to_host ? d : h, (size_t)bytes,
                             to_host ? d + device_slab_stride : h + host_slab_stride);
        }
    }
    finish_copies();
    return -1;
}
