// Collectives and messages between ranks on separate networks, over TCP connections that are already set up.
//
// Between two ranks there is one connection per channel and one for collectives, so that none waits behind another.
//
// Collectives run on the calling thread: one poll loop sends to and receives from all members at once. A member's
// *share* is what it adds up. In one round every member sends all it has to every other and adds up everything; in two
// rounds a member sends each other its share, adds up its own, and sends the sum to all. Sums follow the data as it
// arrives, and the second round of a prefix starts when it is summed: there is no barrier between the rounds.
//
// Messages are streams of (length, bytes). `send` gives the kernel what it takes at once and queues a copy of the rest;
// one thread per rank drains the queues, and reads ahead what arrives while nobody receives, so that transfers overlap
// computation. A receiver that waits reads from the connection itself, straight into its tensor.

#if defined(__linux__)

#include <poll.h>
#include <signal.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <deque>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "socket_streams.h"
#include "sums.h"

namespace {

using namespace seesaw::tcp;
using seesaw::sum_item_bytes;
using seesaw::sum_members;

constexpr int64_t SUM_GRAIN = 16 << 10;  // sums wait for this much, but for the last piece
constexpr int PATIENCE_MS = 500;         // after which a wait returns to the caller

enum Status : int32_t { DONE = 0, PENDING = 1, MISMATCH = 2, CLOSED = 3, FAILED = 4 };

int64_t now_ms() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000ll + t.tv_nsec / 1'000'000;
}

// One member's part in a collective: what goes to it and what comes from it.
struct Exchange {
    int fd, peer, member;
    struct Stretch {
        char* data;
        int64_t bytes;
    };
    Stretch out[2] = {}, in[2] = {};
    int64_t sent = 0, received = 0;
    int64_t out_bytes() const { return out[0].bytes + out[1].bytes; }
    int64_t in_bytes() const { return in[0].bytes + in[1].bytes; }
};

class Mesh {
  public:
    // `fds`: a connection for every peer and link, -1 for the rank itself. They belong to the mesh from here on.
    Mesh(const int32_t* fds, int rank, int world, int64_t limit, int64_t one_round_bytes)
        : rank_(rank), world_(world), limit_(limit), one_round_bytes_(one_round_bytes), collective_fds_(world),
          outgoing_(world * CHANNELS), incoming_(world * CHANNELS) {
        epoll_ = epoll_create1(EPOLL_CLOEXEC);
        stop_ = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
        epoll_event event = {};
        event.events = EPOLLIN;
        epoll_ctl(epoll_, EPOLL_CTL_ADD, stop_, &event);
        for (int peer = 0; peer < world; ++peer) {
            const int32_t* links = fds + peer * LINKS;
            collective_fds_[peer] = links[CHANNELS];
            for (int c = 0; c < CHANNELS && peer != rank; ++c) {
                open_direction(outgoing(peer, c), links[c], dup(links[c]), peer, true);
                open_direction(incoming(peer, c), links[c], links[c], peer, false);
                arm(incoming(peer, c), true);
            }
        }
        sigset_t all, before;  // signals are for the caller's threads
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before);
        thread_ = std::thread([this] { serve(); });
        pthread_sigmask(SIG_SETMASK, &before, nullptr);
    }
    ~Mesh() {
        const uint64_t one = 1;
        (void)!write(stop_, &one, sizeof one);
        thread_.join();
        for (int peer = 0; peer < world_; ++peer) {
            if (peer == rank_) continue;
            close(collective_fds_[peer]);
            for (int c = 0; c < CHANNELS; ++c) close(outgoing(peer, c).watch_fd), close(incoming(peer, c).fd);
        }
        close(stop_);
        close(epoll_);
    }

    int failed_peer = -1, failed_error = 0;
    int64_t found_bytes = 0;

    // ---- messages -----------------------------------------------------------------------------------------------

    int32_t send(const char* x, int64_t bytes, int peer, int channel) {
        Direction& to = outgoing(peer, channel);
        std::unique_lock<std::mutex> lock(to.mutex);
        const auto room = [&] { return to.error || to.queued == 0 || to.queued + bytes <= limit_; };
        if (!to.progress.wait_for(lock, std::chrono::milliseconds(PATIENCE_MS), room)) return PENDING;
        if (to.error) return fail(peer, to.error);
        int64_t sent = 0;
        if (to.queued == 0 && (sent = send_at_once(to, x, bytes)) < 0) return fail(peer, to.error);
        const int64_t header = sizeof bytes;
        if (sent == header + bytes) return DONE;
        const int64_t of_header = std::min(sent, header);
        to.append((const char*)&bytes + of_header, header - of_header);
        to.append(x + sent - of_header, bytes - (sent - of_header));
        arm(to, true);
        return DONE;
    }

    // Begins to receive into `x`; `resume_receive` goes on while that is PENDING.
    int32_t receive(char* x, int64_t bytes, int peer, int channel) {
        receiving_ = {x, bytes, 0, -(int64_t)sizeof bytes, &incoming(peer, channel)};
        return resume_receive();
    }
    int32_t resume_receive() {
        Direction& from = *receiving_.from;
        if (!from.claimed) {
            std::unique_lock<std::mutex> lock(from.mutex);
            take_buffered(from);
            if (wants_more()) {
                from.claimed = true;
                arm(from, false);
            } else if (!from.armed && !from.ended) {
                arm(from, true);  // it had paused because too much was buffered
            }
        }
        if (!from.claimed) return mismatch() ? MISMATCH : DONE;
        const int32_t status = receive_directly(from);
        if (status == PENDING) return status;
        std::unique_lock<std::mutex> lock(from.mutex);
        from.claimed = false;
        if (!from.ended) arm(from, true);
        return status;
    }

    int32_t flush() {
        for (auto& to : outgoing_) {
            std::unique_lock<std::mutex> lock(to.mutex);
            const auto empty = [&] { return to.error || to.queued == 0; };
            if (!to.progress.wait_for(lock, std::chrono::milliseconds(PATIENCE_MS), empty)) return PENDING;
            if (to.error) return fail(to.peer, to.error);
        }
        return DONE;
    }

    // ---- collectives --------------------------------------------------------------------------------------------

    int32_t all_reduce(char* x, int64_t count, int32_t type, const int32_t* members, int n) {
        const int64_t item = sum_item_bytes(type), bytes = count * item;
        begin(members, n);
        const bool one_round = n == 2 || bytes * (n - 1) * (n - 2) <= one_round_bytes_ * n;
        const int64_t each = (count + n - 1) / n;
        const auto share = [&](int m) -> Exchange::Stretch {
            const int64_t start = one_round ? 0 : std::min(count, m * each);
            const int64_t end = one_round ? count : std::min(count, start + each);
            return {x + start * item, (end - start) * item};
        };
        const Exchange::Stretch own = share(own_member_);
        reserve((n - 1) * own.bytes);
        char* scratch = scratch_.get();
        for (Exchange& e : exchanges_) {
            e.out[0] = share(e.member);
            e.in[0] = {scratch, own.bytes};
            if (!one_round) e.out[1] = own, e.in[1] = share(e.member);
            sources_[e.member] = scratch;
            scratch += own.bytes;
        }
        sources_[own_member_] = own.data;
        sum_ = {own.data, own.bytes, 0, item, type, one_round};
        return resume();
    }
    int32_t gather(char* x, int64_t bytes, char* const* parts, const int32_t* members, int n) {
        begin(members, n);
        if (!parts) exchanges_.erase(exchanges_.begin() + 1, exchanges_.end());
        for (Exchange& e : exchanges_) parts ? e.in[0] = {parts[e.member], bytes} : e.out[0] = {x, bytes};
        return resume();
    }
    int32_t broadcast(char* x, int64_t bytes, bool first, const int32_t* members, int n) {
        begin(members, n);
        if (!first) exchanges_.erase(exchanges_.begin() + 1, exchanges_.end());
        for (Exchange& e : exchanges_) (first ? e.out[0] : e.in[0]) = {x, bytes};
        return resume();
    }

    // Goes on with a collective: until it is done, or for a while.
    int32_t resume() {
        const int64_t end = now_ms() + PATIENCE_MS;
        for (;;) {
            bool moved = false;
            for (Exchange& e : exchanges_) {
                int error = 0;
                const int64_t in = pull(e, &error), out = in < 0 ? 0 : push(e, &error);
                if (in < 0 || out < 0) return fail(e.peer, error);
                moved = moved || in > 0 || out > 0;
            }
            moved = add_up() || moved;
            if (complete()) return DONE;
            if (moved) continue;
            const int ready = wait_for_sockets((int)std::max<int64_t>(1, end - now_ms()));
            if (ready < 0 || (ready == 0 && now_ms() >= end)) return PENDING;
        }
    }

  private:
    struct Receiving {
        char* x = nullptr;
        int64_t bytes = 0, found = 0, at = 0;  // `at` counts from the header: it is negative before the body
        Direction* from = nullptr;
    };
    struct Sum {
        char* data;
        int64_t bytes, done, item;
        int32_t type;
        bool one_round;
    };

    int rank_, world_, epoll_, stop_, own_member_ = 0;
    int64_t limit_, one_round_bytes_;
    std::vector<int> collective_fds_;
    std::deque<Direction> outgoing_, incoming_;
    std::thread thread_;
    Receiving receiving_;
    std::vector<Exchange> exchanges_;
    std::vector<const void*> sources_, shifted_;
    std::vector<pollfd> polled_;
    std::unique_ptr<char[]> scratch_;
    int64_t scratch_bytes_ = 0;
    Sum sum_ = {};

    Direction& outgoing(int peer, int channel) { return outgoing_[(size_t)(peer * CHANNELS + channel)]; }
    Direction& incoming(int peer, int channel) { return incoming_[(size_t)(peer * CHANNELS + channel)]; }

    int32_t fail(int peer, int error) {
        failed_peer = peer, failed_error = error;
        return error < 0 ? CLOSED : FAILED;
    }

    // ---- messages: the calling thread ---------------------------------------------------------------------------

    void open_direction(Direction& d, int fd, int watch_fd, int peer, bool outgoing) {
        d.fd = fd, d.watch_fd = watch_fd, d.peer = peer, d.outgoing = outgoing;
    }
    // Have the thread watch a direction, or not; under its lock. Not watched means not in the set at all, for a
    // closed connection is always reported.
    void arm(Direction& d, bool on) {
        if (on == d.armed) return;
        epoll_event event = {};
        event.events = d.outgoing ? EPOLLOUT : EPOLLIN;
        event.data.ptr = &d;
        epoll_ctl(epoll_, on ? EPOLL_CTL_ADD : EPOLL_CTL_DEL, d.watch_fd, &event);
        d.armed = on;
    }
    // Header and body straight to the kernel; bytes taken, or -1 with `to.error` set.
    int64_t send_at_once(Direction& to, const char* x, int64_t bytes) {
        const int64_t header = sizeof bytes;
        iovec parts[2] = {{&bytes, (size_t)header}, {(void*)x, (size_t)bytes}};
        msghdr message = {};
        message.msg_iov = parts, message.msg_iovlen = bytes ? 2 : 1;
        ssize_t n;
        do n = sendmsg(to.fd, &message, MSG_NOSIGNAL | MSG_DONTWAIT);
        while (n < 0 && errno == EINTR);
        if (n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) n = 0;
        if (n < 0) to.error = errno == EPIPE || errno == ECONNRESET ? -1 : errno;
        return n;
    }
    bool mismatch() const { return receiving_.at >= 0 && receiving_.found != receiving_.bytes; }
    // Where the next bytes of the message go, and how many.
    iovec wanted() {
        Receiving& r = receiving_;
        const int64_t header = sizeof r.found;
        if (r.at < 0) return {(char*)&r.found + header + r.at, (size_t)-r.at};
        return {r.x + r.at, (size_t)(r.bytes - r.at)};
    }
    bool wants_more() const { return receiving_.at < receiving_.bytes && !mismatch(); }

    void take_buffered(Direction& from) {
        while (from.queued > 0 && wants_more()) {
            const Buffer& buffer = from.queue.front();
            const iovec to = wanted();
            const int64_t n = std::min((int64_t)to.iov_len, buffer.bytes());
            std::memcpy(to.iov_base, buffer.data.get() + buffer.begin, (size_t)n);
            receiving_.at += n;
            from.consume(n);
        }
    }
    int32_t receive_directly(Direction& from) {
        const int64_t end = now_ms() + PATIENCE_MS;
        while (wants_more()) {
            const iovec to = wanted();
            if (from.ended) return fail(from.peer, from.error);
            const int64_t n = receive_some(from.fd, (char*)to.iov_base, (int64_t)to.iov_len, &from.error);
            if (n < 0) {
                from.ended = true;
                return fail(from.peer, from.error);
            }
            receiving_.at += n;
            if (n > 0) continue;
            pollfd waiting = {from.fd, POLLIN, 0};
            const int ready = poll(&waiting, 1, (int)std::max<int64_t>(1, end - now_ms()));
            if (ready < 0 || (ready == 0 && now_ms() >= end)) return PENDING;
        }
        return mismatch() ? MISMATCH : DONE;
    }

    // ---- messages: the thread -----------------------------------------------------------------------------------

    void serve() {
        epoll_event events[32];
        for (;;) {
            const int n = epoll_wait(epoll_, events, 32, -1);
            for (int i = 0; i < n; ++i) {
                if (events[i].data.ptr == nullptr) return;
                Direction& d = *(Direction*)events[i].data.ptr;
                std::lock_guard<std::mutex> lock(d.mutex);
                if (!d.armed) continue;  // taken out of the set while the event was on its way
                d.outgoing ? drain(d) : read_ahead(d);
            }
        }
    }
    void drain(Direction& to) {
        const Buffer& part = to.queue.front();
        const int64_t n = send_some(to.fd, part.data.get() + part.begin, part.bytes(), &to.error);
        if (n < 0) {
            to.queue.clear();
            to.queued = 0;
        } else {
            to.consume(n);
        }
        if (to.queue.empty()) arm(to, false);
        to.progress.notify_all();
    }
    void read_ahead(Direction& from) {
        Buffer& buffer = from.back_with_room();
        const int64_t n = receive_some(from.fd, buffer.data.get() + buffer.end, buffer.room(), &from.error);
        if (n < 0) from.ended = true;
        else buffer.end += n, from.queued += n;
        if (from.ended || from.queued >= limit_) arm(from, false);
    }

    // ---- collectives --------------------------------------------------------------------------------------------

    // An exchange with every other member, the first member's first.
    void begin(const int32_t* members, int n) {
        exchanges_.clear();
        sources_.assign((size_t)n, nullptr);
        own_member_ = (int)(std::find(members, members + n, rank_) - members);
        for (int m = 0; m < n; ++m)
            if (m != own_member_) {
                exchanges_.emplace_back();
                exchanges_.back().fd = collective_fds_[members[m]];
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
    // The second stretch going out is our share as far as it is summed.
    int64_t sendable(const Exchange& e) const { return e.out[0].bytes + std::min(e.out[1].bytes, sum_.done); }

    // A little at a time, so that what the peer gets is still in the caches when it reads it.
    int64_t push(Exchange& e, int* error) {
        int64_t total = 0;
        while (e.sent < sendable(e)) {
            const bool second = e.sent >= e.out[0].bytes;
            const int64_t at = e.sent - (second ? e.out[0].bytes : 0);
            const int64_t end = second ? std::min(e.out[1].bytes, sum_.done) : e.out[0].bytes;
            const int64_t n = send_some(e.fd, e.out[second].data + at, std::min(end - at, BUFFER), error);
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
    // Add up what all members' shares have so far. In one round the sum replaces what is still to be sent, so that
    // it must have left as well.
    bool add_up() {
        if (sum_.done == sum_.bytes) return false;
        int64_t ready = sum_.bytes;
        for (const Exchange& e : exchanges_) {
            ready = std::min(ready, e.received);
            if (sum_.one_round) ready = std::min(ready, e.sent);
        }
        ready -= ready % sum_.item;
        if (ready == sum_.done || (ready < sum_.bytes && ready - sum_.done < SUM_GRAIN)) return false;
        shifted_.resize(sources_.size());
        for (size_t m = 0; m < shifted_.size(); ++m) shifted_[m] = (const char*)sources_[m] + sum_.done;
        sum_members(sum_.type, sum_.data + sum_.done, nullptr, shifted_.data(), (int32_t)shifted_.size(),
                    (ready - sum_.done) / sum_.item);
        sum_.done = ready;
        return true;
    }

    bool complete() const {
        for (const Exchange& e : exchanges_)
            if (e.sent < e.out_bytes() || e.received < e.in_bytes()) return false;
        return sum_.done == sum_.bytes;
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

}  // namespace

extern "C" {

// Links per pair of ranks that `seesaw_tcp_open` wants.
int32_t seesaw_tcp_links() { return LINKS; }

// A mesh over `fds[world][links]`, non-blocking or not, which it closes in the end; -1 for `rank` itself. `limit` is how
// many bytes each direction of a channel buffers. Sums whose second round would take longer than the time of
// `one_round_bytes` on the wire saves are made in one.
void* seesaw_tcp_open(const int32_t* fds, int32_t rank, int32_t world, int64_t limit, int64_t one_round_bytes) {
    return new Mesh(fds, rank, world, limit, one_round_bytes);
}
void seesaw_tcp_close(void* mesh) { delete (Mesh*)mesh; }

// Why a call answered CLOSED, FAILED or MISMATCH.
int32_t seesaw_tcp_failed_peer(void* mesh) { return ((Mesh*)mesh)->failed_peer; }
int32_t seesaw_tcp_failed_error(void* mesh) { return ((Mesh*)mesh)->failed_error; }

int32_t seesaw_tcp_all_reduce(void* mesh, void* x, int64_t count, int32_t type, const int32_t* members, int32_t n) {
    return ((Mesh*)mesh)->all_reduce((char*)x, count, type, members, n);
}
int32_t seesaw_tcp_gather(void* mesh, void* x, int64_t bytes, char* const* parts, const int32_t* members, int32_t n) {
    return ((Mesh*)mesh)->gather((char*)x, bytes, parts, members, n);
}
int32_t seesaw_tcp_broadcast(void* mesh, void* x, int64_t bytes, int32_t first, const int32_t* members, int32_t n) {
    return ((Mesh*)mesh)->broadcast((char*)x, bytes, first != 0, members, n);
}
// Goes on with a collective that answered PENDING.
int32_t seesaw_tcp_resume(void* mesh) { return ((Mesh*)mesh)->resume(); }

// PENDING: nothing was sent for want of room; call again.
int32_t seesaw_tcp_send(void* mesh, const void* x, int64_t bytes, int32_t peer, int32_t channel) {
    return ((Mesh*)mesh)->send((const char*)x, bytes, peer, channel);
}
int32_t seesaw_tcp_receive(void* mesh, void* x, int64_t bytes, int32_t peer, int32_t channel) {
    return ((Mesh*)mesh)->receive((char*)x, bytes, peer, channel);
}
int32_t seesaw_tcp_resume_receive(void* mesh) { return ((Mesh*)mesh)->resume_receive(); }

// PENDING: call again.
int32_t seesaw_tcp_flush(void* mesh) { return ((Mesh*)mesh)->flush(); }

}  // extern "C"

#endif  // __linux__
