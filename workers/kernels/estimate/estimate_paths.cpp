// The engines of the estimate: vector code for three instruction sets, and products of bfloat16 in pairs or on AMX.
#include <algorithm>
#include <cstring>

#include "bfloat16.h"
#include "cpu.h"
#include "estimate/estimate.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define LR_SPACE portable
#define LR_TARGET
#define LR_WIDTH 4
#include "estimate/estimate_simd.h"

#if defined(__x86_64__)
#define LR_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma,amx-tile,amx-bf16")))
#define LR_SPACE avx2
#define LR_TARGET __attribute__((target("avx2,fma")))
#define LR_WIDTH 8
#include "estimate/estimate_simd.h"

#define LR_SPACE avx512
#define LR_TARGET LR_AVX512
#define LR_WIDTH 16
#include "estimate/estimate_simd.h"
#endif

namespace longreach::estimate {
namespace {

#if defined(__x86_64__)

constexpr int kDepth = 32;  // values of D in a tile
constexpr int kTileBytes = 1024;

// Queries in bfloat16, [D / 32, kRows / 16] tiles; line i of a tile holds values 2i and 2i + 1 of 16 rows.
void pack_tiles(void* to, const void* q, int, std::int64_t stride, int rows, int dim) {
    auto* packed = static_cast<std::uint16_t*>(to);
    const auto* x = static_cast<const std::uint16_t*>(q);
    for (int r = 0; r < kRows; ++r) {
        for (int d = 0; d < dim; ++d) {
            const int tile = d / kDepth * (kRows / kLanes) + r / kLanes;
            const int place = d % kDepth / 2 * kDepth + r % kLanes * 2 + d % 2;
            packed[tile * (kTileBytes / 2) + place] = r < rows ? x[r * stride + d] : std::uint16_t(0);
        }
    }
}

// Scores of the first vectors of rows.
template <int Groups> LR_AVX512 void products_of_pairs(float* s, const char* q, const char* keys, int dim) {
    constexpr int kBatch = 8;  // keys whose products are computed together
    const int row = dim * int(sizeof(bf16));
    for (int key = 0; key < kKeys; key += kBatch, keys += kBatch * row, s += kBatch * kRows) {
        __m512 sum[kBatch][Groups] = {};
        for (int d = 0; d < row; d += 4) {
            const char* lines = q + d / 64 * (kRows / kLanes) * kTileBytes + d % 64 * 16;
#pragma GCC unroll 8
            for (int k = 0; k < kBatch; ++k) {
                std::int32_t pair;
                std::memcpy(&pair, keys + k * row + d, sizeof pair);
#pragma GCC unroll 2
                for (int g = 0; g < Groups; ++g) {
                    const __m512i line = _mm512_loadu_si512(lines + g * kTileBytes);
                    sum[k][g] = _mm512_dpbf16_ps(sum[k][g], (__m512bh)_mm512_set1_epi32(pair), (__m512bh)line);
                }
            }
        }
#pragma GCC unroll 8
        for (int k = 0; k < kBatch; ++k) {
#pragma GCC unroll 2
            for (int g = 0; g < Groups; ++g) _mm512_storeu_ps(s + k * kRows + g * kLanes, sum[k][g]);
        }
    }
}

LR_AVX512 void scores_bf16(float* s, const Strip& strip, const Block& block, int dim) {
    const auto *q = static_cast<const char*>(strip.q), *keys = static_cast<const char*>(block.keys);
    strip.groups == 1 ? products_of_pairs<1>(s, q, keys, dim) : products_of_pairs<2>(s, q, keys, dim);
    if (block.scales != nullptr) avx512::scale(s, strip, block);
}

// Products of a strip with a block, pair of groups by pair of groups, some keys and values of D at a time.
//
// While tiles are multiplied, and for about a microsecond after, most vector instructions have one port instead of two.
// So products in a phase of their own slow the exponentials after them; woven into these they are nearly free. Memory
// needed next is touched line by line on the way: a burst of such requests holds the tile loads up.
class Tiles {
public:
    LR_AVX512 explicit Tiles(const Next& next)
        : next_(next),
          key_(0),
          group_(0),
          d_(0),
          open_(false),
          left_(next.strip == nullptr ? 0 : steps(next)),
          together_((left_ + avx512::kSteps - 1) / avx512::kSteps),
          ahead_(next.ahead),
          end_(next.ahead + next.bytes),
          touched_((next.bytes + avx512::kSteps - 1) / avx512::kSteps) {}

    LR_AVX512 inline __attribute__((always_inline)) void step() {
        const char* stop = std::min(end_, ahead_ + touched_);
        for (; ahead_ < stop; ahead_ += 64) _mm_prefetch(ahead_, _MM_HINT_T1);
        for (int i = 0; i < together_ && left_ > 0; ++i) multiply();
    }

    LR_AVX512 inline __attribute__((always_inline)) void finish() {
        while (left_ > 0) multiply();
        if (next_.strip == nullptr) return;
        store();
        if (next_.block->scales != nullptr) avx512::scale(next_.s, *next_.strip, *next_.block);
    }

private:
    static int steps(const Next& next) {
        return kKeys / (2 * kLanes) * ((next.strip->groups + 1) / 2) * (next.dim / kDepth);
    }

    LR_AVX512 inline __attribute__((always_inline)) void multiply() {
        const int row = next_.dim * 2;
        if (d_ == 0) {
            if (open_) store();  // late, so that nothing waits for the last products
            to_ = next_.s + key_ * kRows + group_ * kLanes;
            open_ = true;
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
        }
        const char* a = static_cast<const char*>(next_.block->keys) + key_ * row + d_ * 2;
        const int tile = d_ / kDepth * (kRows / kLanes) + group_;
        const char* b = static_cast<const char*>(next_.strip->q) + tile * kTileBytes;
        _tile_loadd(4, a, row);
        _tile_loadd(6, b, 64);
        _tile_loadd(7, b + kTileBytes, 64);
        _tile_loadd(5, a + kLanes * row, row);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
        --left_;
        d_ += kDepth;
        if (d_ < next_.dim) return;
        d_ = 0;
        group_ += 2;  // an odd last group computes one that nobody reads
        if (group_ < next_.strip->groups) return;
        group_ = 0;
        key_ += 2 * kLanes;
    }

    LR_AVX512 inline __attribute__((always_inline)) void store() {
        constexpr int kLine = kRows * int(sizeof(float));
        _tile_stored(0, to_, kLine);
        _tile_stored(1, to_ + kLanes, kLine);
        _tile_stored(2, to_ + kLanes * kRows, kLine);
        _tile_stored(3, to_ + kLanes * kRows + kLanes, kLine);
    }

    const Next& next_;
    int key_, group_, d_;
    bool open_;
    int left_, together_;  // products to do, and at a time
    const char *ahead_, *end_;
    int touched_;
    float* to_ = nullptr;
};

LR_AVX512 void scores_amx(float* s, const Strip& strip, const Block& block, int dim) {
    const Next all{s, &strip, &block, dim, nullptr, 0};
    Tiles(all).finish();
}

alignas(64) thread_local char previous_config[64];  // of oneDNN, which may rely on it

LR_AVX512 void enter_amx() {
    _tile_storeconfig(previous_config);
    _tile_loadconfig(&kTileConfig);
}

LR_AVX512 void leave_amx() { _tile_loadconfig(previous_config); }

// Vector code around products in bfloat16.
template <class Weave> Engine make_bf16() {
    Engine one = avx512::make<Weave>();
    one.type = kBfloat16;
    one.pack = pack_tiles;
    one.convert = avx512::convert<bf16>;
    one.scores = scores_bf16;
    return one;
}

Engine make_amx() {
    Engine one = make_bf16<Tiles>();
    one.scores = scores_amx;
    one.enter = enter_amx;
    one.leave = leave_amx;
    return one;
}
#endif

}  // namespace

const Engine& engine(int path) {
#if defined(__x86_64__)
    static const Engine engines[] = {portable::make(), avx2::make(), avx512::make(),
                                     make_bf16<avx512::Apart<scores_bf16>>(), make_amx()};
#else
    static const Engine engines[] = {portable::make()};
#endif
    return engines[path];
}

}  // namespace longreach::estimate
