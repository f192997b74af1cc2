// Collectives over connected sockets, one for each other rank.
//
// They run on the calling thread: one loop sends to and receives from all members at once. A member's *share* is what
// it adds up. In one round every member sends all it has to every other and adds up everything; in two rounds a member
// sends each other its share, adds up its own, and sends the sum to all. Sums follow the data as it arrives, and the
// second round of a prefix starts when it is summed: there is no barrier between the rounds.
//
// What is summed may still be in the making: `begin` a sum, say how far it is `computed` as it grows, and `resume`.
// Members that do and members that have all of it at once understand each other.
#pragma once

#include <poll.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

#include "socket_streams.h"
#include "sums.h"

namespace seesaw::tcp {

constexpr int64_t SUM_GRAIN = 16 << 10;  // sums wait for this much, but for the last piece

class Collectives {
  public:
    // Where calls that fail say why is the owner's.
    Collectives(int rank, int world, int64_t one_round_bytes, Failure& failure)
        : rank_(rank), one_round_bytes_(one_round_bytes), fds_((size_t)world, -1), failure_(failure) {}
    Collectives(const Collectives&) = delete;
    ~Collectives() {
        for (const int fd : fds_)
            if (fd >= 0) close(fd);
    }
    // The connection to `peer`, which is closed in the end.
    void connect(int peer, int fd) { fds_[(size_t)peer] = fd; }

    int32_t all_reduce(char* x, int64_t count, int32_t type, const int32_t* members, int n) {
        begin_all_reduce(x, count, type, members, n);
        computed_ = x + count * sum_item_bytes(type);
        return resume();
    }
    // Begins a sum of which nothing is computed yet.
    void begin_all_reduce(char* x, int64_t count, int32_t type, const int32_t* members, int n) {
        const int64_t item = sum_item_bytes(type), bytes = count * item;
        begin(members, n);
        const bool one_round = n == 2 || bytes * (n - 1) * (n - 2) <= one_round_bytes_ * n;
        const int64_t each = (count + n - 1) / n;
        const auto share = [&](int m) -> Stretch {
            const int64_t start = one_round ? 0 : std::min(count, m * each);
            const int64_t end = one_round ? count : std::min(count, start + each);
            return {x + start * item, (end - start) * item};
        };
        const Stretch own = share(own_member_);
        reserve((n - 1) * own.bytes);
        char* scratch = scratch_.get();
        for (Exchange& e : exchanges_) {
            e.out[0] = share(e.member);
            e.in[0] = {scratch, own.bytes};
            if (!one_round) e.out[1] = own, e.in[1] = share(e.member);
            sources_[(size_t)e.member] = scratch;
            scratch += own.bytes;
        }
        sources_[(size_t)own_member_] = own.data;
        sum_ = {own, 0, item, type, one_round};
        computed_ = x;
    }
    // `bytes` more of it are there; as much is sent as the kernel takes at once.
    int32_t computed(int64_t bytes) {
        computed_ += bytes;
        bool moved = true;
        int32_t status = PENDING;
        while (status == PENDING && moved) status = move(&moved);
        return status;
    }
    int32_t gather(char* x, int64_t bytes, char* const* parts, const int32_t* members, int n) {
        begin(members, n);
        if (!parts) exchanges_.erase(exchanges_.begin() + 1, exchanges_.end());
        for (Exchange& e : exchanges_) parts ? e.in[0] = {parts[e.member], bytes} : e.out[0] = {x, bytes};
        computed_ = x + bytes;
        return resume();
    }
    int32_t broadcast(char* x, int64_t bytes, bool first, const int32_t* members, int n) {
        begin(members, n);
        if (!first) exchanges_.erase(exchanges_.begin() + 1, exchanges_.end());
        for (Exchange& e : exchanges_) (first ? e.out[0] : e.in[0]) = {x, bytes};
        computed_ = x + bytes;
        return resume();
    }

    // Goes on with a collective of which everything is computed: until it is done, or for a while.
    int32_t resume() {
        const int64_t end = now_ms() + PATIENCE_MS;
        for (;;) {
            bool moved = false;
            const int32_t status = move(&moved);
            if (status != PENDING) return status;
            if (moved) continue;
            const int ready = wait_for_sockets((int)std::max<int64_t>(1, end - now_ms()));
            if (ready < 0 || (ready == 0 && now_ms() >= end)) return PENDING;
        }
    }

  private:
    struct Stretch {
        char* data;
        int64_t bytes;
    };
    // One member's part in a collective: what goes to it and what comes from it.
    struct Exchange {
        int fd, peer, member;
        Stretch out[2] = {}, in[2] = {};
        int64_t sent = 0, received = 0;
        int64_t out_bytes() const { return out[0].bytes + out[1].bytes; }
        int64_t in_bytes() const { return in[0].bytes + in[1].bytes; }
    };
    struct Sum {
        Stretch of;
        int64_t done, item;
        int32_t type;
        bool one_round;
    };

    int rank_, own_member_ = 0;
    int64_t one_round_bytes_;
    std::vector<int> fds_;
    Failure& failure_;
    std::vector<Exchange> exchanges_;
    std::vector<const void*> sources_, shifted_;
    std::vector<pollfd> polled_;
    std::unique_ptr<char[]> scratch_;
    int64_t scratch_bytes_ = 0;
    Sum sum_ = {};
    const char* computed_ = nullptr;  // up to here, of what the call is about

    // An exchange with every other member, the first member's first.
    void begin(const int32_t* members, int n) {
        exchanges_.clear();
        sources_.assign((size_t)n, nullptr);
        own_member_ = (int)(std::find(members, members + n, rank_) - members);
        for (int m = 0; m < n; ++m)
            if (m != own_member_) {
                exchanges_.emplace_back();
                exchanges_.back().fd = fds_[(size_t)members[m]];
                exchanges_.back().peer = members[m];
                exchanges_.back().member = m;
            }
        sum_ = {};
    }
    void reserve(int64_t bytes) {
        if (bytes <= scratch_bytes_) return;
        scratch_.reset(new char[(size_t)bytes]);
        scratch_bytes_ = bytes;
    }

    // What the sockets take and give at once, and what can be added up with it.
    int32_t move(bool* moved) {
        *moved = false;
        for (Exchange& e : exchanges_) {
            int error = 0;
            const int64_t in = pull(e, &error), out = in < 0 ? 0 : push(e, &error);
            if (in < 0 || out < 0) return failure_.of(e.peer, error);
            *moved = *moved || in > 0 || out > 0;
        }
        *moved = add_up() || *moved;
        return complete() ? DONE : PENDING;
    }
    int64_t computed_of(const Stretch& s) const {
        return s.bytes ? std::min(s.bytes, std::max<int64_t>(0, computed_ - s.data)) : 0;
    }
    // The first stretch going out as far as it is computed, and after it the second, which is our share, as far as it
    // is summed.
    int64_t sendable(const Exchange& e) const {
        const int64_t first = computed_of(e.out[0]);
        return first < e.out[0].bytes ? first : first + std::min(e.out[1].bytes, sum_.done);
    }
    // A little at a time, so that what the peer gets is still in the caches when it reads it.
    int64_t push(Exchange& e, int* error) {
        int64_t total = 0;
        for (const int64_t end = sendable(e); e.sent < end;) {
            const bool second = e.sent >= e.out[0].bytes;
            const int64_t before = second ? e.out[0].bytes : 0, stop = second ? end : std::min(end, e.out[0].bytes);
            const char* from = e.out[second].data + (e.sent - before);
            const int64_t n = send_some(e.fd, from, std::min(stop - e.sent, BUFFER), error);
            if (n < 0) return -1;
            e.sent += n, total += n;
            if (n == 0 || total >= BUFFER) break;
        }
        return total;
    }
    // A peer sends its second stretch only after it has our first: `in[1]`, which lies over it, may be filled.
    int64_t pull(Exchange& e, int* error) {
        int64_t total = 0;
        while (e.received < e.in_bytes()) {
            const bool second = e.received >= e.in[0].bytes;
            const int64_t at = e.received - (second ? e.in[0].bytes : 0);
            const int64_t n = receive_some(e.fd, e.in[second].data + at, e.in[second].bytes - at, error);
            if (n < 0) return -1;
            if (n == 0) break;
            e.received += n, total += n;
        }
        return total;
    }
    // Add up what all members' shares have so far, our own with it. In one round the sum replaces what is still to be
    // sent, so that it must have left as well.
    bool add_up() {
        if (sum_.done == sum_.of.bytes) return false;
        int64_t ready = computed_of(sum_.of);
        for (const Exchange& e : exchanges_) {
            ready = std::min(ready, e.received);
            if (sum_.one_round) ready = std::min(ready, e.sent);
        }
        ready -= ready % sum_.item;
        if (ready == sum_.done || (ready < sum_.of.bytes && ready - sum_.done < SUM_GRAIN)) return false;
        shifted_.resize(sources_.size());
        for (size_t m = 0; m < shifted_.size(); ++m) shifted_[m] = (const char*)sources_[m] + sum_.done;
        sum_members(sum_.type, sum_.of.data + sum_.done, nullptr, shifted_.data(), (int32_t)shifted_.size(),
                    (ready - sum_.done) / sum_.item);
        sum_.done = ready;
        return true;
    }

    bool complete() const {
        for (const Exchange& e : exchanges_)
            if (e.sent < e.out_bytes() || e.received < e.in_bytes()) return false;
        return sum_.done == sum_.of.bytes;
    }
    int wait_for_sockets(int milliseconds) {
        polled_.clear();
        for (const Exchange& e : exchanges_) {
            const short events = (short)((e.sent < sendable(e) ? POLLOUT : 0) | (e.received < e.in_bytes() ? POLLIN : 0));
            if (events) polled_.push_back({e.fd, events, 0});
        }
        return poll(polled_.data(), (nfds_t)polled_.size(), milliseconds);
    }
};

}  // namespace seesaw::tcp
