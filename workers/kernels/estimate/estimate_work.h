// One call of the estimate: its chunks of keys, its packed queries, and the blocks of keys read from pages.
#pragma once

#include <omp.h>

#include <algorithm>
#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "estimate/estimate.h"

namespace longreach::estimate {
constexpr std::int64_t kChunk = 4096;  // keys; a multiple of kKeys

struct Chunk {
    int region;              // 0 inter, 1 succ, 2 intra
    std::int32_t low, high;  // low .. high - 1
};

struct Free {
    void operator()(void* at) const { std::free(at); }
};
template <class T> using Memory = std::unique_ptr<T[], Free>;

template <class T> Memory<T> allocate(std::size_t count) {
    void* at = std::aligned_alloc(64, (count * sizeof(T) + 63) / 64 * 64 + 64);
    if (at == nullptr) throw std::bad_alloc();
    return Memory<T>(static_cast<T*>(at));
}

// One call: what its parts share.
struct Work {
    const Args& args;
    const Engine& engine;
    int group, strips;  // heads of the KV head, strips of a head
    std::vector<Chunk> chunks;
    std::vector<Strip> packed;  // [3 regions][group][strips]
    Memory<char> memory;

    explicit Work(const Args& a) : args(a), engine(estimate::engine(a.path)) {
        group = int(a.heads / a.kv_heads);
        strips = int((a.num_rows + kRows - 1) / kRows);
        const std::int64_t step = std::max(kChunk, (2 * a.num_rows + kKeys - 1) / kKeys * kKeys);
        for (int region = 0; region < 3; ++region) {
            for (std::int64_t low = a.borders[region]; low < a.borders[region + 1];) {
                const std::int64_t high = std::min(a.borders[region + 1], (low / step + 1) * step);
                chunks.push_back({region, std::int32_t(low), std::int32_t(high)});
                low = high;
            }
        }
        pack();
    }

    // Padding after the last tile: AMX computes pairs of groups.
    std::size_t strip_bytes() const { return std::size_t(args.dim) * kRows * (engine.bfloat16 ? 2 : 4) + 1024; }
    std::size_t value_bytes() const { return engine.bfloat16 ? 2 : 4; }

    void pack() {
        const std::size_t bytes = strip_bytes();
        const std::size_t width = args.q_type == kFloat32 ? 4 : 2;
        packed.resize(3 * group * strips);
        memory = allocate<char>(bytes * packed.size());
        for (int region = 0; region < 3; ++region) {
            if (args.borders[region] == args.borders[region + 1]) continue;
            for (int i = 0; i < group * strips; ++i) {
                const int head = args.kv_head * group + i / strips, first = i % strips * kRows;
                const int rows = int(std::min<std::int64_t>(kRows, args.num_rows - first));
                const auto* q = static_cast<const char*>(args.q[2 - region]);
                Strip& one = packed[region * group * strips + i];
                char* to = memory.get() + bytes * (region * group * strips + i);
                engine.pack(to, q + (first * args.heads + head) * args.dim * width, args.q_type, args.heads * args.dim,
                            rows, int(args.dim));
                one.q = to;
                one.groups = (rows + kLanes - 1) / kLanes;
                one.first = args.rows[first];
                for (int r = 0; r < kRows; ++r) {
                    one.factor[r] = r < rows ? args.scales[first + r] * kLog2e : 0.0f;
                    one.positions[r] = r < rows ? args.rows[first + r] : -1;
                }
            }
        }
    }

    const Strip& strip(int region, int head, int index) const {
        return packed[(region * group + head) * strips + index];
    }
};

// Reads blocks of keys of one KV head; one reader per thread.
class Reader {
public:
    explicit Reader(const Work& work)
        : work_(work),
          args_(work.args),
          copied_(allocate<char>(2 * kKeys * work.args.dim * work.value_bytes())),
          scores_(allocate<float>(2 * kKeys * kRows)) {
        const std::size_t width = args_.kv_type == kFloat32 ? 4 : args_.kv_type == kBfloat16 ? 2 : 1;
        row_ = args_.dim * width;
        keys_ = static_cast<const char*>(args_.keys) + args_.kv_head * args_.key_head * std::int64_t(width);
        in_place_ = args_.kv_type == (work.engine.bfloat16 ? kBfloat16 : kFloat32);
        if (args_.kv_type == kInt8) given_scales_ = args_.key_scales + args_.kv_head * args_.key_scale_head;
    }

    // Calls use(low, block, number of the strip, masked scores, next) for all blocks and strips of a chunk; `use` has
    // the engine compute the scores that come next.
    template <class Use> void walk(const Chunk& chunk, const Use& use) {
        const int strips = work_.group * work_.strips, dim = int(args_.dim);
        const Strip* all = &work_.strip(chunk.region, 0, 0);
        float *now = scores_.get(), *later = now + kKeys * kRows;
        const Block* block = &range(chunk.low, std::min(chunk.high, chunk.low + kKeys));
        work_.engine.scores(now, all[0], *block, dim);
        for (std::int32_t low = chunk.low; low < chunk.high; low += kKeys) {
            const std::int32_t high = std::min(chunk.high, low + 2 * kKeys);
            const Block* following = nullptr;
            for (int at = 0; at < strips; ++at) {
                Next next{later, at + 1 < strips ? all + at + 1 : nullptr, block, dim, nullptr, 0};
                touch(next, low + kKeys + at * kKeys / strips, std::min(high, low + kKeys + (at + 1) * kKeys / strips));
                if (at + 1 == strips && low + kKeys < high) {
                    next.strip = all;
                    next.block = following = &range(low + kKeys, high);
                }
                use(low, *block, at, masked(now, all[at], *block), next);
                std::swap(now, later);
            }
            block = following;
        }
    }

    // Single keys, ascending, at most kKeys.
    const Block& gather(const std::int32_t* columns, int count) {
        turn();
        for (int i = 0; i < count; ++i) {
            block_->positions[i] = columns[i];
            copy(i, slot(columns[i]), 1);
        }
        close(count, columns[count - 1], false);
        return *block_;
    }

    // Masked scores of a strip with the block last read, [kKeys, kRows].
    const float* scores(const Strip& strip) {
        work_.engine.scores(scores_.get(), strip, *block_, int(args_.dim));
        return masked(scores_.get(), strip, *block_);
    }

private:
    std::int64_t slot(std::int32_t position) const {
        return args_.pages[position / args_.page_size] + position % args_.page_size;
    }

    const float* masked(float* s, const Strip& strip, const Block& block) const {
        if (block.count < kKeys || block.last > strip.first) work_.engine.mask(s, strip, block);
        return s;
    }

    // Has the engine prefetch keys low .. high - 1 as far as they are contiguous.
    void touch(Next& next, std::int32_t low, std::int32_t high) const {
        if (low >= high) return;
        const std::int64_t page = args_.page_size;
        next.ahead = keys_ + slot(low) * row_;
        next.bytes = int(std::min<std::int64_t>(high - low, page - low % page) * row_);
    }

    // Switches to the other block; the previous one stays valid.
    void turn() { block_ = block_ == blocks_ ? blocks_ + 1 : blocks_; }

    char* copied() const { return copied_.get() + (block_ - blocks_) * kKeys * args_.dim * work_.value_bytes(); }
    float* scales() { return scales_[block_ - blocks_]; }

    // Keys `low .. high - 1`, at most kKeys.
    const Block& range(std::int32_t low, std::int32_t high) {
        turn();
        const int count = high - low;
        std::int64_t slot = this->slot(low);
        const std::int64_t page = args_.page_size;
        bool together = in_place_ && count == kKeys;
        for (std::int64_t p = (low / page + 1) * page; together && p < high; p += page) {
            together = this->slot(std::int32_t(p)) == slot + (p - low);
        }
        for (int i = 0; i < count; ++i) block_->positions[i] = low + i;
        block_->keys = keys_ + slot * row_;
        if (!together) {
            for (int i = 0; i < count;) {
                const int n = int(std::min<std::int64_t>(count - i, page - (low + i) % page));
                copy(i, this->slot(low + i), n);
                i += n;
            }
        }
        close(count, high - 1, together);
        return *block_;
    }

    void copy(int to, std::int64_t slot, int count) {
        work_.engine.convert(copied() + to * args_.dim * work_.value_bytes(), keys_ + slot * row_, args_.kv_type,
                             count * args_.dim);
        if (given_scales_ != nullptr) std::memcpy(scales() + to, given_scales_ + slot, count * sizeof(float));
    }

    void close(int count, std::int32_t last, bool together) {
        block_->count = count;
        block_->last = last;
        block_->scales = given_scales_ != nullptr ? scales() : nullptr;
        if (together) return;
        block_->keys = copied();
        const std::size_t key = args_.dim * work_.value_bytes();
        std::memset(copied() + count * key, 0, (kKeys - count) * key);
        for (int i = count; i < kKeys; ++i) {
            block_->positions[i] = kNever;
            scales()[i] = 0.0f;
        }
    }

    const Work& work_;
    const Args& args_;
    Memory<char> copied_;
    Memory<float> scores_;
    std::int64_t row_ = 0;  // bytes of a key in the cache
    const char* keys_ = nullptr;
    const float* given_scales_ = nullptr;
    float scales_[2][kKeys] = {};
    bool in_place_ = false;
    Block blocks_[2] = {}, *block_ = blocks_;
};

// Calls `task(reader, i)` for every i below `count` with i % parts == part, part after part.
template <class Task> void parallel(const Work& work, int count, int parts, const Task& task) {
    const int threads = std::max(1, std::min(work.args.threads, (count + parts - 1) / parts));
    std::vector<std::unique_ptr<Reader>> readers;
    for (int i = 0; i < threads; ++i) readers.push_back(std::make_unique<Reader>(work));
#pragma omp parallel num_threads(threads)
    {
        work.engine.enter();
        for (int part = 0; part < parts; ++part) {
#pragma omp for schedule(dynamic)
            for (int i = part; i < count; i += parts) task(*readers[std::size_t(omp_get_thread_num())], i);
        }
        work.engine.leave();
    }
}

}  // namespace longreach::estimate
