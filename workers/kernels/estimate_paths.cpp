// The engines of the estimate: vector code for three instruction sets, and products on AMX.
#include <cstring>

#include "attention_cpu.h"
#include "estimate.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace longreach {
namespace estimate {
namespace {

inline float widen(std::uint16_t x) {
    const std::uint32_t bits = std::uint32_t(x) << 16;
    float wide;
    std::memcpy(&wide, &bits, sizeof wide);
    return wide;
}

}  // namespace
}  // namespace estimate
}  // namespace longreach

#define LR_SPACE portable
#define LR_TARGET
#define LR_WIDTH 4
#define LR_BATCH 2
#include "estimate_simd.h"

#if defined(__x86_64__)
#define LR_SPACE avx2
#define LR_TARGET __attribute__((target("avx2,fma")))
#define LR_WIDTH 8
#define LR_BATCH 2
#include "estimate_simd.h"

#define LR_SPACE avx512
#define LR_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma")))
#define LR_WIDTH 16
#define LR_BATCH 4
#define LR_SCALEF(x, n) _mm512_scalef_ps((__m512)(x), (__m512)(n))
#include "estimate_simd.h"
#endif

namespace longreach {
namespace estimate {
namespace {

#if defined(__x86_64__)
#define LR_AMX __attribute__((target("amx-tile,amx-bf16")))

constexpr int kDepth = 32;             // values of D in a tile
constexpr int kTileBytes = 1024;

// Queries [D / 32, kRows / 16] tiles; line i of a tile holds values 2i and 2i + 1 of 16 rows.
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

LR_AMX void scores_amx(float* s, const Strip& strip, const Block& block, int dim) {
    const char* q = static_cast<const char*>(strip.q);
    const char* keys = static_cast<const char*>(block.keys);
    const int row = dim * 2, line = kRows * int(sizeof(float));
    for (int i = 0; i < kKeys; i += 2 * kLanes) {
        for (int g = 0; g < strip.groups; g += 2) {    // an odd last group computes one that nobody reads
            const char* a = keys + i * row;
            const char* b = q + g * kTileBytes;
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
            for (int d = 0; d < dim; d += kDepth, a += 2 * kDepth, b += kRows / kLanes * kTileBytes) {
                _tile_loadd(4, a, row);
                _tile_loadd(6, b, 64);
                _tile_loadd(7, b + kTileBytes, 64);
                _tile_loadd(5, a + kLanes * row, row);
                _tile_dpbf16ps(0, 4, 6);
                _tile_dpbf16ps(1, 4, 7);
                _tile_dpbf16ps(2, 5, 6);
                _tile_dpbf16ps(3, 5, 7);
            }
            float* to = s + i * kRows + g * kLanes;
            _tile_stored(0, to, line);
            _tile_stored(1, to + kLanes, line);
            _tile_stored(2, to + kLanes * kRows, line);
            _tile_stored(3, to + kLanes * kRows + kLanes, line);
        }
    }
    if (block.scales != nullptr) avx512::scale(s, strip, block);
}

// All tiles have 16 rows of 64 bytes. Static: compilers take the intrinsic to read no more than a word of it.
alignas(64) const std::uint8_t kTileConfig[64] = {
    1,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,   // palette
    64, 0,  64, 0,  64, 0,  64, 0,  64, 0,  64, 0,  64, 0,  64, 0,   // bytes of a row
    0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,
    16, 16, 16, 16, 16, 16, 16, 16, 0,  0,  0,  0,  0,  0,  0,  0,   // rows
};

alignas(64) thread_local char previous_config[64];  // of oneDNN, which may rely on it

LR_AMX void enter_amx() {
    _tile_storeconfig(previous_config);
    _tile_loadconfig(kTileConfig);
}

LR_AMX void leave_amx() { _tile_loadconfig(previous_config); }

Engine make_amx() {
    Engine one = avx512::make();
    one.bfloat16 = true;
    one.pack = pack_tiles;
    one.convert = avx512::convert_bfloat16;
    one.scores = scores_amx;
    one.enter = enter_amx;
    one.leave = leave_amx;
    return one;
}
#endif

}  // namespace

int best_path() { return attention::best_path(); }

const Engine& engine(int path) {
    static const Engine of_portable = portable::make();
#if defined(__x86_64__)
    static const Engine of_avx2 = avx2::make(), of_avx512 = avx512::make(), of_amx = make_amx();
    if (path == kAmx) return of_amx;
    if (path == kAvx512) return of_avx512;
    if (path == kAvx2) return of_avx2;
#endif
    (void)path;
    return of_portable;
}

}  // namespace estimate
}  // namespace longreach
