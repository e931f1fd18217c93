// See attention_keys.h. The lists equal `AttentionPlan.tile_keys` in workers/attention/plan.py.
#include "attention/attention_keys.h"

#include <algorithm>
#include <cstring>

namespace longreach::attention {
namespace {

constexpr int kPlaces = kGroups + 1;

// Pairs of rows `first .. last` with keys `low .. high - 1`, causal.
std::int64_t pairs(std::int64_t first, std::int64_t last, std::int64_t low, std::int64_t high) {
    const std::int64_t whole = std::max<std::int64_t>(0, last - std::max(first, high - 1) + 1);
    const std::int64_t begin = std::max(first, low), end = std::min(last, high - 2);
    const std::int64_t ragged = begin <= end ? (begin + end + 2 - 2 * low) * (end - begin + 1) / 2 : 0;
    return whole * (high - low) + ragged;
}

}  // namespace

std::size_t KeyStream::bytes(const Args& args) {
    const std::size_t rows = std::size_t(kPlaces) * kGroup * 2;
    return rows * (args.dim * type_bytes(args.kv_type) + sizeof(float)) + 128;
}

void KeyStream::use(char* memory) {
    Arena arena{memory};
    gathered_ = arena.take<char>(std::size_t(kPlaces) * kGroup * 2 * row_);
    gathered_scales_ = arena.take<float>(std::size_t(kPlaces) * kGroup * 2);
}

void KeyStream::run(const Item& item, Engine& engine) {
    engine_ = &engine;
    keys_ = static_cast<const char*>(args_.keys) + item.kv_head * args_.key_head * type_bytes(args_.kv_type);
    values_ = static_cast<const char*>(args_.values) + item.kv_head * args_.value_head * type_bytes(args_.kv_type);
    if (args_.kv_type == kInt8) {
        key_scales_ = args_.key_scales + item.kv_head * args_.key_scale_head;
        value_scales_ = args_.value_scales + item.kv_head * args_.value_scale_head;
    }
    list(item);
    if (args_.visited != nullptr) count(item);

    const std::int64_t intra = args_.distance ? args_.start / args_.distance * args_.distance : 0;
    const std::int64_t succ = std::max<std::int64_t>(0, intra - args_.distance);
    const std::int64_t borders[4] = {0, succ, intra, args_.start + args_.length};
    const std::int32_t* columns = args_.offsets ? args_.columns[item.head] : nullptr;
    const std::int32_t* columns_end = args_.offsets ? columns + args_.num_columns[item.head] : nullptr;
    columns_end = std::upper_bound(columns, columns_end, item.key_high - 1);
    auto next = ranges_.cbegin();  // first range that ends after the column
    const std::int32_t page = std::int32_t(args_.page_size);
    for (int region = 0; region < 3; ++region) {
        const auto low = std::int32_t(borders[region]), high = std::int32_t(borders[region + 1]);
        if (low >= high) continue;
        engine.rotate(2 - region);
        for (const Range& each : ranges_) {
            if (std::max(each.low, low) < std::min(each.high, high)) {
                range(std::max(each.low, low), std::min(each.high, high));
            }
        }
        for (; columns < columns_end && *columns < high; ++columns) {
            while (next != ranges_.cend() && next->high <= *columns) ++next;
            if (next != ranges_.cend() && next->low <= *columns) continue;
            gather(args_.pages[*columns / page] + *columns % page, *columns, 1);
        }
        close();
        flush();
    }
}

void KeyStream::list(const Item& item) {
    const std::int64_t first = args_.start + item.row, last = first + item.rows - 1;
    ranges_.clear();
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
}

void KeyStream::count(const Item& item) {
    const std::int64_t first = args_.start + item.row, last = first + item.rows - 1;
    std::int64_t total = 0;
    for (const Range& each : ranges_) total += pairs(first, last, each.low, each.high);
    if (args_.offsets != nullptr) {
        const std::int32_t* columns = args_.columns[item.head];
        auto next = ranges_.cbegin();
        for (std::int64_t i = 0; i < args_.num_columns[item.head] && columns[i] <= last; ++i) {
            while (next != ranges_.cend() && next->high <= columns[i]) ++next;
            if (next != ranges_.cend() && next->low <= columns[i]) continue;
            total += last - std::max<std::int64_t>(first, columns[i]) + 1;
        }
    }
    for (int i = 0; i < item.heads; ++i) __atomic_fetch_add(args_.visited + item.head + i, total, __ATOMIC_RELAXED);
}

void KeyStream::range(std::int32_t low, std::int32_t high) {
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
        if (whole < n) gather(std::int32_t(slot + whole), std::int32_t(low + whole), int(n - whole));
        low += std::int32_t(n);
    }
}

void KeyStream::gather(std::int32_t slot, std::int32_t position, int n) {
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

void KeyStream::close() {
    if (filled_ == 0) return;
    char* k = gathered_ + std::size_t(place_) * 2 * kGroup * row_;
    char* v = k + kGroup * row_;
    float* scales = gathered_scales_ + place_ * 2 * kGroup;
    std::int32_t first = filled_positions_[0], last = first;
    for (int i = 1; i < filled_; ++i) {
        first = std::min(first, filled_positions_[i]);
        last = std::max(last, filled_positions_[i]);
    }
    if (filled_ < kGroup) {
        last = kNever;
        std::memset(k + filled_ * row_, 0, (kGroup - filled_) * row_);
        std::memset(v + filled_ * row_, 0, (kGroup - filled_) * row_);
        for (int i = filled_; i < kGroup; ++i) {
            filled_positions_[i] = kNever;
            scales[i] = scales[kGroup + i] = 0.0f;
        }
    }
    const bool small = args_.kv_type == kInt8;
    filled_ = 0;
    if (block_.count == kGroups) flush();
    taken_ |= 1u << place_;
    add({k, v, small ? scales : nullptr, small ? scales + kGroup : nullptr, first, last}, filled_positions_);
}

void KeyStream::add(const Group& group, const std::int32_t* positions) {
    if (block_.count == kGroups) flush();
    std::int32_t* to = block_.positions + block_.count * kGroup;
    for (int i = 0; i < kGroup; ++i) to[i] = positions ? positions[i] : group.first + i;
    block_.groups[block_.count++] = group;
}

void KeyStream::flush() {
    if (block_.count > 0) engine_->block(block_);
    block_.count = 0;
    taken_ = 0;
}

}  // namespace longreach::attention
