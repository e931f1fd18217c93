// Messages of a link between neighbouring stages: a header and a tensor, through a connected stream socket.
//
// A decode step waits for both ends. In Python they take 0.2 ms each, since the weights of the step have driven the
// interpreter out of the caches; here they are one call. workers/transport/near.py has the twin, message for message.
#include "gemm/calls.h"

#include <cerrno>
#include <cstring>
#include <ctime>

#include <poll.h>
#include <sched.h>
#include <sys/socket.h>
#include <sys/uio.h>

#ifndef MSG_NOSIGNAL
#define MSG_NOSIGNAL 0
#endif

namespace longreach {
namespace {

constexpr std::int64_t kAlone = 30;   // microseconds; nothing else ran on the core while one yielded it
constexpr std::int64_t kHeader = 64;  // bytes, of which 16 are used: what follows stays aligned

struct Header {
    std::int64_t step, crc;
};

struct TakeCall {
    std::uint8_t* message;  // room for header and body, `bytes` of them
    std::int64_t bytes, step, seed, timeout_us;
    std::int64_t awake_from_us, awake_until_us;  // of the wait: this part of it is spent without sleeping
    std::int64_t* waited_us;                     // the result: until the first byte was here
    std::int32_t socket;
};

enum Status { kFits = 0, kLate = 1, kEnded = 2, kDiffers = 3 };  // or an errno, negative

// CRC-32 as zlib has it.
struct Table {
    std::uint32_t of[256];
    constexpr Table() : of() {
        for (std::uint32_t i = 0; i < 256; ++i) {
            std::uint32_t crc = i;
            for (int bit = 0; bit < 8; ++bit) crc = crc >> 1 ^ (crc & 1 ? 0xEDB88320u : 0);
            of[i] = crc;
        }
    }
};
constexpr Table kTable;

std::uint32_t crc32(std::uint32_t crc, const void* data, std::int64_t bytes) {
    const auto* at = static_cast<const std::uint8_t*>(data);
    crc = ~crc;
    for (std::int64_t i = 0; i < bytes; ++i) crc = kTable.of[(crc ^ at[i]) & 0xFF] ^ crc >> 8;
    return ~crc;
}

std::int64_t checksum(std::int64_t seed, const Header& header, const void* body, std::int64_t bytes) {
    return crc32(crc32(static_cast<std::uint32_t>(seed), &header, sizeof(std::int64_t)), body, bytes);
}

std::int64_t now_us() {
    timespec now{};
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1'000'000LL + now.tv_nsec / 1000;
}

int wait_for(std::int32_t socket, std::int64_t us) {
    pollfd wait{socket, POLLIN, 0};
#ifdef __linux__
    const timespec sleep{us / 1'000'000, us % 1'000'000 * 1000};
    return ppoll(&wait, 1, &sleep, nullptr);
#else
    return poll(&wait, 1, static_cast<int>(us / 1000 < 1'000'000 ? us / 1000 + 1 : 1'000'000));
#endif
}

}  // namespace
}  // namespace longreach

using namespace longreach;

// Wait for a message and read it whole. A status; with kDiffers it is in place for whoever wants to know why.
EXPORT int longreach_take(const TakeCall* call) {
    const std::int64_t began = now_us();
    std::int64_t awake_until = call->awake_until_us;
    for (std::int64_t have = 0; have < call->bytes;) {
        const ssize_t count = recv(call->socket, call->message + have, call->bytes - have, MSG_DONTWAIT);
        const std::int64_t now = now_us() - began;
        if (count > 0) {
            if (have == 0) *call->waited_us = now;
            have += count;
            continue;
        }
        if (count == 0) return kEnded;
        if (errno != EAGAIN && errno != EWOULDBLOCK && errno != EINTR) return -errno;
        if (now >= call->timeout_us) return kLate;
        if (now >= call->awake_from_us && now < awake_until) {
            sched_yield();  // whoever else wants this core has it, and then we sleep
            if (now_us() - began - now > kAlone) awake_until = 0;
            continue;
        }
        const std::int64_t wake = now < call->awake_from_us ? call->awake_from_us : call->timeout_us;
        const std::int64_t left = (wake < call->timeout_us ? wake : call->timeout_us) - now;
        if (wait_for(call->socket, left) < 0 && errno != EINTR) return -errno;
    }
    Header header;
    std::memcpy(&header, call->message, sizeof header);
    const bool due = header.step == call->step;
    const std::int64_t crc = checksum(call->seed, header, call->message + kHeader, call->bytes - kHeader);
    return due && header.crc == crc ? kFits : kDiffers;
}

// Write a message without waiting: the bytes of header and body that the socket took, or an errno, negative.
EXPORT std::int64_t longreach_send(const SendCall* call) {
    alignas(8) std::uint8_t start[kHeader] = {};
    Header header{call->step, 0};
    header.crc = checksum(call->seed, header, call->body, call->bytes);
    std::memcpy(start, &header, sizeof header);
    iovec parts[2] = {{start, kHeader}, {const_cast<std::uint8_t*>(call->body), static_cast<std::size_t>(call->bytes)}};
    msghdr message{};
    message.msg_iov = parts;
    message.msg_iovlen = 2;
    const ssize_t count = sendmsg(call->socket, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
    if (count >= 0) return count;
    return errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR ? 0 : -errno;
}

// Sizes of the structures, for the check that both sides agree.
EXPORT void longreach_link_sizes(std::int64_t* sizes) {
    sizes[0] = sizeof(TakeCall);
    sizes[1] = sizeof(SendCall);
}
