// The engine of x86 with AVX2; see gemm.h.
#include "gemm/gemm.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>

#include "gemm/x86/avx2.h"

namespace longreach::gemm {
namespace {

// scale * (sum - zero * inputs), and what c holds
LR_AVX2 inline __m256 scaled(__m256 sum, const float* scale, const float* zero, const float* inputs, const float* c) {
    if (inputs) sum = _mm256_fnmadd_ps(_mm256_load_ps(zero), _mm256_broadcast_ss(inputs), sum);
    return _mm256_fmadd_ps(_mm256_load_ps(scale), sum, c ? _mm256_loadu_ps(c) : _mm256_setzero_ps());
}

// Rows from `row` on, wide, times `Strips` strips of 16 outputs from `strip` on.
template <int Rows, int Strips>
LR_AVX2 void some_rows(float* c, const Wide& a, const Operands& o, long row, long strip, Ahead ahead) {
    constexpr int kVectors = 2 * Strips;
    __m256 sum[Rows][kVectors];
    const bool add = o.add && !o.scales;
    UNROLL for (int r = 0; r < Rows; ++r) {
        UNROLL for (int v = 0; v < kVectors; ++v) {
            sum[r][v] = add ? _mm256_loadu_ps(c + r * kBlock + strip * kStrip + 8 * v) : _mm256_setzero_ps();
        }
    }
    const bf16 *b0 = strip == 0 ? o.b0 : o.b1, *b1 = Strips == 2 ? o.b1 : b0;
    for (long k = 0; k < o.k_tiles; ++k, b0 += kTile, b1 += kTile) {
        for (long i = 0; i < o.lines; ++i) {
            __m256i line[kVectors];
            UNROLL for (int v = 0; v < kVectors; ++v) line[v] = load((v < 2 ? b0 : b1) + i * kDepth + v % 2 * kStrip);
            UNROLL for (int r = 0; r < Rows; ++r) {
                const __m256 even = _mm256_broadcast_ss(a.rows[r] + k * kDepth + i);
                UNROLL for (int v = 0; v < kVectors; ++v) sum[r][v] = _mm256_fmadd_ps(even, low(line[v]), sum[r][v]);
            }
            UNROLL for (int r = 0; r < Rows; ++r) {
                const __m256 odd = _mm256_broadcast_ss(a.rows[r] + k * kDepth + kStrip + i);
                UNROLL for (int v = 0; v < kVectors; ++v) sum[r][v] = _mm256_fmadd_ps(odd, high(line[v]), sum[r][v]);
            }
        }
        for (long i = 0; i < ahead.lines; ++i, ahead.at += kLine) __builtin_prefetch(ahead.at, 0, 2);
    }
    UNROLL for (int r = 0; r < Rows; ++r) {
        const float* inputs = o.sums ? o.sums + (row + r < o.rows ? row + r : row) : nullptr;
        UNROLL for (int v = 0; v < kVectors; ++v) {
            const long s = strip + v / 2, n = v % 2 * 8;
            float* to = c + r * kBlock + s * kStrip + n;
            if (o.scales) {
                const float* old = o.add ? to : nullptr;
                sum[r][v] = scaled(sum[r][v], o.scales->scale[s] + n, o.scales->zero[s] + n, inputs, old);
            }
            _mm256_storeu_ps(to, sum[r][v]);
        }
    }
}

template <int Rows> LR_AVX2 void by_strips(float* c, const bf16* a, const Operands& o, long row, Ahead ahead) {
    Wide wide;
    widen_rows<Rows>(wide, a, o.k_tiles, kOnes);
    if (Rows <= 2 && o.b1) return some_rows<Rows, 2>(c, wide, o, row, 0, ahead);
    some_rows<Rows, 1>(c, wide, o, row, 0, ahead);
    if (o.b1) some_rows<Rows, 1>(c, wide, o, row, 1, {nullptr, 0});
}

// Rows past `o.rows` are computed too, up to the next of 1, 2 and 4: their strip is filled up. More than a slice of K,
// which there is of weights only, is computed slice by slice.
LR_AVX2 void block(float* c, const Operands& o, Ahead ahead) {
    Operands slice = o;
    for (long k = 0; k < o.k_tiles; k += kSlice) {
        slice.k_tiles = std::min(kSlice, o.k_tiles - k);
        for (long row = 0; row < o.rows; row += 4) {
            const bf16* a = slice.a + row / kStrip * o.a_stride + row % kStrip * kDepth;
            const long left = o.rows - row;
            const Ahead soon{ahead.at, row == 0 ? ahead.lines : 0};
            float* to = c + row * kBlock;
            if (left == 1)
                by_strips<1>(to, a, slice, row, soon);
            else if (left == 2)
                by_strips<2>(to, a, slice, row, soon);
            else
                by_strips<4>(to, a, slice, row, soon);
        }
        ahead.at += slice.k_tiles * ahead.lines * long(kLine);
        slice.a += slice.k_tiles * kTile;
        slice.b0 += slice.k_tiles * kTile;
        if (o.b1) slice.b1 += slice.k_tiles * kTile;
        slice.add = true;
    }
}

// ---- results of a block

LR_AVX2 inline __m256i narrowed(__m256 left, __m256 right) {  // 16 bfloat16
    return _mm256_permute4x64_epi64(_mm256_packus_epi32(rounded(left), rounded(right)), 0xd8);
}

LR_AVX2 inline __m256 widened(const bf16* values) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(values));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

LR_AVX2 void store(const float* c, long rows, long columns, const Target& t) {
    for (long r = 0; r < rows; ++r, c += kBlock) {
        bf16* out = t.out + (t.place ? t.place[r] : r) * t.stride;
        const __m256 scale = _mm256_set1_ps(t.scale ? t.scale[r] : 1.0f);
        for (long n = 0; n < columns; n += kStrip) {
            const __m256 bias0 = t.bias ? widened(t.bias + n) : _mm256_setzero_ps();
            const __m256 bias1 = t.bias ? widened(t.bias + n + 8) : _mm256_setzero_ps();
            const __m256i values = narrowed(_mm256_fmadd_ps(scale, _mm256_loadu_ps(c + n), bias0),
                                            _mm256_fmadd_ps(scale, _mm256_loadu_ps(c + n + 8), bias1));
            auto* to = reinterpret_cast<__m256i*>(out + n);
            if (t.stream && columns > kStrip)
                _mm256_stream_si256(to, values);
            else
                _mm256_storeu_si256(to, values);
        }
    }
}

// x / (1 + exp(-x)): 2 ** t by a polynomial on [-0.5, 0.5]
LR_AVX2 inline __m256 silu(__m256 x) {
    x = _mm256_max_ps(_mm256_set1_ps(-87.0f), x);  // 1e-36 from 0, and 2 ** t stays finite; a NaN stays one
    const __m256 t = _mm256_max_ps(_mm256_set1_ps(-126.0f), _mm256_mul_ps(x, _mm256_set1_ps(-1.44269504f)));
    const __m256 whole = _mm256_round_ps(t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m256 f = _mm256_sub_ps(t, whole);
    __m256 p = _mm256_set1_ps(1.5403530e-4f);
    for (const float term : {1.3333558e-3f, 9.6181291e-3f, 5.5504109e-2f, 2.4022651e-1f, 6.9314718e-1f, 1.0f}) {
        p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(term));
    }
    const __m256i power = _mm256_slli_epi32(_mm256_cvtps_epi32(whole), 23);
    p = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), power));
    return _mm256_div_ps(x, _mm256_add_ps(p, _mm256_set1_ps(1.0f)));
}

LR_AVX2 void swiglu(const float* c, long rows, bf16* out, long stride) {
    for (long r = 0; r < rows; ++r, c += kBlock) {
        const __m256 left = _mm256_mul_ps(silu(_mm256_loadu_ps(c)), _mm256_loadu_ps(c + kStrip));
        const __m256 right = _mm256_mul_ps(silu(_mm256_loadu_ps(c + 8)), _mm256_loadu_ps(c + kStrip + 8));
        bf16* to = out + r / kStrip * stride + r % kStrip * kDepth;
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), narrowed(left, right));
    }
}

LR_AVX2 void sum(bf16* out, const bf16* const* rows, long count, long n) {
    for (long i = 0; i < n; i += kStrip) {
        __m256 left = _mm256_setzero_ps(), right = left;
        for (long r = 0; r < count; ++r) {
            left = _mm256_add_ps(left, widened(rows[r] + i));
            right = _mm256_add_ps(right, widened(rows[r] + i + 8));
        }
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), narrowed(left, right));
    }
}

constexpr Engine kEngine{block, store, swiglu, sum, nothing, nothing};

}  // namespace

const Engine& avx2_engine() { return kEngine; }

}  // namespace longreach::gemm
#endif
