// Quantised weights with AVX2; see weights.h.
#include "gemm/weights.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include "gemm/x86/avx2.h"

namespace longreach::gemm {
namespace {

// ---- lines of codes as float32, of 16 outputs

// The even and the odd inputs of a line, times a power of two that depends on the kind of codes. Outputs 4 to 7 and 8 to
// 11 have changed places where `kCrossed`: so 16 bits are widened within the halves of a register.
struct Line {
    __m256 even[2], odd[2];
};

template <int kind> constexpr float kUnit = kind == kInt8 ? 0x1p24f : 0x1p-8f;
template <int kind> constexpr bool kCrossed = kind == kInt8;

// 4-bit codes of two lines are bits 0, 4, 8 and 12 of a word an output: the even inputs of both, then the odd ones. Each
// becomes the low bits of 2^23, where they stand, without a shift; so the rows are divided by these units.
constexpr Units kInt4Units{{1.0f, 0x1p-4f}, {0x1p-8f, 0x1p-12f}};

// For bits 0, 8, 4 and 12: masks, and what the unit of 2^23 and the 8 of a code amount to.
struct alignas(32) Int4Constants {
    std::uint32_t masks[4][8];
    float zeros[4][8];
};
constexpr int kInt4Bits[4] = {0, 8, 4, 12};
constexpr Int4Constants int4_constants() {
    Int4Constants made{};
    for (int i = 0; i < 4; ++i) {
        for (int lane = 0; lane < 8; ++lane) {
            made.masks[i][lane] = 0x4b000000u | 15u << kInt4Bits[i];
            made.zeros[i][lane] = 0x1p23f + float(8 << kInt4Bits[i]);
        }
    }
    return made;
}
constexpr Int4Constants kInt4Constants = int4_constants();

LR_AVX2 inline __m256i int4_words(const char* at) {  // of eight outputs
    __m256i words = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
    words = _mm256_or_si256(words, _mm256_set1_epi32(0x4b000000));
    __asm__("" : "+x"(words));  // else the compiler repeats it after each mask
    return words;
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

template <int kind> LR_AVX2 inline Line line_of(const char* at) {
    return kind == kInt8 ? int8_line(load(at)) : float8_line(load(at));
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

// A line as pairs of bfloat16, which is exact.
template <int kind> LR_AVX2 inline void store_line(bf16* out, Line line) {
    const __m256 unit = _mm256_set1_ps(1.0f / kUnit<kind>);
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
    for (long line = 0; line < tiles * kStrip; ++line, out += kDepth, at += kDepth) {
        store_line<kind>(out, line_of<kind>(at));
    }
}

// Bytes of the bfloat16 of a 4-bit code less 8, twice: the upper ones, or the lower ones.
LR_AVX2 inline __m256i int4_bytes(int shift) {
    alignas(32) std::uint8_t bytes[32];
    for (int i = 0; i < 32; ++i) bytes[i] = std::uint8_t(bits_of(float(i % 16 - 8)) >> shift);
    return load(bytes);
}

LR_AVX2 inline void unpack_int4(bf16* out, const char* at, long tiles) {
    const __m256i upper = int4_bytes(24), lower = int4_bytes(16), mask = _mm256_set1_epi8(15);
    for (long pair = 0; pair < tiles * kStrip / 2; ++pair, at += 32) {
        const __m256i both = load(at);
        for (int line = 0; line < 2; ++line, out += kDepth) {
            const __m256i codes = _mm256_and_si256(line ? _mm256_srli_epi16(both, 4) : both, mask);
            const __m256i high_bytes = _mm256_shuffle_epi8(upper, codes), low_bytes = _mm256_shuffle_epi8(lower, codes);
            const __m256i left = _mm256_unpacklo_epi8(low_bytes, high_bytes);
            const __m256i right = _mm256_unpackhi_epi8(low_bytes, high_bytes);
            auto* to = reinterpret_cast<__m256i*>(out);
            _mm256_storeu_si256(to, _mm256_permute2x128_si256(left, right, 0x20));
            _mm256_storeu_si256(to + 1, _mm256_permute2x128_si256(left, right, 0x31));
        }
    }
}

LR_AVX2 inline const char* tiles_at(const Weights& from, const Tiles& tiles) {
    return from.values + from.bytes((tiles.strip * tiles.k_tiles + tiles.first) * kTile);
}

LR_AVX2 void codes(bf16* out, const Weights& from, const Tiles& tiles) {
    const char* at = tiles_at(from, tiles);
    if (from.kind == kInt4) return unpack_int4(out, at, tiles.count);
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

// The tiles of one group, or the lines from `first` on, `lines` of them, of a tile that has several.
struct Group {
    const char* at;  // codes
    long bytes;      // from a strip of codes to the next
    long tiles, first, lines;
};

template <int Rows, int Strips> using Sums = __m256[Rows][2 * Strips];

// Lines i and i + 1 of every strip.
template <int Rows, int Strips> LR_AVX2 inline void add_int4(Sums<Rows, Strips>& sum, const char* at, long bytes,
                                                             const Wide& a, long i, const Int4Constants* constants) {
    __m256i words[2 * Strips];
    UNROLL for (int v = 0; v < 2 * Strips; ++v) words[v] = int4_words(at + v / 2 * bytes + v % 2 * 16);
    UNROLL for (int part = 0; part < 4; ++part) {
        const __m256i mask = load(constants->masks[part]);
        const __m256 zero = _mm256_load_ps(constants->zeros[part]);
        const long place = i + part / 2 + part % 2 * kStrip;
        UNROLL for (int v = 0; v < 2 * Strips; ++v) {
            const __m256 codes = _mm256_sub_ps(_mm256_castsi256_ps(_mm256_and_si256(words[v], mask)), zero);
            UNROLL for (int r = 0; r < Rows; ++r) {
                sum[r][v] = _mm256_fmadd_ps(_mm256_broadcast_ss(a.rows[r] + place), codes, sum[r][v]);
            }
        }
    }
}

template <int kind, int Rows, int Strips>
LR_AVX2 inline void add_lines(Sums<Rows, Strips>& sum, const char* at, long bytes, const Wide& a, long i) {
    UNROLL for (int s = 0; s < Strips; ++s) {
        UNROLL for (int l = 0; l < 2; ++l) {
            const Line codes = line_of<kind>(at + s * bytes + 32 * l);
            UNROLL for (int r = 0; r < Rows; ++r) {
                const __m256 even = _mm256_broadcast_ss(a.rows[r] + i + l);
                const __m256 odd = _mm256_broadcast_ss(a.rows[r] + i + l + kStrip);
                UNROLL for (int v = 0; v < 2; ++v) {
                    __m256& to = sum[r][2 * s + v];
                    to = _mm256_fmadd_ps(even, codes.even[v], to);
                    to = _mm256_fmadd_ps(odd, codes.odd[v], to);
                }
            }
        }
    }
}

// Sums of products of codes; not inlined, so that nothing else asks for registers.
template <int kind, int Rows, int Strips>
LR_AVX2 __attribute__((noinline)) void group_sums(Sums<Rows, Strips>& out, const Wide& a, Group group, Ahead& ahead) {
    Sums<Rows, Strips> sum;
    UNROLL for (int r = 0; r < Rows; ++r) {
        UNROLL for (int v = 0; v < 2 * Strips; ++v) sum[r][v] = _mm256_setzero_ps();
    }
    const char* at = group.at;
    const Int4Constants* constants = &kInt4Constants;
    for (long tile = 0; tile < group.tiles; ++tile) {
        const long first = tile * kDepth + group.first;
        for (long i = first; i < first + group.lines; i += 2, at += kind == kInt4 ? 32 : 64) {
            __asm__("" : "+r"(constants));  // else they take the registers of the sums
            if (kind == kInt4)
                add_int4<Rows, Strips>(sum, at, group.bytes, a, i, constants);
            else
                add_lines<kind, Rows, Strips>(sum, at, group.bytes, a, i);
        }
        for (long i = 0; i < ahead.lines; ++i, ahead.at += kLine) __builtin_prefetch(ahead.at, 0, 2);
    }
    UNROLL for (int r = 0; r < Rows; ++r) { UNROLL for (int v = 0; v < 2 * Strips; ++v) out[r][v] = sum[r][v]; }
}

// The products of one group, moved by its zero point, scaled and added; both vectors of a strip.
template <int kind> LR_AVX2 inline void add_group(__m256* total, __m256 left, __m256 right, const Weights& from,
                                                  long index, const float* inputs) {
    in_order<kind>(left, right);
    const __m256 part[2] = {left, right};
    UNROLL for (int v = 0; v < 2; ++v) {
        __m256 value = part[v];
        if (kind != kInt4) value = _mm256_mul_ps(value, _mm256_set1_ps(1.0f / kUnit<kind>));
        if (inputs) value = _mm256_fnmadd_ps(zero_of(from, index + 8 * v), _mm256_broadcast_ss(inputs), value);
        total[v] = _mm256_fmadd_ps(scale_of(from, index + 8 * v), value, total[v]);
    }
}

// Strips from `strip` of the panel on.
template <int kind, int Rows, int Strips>
LR_AVX2 void rows_of(float* c, const bf16* a, const FewRows& o, long strip, Ahead ahead) {
    const Weights& from = o.weights;
    const long k_tiles = o.tiles.k_tiles, groups = from.groups(k_tiles * kDepth), bytes = from.bytes(k_tiles * kTile);
    const char* at = tiles_at(from, o.tiles) + strip * bytes;
    Sums<Rows, Strips> total = {}, sum;
    const long parts = parts_of_tile(from), lines = kStrip / parts;
    Ahead none{nullptr, 0};
    Wide wide;
    for (long k = 0, slice, left = 0, next = 0; k < k_tiles; k += slice, left -= slice, a += slice * kTile) {
        const bool starts = left == 0;  // a group
        if (starts) left = std::min(tiles_of_group(from), k_tiles - k), next += parts;
        slice = std::min(kSlice, left);
        widen_rows<Rows>(wide, a, slice, kind == kInt4 ? kInt4Units : kOnes);
        for (long part = 0; part < parts; ++part) {
            group_sums<kind, Rows, Strips>(sum, wide, {at, bytes, slice, part * lines, lines}, part ? none : ahead);
            at += from.bytes(slice * lines * kDepth);
            const long group = next - parts + part;
            for (int s = 0; s < Strips; ++s) {
                const long index = ((o.tiles.strip + strip + s) * groups + group) * kStrip;
                for (int r = 0; r < Rows; ++r) {  // rows past `rows` are computed too, with any sums
                    const float* inputs = o.sums && starts ? o.sums + group * o.rows + (r < o.rows ? r : 0) : nullptr;
                    add_group<kind>(total[r] + 2 * s, sum[r][2 * s], sum[r][2 * s + 1], from, index, inputs);
                }
            }
        }
    }
    for (int r = 0; r < Rows; ++r) {
        for (int v = 0; v < 2 * Strips; ++v) _mm256_storeu_ps(c + r * kBlock + strip * kStrip + 8 * v, total[r][v]);
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
