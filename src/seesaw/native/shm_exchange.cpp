// Collectives and messages between the ranks of one host, through one shared anonymous region of memory.
//
// Collectives. A *turn* of a rank is one use of one of its slots: it fills the slot, posts that to the readers, and may
// fill the slot again once all of them have taken it. Small sums: all fill their slots, then each adds up all slots.
// Large ones go chunk by chunk: each member puts the others' shares of a chunk into its slot, adds up its own share,
// puts the sum where its own share would be, and posts again; then everybody copies the others' sums.
//
// Messages. A sender cuts them into pieces of one block each, always in the lowest free block, so that the same pages
// are used again and blocks far out are touched only by what is under way at one time.
//
// Waiting. A rank first spins for a moment where every rank has a core of its own, then sleeps on its bell (a futex);
// whoever makes progress rings it only if the rank sleeps on that peer. Every wait returns now and then, with all state
// kept, so that the caller can look at its signals.

#if defined(__linux__)

#include <linux/futex.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <vector>

#include "recordable.h"
#include "shm_region.h"
#include "sums.h"

namespace {

using seesaw::LINE, seesaw::round_up;
using namespace seesaw::shm;
using seesaw::sum_item_bytes;
using seesaw::sum_members;
using std::memory_order_acquire, std::memory_order_relaxed, std::memory_order_release, std::memory_order_seq_cst;

constexpr int64_t NAP_NS = 200'000'000;       // the longest sleep before a wait looks again
constexpr int64_t PATIENCE_NS = 500'000'000;  // after which a wait returns to the caller

enum Status : int32_t { DONE = 0, PENDING = 1, MISMATCH = 2 };

int64_t now_ns() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1'000'000'000ll + t.tv_nsec;
}

void pause_briefly() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// What the rank is in the middle of; a call that returned PENDING goes on from here.
struct Call {
    enum Kind { NONE, SMALL_SUM, LARGE_SUM, GATHER_OUT, GATHER_IN, BROADCAST_OUT, BROADCAST_IN, SEND, RECEIVE } kind = NONE;
    char* x = nullptr;
    char* const* parts = nullptr;
    int64_t bytes = 0, at = 0;
    int32_t type = 0, channel = 0, step = 0, peer = 0;
};

class Exchange {
  public:
    Exchange(char* base, const Map& map, int rank, int64_t spin_ns)
        : base_(base), map_(map), rank_(rank), world_((int)map.shape.world), spin_ns_(spin_ns), out_turns_(world_),
          in_turns_(world_), slot_uses_{std::vector<uint64_t>(world_), std::vector<uint64_t>(world_)} {
        for (int c = 0; c < CHANNELS; ++c) blocks_[c].resize(world_), received_[c].resize(world_);
        place(spin_ns > 0);
    }
    ~Exchange() { munmap(base_, (size_t)map_.total); }

    Call call;
    std::vector<int32_t> members;

    int32_t advance() {
        patience_ = 0;
        switch (call.kind) {
            case Call::SMALL_SUM: return small_sum();
            case Call::LARGE_SUM: return large_sum();
            case Call::GATHER_OUT: return put_chunks(1);
            case Call::BROADCAST_OUT: return put_chunks(count());
            case Call::GATHER_IN: return gather_in();
            case Call::BROADCAST_IN: return take_chunks(0, call.x);
            case Call::SEND: return send();
            case Call::RECEIVE: return receive();
            default: return DONE;
        }
    }
    bool one_round(int64_t bytes) const { return bytes <= map_.shape.one_round_bytes; }

  private:
    char* base_;
    Map map_;
    int rank_, world_;
    int64_t spin_ns_, patience_ = 0;
    bool may_spin_ = false, placement_known_ = false;
    int slot_ = 0;                                   // the one that the next turn uses
    std::vector<uint64_t> out_turns_, in_turns_;     // by peer: turns started to it, taken from it
    std::vector<uint64_t> slot_uses_[2];             // by peer: turns it must have taken before the slot is free
    std::vector<Blocks> blocks_[CHANNELS];           // by destination
    std::vector<uint64_t> received_[CHANNELS];       // by source: pieces taken
    std::vector<const void*> sources_;

    RankState& state(int rank) { return *((RankState*)(base_ + map_.states) + rank); }
    Link& link(int source, int reader) { return *((Link*)(base_ + map_.links) + source * world_ + reader); }
    char* slot(int rank, uint64_t index) {
        return base_ + map_.outboxes + (rank * 2 + (int64_t)index) * round_up(map_.shape.slot_bytes, PAGE);
    }
    Ring& ring(int source, int destination, int channel) {
        return *(Ring*)(base_ + map_.ring(source, destination, channel));
    }
    char* block(int source, int destination, int channel, uint32_t index) {
        return base_ + map_.ring(source, destination, channel) + map_.data[channel] +
               (int64_t)index * map_.shape.block_bytes[channel];
    }

    // ---- waiting ------------------------------------------------------------------------------------------------

    // Tell the others on which cores this rank may run.
    void place(bool willing) {
        RankState& mine = state(rank_);
        cpu_set_t set;
        CPU_ZERO(&set);
        willing = sched_getaffinity(0, sizeof set, &set) == 0 && willing;
        for (int i = 0; i < MAX_CORES && i < CPU_SETSIZE; ++i)
            if (CPU_ISSET(i, &set)) mine.cores[i / 64] |= 1ull << (i % 64);
        mine.placed.store(willing ? 2 : 1, memory_order_release);
    }

    // Spinning helps only where no rank takes the core from the one that is waited for.
    bool may_spin() {
        if (placement_known_) return may_spin_;
        uint64_t cores[MAX_CORES / 64] = {};
        bool willing = true;
        for (int r = 0; r < world_; ++r) {
            const uint32_t placed = state(r).placed.load(memory_order_acquire);
            if (placed == 0) return false;
            willing = willing && placed == 2;
            for (int i = 0; i < MAX_CORES / 64; ++i) cores[i] |= state(r).cores[i];
        }
        int reach = 0;
        for (uint64_t word : cores) reach += __builtin_popcountll(word);
        placement_known_ = true;
        return may_spin_ = willing && reach >= world_;
    }

    // Wait until `ready()`, which `peer` brings about. False: the caller of the call should look at its signals first.
    template <class F>
    bool wait(int peer, F ready) {
        if (ready()) return true;
        if (may_spin()) {
            const int64_t end = now_ns() + spin_ns_;
            do
                for (int i = 0; i < 64; ++i) {
                    pause_briefly();
                    if (ready()) return true;
                }
            while (now_ns() < end);
        }
        return sleep(peer, ready);
    }
    template <class F>
    bool sleep(int peer, F ready) {
        RankState& mine = state(rank_);
        if (patience_ == 0) patience_ = now_ns() + PATIENCE_NS;
        for (;;) {
            const uint32_t heard = mine.bell.load(memory_order_acquire);
            mine.waits_for.store((uint32_t)peer + 1, memory_order_relaxed);
            std::atomic_thread_fence(memory_order_seq_cst);  // with the one in `ring_bell`: one of us sees the other
            int error = 0;
            if (!ready()) {
                const timespec nap = {0, NAP_NS};
                if (syscall(SYS_futex, (uint32_t*)&mine.bell, FUTEX_WAIT, heard, &nap, nullptr, 0) != 0) error = errno;
            }
            mine.waits_for.store(0, memory_order_relaxed);
            if (ready()) return true;
            if (error == EINTR || now_ns() > patience_) return false;
        }
    }

    // Wake `peer` if it sleeps on this rank. Whoever clears `waits_for` rings; the sleeper sets it anew.
    void ring_bell(int peer) {
        std::atomic_thread_fence(memory_order_seq_cst);
        RankState& other = state(peer);
        uint32_t expected = (uint32_t)rank_ + 1;
        if (other.waits_for.load(memory_order_relaxed) != expected) return;
        if (!other.waits_for.compare_exchange_strong(expected, 0)) return;
        other.bell.fetch_add(1, memory_order_release);
        syscall(SYS_futex, (uint32_t*)&other.bell, FUTEX_WAKE, 1, nullptr, nullptr, 0);
    }

    // ---- turns --------------------------------------------------------------------------------------------------

    int count() const { return (int)members.size(); }
    int index() const { return (int)(std::find(members.begin(), members.end(), rank_) - members.begin()); }
    // The member `steps` after this rank: all start with a different one.
    int other(int steps) const { return members[(size_t)((index() + steps) % count())]; }

    bool wait_for_slot() {
        for (int peer = 0; peer < world_; ++peer) {
            const uint64_t needed = slot_uses_[slot_][peer];
            if (needed && !wait(peer, [&] { return link(rank_, peer).taken.load(memory_order_acquire) >= needed; }))
                return false;
        }
        return true;
    }
    // The slot is filled: start a turn to `peer`. `whole`: there will be no second part.
    void post(int peer, bool whole) {
        Link& to = link(rank_, peer);
        const uint64_t turn = out_turns_[peer]++;
        to.slots[turn & 1].store((uint64_t)slot_, memory_order_relaxed);
        to.posted.store(2 * turn + (whole ? 2 : 1), memory_order_release);
        slot_uses_[slot_][peer] = turn + 1;
        ring_bell(peer);
    }
    void post_second(int peer) {
        link(rank_, peer).posted.store(2 * out_turns_[peer], memory_order_release);
        ring_bell(peer);
    }
    bool wait_for_post(int peer, uint64_t turn, bool second) {
        const uint64_t needed = 2 * turn + (second ? 2 : 1);
        return wait(peer, [&] { return link(peer, rank_).posted.load(memory_order_acquire) >= needed; });
    }
    const char* filled(int peer, uint64_t turn) {
        return slot(peer, link(peer, rank_).slots[turn & 1].load(memory_order_relaxed));
    }
    void take(int peer) {
        link(peer, rank_).taken.store(++in_turns_[peer], memory_order_release);
        ring_bell(peer);
    }

    // ---- sums ---------------------------------------------------------------------------------------------------

    // Everybody reads everything: one round.
    int32_t small_sum() {
        const int n = count();
        if (call.step == 0) {
            if (!wait_for_slot()) return PENDING;
            std::memcpy(slot(rank_, slot_), call.x, (size_t)call.bytes);
            for (int k = 1; k < n; ++k) post(other(k), true);
            slot_ ^= 1;
            call.step = 1;
        }
        for (; call.step < n; ++call.step)
            if (!wait_for_post(other(call.step), in_turns_[other(call.step)], false)) return PENDING;
        sources_.resize(n);
        for (int m = 0; m < n; ++m)
            sources_[m] = members[m] == rank_ ? call.x : filled(members[m], in_turns_[members[m]]);
        sum_members(call.type, call.x, nullptr, sources_.data(), n, call.bytes / sum_item_bytes(call.type));
        for (int k = 1; k < n; ++k) take(other(k));
        return DONE;
    }

    struct Share {
        int64_t start, bytes;
    };
    // The part of a chunk that member `m` adds up; whole cache lines but for the last.
    Share share(int64_t chunk, int m) const {
        const int64_t each = round_up((chunk + count() - 1) / count(), LINE);
        const int64_t start = std::min(chunk, m * each);
        return {start, std::min(chunk, start + each) - start};
    }
    int64_t chunk_at(int64_t start) const { return std::min(call.bytes - start, map_.shape.slot_bytes); }

    // Steps of chunk k: 0 fill it, 1 finish chunk k - 1, 2 add up the own share. `call.peer` counts members done.
    int32_t large_sum() {
        for (;;) {
            const int64_t chunk = call.at < call.bytes ? chunk_at(call.at) : 0;
            if (call.step == 0) {
                if (chunk && !fill_chunk(chunk)) return PENDING;
                call.step = 1, call.peer = 1;
            }
            if (call.step == 1) {
                if (call.at > 0 && !finish_chunk(call.at - map_.shape.slot_bytes)) return PENDING;
                if (chunk == 0) return DONE;
                call.step = 2, call.peer = 1;
            }
            if (!add_chunk(chunk)) return PENDING;
            call.at += map_.shape.slot_bytes;
            call.step = 0;
        }
    }
    bool fill_chunk(int64_t chunk) {
        if (!wait_for_slot()) return false;
        for (int m = 0; m < count(); ++m) {
            const Share part = share(chunk, m);
            if (members[m] != rank_)
                std::memcpy(slot(rank_, slot_) + part.start, call.x + call.at + part.start, (size_t)part.bytes);
        }
        for (int k = 1; k < count(); ++k) post(other(k), false);
        slot_ ^= 1;
        return true;
    }
    // Copy the others' sums of the chunk at `start`. Its turn to us is the oldest not taken, whether or not a peer has
    // already posted the one after it.
    bool finish_chunk(int64_t start) {
        const int64_t chunk = chunk_at(start);
        for (; call.peer < count(); ++call.peer) {
            const int m = (index() + call.peer) % count(), peer = members[m];
            if (!wait_for_post(peer, in_turns_[peer], true)) return false;
            const Share part = share(chunk, m);
            std::memcpy(call.x + start + part.start, filled(peer, in_turns_[peer]) + part.start, (size_t)part.bytes);
            take(peer);
        }
        return true;
    }
    bool add_chunk(int64_t chunk) {
        const int n = count();
        for (; call.peer < n; ++call.peer)
            if (!wait_for_post(other(call.peer), in_turns_[other(call.peer)], false)) return false;
        const Share part = share(chunk, index());
        char* own = call.x + call.at + part.start;
        sources_.resize(n);
        for (int m = 0; m < n; ++m)
            sources_[m] = members[m] == rank_ ? own : filled(members[m], in_turns_[members[m]]) + part.start;
        sum_members(call.type, own, slot(rank_, slot_ ^ 1) + part.start, sources_.data(), n,
                    part.bytes / sum_item_bytes(call.type));
        for (int k = 1; k < n; ++k) post_second(other(k));
        return true;
    }

    // ---- gather and broadcast -----------------------------------------------------------------------------------

    // Put `call.x` before the first `readers` members, chunk by chunk.
    int32_t put_chunks(int readers) {
        for (; call.at < call.bytes; call.at += map_.shape.slot_bytes) {
            if (!wait_for_slot()) return PENDING;
            std::memcpy(slot(rank_, slot_), call.x + call.at, (size_t)chunk_at(call.at));
            for (int m = 0; m < readers; ++m)
                if (members[m] != rank_) post(members[m], true);
            slot_ ^= 1;
        }
        return DONE;
    }
    int32_t take_chunks(int m, char* to) {
        const int peer = members[m];
        for (; call.at < call.bytes; call.at += map_.shape.slot_bytes) {
            if (!wait_for_post(peer, in_turns_[peer], true)) return PENDING;
            std::memcpy(to + call.at, filled(peer, in_turns_[peer]), (size_t)chunk_at(call.at));
            take(peer);
        }
        return DONE;
    }
    // Chunk by chunk over all members, so that all of them fill their slots while we copy.
    int32_t gather_in() {
        for (; call.at < call.bytes; call.at += map_.shape.slot_bytes, call.step = 1)
            for (; call.step < count(); ++call.step) {
                const int peer = members[call.step];
                if (!wait_for_post(peer, in_turns_[peer], true)) return PENDING;
                std::memcpy(call.parts[call.step] + call.at, filled(peer, in_turns_[peer]), (size_t)chunk_at(call.at));
                take(peer);
            }
        return DONE;
    }

    // ---- messages -----------------------------------------------------------------------------------------------

    // An empty message is one empty piece.
    int32_t send() {
        Ring& to = ring(rank_, call.peer, call.channel);
        Blocks& blocks = blocks_[call.channel][call.peer];
        const uint64_t limit = (uint64_t)map_.shape.blocks[call.channel];
        blocks.prepare((int64_t)limit);
        do {
            uint64_t taken = to.taken.load(memory_order_acquire);
            const uint64_t posted = to.posted.load(memory_order_relaxed);
            if (taken == blocks.reclaimed && posted - taken == limit) {
                if (!wait(call.peer, [&] { return to.taken.load(memory_order_acquire) != taken; })) return PENDING;
                taken = to.taken.load(memory_order_acquire);
            }
            for (; blocks.reclaimed < taken; ++blocks.reclaimed)
                blocks.give(to.pieces()[blocks.reclaimed % limit].block);
            const int64_t bytes = std::min(call.bytes - call.at, map_.shape.block_bytes[call.channel]);
            const uint32_t index = (uint32_t)blocks.take();
            std::memcpy(block(rank_, call.peer, call.channel, index), call.x + call.at, (size_t)bytes);
            to.pieces()[posted % limit] = {index, (uint32_t)bytes, (uint64_t)call.bytes};
            to.posted.store(posted + 1, memory_order_release);
            ring_bell(call.peer);
            call.at += bytes;
        } while (call.at < call.bytes);
        return DONE;
    }
    int32_t receive() {
        Ring& from = ring(call.peer, rank_, call.channel);
        uint64_t& done = received_[call.channel][call.peer];
        const uint64_t limit = (uint64_t)map_.shape.blocks[call.channel];
        do {
            if (!wait(call.peer, [&] { return from.posted.load(memory_order_acquire) > done; })) return PENDING;
            const Piece piece = from.pieces()[done % limit];
            if ((int64_t)piece.message_bytes != call.bytes) {
                call.at = (int64_t)piece.message_bytes;
                return MISMATCH;
            }
            std::memcpy(call.x + call.at, block(call.peer, rank_, call.channel, piece.block), piece.bytes);
            from.taken.store(++done, memory_order_release);
            ring_bell(call.peer);
            call.at += piece.bytes;
        } while (call.at < call.bytes);
        return DONE;
    }
};

Exchange& begin(void* handle, const int32_t* members = nullptr, int32_t n = 0) {
    Exchange& e = *(Exchange*)handle;
    e.members.assign(members, members + n), e.call = {};
    return e;
}

}  // namespace

extern "C" {

// Bytes of a region of this shape.
int64_t seesaw_shm_bytes(const Shape* shape) { return Map(*shape).total; }

// Makes the zeros behind `fd`, of the right size, a region. Returns 0 or an error number.
int32_t seesaw_shm_format(int32_t fd, const Shape* shape) {
    const Header header = {MAGIC, *shape};
    return pwrite(fd, &header, sizeof header, 0) == (ssize_t)sizeof header ? 0 : errno ? errno : EIO;
}

// Maps a region for `rank`, who must be the only one of that rank ever to do so; `spin_ns` is how long it may spin where
// every rank has a core. `fd` stays the caller's. Returns null with `error` set: an error number, or -1 if this is not a
// region for `world` ranks.
void* seesaw_shm_open(int32_t fd, int32_t rank, int32_t world, int64_t spin_ns, int32_t* error) {
    Header header;
    struct stat status;
    *error = -1;
    if (pread(fd, &header, sizeof header, 0) != (ssize_t)sizeof header || fstat(fd, &status) != 0) return nullptr;
    if (header.magic != MAGIC || header.shape.world != world || rank < 0 || rank >= world) return nullptr;
    const Map map(header.shape);
    if (map.total != status.st_size) return nullptr;
    void* base = mmap(nullptr, (size_t)map.total, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (base == MAP_FAILED) {
        *error = errno;
        return nullptr;
    }
    *error = 0;
    return new Exchange((char*)base, map, rank, spin_ns);
}

void seesaw_shm_close(void* handle) { delete (Exchange*)handle; }

// Goes on with a call that returned PENDING.
int32_t seesaw_shm_resume(void* handle) { return ((Exchange*)handle)->advance(); }

// Bytes of the message that was not as long as the tensor given to receive it.
int64_t seesaw_shm_found_bytes(void* handle) { return ((Exchange*)handle)->call.at; }

int32_t seesaw_shm_all_reduce(void* handle, void* x, int64_t count, int32_t type, const int32_t* members, int32_t n) {
    Exchange& e = begin(handle, members, n);
    e.call.x = (char*)x, e.call.bytes = count * sum_item_bytes(type), e.call.type = type;
    e.call.kind = e.one_round(e.call.bytes) ? Call::SMALL_SUM : Call::LARGE_SUM;
    return e.advance();
}
SEESAW_RECORDABLE(seesaw_shm_all_reduce);

// `parts` has room for each member's `bytes` bytes on the first member (its own entry is not used), and is null on the
// others. It must stay until the call is done.
int32_t seesaw_shm_gather(void* handle, void* x, int64_t bytes, char* const* parts, const int32_t* members, int32_t n) {
    Exchange& e = begin(handle, members, n);
    e.call.kind = parts ? Call::GATHER_IN : Call::GATHER_OUT;
    e.call.x = (char*)x, e.call.parts = parts, e.call.bytes = bytes, e.call.step = 1;
    return e.advance();
}

int32_t seesaw_shm_broadcast(void* handle, void* x, int64_t bytes, int32_t first, const int32_t* members, int32_t n) {
    Exchange& e = begin(handle, members, n);
    e.call.kind = first ? Call::BROADCAST_OUT : Call::BROADCAST_IN;
    e.call.x = (char*)x, e.call.bytes = bytes;
    return e.advance();
}

int32_t seesaw_shm_send(void* handle, void* x, int64_t bytes, int32_t peer, int32_t channel) {
    Exchange& e = begin(handle);
    e.call.kind = Call::SEND;
    e.call.x = (char*)x, e.call.bytes = bytes, e.call.peer = peer, e.call.channel = channel;
    return e.advance();
}

int32_t seesaw_shm_receive(void* handle, void* x, int64_t bytes, int32_t peer, int32_t channel) {
    Exchange& e = begin(handle);
    e.call.kind = Call::RECEIVE;
    e.call.x = (char*)x, e.call.bytes = bytes, e.call.peer = peer, e.call.channel = channel;
    return e.advance();
}

}  // extern "C"

#endif  // __linux__
