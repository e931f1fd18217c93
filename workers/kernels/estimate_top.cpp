// The largest of many scores, ties to the lower index: the twin is `top` in workers/attention/selection.py.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <new>
#include <vector>

namespace {

constexpr int kShift = 18;             // buckets by exponent and the first five bits of the mantissa
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
    std::vector<std::int32_t> sizes((kInfinity >> kShift) + 1);
    for (std::int64_t i = always; i < count; ++i) ++sizes[order_of(scores[i]) >> kShift];
    std::uint32_t bucket = kInfinity >> kShift;        // the one in which the least picked score lies
    std::int64_t left = wanted;                        // to be picked from it
    while (sizes[bucket] < left) left -= sizes[bucket--];

    std::vector<std::uint32_t> within;
    within.reserve(sizes[bucket]);
    for (std::int64_t i = always; i < count; ++i) {
        const std::uint32_t order = order_of(scores[i]);
        if (order >> kShift == bucket) within.push_back(order);
    }
    std::nth_element(within.begin(), within.begin() + (left - 1), within.end(), std::greater<std::uint32_t>());
    const std::uint32_t least = within[left - 1];
    std::int64_t equal = left - std::count_if(within.begin(), within.end(), [=](auto x) { return x > least; });
    for (std::int64_t i = always; i < count; ++i) {
        const std::uint32_t order = order_of(scores[i]);
        if (order > least || (order == least && equal-- > 0)) *picked++ = std::int32_t(i);
    }
}

}  // namespace

// Writes to `picked` the first `always` indices and those of the `wanted` largest other scores, together ascending;
// needs always + wanted <= count. Returns 0, or 2 when there is no memory.
extern "C" __attribute__((visibility("default"))) int longreach_estimate_top(
    const float* scores, std::int64_t count, std::int64_t wanted, std::int64_t always, std::int32_t* picked) {
    try {
        pick(scores, count, wanted, always, picked);
    } catch (const std::bad_alloc&) {
        return 2;
    }
    return 0;
}
