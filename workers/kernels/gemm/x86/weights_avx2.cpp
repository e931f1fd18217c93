// Quantised weights with AVX2; see weights.h.
#include "gemm/weights.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include "gemm/x86/avx2.h"

namespace longreach::gemm {
namespace {

// ---- lines of codes as float32: the even and the odd inputs of 16 outputs, each times `kUnit` of the kind

struct Line {
    __m256 even[2], odd[2];
};

// What a value in a `Line` must be multiplied by. Outputs 4 to 7 and 8 to 11 of a line have changed places where
// `kCrossed`: so 16 bits are widened within the halves of a register.
template <int kind> constexpr float kUnit = kind == kInt4 ? 1.0f : kind == kInt8 ? 0x1p-24f : 0x1p8f;
template <int kind> constexpr bool kCrossed = kind != kFloat8;

struct Tables {
    __m256i upper, lower;  // bytes of the bfloat16 of a 4-bit code less 8
};

LR_AVX2 inline Tables tables() {
    alignas(32) std::uint8_t upper[32], lower[32];
    for (int i = 0; i < 32; ++i) {
        const float value = float(i % 16 - 8);
        std::uint32_t bits;
        std::memcpy(&bits, &value, sizeof bits);
        upper[i] = std::uint8_t(bits >> 24);
        lower[i] = std::uint8_t(bits >> 16);
    }
    return {load(upper), load(lower)};
}

// 4-bit codes, a byte each, as pairs of bfloat16.
LR_AVX2 inline void int4_pairs(__m256i codes, const Tables& t, __m256i& left, __m256i& right) {
    const __m256i upper = _mm256_shuffle_epi8(t.upper, codes), lower = _mm256_shuffle_epi8(t.lower, codes);
    left = _mm256_unpacklo_epi8(lower, upper);
    right = _mm256_unpackhi_epi8(lower, upper);
}

LR_AVX2 inline Line int4_line(__m256i codes, const Tables& t) {
    __m256i left, right;
    int4_pairs(codes, t, left, right);
    return {{low(left), low(right)}, {high(left), high(right)}};
}

LR_AVX2 inline __m256 int8_values(__m256i upper_bytes, bool right) {  // words whose lower bytes are 0
    const __m256i zero = _mm256_setzero_si256();
    return _mm256_cvtepi32_ps(right ? _mm256_unpackhi_epi16(zero, upper_bytes)
                                    : _mm256_unpacklo_epi16(zero, upper_bytes));
}

LR_AVX2 inline Line int8_line(__m256i pairs) {
    const __m256i even = _mm256_slli_epi16(pairs, 8), odd = _mm256_and_si256(pairs, _mm256_set1_epi16(short(0xff00)));
    return {{int8_values(even, false), int8_values(even, true)}, {int8_values(odd, false), int8_values(odd, true)}};
}

// Words with 8-bit floating point in their upper bytes as half precision, which has the same numbers times 2^-8.
LR_AVX2 inline __m256i halves(__m256i words) {
    const __m256i rest = _mm256_set1_epi16(0x7f00);
    const __m256i nan = _mm256_cmpeq_epi16(_mm256_and_si256(words, rest), rest);
    const __m256i moved = _mm256_and_si256(_mm256_srai_epi16(words, 1), _mm256_set1_epi16(short(0xbf80)));
    return _mm256_or_si256(moved, nan);
}

LR_AVX2 inline Line float8_line(__m256i pairs) {
    const __m256i even = halves(_mm256_slli_epi16(pairs, 8));
    const __m256i odd = halves(_mm256_and_si256(pairs, _mm256_set1_epi16(short(0xff00))));
    return {{_mm256_cvtph_ps(_mm256_castsi256_si128(even)), _mm256_cvtph_ps(_mm256_extracti128_si256(even, 1))},
            {_mm256_cvtph_ps(_mm256_castsi256_si128(odd)), _mm256_cvtph_ps(_mm256_extracti128_si256(odd, 1))}};
}

// Two lines of codes: 32 bytes for 4 bits, 64 for 8.
template <int kind> LR_AVX2 inline void two_lines(const char* at, const Tables& t, Line& a, Line& b) {
    if (kind == kInt4) {
        const __m256i both = load(at), mask = _mm256_set1_epi8(15);
        a = int4_line(_mm256_and_si256(both, mask), t);
        b = int4_line(_mm256_and_si256(_mm256_srli_epi16(both, 4), mask), t);
    } else if (kind == kInt8) {
        a = int8_line(load(at));
        b = int8_line(load(at + 32));
    } else {
        a = float8_line(load(at));
        b = float8_line(load(at + 32));
    }
}

// Both vectors of a strip in the order of its outputs.
template <int kind> LR_AVX2 inline void in_order(__m256& left, __m256& right) {
    if (!kCrossed<kind>) return;
    const __m256 first = _mm256_permute2f128_ps(left, right, 0x20);
    right = _mm256_permute2f128_ps(left, right, 0x31);
    left = first;
}

// ---- scales

LR_AVX2 inline __m256 numbers(const char* from, int type, long index) {  // eight
    const char* at = from + index * Weights::size_of(type);
    switch (type) {
        case kFloat32:
            return _mm256_loadu_ps(reinterpret_cast<const float*>(at));
        case kFloat16:
            return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
        case kBfloat16:
            return low(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at))));
        case kInt8:
            return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(at))));
        default:
            return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(at))));
    }
}

LR_AVX2 inline __m256 scale_of(const Weights& from, long index) { return numbers(from.scales, from.scale_type, index); }

LR_AVX2 inline __m256 zero_of(const Weights& from, long index) {
    if (from.zeros == nullptr) return _mm256_setzero_ps();
    const __m256 zero = numbers(from.zeros, from.zero_type, index);
    return from.kind == kInt4 ? _mm256_sub_ps(zero, _mm256_set1_ps(8.0f)) : zero;
}

LR_AVX2 void scales(GroupScales& out, const Weights& from, long strip, bool two, long groups, long group) {
    for (long s = 0; s < (two ? 2 : 1); ++s) {
        for (long n = 0; n < kStrip; n += 8) {
            const long index = ((strip + s) * groups + group) * kStrip + n;
            _mm256_store_ps(out.scale[s] + n, scale_of(from, index));
            _mm256_store_ps(out.zero[s] + n, zero_of(from, index));
        }
    }
}

// ---- strips of tiles

// Two lines as pairs of bfloat16, which is exact.
template <int kind> LR_AVX2 inline void store_line(bf16* out, Line line) {
    const __m256 unit = _mm256_set1_ps(kUnit<kind>);
    in_order<kind>(line.even[0], line.even[1]);
    in_order<kind>(line.odd[0], line.odd[1]);
    for (int v = 0; v < 2; ++v) {
        const __m256i even = _mm256_castps_si256(_mm256_mul_ps(line.even[v], unit));
        const __m256i odd = _mm256_castps_si256(_mm256_mul_ps(line.odd[v], unit));
        const __m256i upper = _mm256_and_si256(odd, _mm256_set1_epi32(int(0xffff0000u)));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 16 * v),
                            _mm256_or_si256(upper, _mm256_srli_epi32(even, 16)));
    }
}

template <int kind> LR_AVX2 inline void unpack_codes(bf16* out, const char* at, long tiles) {
    const Tables table = tables();
    for (long pair = 0; pair < tiles * kStrip / 2; ++pair, out += 2 * kDepth, at += kind == kInt4 ? 32 : 64) {
        Line a, b;
        two_lines<kind>(at, table, a, b);
        store_line<kind>(out, a);
        store_line<kind>(out + kDepth, b);
    }
}

LR_AVX2 inline const char* tiles_at(const Weights& from, const Tiles& tiles) {
    return from.values + from.bytes((tiles.strip * tiles.k_tiles + tiles.first) * kTile);
}

LR_AVX2 void codes(bf16* out, const Weights& from, const Tiles& tiles) {
    const char* at = tiles_at(from, tiles);
    if (from.kind == kInt4) return unpack_codes<kInt4>(out, at, tiles.count);
    return from.kind == kInt8 ? unpack_codes<kInt8>(out, at, tiles.count) : unpack_codes<kFloat8>(out, at, tiles.count);
}

// Weights of groups that end within a tile, rounded once.
LR_AVX2 void weights(bf16* out, const Weights& from, const Tiles& tiles) {
    codes(out, from, tiles);
    const long groups = from.groups(tiles.k_tiles * kDepth);
    for (long pass = 0; pass < 2 * tiles.count; ++pass) {  // half a tile: 16 inputs
        const long group = (tiles.first * kDepth + pass * kStrip) / from.group;
        for (long line = 0; line < kStrip / 2; ++line, out += kDepth) {
            for (long v = 0; v < 2; ++v) {
                const long index = (tiles.strip * groups + group) * kStrip + 8 * v;
                const __m256 scale = scale_of(from, index), zero = zero_of(from, index);
                const __m256i pair = load(out + 16 * v);
                const __m256 even = _mm256_mul_ps(scale, _mm256_sub_ps(low(pair), zero));
                const __m256 odd = _mm256_mul_ps(scale, _mm256_sub_ps(high(pair), zero));
                const __m256i upper = _mm256_slli_epi32(rounded(odd), 16);
                _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 16 * v), _mm256_or_si256(upper, rounded(even)));
            }
        }
    }
}

// ---- a few rows, without a copy of the codes

// The products of one group, moved by its zero point, scaled and added; both vectors of a strip.
template <int kind> LR_AVX2 inline void add_group(__m256* total, __m256 left, __m256 right, const Weights& from,
                                                  long index, const float* inputs) {
    in_order<kind>(left, right);
    __m256 part[2] = {left, right};
    for (int v = 0; v < 2; ++v) {
        if (kUnit<kind> != 1.0f) part[v] = _mm256_mul_ps(part[v], _mm256_set1_ps(kUnit<kind>));
        if (inputs) part[v] = _mm256_fnmadd_ps(zero_of(from, index + 8 * v), _mm256_broadcast_ss(inputs), part[v]);
        total[v] = _mm256_fmadd_ps(scale_of(from, index + 8 * v), part[v], total[v]);
    }
}

// Strips from `strip` of the panel on.
template <int kind, int Rows, int Strips>
LR_AVX2 void rows_of(float* c, const bf16* a, const FewRows& o, long strip, Ahead ahead) {
    const Tables table = tables();
    const Weights& from = o.weights;
    const long k_tiles = o.tiles.k_tiles, groups = from.groups(k_tiles * kDepth), bytes = from.bytes(k_tiles * kTile);
    const char* at = tiles_at(from, o.tiles) + strip * bytes;
    __m256 total[Rows][2 * Strips], sum[Rows][2 * Strips];
    UNROLL for (int r = 0; r < Rows; ++r) {
        UNROLL for (int v = 0; v < 2 * Strips; ++v) total[r][v] = _mm256_setzero_ps();
    }
    const long parts = parts_of_tile(from), lines = kStrip / parts;
    for (long k = 0, slice; k < k_tiles; k += slice, a += slice * kTile) {
        slice = group_slice(k, k_tiles, from.group);
        for (long part = 0; part < parts; ++part) {
            const long group = (k * kDepth + part * kStrip) / from.group;
            UNROLL for (int r = 0; r < Rows; ++r) {
                UNROLL for (int v = 0; v < 2 * Strips; ++v) sum[r][v] = _mm256_setzero_ps();
            }
            for (long tile = 0; tile < slice; ++tile) {
                const auto* pairs = reinterpret_cast<const std::int32_t*>(a + tile * kTile) + part * lines;
                for (long line = 0; line < lines; line += 2, at += kind == kInt4 ? 32 : 64) {
                    UNROLL for (int s = 0; s < Strips; ++s) {
                        Line both[2];
                        two_lines<kind>(at + s * bytes, table, both[0], both[1]);
                        UNROLL for (int l = 0; l < 2; ++l) {
                            UNROLL for (int r = 0; r < Rows; ++r) {
                                const __m256i pair = _mm256_set1_epi32(pairs[r * kStrip + line + l]);
                                const __m256 even = low(pair), odd = high(pair);
                                UNROLL for (int v = 0; v < 2; ++v) {
                                    __m256& to = sum[r][2 * s + v];
                                    to = _mm256_fmadd_ps(even, both[l].even[v], to);
                                    to = _mm256_fmadd_ps(odd, both[l].odd[v], to);
                                }
                            }
                        }
                    }
                }
                for (long i = 0; part == 0 && i < ahead.lines; ++i, ahead.at += kLine) {
                    __builtin_prefetch(ahead.at, 0, 2);
                }
            }
            UNROLL for (int s = 0; s < Strips; ++s) {
                const long index = ((o.tiles.strip + strip + s) * groups + group) * kStrip;
                UNROLL for (int r = 0; r < Rows; ++r) {  // rows past `rows` are computed too, with any sums
                    const float* inputs = o.sums ? o.sums + group * o.rows + (r < o.rows ? r : 0) : nullptr;
                    add_group<kind>(total[r] + 2 * s, sum[r][2 * s], sum[r][2 * s + 1], from, index, inputs);
                }
            }
        }
    }
    UNROLL for (int r = 0; r < Rows; ++r) {
        UNROLL for (int v = 0; v < 2 * Strips; ++v)
            _mm256_storeu_ps(c + r * kBlock + strip * kStrip + 8 * v, total[r][v]);
    }
}

template <int kind, int Rows> LR_AVX2 void by_strips(float* c, const bf16* a, const FewRows& o, Ahead ahead) {
    if (Rows <= 2 && o.two) return rows_of<kind, Rows, 2>(c, a, o, 0, ahead);
    rows_of<kind, Rows, 1>(c, a, o, 0, ahead);
    if (o.two) rows_of<kind, Rows, 1>(c, a, o, 1, {nullptr, 0});
}

template <int kind> LR_AVX2 void by_rows(float* c, const bf16* a, const FewRows& o, Ahead ahead) {
    if (o.rows == 1) return by_strips<kind, 1>(c, a, o, ahead);
    o.rows == 2 ? by_strips<kind, 2>(c, a, o, ahead) : by_strips<kind, 4>(c, a, o, ahead);
}

LR_AVX2 void few_rows(float* c, const bf16* a, const FewRows& o, Ahead ahead) {
    if (o.weights.kind == kInt4) return by_rows<kInt4>(c, a, o, ahead);
    o.weights.kind == kInt8 ? by_rows<kInt8>(c, a, o, ahead) : by_rows<kFloat8>(c, a, o, ahead);
}

constexpr Decoder kDecoder{codes, weights, scales, few_rows};

}  // namespace

const Decoder& avx2_decoder() { return kDecoder; }

}  // namespace longreach::gemm
#endif
