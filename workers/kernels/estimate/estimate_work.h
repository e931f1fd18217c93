// One call of the estimate: its chunks of keys, its packed queries, and the blocks of keys read from pages.
#pragma once

#include <omp.h>

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <memory>
#include <vector>

#include "estimate/estimate.h"
#include "memory.h"

namespace longreach::estimate {
using attention::type_bytes;
constexpr std::int64_t kChunk = 4096;  // keys; a multiple of kKeys

struct Chunk {
    int region;              // 0 inter, 1 succ, 2 intra
    std::int32_t low, high;  // low .. high - 1
};

// One call: what its parts share.
struct Work {
    const Args& args;
    const Engine& engine;
    const int group, strips;  // heads of the KV head, strips of a head
    std::vector<Chunk> chunks;
    std::vector<Strip> packed;  // [3 regions][group][strips]
    Lines queries;              // of the strips

    explicit Work(const Args& a)
        : args(a),
          engine(estimate::engine(a.path)),
          group(int(a.heads / a.kv_heads)),
          strips(int((a.num_rows + kRows - 1) / kRows)),
          packed(3 * group * strips) {
        const std::int64_t step = std::max(kChunk, (2 * a.num_rows + kKeys - 1) / kKeys * kKeys);
        // padding after the last tile: AMX computes pairs of groups
        const std::size_t lines = lines_of(a.dim * kRows * type_bytes(engine.type) + 1024);
        queries.resize(lines * packed.size());
        for (int region = 0; region < 3; ++region) {
            for (std::int64_t low = a.borders[region]; low < a.borders[region + 1];) {
                const std::int64_t high = std::min(a.borders[region + 1], (low / step + 1) * step);
                chunks.push_back({region, std::int32_t(low), std::int32_t(high)});
                low = high;
            }
            if (a.borders[region] == a.borders[region + 1]) continue;
            for (int i = 0; i < group * strips; ++i) {
                const int at = region * group * strips + i;
                pack(packed[at], queries[at * lines].bytes, a.q[2 - region], i / strips, i % strips * kRows);
            }
        }
    }

    // The strips of a region: [group][strips].
    const Strip* of(int region) const { return &packed[region * group * strips]; }

private:
    // Rows of the `head`-th query head of the KV head, from row `first` on.
    void pack(Strip& one, char* to, const void* q, int head, int first) const {
        const std::int64_t from = (first * args.heads + args.kv_head * group + head) * args.dim;
        const int rows = int(std::min<std::int64_t>(kRows, args.num_rows - first));
        engine.pack(to, static_cast<const char*>(q) + from * type_bytes(args.q_type), args.q_type,
                    args.heads * args.dim, rows, int(args.dim));
        one.q = to;
        one.groups = (rows + kLanes - 1) / kLanes;
        one.first = args.rows[first];
        for (int r = 0; r < kRows; ++r) {
            one.factor[r] = r < rows ? args.scales[first + r] * kLog2e : 0.0f;
            one.positions[r] = r < rows ? args.rows[first + r] : -1;
        }
    }
};

// Reads blocks of keys of one KV head; one reader per thread.
class Reader {
public:
    explicit Reader(const Work& work)
        : work_(work),
          args_(work.args),
          row_(args_.dim * type_bytes(args_.kv_type)),
          key_(args_.dim * type_bytes(work.engine.type)),
          keys_(static_cast<const char*>(args_.keys) + args_.kv_head * args_.key_head * type_bytes(args_.kv_type)),
          scales_(args_.kv_type == kInt8 ? args_.key_scales + args_.kv_head * args_.key_scale_head : nullptr),
          copies_(lines_of(2 * kKeys * key_)),
          scores_(lines_of(2 * kKeys * kRows * sizeof(float))) {
        for (int i = 0; i < 2; ++i) blocks_[i].copy = copies_[0].bytes + i * kKeys * key_;
    }

    // Calls use(low, block, number of the strip, strip, masked scores, next) for all blocks and strips of a chunk; `use`
    // has the engine compute the scores that come next.
    template <class Use> void walk(const Chunk& chunk, const Use& use) {
        const int strips = work_.group * work_.strips, dim = int(args_.dim);
        const Strip* all = work_.of(chunk.region);
        float *now = scores(), *later = now + kKeys * kRows;
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
                use(low, *block, at, all[at], masked(now, all[at], *block), next);
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
        pad(count);
        return *block_;
    }

    // Masked scores of a strip with the block last read, [kKeys, kRows].
    const float* scores(const Strip& strip) {
        work_.engine.scores(scores(), strip, *block_, int(args_.dim));
        return masked(scores(), strip, *block_);
    }

private:
    struct Buffered : Block {
        char* copy;  // [kKeys, D] in the type of the engine
        float copied_scales[kKeys];
    };

    float* scores() { return reinterpret_cast<float*>(scores_.data()); }

    std::int64_t slot(std::int64_t position) const {
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

    // Keys `low .. high - 1`, at most kKeys.
    const Block& range(std::int32_t low, std::int32_t high) {
        turn();
        const int count = high - low;
        const std::int64_t page = args_.page_size, first = slot(low);
        bool together = args_.kv_type == work_.engine.type && count == kKeys;
        for (std::int64_t p = (low / page + 1) * page; together && p < high; p += page) {
            together = slot(p) == first + (p - low);
        }
        for (int i = 0; i < count; ++i) block_->positions[i] = low + i;
        if (together) {
            block_->keys = keys_ + first * row_;
            block_->scales = nullptr;
            block_->count = count;
            block_->last = high - 1;
            return *block_;
        }
        for (int i = 0; i < count;) {
            const int n = int(std::min<std::int64_t>(count - i, page - (low + i) % page));
            copy(i, slot(low + i), n);
            i += n;
        }
        pad(count);
        return *block_;
    }

    void copy(int to, std::int64_t slot, int count) {
        work_.engine.convert(block_->copy + to * key_, keys_ + slot * row_, args_.kv_type, count * args_.dim);
        if (scales_ != nullptr) std::memcpy(block_->copied_scales + to, scales_ + slot, count * sizeof(float));
    }

    // Completes a block of `count` copied keys.
    void pad(int count) {
        block_->keys = block_->copy;
        block_->scales = scales_ != nullptr ? block_->copied_scales : nullptr;
        block_->count = count;
        block_->last = block_->positions[count - 1];
        std::memset(block_->copy + count * key_, 0, (kKeys - count) * key_);
        std::fill(block_->positions + count, block_->positions + kKeys, kNever);
        std::fill(block_->copied_scales + count, block_->copied_scales + kKeys, 0.0f);
    }

    const Work& work_;
    const Args& args_;
    const std::size_t row_, key_;  // bytes of a key in the cache and in the type of the engine
    const char* keys_;
    const float* scales_;
    Lines copies_, scores_;  // of two blocks each
    Buffered blocks_[2] = {}, *block_ = blocks_;
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
