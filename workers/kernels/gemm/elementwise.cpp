// Row operations in bfloat16, computed in float32 and rounded once: norms, rotation, routing. One source is compiled
// for each instruction set; sums run in 16 fixed lanes, so that a row's result does not depend on the rows beside it.
#include "gemm/calls.h"

#include <cmath>

#define INLINE __attribute__((always_inline)) inline

namespace longreach {
namespace gemm {
namespace {

constexpr long kLanes = 16;
constexpr long kSerial = 1L << 14;  // values below which threads cost more than they save

INLINE float inverse_rms(const float* lanes, long n, float eps) {
    float sum = 0.0f;
    for (long l = 0; l < kLanes; ++l) sum += lanes[l];
    return 1.0f / std::sqrt(sum / float(n) + eps);
}

INLINE void norm_row(const NormCall& call, long token) {
    const bf16* x = call.x + token * call.stride;
    bf16* out = call.out + token * call.size;
    float lanes[kLanes] = {};
    for (long i = 0; i < call.size; i += kLanes) {
        for (long l = 0; l < kLanes; ++l) lanes[l] += widen(x[i + l]) * widen(x[i + l]);
    }
    const float factor = inverse_rms(lanes, call.size, call.eps);
    for (long i = 0; i < call.size; ++i) out[i] = narrow(widen(x[i]) * factor * widen(call.weight[i]));
}

INLINE void rotate_row(const RotateCall& call, long token) {
    const long dim = call.dim, half = dim / 2;
    const float *cos = call.cos + token * call.cos_stride, *sin = call.sin + token * call.cos_stride;
    for (long head = 0; head < call.heads; ++head) {
        const bf16* x = call.x + token * call.row_stride + head * call.head_stride;
        bf16* out = call.out + token * call.out_row_stride + head * call.out_head_stride;
        float wide[kMaxDim], lanes[kLanes] = {};
        for (long i = 0; i < dim; ++i) wide[i] = widen(x[i]);
        if (call.weight != nullptr) {
            for (long i = 0; i < dim; i += kLanes) {
                for (long l = 0; l < kLanes; ++l) lanes[l] += wide[i + l] * wide[i + l];
            }
            const float factor = inverse_rms(lanes, dim, call.eps);
            const float* weight = call.weight + head * dim;
            for (long i = 0; i < dim; ++i) wide[i] = wide[i] * factor * weight[i];
        }
        for (long i = 0; i < half; ++i) {
            out[i] = narrow(wide[i] * cos[i] - wide[half + i] * sin[i]);
            out[half + i] = narrow(wide[half + i] * cos[i] + wide[i] * sin[i]);
        }
    }
}

// The k largest, the first of equals first. A key holds a logit in order-preserving form above its index, negated.
INLINE void route_row(const RouteCall& call, long token) {
    const long count = call.experts;
    const bf16* logits = call.logits + token * count;
    std::int32_t keys[kMaxExperts];
    for (long i = 0; i < count; ++i) {
        const std::int32_t bits = std::int16_t(logits[i]);
        const std::int32_t ordered = bits ^ (bits < 0 ? 0x7fff : 0);
        keys[i] = ordered * 65536 + std::int32_t(0xffff - i);
    }
    std::int64_t* chosen = call.chosen + token * call.top_k;
    float *weights = call.weights + token * call.top_k, sum = 0.0f;
    for (long k = 0; k < call.top_k; ++k) {
        std::int32_t best = INT32_MIN;
        for (long i = 0; i < count; ++i) best = keys[i] > best ? keys[i] : best;
        chosen[k] = 0xffff - (best & 0xffff);
        keys[chosen[k]] = INT32_MIN;
        weights[k] = std::exp(widen(logits[chosen[k]]) - widen(logits[chosen[0]]));
        sum += weights[k];
    }
    if (!call.normalise) {
        sum = 0.0f;
        for (long i = 0; i < count; ++i) sum += std::exp(widen(logits[i]) - widen(logits[chosen[0]]));
    }
    for (long k = 0; k < call.top_k; ++k) weights[k] /= sum;
}

#define COMPILED(row, Call)                                                                \
    void row##_portable(const Call& call, long token) { row(call, token); }                \
    LONGREACH_AVX2 void row##_avx2(const Call& call, long token) { row(call, token); }     \
    LONGREACH_AVX512 void row##_avx512(const Call& call, long token) { row(call, token); } \
    constexpr void (*row##_of[])(const Call&, long) = {row##_portable, row##_avx2, row##_avx512};

COMPILED(norm_row, NormCall)
COMPILED(rotate_row, RotateCall)
COMPILED(route_row, RouteCall)

template <typename Call> void every_token(const Call& call, void (*const* of)(const Call&, long), long values) {
    const auto row = of[call.path < kAvx512 ? call.path : kAvx512];
#pragma omp parallel for schedule(static) num_threads(call.threads) if (values > kSerial)
    for (long token = 0; token < call.tokens; ++token) row(call, token);
}

}  // namespace
}  // namespace gemm
}  // namespace longreach

using namespace longreach;
using namespace longreach::gemm;

// out = x / rms(x) * weight, row by row.
EXPORT int longreach_rms_norm(const NormCall* call) {
    every_token(*call, norm_row_of, call->tokens * call->size);
    return 0;
}

// Norm of every head (where there is a weight), then rotation of its two halves.
EXPORT int longreach_norm_rotate(const RotateCall* call) {
    every_token(*call, rotate_row_of, call->tokens * call->heads * call->dim);
    return 0;
}

// Softmax over the experts, the k largest of it, divided by their sum if asked.
EXPORT int longreach_route(const RouteCall* call) {
    every_token(*call, route_row_of, call->tokens * call->experts);
    return 0;
}
