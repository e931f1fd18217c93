// Pairs of bfloat16 in AVX2 registers.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>

#include "gemm/gemm.h"

namespace longreach::gemm {

LR_AVX2 inline __m256i load(const void* at) { return _mm256_loadu_si256(static_cast<const __m256i*>(at)); }

// The first and the second value of each pair.
LR_AVX2 inline __m256 low(__m256i pairs) { return _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)); }
LR_AVX2 inline __m256 high(__m256i pairs) {
    return _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(int(0xffff0000u))));
}

// Up to 4 rows of a slice in float32: of each tile the 16 even inputs, then the 16 odd ones.
struct alignas(32) Wide {
    float rows[4][kSlice * kDepth];
};

// Powers of two for the even and the odd inputs of a tile's lines 0, 2, 4 ... and 1, 3, 5 ...
struct Units {
    float even[2], odd[2];
};
constexpr Units kOnes{{1.0f, 1.0f}, {1.0f, 1.0f}};

LR_AVX2 inline __m256 alternate(const float* two) {
    return _mm256_setr_ps(two[0], two[1], two[0], two[1], two[0], two[1], two[0], two[1]);
}

// Rows of `k_tiles` tiles, at most a slice, times `units`.
template <int Rows> LR_AVX2 inline void widen_rows(Wide& out, const bf16* a, long k_tiles, const Units& units) {
    const bool plain = units.odd[1] == 1.0f;
    const __m256 even = alternate(units.even);
    const __m256 odd = alternate(units.odd);
    for (long k = 0; k < k_tiles; ++k, a += kTile) {
        UNROLL for (int r = 0; r < Rows; ++r) {
            UNROLL for (int v = 0; v < 2; ++v) {
                const __m256i pairs = load(a + r * kDepth + v * kStrip);
                float* to = out.rows[r] + k * kDepth + 8 * v;
                _mm256_store_ps(to, plain ? low(pairs) : _mm256_mul_ps(low(pairs), even));
                _mm256_store_ps(to + kStrip, plain ? high(pairs) : _mm256_mul_ps(high(pairs), odd));
            }
        }
    }
}

// Bits of eight bfloat16 in words: to the nearest, ties to even; a NaN stays one.
LR_AVX2 inline __m256i rounded(__m256 value) {
    const __m256i bits = _mm256_castps_si256(value);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256 nan = _mm256_cmp_ps(value, value, _CMP_UNORD_Q);
    const __m256 quiet = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fc00000));
    return _mm256_srli_epi32(_mm256_castps_si256(_mm256_blendv_ps(_mm256_castsi256_ps(up), quiet, nan)), 16);
}

}  // namespace longreach::gemm
#endif
