// Steps of the AMX engine in AVX-512 registers.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>

#include <cstdint>

#include "attention/attention.h"
#include "cpu.h"

#define AMX __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,amx-tile,amx-bf16")))
#define AMX_INLINE AMX inline __attribute__((always_inline))
#define AMX_FENCE() __asm__ volatile("" ::: "memory")  // tile loads do not tell the compiler what they read

namespace longreach::attention {

constexpr int kTile = 16;  // columns, keys or dims of a tile
constexpr int kTileBytes = 1024;
constexpr int kScores = kTile * kTile;  // floats of a tile
constexpr float kHighest = 4096.0f;     // sum of a pass's weights above which the maximum is raised

// 2^x, relative error 3e-4 (the result becomes a bfloat16); 0 below -2^18, above 2^18 of any sign and size. Beside tile
// products only one port serves multiplications, conversions and maxima: the sixteenths come from a table.
AMX_INLINE __m512 exp2(__m512 x) {
    const __m512 powers =
        _mm512_set_ps(1.9152066f, 1.8340080f, 1.7562522f, 1.6817928f, 1.6104903f, 1.5422108f, 1.4768262f, 1.4142136f,
                      1.3542555f, 1.2968396f, 1.2418578f, 1.1892071f, 1.1387886f, 1.0905077f, 1.0442738f, 1.0f);
    const __m512 slopes = _mm512_mul_ps(powers, _mm512_set1_ps(0.69314718f));
    const __m512 shift = _mm512_set1_ps(786432.0f);  // its last bit is 2^-4
    const __m512 shifted = _mm512_add_ps(x, shift), rounded = _mm512_sub_ps(shifted, shift);
    const __m512i index = _mm512_castps_si512(shifted);
    const __m512 p = _mm512_fmadd_ps(_mm512_permutexvar_ps(index, slopes), _mm512_sub_ps(x, rounded),
                                     _mm512_permutexvar_ps(index, powers));
    return _mm512_scalef_ps(p, rounded);
}

// 16 x 16 values of 32 bits, in place.
AMX_INLINE void transpose(__m512i* r) {
    __m512i t[16];
    for (int i = 0; i < 8; ++i) {
        t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
    for (int i = 0; i < 4; ++i) {  // lane l of r[4 i + j]: rows 4 i .. 4 i + 3 of column 4 l + j
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
    for (int i = 0; i < kGroup; ++i) top = _mm512_max_ps(top, _mm512_load_ps(s + i * kTile));
    return top;
}

// Loads a cache line ahead of its use.
AMX_INLINE void touch(const void* line) {
    const __m512i read = _mm512_loadu_si512(line);
    asm volatile("" ::"v"(read));
}

// Words of two keys' rows, side by side: dims 0-3, 8-11, 16-19, 24-27 of 32 in `low`, the others in `high`.
AMX_INLINE void pair_rows(char* low, char* high, __m512i a, __m512i b) {
    _mm512_store_si512(low, _mm512_unpacklo_epi16(a, b));
    _mm512_store_si512(high, _mm512_unpackhi_epi16(a, b));
}

// 32 values as bfloat16.
AMX_INLINE __m512i widen(const char* from, __m512 scale) {
    auto* bytes = reinterpret_cast<const __m128i*>(from);
    const __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(bytes)));
    const __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(bytes + 1)));
    return (__m512i)_mm512_cvtne2ps_pbh(_mm512_mul_ps(high, scale), _mm512_mul_ps(low, scale));
}

// One block of keys against one or two tiles of columns, on its way through the engine.
struct Pass {
    int tile = 0, tiles = 0, groups = 0;
    const char* v[kGroups];  // packed values of the groups
    float* s = nullptr;  // [2][block][16 columns]
    char* p = nullptr;  // [2][group] tiles: a line a column
    alignas(64) float factors[2][16];  // of earlier sums, where `raised`
    bool raised[2] = {};
};

// Turns the scores of a pass into weights, in steps small enough to run between the tile products of other passes.
class Softmax {
public:
    AMX_INLINE void start(Pass& pass, const float* scales, float* highest, float* sums) {
        pass_ = &pass;
        scales_ = scales;
        tops_ = highest;
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
        const __mmask16 fits = _mm512_cmp_ps_mask(sum_, _mm512_set1_ps(kHighest), _CMP_LE_OQ) &
                               _mm512_cmp_ps_mask(sum_, _mm512_setzero_ps(), _CMP_GE_OQ);
        if (fits != 0xffff && !pass_->raised[tile_]) {  // a score lies far above the maximum so far
            raise();
            again();
            return;
        }
        float* sums = sums_ + (pass_->tile + tile_) * kTile;
        __m512 sum = _mm512_load_ps(sums);
        if (pass_->raised[tile_]) sum = _mm512_mul_ps(sum, _mm512_load_ps(pass_->factors[tile_]));
        _mm512_store_ps(sums, _mm512_add_ps(sum, sum_));
        ++tile_;
        open();
    }

    AMX_INLINE void open() {
        if (tile_ == pass_->tiles) return;
        const int column = (pass_->tile + tile_) * kTile;
        scale_ = _mm512_load_ps(scales_ + column);
        highest_ = _mm512_load_ps(tops_ + column);
        pass_->raised[tile_] = false;
        if (_mm512_cmp_ps_mask(highest_, _mm512_set1_ps(kUnseen), _CMP_EQ_OQ)) raise();
        again();
    }

    AMX_INLINE void again() {
        s_ = pass_->s + tile_ * kBlock * kTile;
        p_ = pass_->p + tile_ * kGroups * kTileBytes;
        left_ = 4 * pass_->groups;
        sum_ = _mm512_setzero_ps();
    }

    AMX __attribute__((noinline)) void raise() {  // to the highest scores of the pass
        const float* s = pass_->s + tile_ * kBlock * kTile;
        __m512 top = _mm512_set1_ps(kMasked);
        for (int g = 0; g < pass_->groups; ++g) top = highest_of(top, s + g * kGroup * kTile);
        const __m512 higher = _mm512_max_ps(_mm512_mul_ps(top, scale_), highest_);
        _mm512_store_ps(pass_->factors[tile_], exp2(_mm512_sub_ps(highest_, higher)));
        _mm512_store_ps(tops_ + (pass_->tile + tile_) * kTile, higher);
        pass_->raised[tile_] = true;
        highest_ = higher;
    }

    __m512 scale_, highest_, sum_;
    alignas(64) char lines_[kTileBytes];
    const float* s_ = nullptr;
    char* p_ = nullptr;
    Pass* pass_ = nullptr;
    const float* scales_ = nullptr;
    float *tops_ = nullptr, *sums_ = nullptr;  // of all columns
    int tile_ = 0, left_ = 0;
};

}  // namespace longreach::attention
#endif
