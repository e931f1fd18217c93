// The weight of a product: bfloat16, or codes of 4 or 8 bits with one scale, and perhaps one zero point, a group.
//
//     w[n, k] = scales[n, k / group] * (code[n, k] - zeros[n, k / group])
//
// Codes lie as bfloat16 values do (gemm.h), a byte or half a byte each. A line of 8-bit codes has 32 bytes; two lines
// of 4-bit codes share 32 bytes, the first of them in the low halves. Scales and zero points: strip after strip, group
// after group, 16 outputs each. Mirrored in workers/kernels/abi.py.
#pragma once

#include <algorithm>
#include <cstdint>

#include "gemm/gemm.h"

namespace longreach::gemm {

enum Kind : int { kPlain = 0, kInt4 = 1, kInt8 = 2, kFloat8 = 3 };

// `zeros` null: 8 for 4-bit codes, else 0.
struct Weights {
    const char *values, *scales, *zeros;
    std::int64_t group;                      // inputs that share a scale: a multiple of 16
    std::int32_t kind, scale_type, zero_type;  // a Kind, and a Type each
    std::int32_t reserved;

    long half_bytes() const { return kind == kPlain ? 4 : kind == kInt4 ? 1 : 2; }  // of a value
    long bytes(long count) const { return count * half_bytes() / 2; }               // of so many values
    long groups(long k) const { return (k + group - 1) / group; }

    // Matrix `index` of several [n, k].
    Weights matrix(long index, long n, long k) const {
        Weights one = *this;
        one.values += bytes(index * n * k);
        if (kind == kPlain) return one;
        const long numbers = index * n * groups(k);
        one.scales += numbers * size_of(scale_type);
        if (zeros) one.zeros += numbers * size_of(zero_type);
        return one;
    }

    static long size_of(int type) { return type == kFloat32 ? 4 : type == kFloat16 || type == kBfloat16 ? 2 : 1; }
};

// Tiles of one strip: `first` to first + count - 1 of k_tiles.
struct Tiles {
    long strip, k_tiles, first, count;
};

// At most kFewRows rows of a panel, over all of K.
struct FewRows {
    const Weights& weights;
    Tiles tiles;
    long rows;
    bool two;           // strips
    const float* sums;  // [groups, rows], null: no zeros
};
constexpr long kFewRows = 4;

// What one instruction set does with codes.
struct Decoder {
    // Codes (less 8 where they have 4 bits) as bfloat16, which is exact; or `weights`, rounded once.
    void (*codes)(bf16* out, const Weights& from, const Tiles& tiles);
    void (*weights)(bf16* out, const Weights& from, const Tiles& tiles);
    void (*scales)(GroupScales& out, const Weights& from, long strip, bool two, long groups, long group);
    // few rows times a panel by groups, as the above and `Engine::block` would compute it; null: not faster
    void (*few_rows)(float* c, const bf16* a, const FewRows& operands, Ahead ahead);
};

// The decoder of a path that the CPU has.
const Decoder& decoder(int path);
const Decoder& avx2_decoder();
const Decoder& avx512_decoder(Path path);  // and AMX

// Whether codes are multiplied as they are, and sums of groups scaled: exact weights, and the cheaper way for a row.
// Else weights are rounded to bfloat16: where groups end elsewhere than after a tile or half of one, and, on AMX, in
// groups below `kAmxGroup`, where to scale sums takes as long as the products. One way for all numbers of rows, so
// that a row's result does not depend on the rows beside it, but for those groups on AMX: a call of at most kStrip rows
// (`few`: it decodes) would spend twice its time on rounding.
constexpr long kAmxGroup = 128;
inline bool scales_sums(const Weights& weights, int path, bool few) {
    const bool ends_with_tiles = weights.group % kDepth == 0 || weights.group == kStrip;
    return ends_with_tiles && (path != kAmx || few || weights.group >= kAmxGroup);
}

// Parts of a tile that have scales of their own.
inline long parts_of_tile(const Weights& weights) { return weights.group == kStrip ? 2 : 1; }

// Tiles that share a scale; one where a tile has two.
inline long tiles_of_group(const Weights& weights) { return std::max(1L, weights.group / kDepth); }

// Sums of the values of rows in every group: out[group * rows + row].
void sum_groups(float* out, const bf16* a, long rows, long k_tiles, long group);

}  // namespace longreach::gemm
