// The keys a work item visits, as blocks for an engine. The lists equal `AttentionPlan.tile_keys` in
// workers/attention/plan.py.
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "attention/attention.h"

namespace longreach::attention {

struct Range {
    std::int32_t low, high;  // low .. high - 1

    // Pairs of rows `first .. last` with these keys, causal.
    std::int64_t pairs(std::int64_t first, std::int64_t last) const {
        const std::int64_t whole = std::max<std::int64_t>(0, last - std::max<std::int64_t>(first, high - 1) + 1);
        const std::int64_t begin = std::max<std::int64_t>(first, low), end = std::min<std::int64_t>(last, high - 2);
        const std::int64_t ragged = begin <= end ? (begin + end + 2 - 2 * low) * (end - begin + 1) / 2 : 0;
        return whole * (high - low) + ragged;
    }
};

// Reads the key blocks of a plan; one stream per thread, whose memory is reused from item to item.
class KeyStream {
public:
    KeyStream(const Args& args, Arena& arena)
        : args_(args),
          row_(args.dim * type_bytes(args.kv_type)),
          gathered_(arena.take<char>(kPlaces * 2 * kGroup * row_)),
          gathered_scales_(arena.take<float>(kPlaces * 2 * kGroup)) {}

    void run(const Item& item, Engine& engine) {
        engine_ = &engine;
        const std::size_t bytes = type_bytes(args_.kv_type);
        keys_ = static_cast<const char*>(args_.keys) + item.kv_head * args_.key_head * bytes;
        values_ = static_cast<const char*>(args_.values) + item.kv_head * args_.value_head * bytes;
        if (args_.kv_type == kInt8) {
            key_scales_ = args_.key_scales + item.kv_head * args_.key_scale_head;
            value_scales_ = args_.value_scales + item.kv_head * args_.value_scale_head;
        }
        list(item);
        if (args_.visited != nullptr) count(item);

        const std::int64_t intra = args_.distance ? args_.start / args_.distance * args_.distance : 0;
        const std::int64_t succ = std::max<std::int64_t>(0, intra - args_.distance);
        const std::int64_t borders[4] = {0, succ, intra, args_.start + args_.length};
        auto column = columns_.cbegin();
        for (int region = 0; region < 3; ++region) {
            const auto low = std::int32_t(borders[region]), high = std::int32_t(borders[region + 1]);
            if (low >= high) continue;
            engine.rotate(2 - region);
            for (const Range& each : ranges_) range(std::max(each.low, low), std::min(each.high, high));
            for (; column != columns_.cend() && *column < high; ++column) {
                gather(args_.pages[*column / args_.page_size] + *column % args_.page_size, *column, 1);
            }
            close();
            flush();
        }
    }

private:
    static constexpr int kPlaces = kGroups + 1;

    // The visited ranges of the item, and the columns outside of them.
    void list(const Item& item) {
        const std::int64_t first = args_.start + item.first_row, last = first + item.rows - 1;
        ranges_.clear();
        columns_.clear();
        if (args_.offsets == nullptr) {
            ranges_.push_back({item.key_low, item.key_high});
            return;
        }
        const std::int32_t* offsets = args_.offsets[item.head];
        for (std::int64_t i = args_.num_offsets[item.head] - 1; i >= 0; --i) {  // far offsets are early keys
            const auto low = std::int32_t(std::max<std::int64_t>(0, first - offsets[2 * i + 1]));
            const auto high = std::int32_t(std::min(last + 1, last - offsets[2 * i] + 1));
            if (low >= high) continue;
            if (!ranges_.empty() && low <= ranges_.back().high) {
                ranges_.back().high = std::max(ranges_.back().high, high);
            } else {
                ranges_.push_back({low, high});
            }
        }
        const std::int32_t *column = args_.columns[item.head], *end = column + args_.num_columns[item.head];
        auto next = ranges_.cbegin();  // first range that ends after the column
        for (; column < end && *column <= last; ++column) {
            while (next != ranges_.cend() && next->high <= *column) ++next;
            if (next == ranges_.cend() || next->low > *column) columns_.push_back(*column);
        }
    }

    void count(const Item& item) {
        const std::int64_t first = args_.start + item.first_row, last = first + item.rows - 1;
        std::int64_t total = 0;
        for (const Range& each : ranges_) total += each.pairs(first, last);
        for (const std::int32_t column : columns_) total += Range{column, column + 1}.pairs(first, last);
        for (int i = 0; i < item.heads; ++i) __atomic_fetch_add(args_.visited + item.head + i, total, __ATOMIC_RELAXED);
    }

    // Adds the keys `low .. high - 1`, if any: groups that lie together as they are, copies of the others.
    void range(std::int32_t low, std::int32_t high) {
        const std::int64_t page = args_.page_size;
        while (low < high) {
            std::int64_t index = low / page;
            const std::int64_t slot = args_.pages[index] + low % page;
            std::int64_t n = std::min<std::int64_t>(high - low, page - low % page);
            while (low + n < high && args_.pages[index + 1] == args_.pages[index] + page) {
                ++index;
                n = std::min<std::int64_t>(high - low, n + page);
            }
            const std::int64_t whole = n / kGroup * kGroup;
            for (std::int64_t i = 0; i < whole; i += kGroup) {
                const std::int64_t at = slot + i;
                const auto position = std::int32_t(low + i);
                add({keys_ + at * row_, values_ + at * row_, key_scales_ ? key_scales_ + at : nullptr,
                     value_scales_ ? value_scales_ + at : nullptr, position, position + kGroup - 1},
                    nullptr);
            }
            if (whole < n) gather(slot + whole, std::int32_t(low + whole), int(n - whole));
            low += std::int32_t(n);
        }
    }

    void gather(std::int64_t slot, std::int32_t position, int n) {
        while (n > 0) {
            if (filled_ == 0) place_ = __builtin_ctz(~taken_);
            const int part = std::min(n, kGroup - filled_);
            char* k = gathered_ + (std::size_t(place_) * 2 * kGroup + filled_) * row_;
            std::memcpy(k, keys_ + slot * row_, part * row_);
            std::memcpy(k + kGroup * row_, values_ + slot * row_, part * row_);
            float* scales = gathered_scales_ + place_ * 2 * kGroup + filled_;
            for (int i = 0; i < part; ++i) {
                filled_positions_[filled_ + i] = position + i;
                if (key_scales_ != nullptr) {
                    scales[i] = key_scales_[slot + i];
                    scales[kGroup + i] = value_scales_[slot + i];
                }
            }
            filled_ += part;
            slot += part;
            position += part;
            n -= part;
            if (filled_ == kGroup) close();
        }
    }

    // Pads the group being gathered, if any, and adds it.
    void close() {
        if (filled_ == 0) return;
        char* k = gathered_ + std::size_t(place_) * 2 * kGroup * row_;
        char* v = k + kGroup * row_;
        float* scales = gathered_scales_ + place_ * 2 * kGroup;
        const auto [first, last] = std::minmax_element(filled_positions_, filled_positions_ + filled_);
        const bool small = args_.kv_type == kInt8;
        const Group group{k,
                          v,
                          small ? scales : nullptr,
                          small ? scales + kGroup : nullptr,
                          *first,
                          filled_ < kGroup ? kNever : *last};
        std::memset(k + filled_ * row_, 0, (kGroup - filled_) * row_);
        std::memset(v + filled_ * row_, 0, (kGroup - filled_) * row_);
        for (int i = filled_; i < kGroup; ++i) {
            filled_positions_[i] = kNever;
            scales[i] = scales[kGroup + i] = 0.0f;
        }
        filled_ = 0;
        if (block_.count == kGroups) flush();
        taken_ |= 1u << place_;
        add(group, filled_positions_);
    }

    void add(const Group& group, const std::int32_t* positions) {
        if (block_.count == kGroups) flush();
        std::int32_t* to = block_.positions + block_.count * kGroup;
        for (int i = 0; i < kGroup; ++i) to[i] = positions ? positions[i] : group.first + i;
        block_.groups[block_.count++] = group;
    }

    void flush() {
        if (block_.count > 0) engine_->block(block_);
        block_.count = 0;
        taken_ = 0;
    }

    const Args& args_;
    const std::size_t row_;  // bytes of a key
    Engine* engine_ = nullptr;
    std::vector<Range> ranges_;
    std::vector<std::int32_t> columns_;
    Block block_{};
    const char* keys_ = nullptr;  // of the item's KV head
    const char* values_ = nullptr;
    const float* key_scales_ = nullptr;
    const float* value_scales_ = nullptr;
    // gathered groups: those of the block, and one being filled
    char* gathered_;
    float* gathered_scales_;
    std::int32_t filled_positions_[kGroup];
    unsigned taken_ = 0;  // bit i: place i is part of the block
    int place_ = 0, filled_ = 0;
};

}  // namespace longreach::attention
