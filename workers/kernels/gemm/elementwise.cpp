// Row operations in bfloat16, computed in float32 and rounded once: norms, rotation, routing. One source is compiled
// for each instruction set; sums run in 16 fixed lanes, so that a row's result does not depend on the rows beside it.
#include "gemm/calls.h"

#include <cmath>

namespace longreach::gemm {
namespace {

constexpr long kLanes = 16;
constexpr long kSerial = 1L << 14;  // values below which threads cost more than they save

// 1 / rms of the values that `at` returns.
template <typename At> INLINE float inverse_rms(long n, float eps, const At& at) {
    float lanes[kLanes] = {}, sum = 0.0f;
    for (long i = 0; i < n; i += kLanes) {
        for (long l = 0; l < kLanes; ++l) lanes[l] += at(i + l) * at(i + l);
    }
    for (long l = 0; l < kLanes; ++l) sum += lanes[l];
    return 1.0f / std::sqrt(sum / float(n) + eps);
}

INLINE void norm_row(const NormCall& call, long token) {
    const bf16* x = call.x + token * call.stride;
    bf16* out = call.out + token * call.size;
    if (call.delta != nullptr) {
        bf16* total = call.delta + token * call.size;
        for (long i = 0; i < call.size; ++i) total[i] = narrow(widen(x[i]) + widen(total[i]));
        x = total;
    }
    const float factor = inverse_rms(call.size, call.eps, [&](long i) { return widen(x[i]); });
    for (long i = 0; i < call.size; ++i) out[i] = narrow(widen(x[i]) * factor * widen(call.weight[i]));
}

INLINE void rotate_row(const RotateCall& call, long token) {
    const long dim = call.dim, half = dim / 2;
    const float *cos = call.cos + token * call.cos_stride, *sin = call.sin + token * call.cos_stride;
    for (long head = 0; head < call.heads; ++head) {
        const bf16* x = call.x + token * call.row_stride + head * call.head_stride;
        bf16* out = call.out + token * call.out_row_stride + head * call.out_head_stride;
        float wide[kMaxDim];
        for (long i = 0; i < dim; ++i) wide[i] = widen(x[i]);
        if (call.weight != nullptr) {
            const float factor = inverse_rms(dim, call.eps, [&](long i) { return wide[i]; });
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

// Calls the function for every token of a call that has so many values.
template <auto function, typename Call> int every_token(const Call& call, long values) {
    const auto row = Compiled<function>::of[call.path];
#pragma omp parallel for schedule(static) num_threads(call.threads) if (values > kSerial)
    for (long token = 0; token < call.tokens; ++token) row(call, token);
    return kOk;
}

}  // namespace

// out = x / rms(x) * weight, row by row; of x + delta where there is one.
EXPORT int longreach_rms_norm(const NormCall* call) { return every_token<norm_row>(*call, call->tokens * call->size); }

// Norm of every head (where there is a weight), then rotation of its two halves.
EXPORT int longreach_norm_rotate(const RotateCall* call) {
    return every_token<rotate_row>(*call, call->tokens * call->heads * call->dim);
}

// Softmax over the experts, the k largest of it, divided by their sum if asked.
EXPORT int longreach_route(const RouteCall* call) {
    return every_token<route_row>(*call, call->tokens * call->experts);
}

}  // namespace longreach::gemm
