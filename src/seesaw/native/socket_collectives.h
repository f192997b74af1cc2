// Collectives over connected sockets, one for each other rank.
//
// They run on the calling thread: one loop sends to and receives from all members at once. A member's *share* is what
// it adds up. In one round every member sends all it has to every other and adds up everything; in two rounds a member
// sends each other its share, adds up its own, and sends the sum to all. Sums follow the data as it arrives, and the
// second round of a prefix starts when it is summed: there is no barrier between the rounds.
//
// What is summed may still be in the making, in parts that all members have alike: begin a sum, say `computed` behind
// each part, and `resume`. Every member has a share of every part, so that both rounds of a part travel while the next
// ones are computed. On a connection the sum of a part follows the share of the next, which takes it along.
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

constexpr int PIECES = 8;                // stretches that a call of the kernel sends or receives
constexpr int64_t SUM_GRAIN = 16 << 10;  // sums wait for this much, but for the last piece of a share

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
        begin_all_reduce(x, &count, 1, type, members, n);
        computed_ = 1;
        return resume();
    }
    // Begins a sum of which nothing is computed yet: part i has `counts[i]` items, and lies behind the one before.
    void begin_all_reduce(char* x, const int64_t* counts, int parts, int32_t type, const int32_t* members, int n) {
        begin(members, n);
        int64_t bytes = 0, own_bytes = 0;
        sum_.type = type, sum_.item = sum_item_bytes(type);
        for (int i = 0; i < parts; ++i) bytes += counts[i] * sum_.item;
        sum_.one_round = n == 2 || bytes * (n - 1) * (n - 2) <= one_round_bytes_ * n;
        for (int i = 0; i < parts; x += counts[i++] * sum_.item) {
            parts_.push_back({x, counts[i] * sum_.item, i});
            own_.push_back(share(parts_.back(), own_member_, n));
            own_bytes += own_.back().bytes;
        }
        reserve((n - 1) * own_bytes);
        char* scratch = scratch_.get();
        for (Exchange& e : exchanges_) {
            sources_[(size_t)e.member] = scratch;
            for (int i = 0; i < parts; scratch += own_[(size_t)i++].bytes) {
                e.out.add(share(parts_[(size_t)i], e.member, n));
                e.in.add({scratch, own_[(size_t)i].bytes});
                if (!sum_.one_round && i > 0) add_sums(e, i - 1, n);
            }
            if (!sum_.one_round) add_sums(e, parts - 1, n);
        }
    }
    // One more part is there, and others will be; as much is sent as the kernel takes at once.
    int32_t computed() {
        ++computed_;
        for (Exchange& e : exchanges_) e.readable = true;
        bool moved = true;
        int32_t status = PENDING;
        while (status == PENDING && moved) status = move(&moved);
        return status == PENDING ? DONE : status;
    }
    // The last part is there.
    int32_t all_computed() {
        ++computed_;
        for (Exchange& e : exchanges_) e.readable = true;
        return resume();
    }
    int32_t gather(char* x, int64_t bytes, char* const* parts, const int32_t* members, int n) {
        begin(members, n, !parts);
        for (Exchange& e : exchanges_) parts ? e.in.add({parts[e.member], bytes}) : e.out.add({x, bytes});
        computed_ = 1;
        return resume();
    }
    int32_t broadcast(char* x, int64_t bytes, bool first, const int32_t* members, int n) {
        begin(members, n, !first);
        for (Exchange& e : exchanges_) (first ? e.out : e.in).add({x, bytes});
        computed_ = 1;
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
        int number = 0;       // of its part
        bool summed = false;  // it goes out as it is summed, not as it is computed
    };
    // What passes one way of a connection, one stretch behind the other, and how far that is.
    class Way {
      public:
        void add(Stretch s) {
            if (s.bytes) stretches_.push_back(s);
        }
        bool over() const { return at_ == stretches_.size(); }
        // Bytes of shares that have passed.
        int64_t shares() const { return shares_; }
        // What is next, `limit` bytes at most: of each stretch what is `ready`, up to the first that is not as a whole.
        template <class Ready>
        int next(iovec* pieces, int64_t limit, Ready ready) const {
            int n = 0;
            for (size_t i = at_; i < stretches_.size() && n < PIECES; ++i) {
                const Stretch& s = stretches_[i];
                const int64_t from = i == at_ ? passed_ : 0, to = std::min(ready(s), from + limit);
                if (to > from) pieces[n++] = {s.data + from, (size_t)(to - from)};
                if (to < s.bytes) break;
                limit -= to - from;
            }
            return n;
        }
        void pass(int64_t bytes) {
            while (bytes > 0) {
                const Stretch& s = stretches_[at_];
                const int64_t now = std::min(bytes, s.bytes - passed_);
                passed_ += now, bytes -= now;
                if (!s.summed) shares_ += now;
                if (passed_ == s.bytes) ++at_, passed_ = 0;
            }
        }

      private:
        std::vector<Stretch> stretches_;
        size_t at_ = 0;
        int64_t passed_ = 0, shares_ = 0;
    };
    // One member's part in a collective: what goes to it and what comes from it.
    struct Exchange {
        int fd, peer, member;
        Way out = {}, in = {};
        bool readable = true;  // it may be: nobody has looked since `poll` said so, or since the rank last computed
    };
    // How far our own shares are added up: those of the parts before `part`, and `done` bytes of it.
    struct Sum {
        int32_t type = 0;
        int64_t item = 1;
        bool one_round = false;
        int part = 0;
        int64_t done = 0, before = 0;  // `before`: bytes of our shares of the parts before
    };

    int rank_, own_member_ = 0;
    int64_t one_round_bytes_;
    std::vector<int> fds_;
    Failure& failure_;
    std::vector<Exchange> exchanges_;
    std::vector<Stretch> parts_, own_;  // of a sum, and our shares of them
    int computed_ = 0;                  // parts
    Sum sum_;
    std::vector<const char*> sources_;  // by member: its parts of our shares, in one piece
    std::vector<const void*> summands_;
    std::unique_ptr<char[]> scratch_;
    int64_t scratch_bytes_ = 0;
    std::vector<pollfd> polled_;

    // An exchange with every other member, the next one first, so that not all send to the same member at once; or with
    // the first member alone.
    void begin(const int32_t* members, int n, bool first_alone = false) {
        exchanges_.clear();
        parts_.clear();
        own_.clear();
        sources_.assign((size_t)n, nullptr);
        own_member_ = (int)(std::find(members, members + n, rank_) - members);
        for (int i = 1; i < n; ++i) {
            const int m = (own_member_ + i) % n;
            if (!first_alone || m == 0) exchanges_.push_back({fds_[(size_t)members[m]], members[m], m});
        }
        sum_ = {};
        computed_ = 0;
    }
    void reserve(int64_t bytes) {
        if (bytes <= scratch_bytes_) return;
        scratch_.reset(new char[(size_t)bytes]);
        scratch_bytes_ = bytes;
    }
    Stretch share(const Stretch& part, int member, int n) const {
        if (sum_.one_round) return part;
        const int64_t each = (part.bytes / sum_.item + n - 1) / n * sum_.item;
        const int64_t start = std::min(part.bytes, member * each);
        return {part.data + start, std::min(each, part.bytes - start), part.number};
    }
    // A peer sends its sums only after it has our share of the part: where they come in lies over it.
    void add_sums(Exchange& e, int part, int n) {
        Stretch ours = own_[(size_t)part], theirs = share(parts_[(size_t)part], e.member, n);
        ours.summed = theirs.summed = true;
        e.out.add(ours);
        e.in.add(theirs);
    }

    // What the sockets give at once, what can be added up with it, and what they take then: so the share of a part and
    // the sum of the one before, which are there at the same time, leave as one message.
    int32_t move(bool* moved) {
        *moved = false;
        int error = 0;
        for (Exchange& e : exchanges_) {
            const int64_t in = e.readable ? pull(e, &error) : 0;
            if (in < 0) return failure_.of(e.peer, error);
            *moved = *moved || in > 0;
        }
        *moved = add_up() || *moved;
        for (Exchange& e : exchanges_) {
            const int64_t out = push(e, &error);
            if (out < 0) return failure_.of(e.peer, error);
            *moved = *moved || out > 0;
        }
        return complete() ? DONE : PENDING;
    }
    // A little at a time, so that what the peer gets is still in the caches when it reads it.
    int next_out(const Exchange& e, iovec* pieces) const {
        return e.out.next(pieces, BUFFER, [this](const Stretch& s) -> int64_t {
            if (!s.summed) return s.number < computed_ ? s.bytes : 0;
            return s.number < sum_.part ? s.bytes : s.number == sum_.part ? sum_.done : 0;
        });
    }
    int64_t push(Exchange& e, int* error) {
        iovec pieces[PIECES];
        const int n = next_out(e, pieces);
        const int64_t sent = n ? send_some(e.fd, pieces, n, error) : 0;
        e.out.pass(sent);
        return sent;
    }
    int64_t pull(Exchange& e, int* error) {
        iovec pieces[PIECES];
        const int n = e.in.next(pieces, INT64_MAX / 2, [](const Stretch& s) { return s.bytes; });
        const int64_t received = n ? receive_some(e.fd, pieces, n, error) : 0;
        e.readable = false;
        e.in.pass(received);
        return received;
    }
    // Add up what all members' shares have so far, our own with it. In one round the sum replaces what is still to be
    // sent, so that it must have left as well.
    bool add_up() {
        bool added = false;
        for (; sum_.part < (int)own_.size(); ++sum_.part) {
            const Stretch& own = own_[(size_t)sum_.part];
            int64_t ready = sum_.part < computed_ ? own.bytes : 0;
            for (const Exchange& e : exchanges_) {
                ready = std::min(ready, e.in.shares() - sum_.before);
                if (sum_.one_round) ready = std::min(ready, e.out.shares() - sum_.before);
            }
            ready -= ready % sum_.item;
            const bool whole = sum_.part < computed_ && ready == own.bytes;
            if (!whole && ready - sum_.done < SUM_GRAIN) return added;
            add_up(own.data + sum_.done, sum_.before + sum_.done, ready - sum_.done);
            added = true;
            sum_.done = ready;
            if (!whole) return true;
            sum_.before += own.bytes;
            sum_.done = 0;
        }
        return added;
    }
    // `bytes` at `to`, of our shares those from `at` on.
    void add_up(char* to, int64_t at, int64_t bytes) {
        summands_.clear();
        for (const char* source : sources_) summands_.push_back(source ? source + at : to);
        sum_members(sum_.type, to, nullptr, summands_.data(), (int32_t)summands_.size(), bytes / sum_.item);
    }

    bool complete() const {
        for (const Exchange& e : exchanges_)
            if (!e.out.over() || !e.in.over()) return false;
        return sum_.part == (int)own_.size();
    }
    int wait_for_sockets(int milliseconds) {
        polled_.clear();
        for (const Exchange& e : exchanges_) {
            iovec pieces[PIECES];
            const short events = (short)((next_out(e, pieces) ? POLLOUT : 0) | (e.in.over() ? 0 : POLLIN));
            if (events) polled_.push_back({e.fd, events, 0});
        }
        const int ready = poll(polled_.data(), (nfds_t)polled_.size(), milliseconds);
        for (const pollfd& p : polled_)
            for (Exchange& e : exchanges_) e.readable = e.readable || (e.fd == p.fd && (p.revents & ~POLLOUT));
        return ready;
    }
};

}  // namespace seesaw::tcp
