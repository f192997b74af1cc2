// Where everything lies in the region that the ranks of one host share (`shm_exchange.cpp`).
//
// The region holds, for every rank, what wakes it and an outbox of two slots; for every ordered pair of ranks, the
// counters of their exchange; for every (source, destination, channel), a ring of blocks. It starts as zeros and every
// word in it has one writer, but for `RankState`. Counters have 64 bits and never go back.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "lines.h"

namespace seesaw::shm {

constexpr uint64_t MAGIC = 0x53656553617731ull;
constexpr int CHANNELS = 2, MAX_CORES = 1024;
constexpr int64_t PAGE = 4096;

// What the creator decides; written once into the first page. `transport/shared_memory.py` has the same fields.
struct Shape {
    int64_t world, slot_bytes, one_round_bytes;
    int64_t blocks[CHANNELS], block_bytes[CHANNELS];
};

struct Header {
    uint64_t magic;
    Shape shape;
};

struct alignas(LINE) RankState {
    std::atomic<uint32_t> bell;       // changes with every ring; what the rank sleeps on
    std::atomic<uint32_t> waits_for;  // 1 + the peer the rank sleeps on, 0 while it is awake
    std::atomic<uint32_t> placed;     // 1: `cores` is valid, 2: and the rank may spin
    alignas(LINE) uint64_t cores[MAX_CORES / 64];
};

// Turns from one rank to another. `posted` is 2 * turn + 1 when a slot is filled and 2 * turn + 2 when it holds sums as
// well (or at once, where there is no second part). No turn starts before all but the last one were taken, so two
// entries of `slots` do.
struct alignas(LINE) Link {
    std::atomic<uint64_t> posted;
    std::atomic<uint64_t> slots[2];
    alignas(LINE) std::atomic<uint64_t> taken;
};

struct Piece {
    uint32_t block, bytes;
    uint64_t message_bytes;  // of the whole message: a check
};

struct alignas(LINE) Ring {
    std::atomic<uint64_t> posted;  // pieces
    alignas(LINE) std::atomic<uint64_t> taken;
    Piece* pieces() { return (Piece*)(this + 1); }
};

// Where everything lies.
struct Map {
    Shape shape;
    int64_t states, links, outboxes, rings, ring_bytes[CHANNELS], data[CHANNELS], total;

    explicit Map(const Shape& s) : shape(s) {
        const int64_t pairs = s.world * s.world;
        states = PAGE;
        links = states + s.world * (int64_t)sizeof(RankState);
        outboxes = round_up(links + pairs * (int64_t)sizeof(Link), PAGE);
        rings = outboxes + s.world * 2 * round_up(s.slot_bytes, PAGE);
        total = rings;
        for (int c = 0; c < CHANNELS; ++c) {
            data[c] = round_up((int64_t)sizeof(Ring) + s.blocks[c] * (int64_t)sizeof(Piece), PAGE);
            ring_bytes[c] = data[c] + round_up(s.blocks[c] * s.block_bytes[c], PAGE);
            total += pairs * ring_bytes[c];
        }
    }
    int64_t ring(int64_t source, int64_t destination, int channel) const {
        const int64_t pairs = shape.world * shape.world;
        int64_t at = rings + (source * shape.world + destination) * ring_bytes[channel];
        for (int c = 0; c < channel; ++c) at += pairs * ring_bytes[c];
        return at;
    }
};

// The blocks of one ring as its sender sees them.
struct Blocks {
    std::vector<uint64_t> free;  // a bit for each block
    size_t lowest = 0;           // no word before this one has a free block
    uint64_t reclaimed = 0;      // pieces whose blocks are free again

    void prepare(int64_t blocks) {
        if (!free.empty()) return;
        free.assign((size_t)(blocks + 63) / 64, ~0ull);
        if (blocks % 64) free.back() = (1ull << (blocks % 64)) - 1;
    }
    int64_t take() {
        while (lowest < free.size() && free[lowest] == 0) ++lowest;
        if (lowest == free.size()) return -1;
        const int bit = __builtin_ctzll(free[lowest]);
        free[lowest] &= free[lowest] - 1;
        return (int64_t)lowest * 64 + bit;
    }
    void give(uint32_t block) {
        free[block / 64] |= 1ull << (block % 64);
        lowest = std::min(lowest, (size_t)block / 64);
    }
};

}  // namespace seesaw::shm
