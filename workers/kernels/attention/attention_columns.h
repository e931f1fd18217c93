// The columns of a work item: where their queries and results lie. Shared by the engines.
#pragma once

#include <cstring>

#include "attention/attention.h"

namespace longreach {
namespace attention {

inline float from_bfloat16(std::uint16_t x) {
    const std::uint32_t bits = std::uint32_t(x) << 16;
    float y;
    std::memcpy(&y, &bits, sizeof y);
    return y;
}

inline std::uint16_t to_bfloat16(float x) {  // nearest, ties to even
    std::uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return std::uint16_t(bits >> 16 | 0x40);
    return std::uint16_t((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

// Column `c` is row `c % rows` of the tile, of head `c / rows` of the item.
struct Columns {
    const Args& args;
    Item item{};

    int head(int c) const { return item.head + c / item.rows; }
    int row(int c) const { return item.row + c % item.rows; }
    const char* query(int c, int rotation) const {
        const std::int64_t at = row(c) * args.q_row[rotation] + head(c) * args.q_head[rotation];
        return static_cast<const char*>(args.q[rotation]) + at * type_bytes(args.q_type);
    }
    char* out(int c) const {
        const std::int64_t at = (row(c) * args.heads + head(c)) * args.dim;
        return static_cast<char*>(args.out) + at * type_bytes(args.q_type);
    }
    // Factor on the logits with log2(e), and position, of columns; those beyond the last see every key.
    void describe(int padded, float* scales, std::int32_t* positions) const {
        for (int c = 0; c < padded; ++c) {
            const bool real = c < item.columns();
            scales[c] = real ? args.scales[row(c)] * 1.44269504088896341f : 0.1f;
            positions[c] = real ? std::int32_t(args.start + row(c)) : kNever - 1;
        }
    }
};

}  // namespace attention
}  // namespace longreach
