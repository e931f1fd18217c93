// Scratch memory.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdlib>
#include <vector>

namespace longreach {

// Memory of one call, aligned to cache lines.
struct alignas(64) Line {
    char bytes[64];
};
using Lines = std::vector<Line>;
inline std::size_t lines_of(std::size_t bytes) { return (bytes + sizeof(Line) - 1) / sizeof(Line); }

// Memory of a thread, kept between calls; in huge pages where the system has them.
class Scratch {
public:
    ~Scratch() { std::free(base_); }
    // At least `bytes` on a cache line, of unspecified content; null when there is no room.
    char* get(std::size_t bytes) {
        constexpr std::size_t kHugePage = 2 << 20;
        if (bytes > size_) {
            std::free(base_);
            size_ = (bytes + kHugePage - 1) / kHugePage * kHugePage;
            base_ = static_cast<char*>(std::aligned_alloc(kHugePage, size_));
            if (base_ == nullptr) size_ = 0;
#if defined(MADV_HUGEPAGE)
            if (base_ != nullptr) madvise(base_, size_, MADV_HUGEPAGE);  // advice: it may fail
#endif
        }
        return base_;
    }
    void free_above(std::size_t bytes) {
        if (size_ <= bytes) return;
        std::free(base_);
        base_ = nullptr;
        size_ = 0;
    }

private:
    char* base_ = nullptr;
    std::size_t size_ = 0;
};

}  // namespace longreach
