// Streams of bytes over connected sockets: what the kernel takes or gives at once, and buffers for the rest.
#pragma once

#include <sys/socket.h>
#include <sys/uio.h>
#include <time.h>

#include <algorithm>
#include <cerrno>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <deque>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

namespace seesaw::tcp {

constexpr int CHANNELS = 2, LINKS = CHANNELS + 1;  // the last one is for collectives
constexpr int64_t BUFFER = 256 << 10;              // what the thread reads or writes at a time
constexpr int PATIENCE_MS = 500;                   // after which a wait returns to the caller

enum Status : int32_t { DONE = 0, PENDING = 1, MISMATCH = 2, CLOSED = 3, FAILED = 4 };

// Which peer a call failed with, and why: an error number, or -1 if it has closed the connection.
struct Failure {
    int peer = -1, error = 0;
    int32_t of(int with, int why) {
        peer = with, error = why;
        return why < 0 ? CLOSED : FAILED;
    }
};

inline int64_t now_ms() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000ll + t.tv_nsec / 1'000'000;
}

// Bytes between two offsets. The memory is not touched before it is used.
struct Buffer {
    std::unique_ptr<char[]> data{new char[(size_t)BUFFER]};
    int64_t begin = 0, end = 0;
    int64_t bytes() const { return end - begin; }
    int64_t room() const { return BUFFER - end; }
};

// One direction of a channel to or from a peer. The thread watches `watch_fd` for it while `armed`.
struct Direction {
    int fd = -1, watch_fd = -1, peer = -1;
    bool outgoing = false, armed = false, ended = false;
    int error = 0;  // an error number; -1: the peer has closed
    std::mutex mutex;
    std::condition_variable progress;
    std::deque<Buffer> queue;
    std::vector<Buffer> spare;  // emptied ones: touching new pages is slow
    int64_t queued = 0;
    bool claimed = false;  // incoming: a receiver reads for itself

    Buffer& back_with_room() {
        if (queue.empty() || queue.back().room() == 0) {
            if (spare.empty()) spare.emplace_back();
            queue.push_back(std::move(spare.back()));
            spare.pop_back();
        }
        return queue.back();
    }
    // `n` bytes of the first buffer have been used.
    void consume(int64_t n) {
        Buffer& first = queue.front();
        first.begin += n, queued -= n;
        if (first.bytes() > 0) return;
        first.begin = first.end = 0;
        spare.push_back(std::move(first));
        queue.pop_front();
    }
    void append(const char* data, int64_t bytes) {
        while (bytes > 0) {
            Buffer& buffer = back_with_room();
            const int64_t n = std::min(bytes, buffer.room());
            std::memcpy(buffer.data.get() + buffer.end, data, (size_t)n);
            buffer.end += n, queued += n, data += n, bytes -= n;
        }
    }
};

// Bytes sent of `n` pieces in a row; 0 if the kernel takes none now; -1 with `error` set: a number, or -1 if the peer
// has closed the connection.
inline int64_t send_some(int fd, iovec* pieces, int n, int* error) {
    msghdr message = {};
    message.msg_iov = pieces, message.msg_iovlen = (size_t)n;
    for (;;) {
        const ssize_t sent = ::sendmsg(fd, &message, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (sent >= 0) return sent;
        if (errno == EAGAIN || errno == EWOULDBLOCK) return 0;
        if (errno == EINTR) continue;
        *error = errno == EPIPE || errno == ECONNRESET ? -1 : errno;
        return -1;
    }
}
// The same of bytes received.
inline int64_t receive_some(int fd, iovec* pieces, int n, int* error) {
    msghdr message = {};
    message.msg_iov = pieces, message.msg_iovlen = (size_t)n;
    for (;;) {
        const ssize_t received = ::recvmsg(fd, &message, MSG_DONTWAIT);
        if (received > 0) return received;
        if (received < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) return 0;
        if (received < 0 && errno == EINTR) continue;
        *error = received == 0 || errno == ECONNRESET ? -1 : errno;
        return -1;
    }
}

}  // namespace seesaw::tcp
