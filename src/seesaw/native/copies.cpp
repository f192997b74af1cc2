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

#if defined(__AVX__)
constexpr size_t AHEAD = 32 * LINE;  // bytes that are asked for before they are copied
constexpr size_t SHORT = 512;        // bytes that are not worth aligning for

// Asks for what will be copied, AHEAD bytes further on: pieces are a few kilobytes, and each would begin with waiting,
// for memory and for the address of its page. `From` gives the beginning of piece i.
template <class From>
class Lookout {
  public:
    Lookout(const From& from, int64_t pieces, size_t bytes) : from_(from), pieces_(pieces), bytes_(bytes) {
        if (pieces > 0) at_ = from(0);
        for (size_t asked = 0; asked < AHEAD; asked += LINE) step();
    }

    // The next line.
    void step() {
        if (piece_ == pieces_) return;
        _mm_prefetch(at_ + offset_, _MM_HINT_NTA);
        offset_ += LINE;
        if (offset_ < bytes_) return;
        offset_ = 0;
        if (++piece_ < pieces_) at_ = from_(piece_);
    }

  private:
    const From& from_;
    int64_t piece_ = 0, pieces_;
    size_t offset_ = 0, bytes_;
    const char* at_ = nullptr;
};
#endif

// Copies `pieces` pieces of `bytes` bytes from `from(i)` to `to(i)`.
template <class To, class From>
void copy_past_caches(const To& to, const From& from, int64_t pieces, size_t bytes) {
#if defined(__AVX__)
    if (bytes >= SHORT) {
        Lookout<From> lookout(from, pieces, bytes);
        for (int64_t i = 0; i < pieces; ++i) {
            char* there = to(i);
            const char* here = from(i);
            const size_t head = (size_t)(-(intptr_t)there & (LINE - 1));
            std::memcpy(there, here, head);
            size_t left = bytes - head, asked = 0;
            for (there += head, here += head; left >= LINE; there += LINE, here += LINE, left -= LINE) {
                lookout.step(), asked += LINE;
                const __m256i low = _mm256_loadu_si256((const __m256i*)here);
                const __m256i high = _mm256_loadu_si256((const __m256i*)(here + 32));
                _mm256_stream_si256((__m256i*)there, low);
                _mm256_stream_si256((__m256i*)(there + 32), high);
            }
            std::memcpy(there, here, left);
            for (; asked < bytes; asked += LINE) lookout.step();
        }
        return;
    }
#endif
    for (int64_t i = 0; i < pieces; ++i) std::memcpy(to(i), from(i), bytes);
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
    const auto target = [=](int64_t row) { return to + row * to_stride; };
    const auto source = [=](int64_t row) { return from + row * from_stride; };
    copy_past_caches(target, source, rows, (size_t)bytes);
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
    const auto near = [=](int64_t i) {
        return device + pairs[2 * (i / slabs)] * device_block_stride + i % slabs * device_slab_stride;
    };
    const auto far = [=](int64_t i) {
        return host + pairs[2 * (i / slabs) + 1] * host_block_stride + i % slabs * host_slab_stride;
    };
    if (to_host)
        copy_past_caches(far, near, count * slabs, (size_t)bytes);
    else
        copy_past_caches(near, far, count * slabs, (size_t)bytes);
    finish_copies();
    return -1;
}
