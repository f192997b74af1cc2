// Collectives and messages between ranks on separate networks, over TCP connections that are already set up.
//
// Between two ranks there is one connection per channel and one for collectives (`socket_collectives.h`), so that none
// waits behind another.
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

#include "recordable.h"
#include "socket_collectives.h"
#include "socket_streams.h"

namespace {

using namespace seesaw::tcp;

class Mesh {
  public:
    // `fds`: a connection for every peer and link, -1 for the rank itself. They belong to the mesh from here on.
    Mesh(const int32_t* fds, int rank, int world, int64_t limit, int64_t one_round_bytes)
        : collectives(rank, world, one_round_bytes, failure), rank_(rank), world_(world), limit_(limit),
          outgoing_(world * CHANNELS), incoming_(world * CHANNELS) {
        epoll_ = epoll_create1(EPOLL_CLOEXEC);
        stop_ = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
        epoll_event event = {};
        event.events = EPOLLIN;
        epoll_ctl(epoll_, EPOLL_CTL_ADD, stop_, &event);
        for (int peer = 0; peer < world; ++peer) {
            const int32_t* links = fds + peer * LINKS;
            collectives.connect(peer, links[CHANNELS]);
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
            for (int c = 0; c < CHANNELS; ++c) close(outgoing(peer, c).watch_fd), close(incoming(peer, c).fd);
        }
        close(stop_);
        close(epoll_);
    }

    Failure failure;
    Collectives collectives;

    // ---- the calling thread -------------------------------------------------------------------------------------

    int32_t send(const char* x, int64_t bytes, int peer, int channel) {
        Direction& to = outgoing(peer, channel);
        std::unique_lock<std::mutex> lock(to.mutex);
        const auto room = [&] { return to.error || to.queued == 0 || to.queued + bytes <= limit_; };
        if (!to.progress.wait_for(lock, std::chrono::milliseconds(PATIENCE_MS), room)) return PENDING;
        if (to.error) return failure.of(peer, to.error);
        int64_t sent = 0;
        if (to.queued == 0 && (sent = send_at_once(to, x, bytes)) < 0) return failure.of(peer, to.error);
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
            if (to.error) return failure.of(to.peer, to.error);
        }
        return DONE;
    }

  private:
    struct Receiving {
        char* x = nullptr;
        int64_t bytes = 0, found = 0, at = 0;  // `at` counts from the header: it is negative before the body
        Direction* from = nullptr;
    };

    int rank_, world_, epoll_, stop_;
    int64_t limit_;
    std::deque<Direction> outgoing_, incoming_;
    std::thread thread_;
    Receiving receiving_;

    Direction& outgoing(int peer, int channel) { return outgoing_[(size_t)(peer * CHANNELS + channel)]; }
    Direction& incoming(int peer, int channel) { return incoming_[(size_t)(peer * CHANNELS + channel)]; }

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
        iovec parts[2] = {{&bytes, sizeof bytes}, {(void*)x, (size_t)bytes}};
        return send_some(to.fd, parts, bytes ? 2 : 1, &to.error);
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
            iovec to = wanted();
            if (from.ended) return failure.of(from.peer, from.error);
            const int64_t n = receive_some(from.fd, &to, 1, &from.error);
            if (n < 0) {
                from.ended = true;
                return failure.of(from.peer, from.error);
            }
            receiving_.at += n;
            if (n > 0) continue;
            pollfd waiting = {from.fd, POLLIN, 0};
            const int ready = poll(&waiting, 1, (int)std::max<int64_t>(1, end - now_ms()));
            if (ready < 0 || (ready == 0 && now_ms() >= end)) return PENDING;
        }
        return mismatch() ? MISMATCH : DONE;
    }

    // ---- the thread ---------------------------------------------------------------------------------------------

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
        iovec piece = {part.data.get() + part.begin, (size_t)part.bytes()};
        const int64_t n = send_some(to.fd, &piece, 1, &to.error);
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
        iovec piece = {buffer.data.get() + buffer.end, (size_t)buffer.room()};
        const int64_t n = receive_some(from.fd, &piece, 1, &from.error);
        if (n < 0) from.ended = true;
        else buffer.end += n, from.queued += n;
        if (from.ended || from.queued >= limit_) arm(from, false);
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
int32_t seesaw_tcp_failed_peer(void* mesh) { return ((Mesh*)mesh)->failure.peer; }
int32_t seesaw_tcp_failed_error(void* mesh) { return ((Mesh*)mesh)->failure.error; }

int32_t seesaw_tcp_all_reduce(void* mesh, void* x, int64_t count, int32_t type, const int32_t* members, int32_t n) {
    return ((Mesh*)mesh)->collectives.all_reduce((char*)x, count, type, members, n);
}
// Begins a sum of which nothing is computed yet; its parts have `counts[i]` items.
void seesaw_tcp_begin_all_reduce(void* mesh, void* x, const int64_t* counts, int32_t parts, int32_t type,
                                 const int32_t* members, int32_t n) {
    ((Mesh*)mesh)->collectives.begin_all_reduce((char*)x, counts, parts, type, members, n);
}
// The next part is computed, which is not the last.
int32_t seesaw_tcp_computed(void* mesh) { return ((Mesh*)mesh)->collectives.computed(); }
// The last part is computed. Goes on as `seesaw_tcp_all_reduce` does.
int32_t seesaw_tcp_all_computed(void* mesh) { return ((Mesh*)mesh)->collectives.all_computed(); }
int32_t seesaw_tcp_gather(void* mesh, void* x, int64_t bytes, char* const* parts, const int32_t* members, int32_t n) {
    return ((Mesh*)mesh)->collectives.gather((char*)x, bytes, parts, members, n);
}
int32_t seesaw_tcp_broadcast(void* mesh, void* x, int64_t bytes, int32_t first, const int32_t* members, int32_t n) {
    return ((Mesh*)mesh)->collectives.broadcast((char*)x, bytes, first != 0, members, n);
}
// Goes on with a collective that answered PENDING, of which everything is computed.
int32_t seesaw_tcp_resume(void* mesh) { return ((Mesh*)mesh)->collectives.resume(); }

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

SEESAW_RECORDABLE(seesaw_tcp_all_reduce);
SEESAW_RECORDABLE(seesaw_tcp_begin_all_reduce);
SEESAW_RECORDABLE(seesaw_tcp_computed);
SEESAW_RECORDABLE(seesaw_tcp_all_computed);

}  // extern "C"

#endif  // __linux__
