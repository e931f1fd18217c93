// The arguments of whole layers in one call, mirrored in workers/kernels/abi.py.
//
// Legend: T rows, M hidden size, H and K query and KV heads of the shard, D head dim, E experts, k experts of a token.
#pragma once

#include "attention/attention.h"
#include "gemm/calls.h"

namespace longreach::gemm {

// One layer of one shard; weights are packed, vectors plain.
struct Layer {
    const bf16 *input_norm, *qkv_bias, *o_bias, *post_norm;
    Weights qkv[3];  // of queries, keys and values; where the others are null, the first has all
    Weights o, router, gate_up, down;
    const float* head_norm;  // [H + K, D], or null
    void *keys, *values;     // of the cache: [K, slots, D] bf16 or int8, heads `kv_head` values apart
    float *key_scales, *value_scales;  // [K, slots] of int8, heads `scale_head` apart; else null
    std::int64_t kv_head, scale_head, heads, kv_heads, dim, hidden_size;
    std::int64_t all_experts, first, experts, top_k, width;
    float eps;
    std::int32_t normalise;
};

// Rows of one sequence: `row` is the first of them.
struct Piece {
    attention::Args args;  // complete but for queries, keys, values and the result
    std::int64_t row;
};

// One step; all buffers are contiguous.
struct Step {
    bf16 *x, *out;                 // [T, M]: the residual stream, and what a half of a layer adds to it
    bf16 *normed, *qkv;            // [T, M], [T, H + 2 K, D]
    bf16 *far[2], *attended;       // [T, H, D]: queries rotated for `succ` and `inter`
    bf16 *logits, *rows;           // [T, E], [T k, M]
    std::int64_t* chosen;          // [T, k]
    float* weights;                // [T, k]
    const float *cos[3], *sin[3];  // [T, D / 2]: intra, succ, inter; null where no row needs it
    std::int64_t cos_stride[3];
    const std::int64_t* slots;  // [T]: where keys and values go
    Piece* pieces;
    std::int64_t tokens, num_pieces;
    std::int32_t path, threads;
};

}  // namespace longreach::gemm
