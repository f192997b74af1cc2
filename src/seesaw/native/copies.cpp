// Gather and scatter of KV slabs between a device pool on the host's memory and the host buffer.

#include <cstdint>
#include <cstring>

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
            std::memcpy(to_host ? h : d, to_host ? d : h, (size_t)bytes);
        }
    }
    return -1;
}
