// The largest of many scores, ties to the lower index; the reference is `top_indices` in workers/sparse/selection.py.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <new>
#include <vector>

#include "abi.h"

namespace longreach::estimate {
namespace {

constexpr int kShift = 18;  // buckets: exponent and the first five bits of the mantissa
constexpr std::uint32_t kInfinity = 0x7F800000u;

// Scores are not negative, so their bits order like they do; NaN counts as infinity, less than zero as zero.
inline std::uint32_t order_of(float score) {
    std::uint32_t bits;
    std::memcpy(&bits, &score, sizeof bits);
    const std::uint32_t magnitude = bits & 0x7FFFFFFFu;
    return magnitude > kInfinity ? kInfinity : bits == magnitude ? bits : 0u;
}

void pick(const float* scores, std::int64_t count, std::int64_t wanted, std::int64_t always, std::int32_t* picked) {
    for (std::int64_t i = 0; i < always; ++i) *picked++ = std::int32_t(i);
    if (wanted <= 0) return;
    constexpr std::uint32_t kBuckets = (kInfinity >> kShift) + 1;
    std::vector<std::int32_t> sizes(4 * kBuckets);  // four in turn: neighbours tend to share a bucket
    for (std::int64_t i = always; i < count; ++i) ++sizes[i % 4 * kBuckets + (order_of(scores[i]) >> kShift)];
    for (std::uint32_t i = 0; i < kBuckets; ++i) {
        sizes[i] += sizes[kBuckets + i] + sizes[2 * kBuckets + i] + sizes[3 * kBuckets + i];
    }
    std::uint32_t bucket = kInfinity >> kShift;  // the one of the lowest picked score
    std::int64_t left = wanted;                  // to be picked from it
    while (sizes[bucket] < left) left -= sizes[bucket--];

    std::vector<std::uint32_t> within;
    within.reserve(sizes[bucket]);
    for (std::int64_t i = always; i < count; ++i) {
        const std::uint32_t order = order_of(scores[i]);
        if (order >> kShift == bucket) within.push_back(order);
    }
    std::nth_element(within.begin(), within.begin() + (left - 1), within.end(), std::greater<std::uint32_t>());
    const std::uint32_t threshold = within[left - 1];
    std::int64_t equal = left - std::count_if(within.begin(), within.end(), [=](auto x) { return x > threshold; });
    for (std::int64_t i = always; i < count; ++i) {
        const std::uint32_t order = order_of(scores[i]);
        if (order < threshold) continue;
        if (order > threshold || equal-- > 0) *picked++ = std::int32_t(i);
    }
}

}  // namespace

// For each of `rows` rows of `scores` [rows, size]: writes to its row of `picked` [rows, width] the first `always`
// indices and those of its largest other scores, `counts` [rows] together, ascending; always <= counts <= size, width.
// Returns a `Status`.
EXPORT int longreach_estimate_top(const float* scores, std::int64_t rows, std::int64_t size, std::int64_t width,
                                  std::int64_t always, const std::int64_t* counts, std::int32_t* picked, int threads) {
    int status = kOk;
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (std::int64_t row = 0; row < rows; ++row) {
        try {
            pick(scores + row * size, size, counts[row] - always, always, picked + row * width);
        } catch (const std::bad_alloc&) {
#pragma omp atomic write
            status = kNoMemory;
        }
    }
    return status;
}

}  // namespace longreach::estimate
