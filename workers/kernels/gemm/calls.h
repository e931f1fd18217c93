// The arguments of the exported products and row operations, mirrored in workers/kernels/abi.py.
//
// Legend: T tokens, M hidden size, H heads, D head dim, I intermediate, E experts of the model, Er of the shard,
// k experts per token.
#pragma once

#include "gemm/panels.h"

namespace longreach::gemm {

constexpr long kMaxTopK = 128;  // experts of a token
constexpr long kMaxExperts = 4096;
constexpr long kMaxDim = 512;  // of a head that is rotated

// Rows of x are `stride` values apart, here and below.
struct LinearCall {
    const bf16 *x, *bias;  // [rows, k], [n] or null
    bf16* out;             // [rows, n], contiguous
    Weights weight;        // packed [n, k]
    std::int64_t rows, stride, n, k;
    std::int32_t path, threads;
};

struct NormCall {
    const bf16 *x, *weight;  // [T, M], [M]; M is a multiple of 16
    bf16* out;               // [T, M]
    bf16* delta;             // [T, M], contiguous: becomes x + delta, which is normed instead of x; or null
    std::int64_t tokens, stride, size;
    float eps;
    std::int32_t path, threads;
};

struct RotateCall {
    const bf16* x;           // [T, H, D], unit stride in D, which is a multiple of 32
    bf16* out;               // the same; may be x
    const float *cos, *sin;  // [T, D / 2], rows `cos_stride` apart
    const float* weight;     // [H, D], or null: no norm
    std::int64_t tokens, heads, dim, row_stride, head_stride, out_row_stride, out_head_stride, cos_stride;
    float eps;
    std::int32_t path, threads;
};

struct RouteCall {
    const bf16* logits;    // [T, E]
    std::int64_t* chosen;  // [T, k]
    float* weights;        // [T, k]
    std::int64_t tokens, experts, top_k;
    std::int32_t normalise, path, threads;
};

// The shard has Er `experts` from global id `first`.
struct ExpertsCall {
    const bf16* x;               // [T, M]
    const std::int64_t* chosen;  // [T, k] global ids
    const float* weights;        // [T, k]
    bf16 *rows, *out;            // [T k, M] of unspecified content, [T, M]
    Weights gate_up, down;       // packed [Er, 2 I, M] and [Er, M, I]
    std::int64_t tokens, stride, top_k, first, experts, hidden_size, width;
    std::int32_t path, threads;
};

EXPORT int longreach_linear(const LinearCall* call);
EXPORT int longreach_rms_norm(const NormCall* call);
EXPORT int longreach_norm_rotate(const RotateCall* call);
EXPORT int longreach_route(const RouteCall* call);
EXPORT int longreach_experts(const ExpertsCall* call);

}  // namespace longreach::gemm
