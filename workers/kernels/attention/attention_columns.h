// The columns of a work item: where their queries and results lie. Shared by the engines.
#pragma once

#include "attention/attention.h"
#include "bfloat16.h"

namespace longreach::attention {

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

}  // namespace longreach::attention
