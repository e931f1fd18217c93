// Sums of attention over sampled rows of a cell: what the parts of the estimate share.
//
//   estimate_simd     vector code for any type (portable, AVX2 and AVX-512 from one source)
//   estimate_paths    the engines, products in bfloat16, and the engine of a path
//   estimate          checks, blocks of keys read from pages, threads, joining of parts
//   estimate_top      the largest of many scores
//
// Scores of a block are kept transposed, S^T = K Q^T: `kKeys` keys by `kRows` rows. So keys need no repacking, a vector
// holds neighbouring rows of one key, and maxima and sums of rows are sums of vectors.
#pragma once

#include <algorithm>
#include <cstdint>

#include "attention/attention.h"

namespace longreach::estimate {

using attention::kMasked, attention::kNever, attention::kUnseen;
constexpr float kHighest = 65536.0f;  // sum of a block's weights above which the maximum is searched again

constexpr int kKeys = 64;  // of a block
constexpr int kRows = 32;  // of a strip; fewer rows are padded
constexpr int kLanes = 16;  // rows of a vector
constexpr float kLog2e = 1.4426950408889634f;

// Mirrored by `EstimateArgs` in workers/kernels/abi.py. Strides count elements.
struct Args {
    const void* q[3];  // [R, H, D] under the rotations intra, succ, inter; contiguous, null: not needed
    const float* scales;  // [R], > 0
    const std::int32_t* rows;  // [R] positions, ascending; neighbours for the sums
    const void* keys;  // [K, slots, D]
    const float* key_scales;  // [K, slots], int8 only
    const std::int32_t* pages;  // first slot of every page
    std::int64_t key_head, key_scale_head;
    std::int64_t num_rows, heads, kv_heads, dim, page_size;
    std::int64_t borders[4];  // of the regions inter, succ, intra: 0, ..., S
    int kv_head, q_type, kv_type, threads, path;
};

// The pairs that a head keeps; empty for heads that are left out.
struct Selection {
    const std::int32_t* offsets;  // [n, 2] closed intervals
    const std::int32_t* columns;  // [m]
    std::int64_t num_offsets, num_columns;
};

// `kKeys` keys in the type of the engine; those from `count` on are zero, and their position is `kNever`.
struct Block {
    const void* keys;  // [kKeys, D]
    const float* scales;  // [kKeys], null unless int8
    alignas(64) std::int32_t positions[kKeys];
    int count;
    std::int32_t last;  // highest position
};

// One strip of rows of one head.
struct Strip {
    const void* q;  // packed by the engine
    int groups;  // vectors of rows in use
    alignas(64) float factor[kRows];  // of the logits, for powers of two; 0 for padding rows
    alignas(64) std::int32_t positions[kRows];  // -1 for padding rows
    std::int32_t first;  // lowest position
};

// Running softmax of the rows of a strip, and the share of it that is kept.
struct Running {
    alignas(64) float maximum[kRows];  // of the scores, without the factor
    alignas(64) float sum[kRows] = {};
    alignas(64) float kept[kRows] = {};
    Running() { std::fill_n(maximum, kRows, kUnseen); }
};

// Offsets of a strip with a block: offset (position of row 0) - (position of key 0) - (kKeys - 1) + i at index i.
constexpr int kSpan = kKeys + kRows;

// Scores to compute while those of the strip before are used; `strip` is null where none follow.
struct Next {
    float* s;  // [kKeys, kRows]
    const Strip* strip;
    const Block* block;
    int dim;
    const char* ahead;  // memory to prefetch, `bytes` of it
    int bytes;
};

struct Engine {
    Type type;  // of keys and queries: float32 or bfloat16
    void (*pack)(void* to, const void* q, int q_type, std::int64_t stride, int rows, int dim);
    void (*convert)(void* to, const void* from, int kv_type, std::int64_t count);
    void (*scores)(float* s, const Strip& strip, const Block& block, int dim);
    void (*mask)(float* s, const Strip& strip, const Block& block);
    // these three compute the next scores too
    void (*running)(Running& state, const float* s, const Strip& strip, const Next& next);
    // the same, and the sum over pairs whose bit is set: bit i % 32 of words[i / 32][row] for key i
    void (*kept)(Running& state, const float* s, const Strip& strip, const std::int32_t* words, const Next& next);
    // weights 2^(factor * s - lse): added to lanes [kKeys, at most kLanes], written to offsets [kSpan]
    void (*sums)(const float* s, const Strip& strip, const float* lse, float* lanes, float* offsets, const Next& next);
    // columns [kKeys]: sums of the lanes of each key
    void (*fold)(float* columns, const float* lanes);
    // sum of the weights of pairs whose bit is set: bit r of words[key] for row r
    double (*mass)(const float* s, const Strip& strip, const float* lse, const std::uint64_t* words);
    void (*enter)();  // on every thread, before the first block of a parallel region
    void (*leave)();  // and after the last
};

const Engine& engine(int path);  // one this CPU has

}  // namespace longreach::estimate
