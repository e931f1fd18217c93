// Quantised weights with AVX-512; see weights.h.
#include "gemm/weights.h"

#if defined(__x86_64__)
#include <immintrin.h>

namespace longreach::gemm {
namespace {

#define PAIRS __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")))

LR_AVX512 inline __m512 low(__m512i pairs) { return _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)); }
LR_AVX512 inline __m512 high(__m512i pairs) {
    return _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(int(0xffff0000u))));
}

// ---- lines of codes as bfloat16

struct Tables {
    __m512i words;  // of 4 bits: code - 8, twice; of 8: the odd words of two vectors
    __m512i small;  // of floating point: the values below 2^-6, twice and again
    __m512 floats;  // of 4 bits: code - 8
};

alignas(kLine) constexpr bf16 kInt4Words[32] = {  // -8 to 7, twice
                                                0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80,
                                                0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0,
                                                0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80,
                                                0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0};
alignas(kLine) constexpr float kInt4Floats[16] = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};
alignas(kLine) constexpr bf16 kOddWords[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
                                               33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
alignas(kLine) constexpr bf16 kSmallWords[32] = {  // 0 to 7 times 2^-9, four times
                                                 0, 0x3b00, 0x3b80, 0x3bc0, 0x3c00, 0x3c20, 0x3c40, 0x3c60,
                                                 0, 0x3b00, 0x3b80, 0x3bc0, 0x3c00, 0x3c20, 0x3c40, 0x3c60,
                                                 0, 0x3b00, 0x3b80, 0x3bc0, 0x3c00, 0x3c20, 0x3c40, 0x3c60,
                                                 0, 0x3b00, 0x3b80, 0x3bc0, 0x3c00, 0x3c20, 0x3c40, 0x3c60};

template <int kind> LR_AVX512 inline Tables tables() {
    return {_mm512_load_si512(kind == kInt4 ? kInt4Words : kOddWords), _mm512_load_si512(kSmallWords),
            _mm512_load_ps(kInt4Floats)};
}

LR_AVX512 inline __m256i half_line(const void* at) { return _mm256_loadu_si256(static_cast<const __m256i*>(at)); }
LR_AVX512 inline __m128i quarter_line(const void* at) { return _mm_loadu_si128(static_cast<const __m128i*>(at)); }

LR_AVX512 inline __m512i int8_line(const char* at, const Tables& tables) {
    const __m512 left = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(quarter_line(at)));
    const __m512 right = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(quarter_line(at + 16)));
    return _mm512_permutex2var_epi16(_mm512_castps_si512(left), tables.words, _mm512_castps_si512(right));
}

LR_AVX512 inline __m512i float8_line(const char* at, const Tables& tables) {
    const __m512i wide = _mm512_cvtepu8_epi16(half_line(at)), rest = _mm512_and_si512(wide, _mm512_set1_epi16(0x7f));
    __m512i value = _mm512_add_epi16(_mm512_slli_epi16(rest, 4), _mm512_set1_epi16(120 << 7));
    const __mmask32 few = _mm512_cmplt_epu16_mask(rest, _mm512_set1_epi16(8));
    const __mmask32 nan = _mm512_cmpeq_epi16_mask(rest, _mm512_set1_epi16(0x7f));
    value = _mm512_mask_permutexvar_epi16(value, few, rest, tables.small);
    value = _mm512_mask_mov_epi16(value, nan, _mm512_set1_epi16(0x7fc0));
    return _mm512_or_si512(value, _mm512_slli_epi16(_mm512_and_si512(wide, _mm512_set1_epi16(0x80)), 8));
}

// Two lines of codes: 32 bytes for 4 bits, 64 for 8.
template <int kind> LR_AVX512 inline void two_lines(const char* at, const Tables& tables, __m512i& a, __m512i& b) {
    if (kind == kInt4) {
        const __m512i both = _mm512_cvtepu8_epi16(half_line(at));
        a = _mm512_permutexvar_epi16(both, tables.words);  // of an index the low five bits count
        b = _mm512_permutexvar_epi16(_mm512_srli_epi16(both, 4), tables.words);
    } else if (kind == kInt8) {
        a = int8_line(at, tables);
        b = int8_line(at + 32, tables);
    } else {
        a = float8_line(at, tables);
        b = float8_line(at + 32, tables);
    }
}

// ---- scales

LR_AVX512 inline __m512 numbers(const char* from, int type, long index) {
    const char* at = from + index * Weights::size_of(type);
    switch (type) {
        case kFloat32:
            return _mm512_loadu_ps(at);
        case kFloat16:
            return _mm512_cvtph_ps(half_line(at));
        case kBfloat16:
            return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half_line(at)), 16));
        case kInt8:
            return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(quarter_line(at)));
        default:
            return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(quarter_line(at)));
    }
}

LR_AVX512 inline __m512 scale_of(const Weights& from, long strip, long groups, long group) {
    return numbers(from.scales, from.scale_type, (strip * groups + group) * kStrip);
}

LR_AVX512 inline __m512 zero_of(const Weights& from, long strip, long groups, long group) {
    if (from.zeros == nullptr) return _mm512_setzero_ps();
    const __m512 zero = numbers(from.zeros, from.zero_type, (strip * groups + group) * kStrip);
    return from.kind == kInt4 ? _mm512_sub_ps(zero, _mm512_set1_ps(8.0f)) : zero;
}

LR_AVX512 void scales(GroupScales& out, const Weights& from, long strip, bool two, long groups, long group) {
    for (long s = 0; s < (two ? 2 : 1); ++s) {
        _mm512_store_ps(out.scale[s], scale_of(from, strip + s, groups, group));
        _mm512_store_ps(out.zero[s], zero_of(from, strip + s, groups, group));
    }
}

// The sum of products of a group, moved by its zero point.
LR_AVX512 inline __m512 moved(__m512 part, __m512 zero, const float* sums, long row) {
    return sums ? _mm512_fnmadd_ps(zero, _mm512_set1_ps(sums[row]), part) : part;
}

// ---- strips of tiles

template <int kind> LR_AVX512 inline void unpack_codes(bf16* out, const char* at, long tiles) {
    const Tables table = tables<kind>();
    for (long pair = 0; pair < tiles * kStrip / 2; ++pair, out += 2 * kDepth, at += kind == kInt4 ? 32 : 64) {
        __m512i a, b;
        two_lines<kind>(at, table, a, b);
        _mm512_storeu_si512(out, a);
        _mm512_storeu_si512(out + kDepth, b);
    }
}

LR_AVX512 inline const char* tiles_at(const Weights& from, const Tiles& tiles) {
    return from.values + from.bytes((tiles.strip * tiles.k_tiles + tiles.first) * kTile);
}

LR_AVX512 void codes(bf16* out, const Weights& from, const Tiles& tiles) {
    const char* at = tiles_at(from, tiles);
    if (from.kind == kInt4) return unpack_codes<kInt4>(out, at, tiles.count);
    return from.kind == kInt8 ? unpack_codes<kInt8>(out, at, tiles.count) : unpack_codes<kFloat8>(out, at, tiles.count);
}

// Bits of a bfloat16 in the upper halves: to the nearest, ties to even; a NaN stays one.
LR_AVX512 inline __m512i rounded(__m512 value) {
    const __m512i bits = _mm512_castps_si512(value);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    return _mm512_mask_mov_epi32(up, nan, _mm512_set1_epi32(0x7fc00000));
}

template <bool Pairs> PAIRS inline __m512i interleaved(__m512 even, __m512 odd, __m512i order) {
    if (Pairs) return _mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(odd, even));
    const __m512i upper = _mm512_and_si512(rounded(odd), _mm512_set1_epi32(int(0xffff0000u)));
    return _mm512_or_si512(upper, _mm512_srli_epi32(rounded(even), 16));
}

template <bool Pairs> PAIRS void weights(bf16* out, const Weights& from, const Tiles& tiles) {
    codes(out, from, tiles);
    alignas(64) std::uint16_t places[32];
    for (int i = 0; i < 32; ++i) places[i] = std::uint16_t(i / 2 + i % 2 * 16);
    const __m512i order = _mm512_load_si512(places);
    const long groups = from.groups(tiles.k_tiles * kDepth), half = kStrip / 2;
    for (long pass = 0; pass < 2 * tiles.count; ++pass) {  // half a tile: 16 inputs
        const long group = (tiles.first * kDepth + pass * kStrip) / from.group;
        const __m512 scale = scale_of(from, tiles.strip, groups, group);
        const __m512 zero = zero_of(from, tiles.strip, groups, group);
        for (long line = 0; line < half; ++line, out += kDepth) {
            const __m512i pair = _mm512_loadu_si512(out);
            const __m512 even = _mm512_mul_ps(scale, _mm512_sub_ps(low(pair), zero));
            const __m512 odd = _mm512_mul_ps(scale, _mm512_sub_ps(high(pair), zero));
            _mm512_storeu_si512(out, interleaved<Pairs>(even, odd, order));
        }
    }
}

// ---- a few rows, without a copy of the codes

template <bool Pairs> PAIRS inline __m512 multiply_add(__m512 sum, __m512i pair, __m512i line) {
    if (Pairs) return _mm512_dpbf16_ps(sum, (__m512bh)pair, (__m512bh)line);
    return _mm512_fmadd_ps(high(pair), high(line), _mm512_fmadd_ps(low(pair), low(line), sum));
}

template <bool Pairs, int kind, int Rows, int Strips>
PAIRS void rows_of(float* c, const bf16* a, const FewRows& o, Ahead ahead) {
    const Tables table = tables<kind>();
    const Weights& from = o.weights;
    const long k_tiles = o.tiles.k_tiles, groups = from.groups(k_tiles * kDepth), strip = from.bytes(k_tiles * kTile);
    const char* at = tiles_at(from, o.tiles);
    __m512 total[Rows][Strips], sum[Rows][Strips];
    UNROLL for (int r = 0; r < Rows; ++r) { UNROLL for (int s = 0; s < Strips; ++s) total[r][s] = _mm512_setzero_ps(); }
    const long parts = parts_of_tile(from), lines = kStrip / parts;
    for (long k = 0, slice, left = 0, next = 0; k < k_tiles; k += slice, left -= slice, a += slice * kTile) {
        const bool starts = left == 0;  // a group
        if (starts) left = std::min(tiles_of_group(from), k_tiles - k), next += parts;
        slice = std::min(kSlice, left);
        for (long part = 0; part < parts; ++part) {
            const long group = next - parts + part;
            UNROLL for (int r = 0; r < Rows; ++r) {
                UNROLL for (int s = 0; s < Strips; ++s) sum[r][s] = _mm512_setzero_ps();
            }
            for (long tile = 0; tile < slice; ++tile) {
                const auto* pairs = reinterpret_cast<const std::int32_t*>(a + tile * kTile) + part * lines;
                for (long line = 0; line < lines; line += 2, at += kind == kInt4 ? 32 : 64) {
                    UNROLL for (int s = 0; s < Strips; ++s) {
                        __m512i one, two;
                        two_lines<kind>(at + s * strip, table, one, two);
                        UNROLL for (int r = 0; r < Rows; ++r) {
                            const __m512i first = _mm512_set1_epi32(pairs[r * kStrip + line]);
                            const __m512i second = _mm512_set1_epi32(pairs[r * kStrip + line + 1]);
                            sum[r][s] = multiply_add<Pairs>(multiply_add<Pairs>(sum[r][s], first, one), second, two);
                        }
                    }
                }
                for (long i = 0; part == 0 && i < ahead.lines; ++i, ahead.at += kLine) {
                    __builtin_prefetch(ahead.at, 0, 2);
                }
            }
            UNROLL for (int s = 0; s < Strips; ++s) {
                const __m512 scale = scale_of(from, o.tiles.strip + s, groups, group);
                const __m512 zero = zero_of(from, o.tiles.strip + s, groups, group);
                const float* sums = o.sums && starts ? o.sums + group * o.rows : nullptr;
                UNROLL for (int r = 0; r < Rows; ++r) {  // rows past `rows` are computed too, with any sums
                    const __m512 moved_sum = moved(sum[r][s], zero, sums, r < o.rows ? r : 0);
                    total[r][s] = _mm512_fmadd_ps(scale, moved_sum, total[r][s]);
                }
            }
        }
    }
    UNROLL for (int r = 0; r < Rows; ++r) {
        UNROLL for (int s = 0; s < Strips; ++s) _mm512_storeu_ps(c + r * kBlock + s * kStrip, total[r][s]);
    }
}

// ---- a few rows, in the order in which AMX sums

// Values of a slice of a few rows in float32: [row][even, odd][line].
struct alignas(kLine) Wide {
    float at[kFewRows][2][kSlice * kStrip];
};

LR_AVX512 inline void widen_rows(Wide& out, const bf16* a, long tiles, int rows) {
    for (int r = 0; r < rows; ++r) {
        for (long tile = 0; tile < tiles; ++tile) {
            const __m512i pairs = _mm512_loadu_si512(a + tile * kTile + r * kDepth);
            _mm512_store_ps(out.at[r][0] + tile * kStrip, low(pairs));
            _mm512_store_ps(out.at[r][1] + tile * kStrip, high(pairs));
        }
    }
}

// Two lines of codes in float32: the even inputs of the first, its odd ones, then those of the second.
template <int kind> LR_AVX512 inline void two_wide_lines(const char* at, const Tables& tables, __m512* out) {
    if (kind == kInt4) {
        const __m512i both = _mm512_cvtepu8_epi16(half_line(at));  // of an index the low four bits count
        out[0] = _mm512_permutexvar_ps(both, tables.floats);
        out[1] = _mm512_permutexvar_ps(_mm512_srli_epi32(both, 16), tables.floats);
        out[2] = _mm512_permutexvar_ps(_mm512_srli_epi32(both, 4), tables.floats);
        out[3] = _mm512_permutexvar_ps(_mm512_srli_epi32(both, 20), tables.floats);
    } else {
        __m512i a, b;
        two_lines<kind>(at, tables, a, b);
        out[0] = low(a), out[1] = high(a), out[2] = low(b), out[3] = high(b);
    }
}

// As a product of tiles is defined: even and odd inputs of a tile are summed apart, one after the other, and both sums
// added to what came before. So a row has the same bits here and in `amx_tiles`.
template <int kind, int Rows, int Strips>
LR_AVX512 void tile_rows(float* c, const bf16* a, const FewRows& o, Ahead ahead) {
    const Tables table = tables<kind>();
    const Weights& from = o.weights;
    const long k_tiles = o.tiles.k_tiles, groups = from.groups(k_tiles * kDepth), strip = from.bytes(k_tiles * kTile);
    const char* at = tiles_at(from, o.tiles);
    const long step = ahead.lines > 0 ? long(kLine) : 0;  // a line for every line of codes, one by one
    if (step == 0) ahead.at = at;
    __m512 total[Rows][Strips], sum[Rows][Strips], part_sum[Rows][Strips][2];
    UNROLL for (int r = 0; r < Rows; ++r) { UNROLL for (int s = 0; s < Strips; ++s) total[r][s] = _mm512_setzero_ps(); }
    const long parts = parts_of_tile(from), lines = kStrip / parts;
    Wide wide;
    for (long k = 0, slice, left = 0, next = 0; k < k_tiles; k += slice, left -= slice, a += slice * kTile) {
        const bool starts = left == 0;  // a group
        if (starts) left = std::min(tiles_of_group(from), k_tiles - k), next += parts;
        slice = std::min(kSlice, left);
        widen_rows(wide, a, slice, Rows);
        for (long part = 0; part < parts; ++part) {
            const long group = next - parts + part;
            UNROLL for (int r = 0; r < Rows; ++r) {
                UNROLL for (int s = 0; s < Strips; ++s) sum[r][s] = _mm512_setzero_ps();
            }
            for (long tile = 0; tile < slice; ++tile) {
                UNROLL for (int r = 0; r < Rows; ++r) {
                    UNROLL for (int s = 0; s < Strips; ++s) part_sum[r][s][0] = part_sum[r][s][1] = _mm512_setzero_ps();
                }
                const long first = tile * kStrip + part * lines;
                for (long line = first; line < first + lines; line += 2, at += kind == kInt4 ? 32 : 64) {
                    for (int i = 0; i < (kind == kInt4 ? 1 : 2); ++i, ahead.at += step) {
                        __builtin_prefetch(ahead.at, 0, 2);
                    }
                    UNROLL for (int s = 0; s < Strips; ++s) {
                        __m512 values[4];
                        two_wide_lines<kind>(at + s * strip, table, values);
                        UNROLL for (int r = 0; r < Rows; ++r) {
                            UNROLL for (int i = 0; i < 4; ++i) {
                                const __m512 input = _mm512_set1_ps(wide.at[r][i % 2][line + i / 2]);
                                part_sum[r][s][i % 2] = _mm512_fmadd_ps(input, values[i], part_sum[r][s][i % 2]);
                            }
                        }
                    }
                }
                UNROLL for (int r = 0; r < Rows; ++r) {
                    UNROLL for (int s = 0; s < Strips; ++s) sum[r][s] =
                        _mm512_add_ps(sum[r][s], _mm512_add_ps(part_sum[r][s][0], part_sum[r][s][1]));
                }
            }
            UNROLL for (int s = 0; s < Strips; ++s) {
                const __m512 scale = scale_of(from, o.tiles.strip + s, groups, group);
                const __m512 zero = zero_of(from, o.tiles.strip + s, groups, group);
                const float* sums = o.sums && starts ? o.sums + group * o.rows : nullptr;
                UNROLL for (int r = 0; r < Rows; ++r) {
                    const __m512 moved_sum = moved(sum[r][s], zero, sums, r < o.rows ? r : 0);
                    total[r][s] = _mm512_fmadd_ps(scale, moved_sum, total[r][s]);
                }
            }
        }
    }
    UNROLL for (int r = 0; r < Rows; ++r) {
        UNROLL for (int s = 0; s < Strips; ++s) _mm512_storeu_ps(c + r * kBlock + s * kStrip, total[r][s]);
    }
}

enum class Sums { kSingles, kPairs, kTiles };  // how the path of the engine sums

template <Sums sums, int kind, int Rows> PAIRS void by_strips(float* c, const bf16* a, const FewRows& o, Ahead ahead) {
    if constexpr (sums == Sums::kTiles) {
        o.two ? tile_rows<kind, Rows, 2>(c, a, o, ahead) : tile_rows<kind, Rows, 1>(c, a, o, ahead);
    } else {
        constexpr bool pairs = sums == Sums::kPairs;
        o.two ? rows_of<pairs, kind, Rows, 2>(c, a, o, ahead) : rows_of<pairs, kind, Rows, 1>(c, a, o, ahead);
    }
}

template <Sums sums, int kind> PAIRS void by_rows(float* c, const bf16* a, const FewRows& o, Ahead ahead) {
    if (o.rows == 1) return by_strips<sums, kind, 1>(c, a, o, ahead);
    o.rows == 2 ? by_strips<sums, kind, 2>(c, a, o, ahead) : by_strips<sums, kind, 4>(c, a, o, ahead);
}

template <Sums sums> PAIRS void few_rows(float* c, const bf16* a, const FewRows& o, Ahead ahead) {
    if (o.weights.kind == kInt4) return by_rows<sums, kInt4>(c, a, o, ahead);
    o.weights.kind == kInt8 ? by_rows<sums, kInt8>(c, a, o, ahead) : by_rows<sums, kFloat8>(c, a, o, ahead);
}

constexpr Decoder kDecoders[] = {
    {codes, weights<false>, scales, few_rows<Sums::kSingles>},
    {codes, weights<true>, scales, few_rows<Sums::kPairs>},
    {codes, weights<true>, scales, few_rows<Sums::kTiles>},
};

}  // namespace

const Decoder& avx512_decoder(Path path) { return kDecoders[path - kAvx512]; }

}  // namespace longreach::gemm
#endif
