// Steps of the AMX engine in AVX-512 registers.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>

#include <cstdint>

#define AMX __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,amx-tile,amx-bf16")))
#define AMX_INLINE AMX inline __attribute__((always_inline))

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

// Words of two keys' rows, side by side: dims 0-3, 8-11, 16-19, 24-27 of 32 in `low`, the others in `high`.
AMX_INLINE void pair_rows(char* low, char* high, const bf16* a, const bf16* b) {
    const __m512i x = _mm512_loadu_si512(a), y = _mm512_loadu_si512(b);
    _mm512_store_si512(low, _mm512_unpacklo_epi16(x, y));
    _mm512_store_si512(high, _mm512_unpackhi_epi16(x, y));
}

AMX_INLINE void widen(bf16* to, const signed char* from, float scale) {
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

}  // namespace attention
}  // namespace longreach
#endif
