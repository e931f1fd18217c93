// Steps of the AMX engine in AVX-512 registers.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>

#include <cstdint>

#include "attention.h"

#define AMX __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,amx-tile,amx-bf16")))
#define AMX_INLINE AMX inline __attribute__((always_inline))
#define AMX_FENCE() __asm__ volatile("" ::: "memory")  // tile loads do not tell the compiler what they read

namespace longreach {
namespace attention {

using bf16 = std::uint16_t;
constexpr int kTile = 16;              // columns, keys or dims of a tile
constexpr int kTileBytes = 1024;
constexpr int kScores = kTile * kTile; // floats of a tile

// 2^x for x <= 2^20, relative error 8e-5 (the result becomes a bfloat16).
AMX_INLINE __m512 exp2(__m512 x) {
    const __m512 f = _mm512_reduce_ps(x, 1);  // x - floor(x)
    __m512 p = _mm512_fmadd_ps(f, _mm512_set1_ps(0.07802452147006989f), _mm512_set1_ps(0.2260671705007553f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.6958335041999817f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.9999251961708069f));
    return _mm512_scalef_ps(p, x);
}

// 16 x 16 values of 32 bits, in place.
AMX_INLINE void transpose(__m512i* r) {
    __m512i t[16];
    for (int i = 0; i < 8; ++i) {
        t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
    for (int i = 0; i < 4; ++i) {      // lane l of r[4 i + j]: rows 4 i .. 4 i + 3 of column 4 l + j
        r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
        r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
    }
    for (int j = 0; j < 4; ++j) {
        const __m512i a = _mm512_shuffle_i32x4(r[j], r[4 + j], 0x88), b = _mm512_shuffle_i32x4(r[j], r[4 + j], 0xdd);
        const __m512i c = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0x88);
        const __m512i d = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0xdd);
        t[j] = _mm512_shuffle_i32x4(a, c, 0x88);
        t[8 + j] = _mm512_shuffle_i32x4(a, c, 0xdd);
        t[4 + j] = _mm512_shuffle_i32x4(b, d, 0x88);
        t[12 + j] = _mm512_shuffle_i32x4(b, d, 0xdd);
    }
    for (int i = 0; i < 16; ++i) r[i] = t[i];
}

// The highest of a column's scores, and `top`, over a group.
AMX_INLINE __m512 highest_of(__m512 top, const float* s) {
    __m512 other = _mm512_load_ps(s);
    for (int i = 1; i + 1 < kGroup; i += 2) {
        top = _mm512_max_ps(top, _mm512_load_ps(s + i * kTile));
        other = _mm512_max_ps(other, _mm512_load_ps(s + (i + 1) * kTile));
    }
    return _mm512_max_ps(_mm512_max_ps(top, other), _mm512_load_ps(s + (kGroup - 1) * kTile));
}

// Words of two keys' rows, side by side: dims 0-3, 8-11, 16-19, 24-27 of 32 in `low`, the others in `high`.
AMX_INLINE void pair_rows(char* low, char* high, const bf16* a, const bf16* b) {
    const __m512i x = _mm512_loadu_si512(a), y = _mm512_loadu_si512(b);
    _mm512_store_si512(low, _mm512_unpacklo_epi16(x, y));
    _mm512_store_si512(high, _mm512_unpackhi_epi16(x, y));
}

AMX_INLINE void widen(void* to, const signed char* from, float scale) {
    const __m512 factor = _mm512_set1_ps(scale);
    const __m512i bytes = _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
    const __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm512_castsi512_si128(bytes)));
    const __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm512_extracti32x4_epi32(bytes, 1)));
    _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh(_mm512_mul_ps(high, factor), _mm512_mul_ps(low, factor)));
}

struct TileConfig {
    std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
    std::uint16_t line_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    std::uint8_t lines[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// One block of keys against one or two tiles of columns, on its way through the engine.
struct Pass {
    int tile = 0, tiles = 0, groups = 0;
    const char* v[kGroups];            // packed values of the groups
    float* s = nullptr;                // [2][block][16 columns]
    char* p = nullptr;                 // [2][group] tiles: a line a column
    alignas(64) float highest[2][16];  // what the weights are relative to
    alignas(64) float factors[2][16];  // of earlier sums, where `raised`
    bool raised[2];
};

// Turns the scores of a pass into weights, in steps small enough to run between the tile products of other passes.
class Softmax {
public:
    AMX_INLINE void start(const Pass& pass, const float* scales, float* sums) {
        pass_ = &pass;
        scales_ = scales;
        sums_ = sums;
        tile_ = 0;
        open();
    }

    AMX_INLINE bool busy() const { return left_ > 0; }

    // 8 keys; every fourth step completes a tile of weights.
    AMX_INLINE void step() {
        if (left_ == 0) return;
        const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22,
                                               6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
        const __m512 scale = scale_, highest = highest_;
        __m512 even[4], odd[4];
        const float* s = s_;
        char* lines = lines_ + (-left_ & 3) * 256;
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            even[i] = exp2(_mm512_fmsub_ps(_mm512_load_ps(s + 2 * i * kTile), scale, highest));
            odd[i] = exp2(_mm512_fmsub_ps(_mm512_load_ps(s + (2 * i + 1) * kTile), scale, highest));
            _mm512_store_si512(lines + 64 * i,
                               _mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(odd[i], even[i])));
        }
        for (int i = 0; i < 4; ++i) even[i] = _mm512_add_ps(even[i], odd[i]);
        even[0] = _mm512_add_ps(_mm512_add_ps(even[0], even[1]), _mm512_add_ps(even[2], even[3]));
        sum_ = _mm512_add_ps(sum_, even[0]);
        s_ = s + 8 * kTile;
        if (--left_ % 4 == 0) complete();
    }

private:
    AMX_INLINE void complete() {
        __m512i lines[16];
        for (int i = 0; i < 16; ++i) lines[i] = _mm512_load_si512(lines_ + 64 * i);
        transpose(lines);
        for (int i = 0; i < 16; ++i) _mm512_store_si512(p_ + 64 * i, lines[i]);
        p_ += kTileBytes;
        if (left_ > 0) return;
        float* sums = sums_ + (pass_->tile + tile_) * kTile;
        __m512 sum = _mm512_load_ps(sums);
        if (pass_->raised[tile_]) sum = _mm512_mul_ps(sum, _mm512_load_ps(pass_->factors[tile_]));
        _mm512_store_ps(sums, _mm512_add_ps(sum, sum_));
        ++tile_;
        open();
    }

    AMX_INLINE void open() {
        if (tile_ == pass_->tiles) return;
        s_ = pass_->s + tile_ * kBlock * kTile;
        p_ = pass_->p + tile_ * kGroups * kTileBytes;
        left_ = 4 * pass_->groups;
        scale_ = _mm512_load_ps(scales_ + (pass_->tile + tile_) * kTile);
        highest_ = _mm512_load_ps(pass_->highest[tile_]);
        sum_ = _mm512_setzero_ps();
    }

    __m512 scale_, highest_, sum_;
    alignas(64) char lines_[kTileBytes];
    const float* s_ = nullptr;
    char* p_ = nullptr;
    const Pass* pass_ = nullptr;
    const float* scales_ = nullptr;
    float* sums_ = nullptr;
    int tile_ = 0, left_ = 0;
};

}  // namespace attention
}  // namespace longreach
#endif
