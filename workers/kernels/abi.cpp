// The check that caller and library agree: sizes of the structures they exchange, and limits both must know.
#include "abi.h"

#include <algorithm>

#include "attention/attention.h"
#include "cpu.h"
#include "estimate/estimate.h"
#include "gemm/calls.h"
#include "gemm/layers.h"

namespace longreach {

// The best instruction set of this CPU, and the one that computes fastest: a `Path` each.
EXPORT int longreach_best_path() { return best_path(); }
EXPORT int longreach_fastest_path() { return fastest_path(); }

// Writes at most `room` numbers, in the order of `_STRUCTURES` and then of `_LIMITS` in workers/kernels/abi.py; returns
// how many there are.
EXPORT std::int64_t longreach_abi(std::int64_t* numbers, std::int64_t room) {
    const std::int64_t all[] = {sizeof(attention::Args),
                                sizeof(estimate::Args),
                                sizeof(estimate::Selection),
                                sizeof(gemm::Weights),
                                sizeof(gemm::LinearCall),
                                sizeof(gemm::ExpertsCall),
                                sizeof(gemm::NormCall),
                                sizeof(gemm::RotateCall),
                                sizeof(gemm::RouteCall),
                                sizeof(gemm::Layer),
                                sizeof(gemm::Piece),
                                sizeof(gemm::Step),
                                attention::kMaxDim,
                                gemm::kStrip,
                                gemm::kDepth,
                                gemm::kMaxDim,
                                gemm::kMaxExperts,
                                gemm::kMaxTopK};
    const std::int64_t count = sizeof(all) / sizeof(all[0]);
    std::copy(all, all + std::min(count, room), numbers);
    return count;
}

}  // namespace longreach
