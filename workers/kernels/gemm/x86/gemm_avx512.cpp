// The engines of x86 with AVX-512 and AMX; see gemm.h.
#include "gemm/gemm.h"

#include "cpu.h"

#if defined(__x86_64__)
#include <immintrin.h>
#include <algorithm>
#include <initializer_list>

#define AMX __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,amx-tile,amx-bf16")))

namespace longreach::gemm {
namespace {

inline void prefetch(Ahead& ahead) {
    for (long i = 0; i < ahead.lines; ++i, ahead.at += kLine) __builtin_prefetch(ahead.at, 0, 2);
}

// scale * (sum - zero * inputs), and what c holds
LR_AVX512 inline __m512 scaled(__m512 sum, const GroupScales& by, long strip, const float* inputs, const float* c) {
    const __m512 scale = _mm512_load_ps(by.scale[strip]);
    if (inputs) sum = _mm512_fnmadd_ps(_mm512_load_ps(by.zero[strip]), _mm512_set1_ps(*inputs), sum);
    return _mm512_fmadd_ps(scale, sum, c ? _mm512_loadu_ps(c) : _mm512_setzero_ps());
}

// ---- AMX: tiles 0 to 3 accumulate, 4 and 5 are rows, 6 and 7 weights

template <bool TwoRows, bool TwoStrips> AMX void amx_tiles(float* c, const Operands& o, Ahead ahead) {
    const bf16 *a = o.a, *a1 = o.a + o.a_stride, *b0 = o.b0, *b1 = o.b1;
    constexpr long row_bytes = kBlock * long(sizeof(float));
    if (o.add && !o.scales) {
        _tile_loadd(0, c, row_bytes);
        if (TwoStrips) _tile_loadd(1, c + kStrip, row_bytes);
        if (TwoRows) _tile_loadd(2, c + kStrip * kBlock, row_bytes);
        if (TwoRows && TwoStrips) _tile_loadd(3, c + kStrip * kBlock + kStrip, row_bytes);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (long k = 0; k < o.k_tiles; ++k, a += kTile, a1 += kTile, b0 += kTile, b1 += kTile) {
        _tile_loadd(6, b0, 64);
        _tile_loadd(4, a, 64);
        _tile_dpbf16ps(0, 4, 6);
        if (TwoRows) {
            _tile_loadd(5, a1, 64);
            _tile_dpbf16ps(2, 5, 6);
        }
        if (TwoStrips) {
            _tile_loadd(7, b1, 64);
            _tile_dpbf16ps(1, 4, 7);
        }
        if (TwoRows && TwoStrips) _tile_dpbf16ps(3, 5, 7);
        prefetch(ahead);
    }
    alignas(kLine) float group[kBlock * kBlock];
    float* to = o.scales ? group : c;
    _tile_stored(0, to, row_bytes);
    if (TwoStrips) _tile_stored(1, to + kStrip, row_bytes);
    if (TwoRows) _tile_stored(2, to + kStrip * kBlock, row_bytes);
    if (TwoRows && TwoStrips) _tile_stored(3, to + kStrip * kBlock + kStrip, row_bytes);
    if (!o.scales) return;
    for (long r = 0; r < o.rows; ++r, to += kBlock, c += kBlock) {
        UNROLL for (int s = 0; s < (TwoStrips ? 2 : 1); ++s) {
            const __m512 sum = _mm512_load_ps(to + s * kStrip);
            float* at = c + s * kStrip;
            _mm512_storeu_ps(at, scaled(sum, *o.scales, s, o.sums ? o.sums + r : nullptr, o.add ? at : nullptr));
        }
    }
}

void amx_block(float* c, const Operands& o, Ahead ahead) {
    if (o.b1 != nullptr) {
        return o.rows > kStrip ? amx_tiles<true, true>(c, o, ahead) : amx_tiles<false, true>(c, o, ahead);
    }
    return o.rows > kStrip ? amx_tiles<true, false>(c, o, ahead) : amx_tiles<false, false>(c, o, ahead);
}

// Tiles of rows that are there: a product of one row costs little more than to read the weights. And of half the lines.
struct Configs {
    TileConfig of[2][kStrip + 1];
    constexpr Configs() : of() {
        for (int rows = 0; rows <= kStrip; ++rows) {
            for (int tile = 0; tile < 6; ++tile) of[0][rows].rows[tile] = of[1][rows].rows[tile] = std::uint8_t(rows);
            for (int tile = 4; tile < 6; ++tile) of[1][rows].row_bytes[tile] = kLine / 2;
            for (int tile = 6; tile < 8; ++tile) of[1][rows].rows[tile] = kStrip / 2;
        }
    }
};
constexpr Configs kConfigs;

AMX void amx_enter(long rows, long lines) {
    _tile_loadconfig(&kConfigs.of[lines == kStrip ? 0 : 1][std::min(rows, kStrip)]);
}

AMX void amx_leave() { _tile_release(); }

// ---- AVX-512: up to 8 rows by 32 outputs in registers; products in pairs where the CPU has them, else in float32

#define PAIRS __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")))

LR_AVX512 inline __m512 low(__m512i pairs) { return _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)); }
LR_AVX512 inline __m512 high(__m512i pairs) {
    return _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(int(0xffff0000u))));
}

template <bool Pairs> PAIRS inline __m512 multiply_add(__m512 sum, __m512i pair, __m512i line) {
    if (Pairs) return _mm512_dpbf16_ps(sum, (__m512bh)pair, (__m512bh)line);
    return _mm512_fmadd_ps(high(pair), high(line), _mm512_fmadd_ps(low(pair), low(line), sum));
}

// Rows from `row` on.
template <bool Pairs, int Rows, bool TwoStrips>
PAIRS void vector_rows(float* c, const bf16* a, const Operands& o, long row, Ahead ahead) {
    __m512 left[Rows], right[Rows];
    const bool add = o.add && !o.scales;
    UNROLL for (int r = 0; r < Rows; ++r) {
        left[r] = add ? _mm512_loadu_ps(c + r * kBlock) : _mm512_setzero_ps();
        right[r] = add && TwoStrips ? _mm512_loadu_ps(c + r * kBlock + kStrip) : _mm512_setzero_ps();
    }
    const bf16 *b0 = o.b0, *b1 = TwoStrips ? o.b1 : o.b0;
    for (long k = 0; k < o.k_tiles; ++k, a += kTile, b0 += kTile, b1 += kTile) {
        const auto* pairs = reinterpret_cast<const std::int32_t*>(a);
        for (long i = 0; i < o.lines; ++i) {
            const __m512i l = _mm512_loadu_si512(b0 + i * kDepth), m = _mm512_loadu_si512(b1 + i * kDepth);
            UNROLL for (int r = 0; r < Rows; ++r) {
                const __m512i pair = _mm512_set1_epi32(pairs[r * kStrip + i]);
                left[r] = multiply_add<Pairs>(left[r], pair, l);
                if (TwoStrips) right[r] = multiply_add<Pairs>(right[r], pair, m);
            }
        }
        prefetch(ahead);
    }
    UNROLL for (int r = 0; r < Rows; ++r, c += kBlock) {
        if (o.scales) {
            const float* inputs = o.sums ? o.sums + (row + r < o.rows ? row + r : row) : nullptr;
            left[r] = scaled(left[r], *o.scales, 0, inputs, o.add ? c : nullptr);
            if (TwoStrips) right[r] = scaled(right[r], *o.scales, 1, inputs, o.add ? c + kStrip : nullptr);
        }
        _mm512_storeu_ps(c, left[r]);
        if (TwoStrips) _mm512_storeu_ps(c + kStrip, right[r]);
    }
}

template <bool Pairs, int Rows> void some_rows(float* c, const bf16* a, const Operands& o, long row, Ahead ahead) {
    o.b1 ? vector_rows<Pairs, Rows, true>(c, a, o, row, ahead) : vector_rows<Pairs, Rows, false>(c, a, o, row, ahead);
}

// Rows past `o.rows` are computed too, up to the next of 1, 2, 4 and 8: their strip is filled up.
template <bool Pairs> void vector_block(float* c, const Operands& o, Ahead ahead) {
    for (long row = 0; row < o.rows; row += 8, ahead.lines = 0) {
        const bf16* a = o.a + row / kStrip * o.a_stride + row % kStrip * kDepth;
        const long left = o.rows - row;
        float* to = c + row * kBlock;
        if (left == 1)
            some_rows<Pairs, 1>(to, a, o, row, ahead);
        else if (left == 2)
            some_rows<Pairs, 2>(to, a, o, row, ahead);
        else if (left <= 4)
            some_rows<Pairs, 4>(to, a, o, row, ahead);
        else
            some_rows<Pairs, 8>(to, a, o, row, ahead);
    }
}

// ---- results of a block

LR_AVX512 inline __m256i narrowed(__m512 value) {  // to the nearest, ties to even; a NaN stays one
    const __m512i bits = _mm512_castps_si512(value);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_mov_epi32(up, nan, _mm512_set1_epi32(0x7fc00000)), 16));
}

LR_AVX512 inline __m512 widened(const bf16* values) {
    const __m256i narrow_values = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow_values), 16));
}

LR_AVX512 void store(const float* c, long rows, long columns, const Target& t) {
    const __m512 zero = _mm512_setzero_ps();
    const __m512 bias0 = t.bias ? widened(t.bias) : zero;
    const __m512 bias1 = t.bias && columns > kStrip ? widened(t.bias + kStrip) : zero;
    for (long r = 0; r < rows; ++r) {
        bf16* out = t.out + (t.place ? t.place[r] : r) * t.stride;
        const __m512 scale = _mm512_set1_ps(t.scale ? t.scale[r] : 1.0f);
        const __m256i left = narrowed(_mm512_fmadd_ps(scale, _mm512_loadu_ps(c + r * kBlock), bias0));
        if (columns <= kStrip) {
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), left);
            continue;
        }
        const __m256i right = narrowed(_mm512_fmadd_ps(scale, _mm512_loadu_ps(c + r * kBlock + kStrip), bias1));
        const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(left), right, 1);
        if (t.stream)
            _mm512_stream_si512(reinterpret_cast<__m512i*>(out), both);
        else
            _mm512_storeu_si512(out, both);
    }
}

// x / (1 + exp(-x)): 2 ** t by a polynomial on [-0.5, 0.5], 1 / y by an estimate and one Newton step
LR_AVX512 inline __m512 silu(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(-87.0f), x);  // 1e-36 from 0, and 2 ** t stays finite; a NaN stays one
    const __m512 t = _mm512_mul_ps(x, _mm512_set1_ps(-1.44269504f));
    const __m512 whole = _mm512_roundscale_ps(t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 f = _mm512_sub_ps(t, whole);
    __m512 p = _mm512_set1_ps(1.5403530e-4f);
    for (const float term : {1.3333558e-3f, 9.6181291e-3f, 5.5504109e-2f, 2.4022651e-1f, 6.9314718e-1f, 1.0f}) {
        p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(term));
    }
    const __m512 y = _mm512_add_ps(_mm512_scalef_ps(p, whole), _mm512_set1_ps(1.0f));
    const __m512 guess = _mm512_rcp14_ps(y);
    const __m512 inverse = _mm512_mul_ps(guess, _mm512_fnmadd_ps(y, guess, _mm512_set1_ps(2.0f)));
    return _mm512_mul_ps(x, inverse);
}

LR_AVX512 void swiglu(const float* c, long rows, bf16* out, long stride) {
    for (long r = 0; r < rows; ++r, c += kBlock) {
        const __m512 value = _mm512_mul_ps(silu(_mm512_loadu_ps(c)), _mm512_loadu_ps(c + kStrip));
        bf16* to = out + r / kStrip * stride + r % kStrip * kDepth;
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), narrowed(value));
    }
}

LR_AVX512 void sum(bf16* out, const bf16* const* rows, long count, long n) {
    for (long i = 0; i < n; i += kStrip) {
        __m512 total = _mm512_setzero_ps();
        for (long r = 0; r < count; ++r) total = _mm512_add_ps(total, widened(rows[r] + i));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), narrowed(total));
    }
}

constexpr Engine kEngines[] = {
    {vector_block<false>, store, swiglu, sum, nothing, nothing},
    {vector_block<true>, store, swiglu, sum, nothing, nothing},
    {amx_block, store, swiglu, sum, amx_enter, amx_leave},
};

}  // namespace

const Engine& avx512_engine(Path path) { return kEngines[path - kAvx512]; }

}  // namespace longreach::gemm
#endif
