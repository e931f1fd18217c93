// An engine in vector code, for any type and head dim. Included once for every instruction set by a source that defines
//   LR_WIDTH    floats of a vector
//   LR_TARGET   attribute that allows the instructions
//   LR_MAKE     name of the function that makes the engine
//   LR_PAIRS    whether products take pairs of bfloat16, from queries and keys in bfloat16; LR_WIDTH is 16
// Other products are computed in float32. Keys and values of other types are converted block by block.
#include <cstring>

#include "attention/attention.h"

#if LR_PAIRS
#include <immintrin.h>
#endif

#define LR_INLINE LR_TARGET inline __attribute__((always_inline))

namespace longreach::attention {
namespace {

constexpr int kWidth = LR_WIDTH;
constexpr int kRows = kWidth == 16 ? 8 : 4;  // of a register block
constexpr int kStrip = 2 * kWidth;  // columns that are computed together
typedef float Vec __attribute__((vector_size(4 * LR_WIDTH)));
typedef std::int32_t Ints __attribute__((vector_size(4 * LR_WIDTH)));

LR_INLINE void choose(Vec& to, const Ints& mask, const Vec& yes, const Vec& no) {
    to = (Vec)((mask & (Ints)yes) | (~mask & (Ints)no));
}

#if LR_PAIRS
// A word is the operand of a product: values of two neighbouring dims (scores) or keys (weighted values).
constexpr int kPair = 2;
typedef std::int32_t Word __attribute__((may_alias));
typedef std::int32_t Words __attribute__((vector_size(64), may_alias));

LR_INLINE void multiply_add(Vec& sum, Word a, const Words& b) {
    sum = (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(a), (__m512bh)b);
}

// Words of two rows of weights, which become bfloat16.
LR_INLINE Words words_of(const Vec* x) {
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                           21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return (Words)_mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh((__m512)x[1], (__m512)x[0]));
}

INLINE Word word_at(const char* row, int, int i) {
    Word word;
    std::memcpy(&word, row + i * sizeof word, sizeof word);
    return word;
}

// 32 values from value `i` of a row on, as bfloat16.
LR_INLINE __m512i halves(const char* row, int type, float scale, int i) {
    if (type == kBfloat16) return _mm512_loadu_si512(row + i * sizeof(bf16));
    const auto* bytes = reinterpret_cast<const __m128i*>(row + i);
    const __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(bytes)));
    const __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(bytes + 1)));
    const __m512 factor = _mm512_set1_ps(scale);
    return (__m512i)_mm512_cvtne2ps_pbh(_mm512_mul_ps(high, factor), _mm512_mul_ps(low, factor));
}

// The keys of a group; bfloat16 as they lie in memory.
LR_TARGET const Word* key_words(Word* to, const char* rows, int type, const float* scales, int dim) {
    if (type == kBfloat16) return reinterpret_cast<const Word*>(rows);
    for (int r = 0; r < kGroup; ++r, rows += dim) {
        for (int d = 0; d < dim; d += 32) _mm512_store_si512(to + (r * dim + d) / 2, halves(rows, type, scales[r], d));
    }
    return to;
}

// The values of a group, a row of words for every two keys.
LR_TARGET const Word* value_words(Word* to, const char* rows, int type, const float* scales, int dim) {
    const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37,
                                         5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    const std::size_t row = dim * type_bytes(type);
    for (int r = 0; r < kGroup; r += 2, rows += 2 * row) {
        const float even = scales ? scales[r] : 1.0f, odd = scales ? scales[r + 1] : 1.0f;
        for (int d = 0; d < dim; d += 32) {
            const __m512i a = halves(rows, type, even, d), b = halves(rows + row, type, odd, d);
            _mm512_store_si512(to + r / 2 * dim + d, _mm512_permutex2var_epi16(a, low, b));
            _mm512_store_si512(to + r / 2 * dim + d + 16, _mm512_permutex2var_epi16(a, high, b));
        }
    }
    return to;
}

// 2^x; exactly 0 below -150; relative error 3e-6 (the result becomes a bfloat16).
LR_INLINE void exp2(Vec& x) {
    __asm__("" : "+v"(x));  // else f may be taken of a product before it is rounded, which is far off where x is large
    const Vec shifted = x + 12582912.0f;  // 1.5 * 2^23: rounds to the nearest integer
    const Vec nearest = shifted - 12582912.0f, f = x - nearest;
    Vec p = f * 9.5701e-3f + 5.591786e-2f;
    p = p * f + 2.4024744e-1f;
    p = p * f + 6.931218e-1f;
    p = p * f + 9.999993e-1f;
    x = (Vec)_mm512_scalef_ps((__m512)p, (__m512)nearest);
}
#else
constexpr int kPair = 1;
typedef float Word;
typedef Vec Words;

LR_INLINE void multiply_add(Vec& sum, Word a, const Words& b) { sum += a * b; }

LR_INLINE Words words_of(const Vec* x) { return *x; }

INLINE Word word_at(const char* row, int type, int i) { return value_at(row, type, i); }

// 2^x for x <= 2^20; 0 below 2^-125; relative error 2e-7.
LR_INLINE void exp2(Vec& x) {
    const Vec floor_x = Vec{} - 200.0f;
    const Ints tiny = x < -125.0f;
    choose(x, tiny, floor_x, x);
    const Vec shifted = x + 12582912.0f;  // 1.5 * 2^23: the low bits are the nearest integer
    const Vec f = x - (shifted - 12582912.0f);
    Vec p = f * 1.535336188319500e-4f + 1.339887440266574e-3f;
    p = p * f + 9.618437357674640e-3f;
    p = p * f + 5.550332471162809e-2f;
    p = p * f + 2.402264791363012e-1f;
    p = p * f + 6.931472028550421e-1f;
    p = p * f + 1.0f;
    x = (Vec)(((Ints)p + ((Ints)shifted << 23)) & ~tiny);
}

// The keys of a group in float32, converted unless they are.
LR_TARGET const Word* key_words(Word* to, const char* from, int type, const float* scales, int dim) {
    const int n = kGroup * dim;
    if (type == kFloat32) return reinterpret_cast<const float*>(from);
    if (type == kBfloat16) {
        const auto* x = reinterpret_cast<const std::uint16_t*>(from);
        for (int i = 0; i < n; ++i) to[i] = widen(x[i]);
    } else {
        const auto* x = reinterpret_cast<const signed char*>(from);
        for (int r = 0; r < kGroup; ++r) {
            for (int i = 0; i < dim; ++i) to[r * dim + i] = scales[r] * float(x[r * dim + i]);
        }
    }
    return to;
}

constexpr auto value_words = key_words;
#endif

// s[32][strip] = k[32][words] q[words][strip], the first N vectors of a strip.
template <int N> LR_TARGET void scores(float* s, const Word* k, const Word* q, int words) {
    for (int r = 0; r < kGroup; r += kRows, k += kRows * words, s += kRows * kStrip) {
        Vec sums[kRows][N] = {};
        for (int d = 0; d < words; ++d) {
            const Words* columns = reinterpret_cast<const Words*>(q + d * kStrip);
            for (int i = 0; i < kRows; ++i) {
                for (int j = 0; j < N; ++j) multiply_add(sums[i][j], k[i * words + d], columns[j]);
            }
        }
        for (int i = 0; i < kRows; ++i) {
            for (int j = 0; j < N; ++j) reinterpret_cast<Vec*>(s + i * kStrip)[j] = sums[i][j];
        }
    }
}

// o[R][strip] += sum over words of v[word][R] p[word][strip].
template <int N, int R>
LR_TARGET void weigh(float* o, const Word* const* v, const Word* p, int groups, int dim, int d) {
    Vec sums[R][N];
    for (int i = 0; i < R; ++i) {
        for (int j = 0; j < N; ++j) sums[i][j] = reinterpret_cast<const Vec*>(o + (d + i) * kStrip)[j];
    }
    for (int g = 0; g < groups; ++g) {
        const Word* row = v[g] + d;
        for (int k = 0; k < kGroup / kPair; ++k, row += dim, p += kStrip) {
            const Words* weights = reinterpret_cast<const Words*>(p);
            for (int i = 0; i < R; ++i) {
                for (int j = 0; j < N; ++j) multiply_add(sums[i][j], row[i], weights[j]);
            }
        }
    }
    for (int i = 0; i < R; ++i) {
        for (int j = 0; j < N; ++j) reinterpret_cast<Vec*>(o + (d + i) * kStrip)[j] = sums[i][j];
    }
}

class Simd final : public Engine {
public:
    Simd(const Args& args, int max_columns, Arena& arena) : Engine(args, max_columns, kStrip, arena) {
        q_ = arena.take<Word>(std::size_t(max_columns + kStrip - 1) / kStrip * kStrip * words_);
        keys_ = arena.take<Word>(std::size_t(kBlock) * words_);
        values_ = arena.take<Word>(std::size_t(kBlock) * words_);
        s_ = arena.take<float>(kBlock * kStrip);
    }

    LR_TARGET void block(const Block& block) override {
        if (!packed_) pack();
        const Word *k[kGroups], *v[kGroups];
        for (int g = 0; g < block.count; ++g) {
            const Group& group = block.groups[g];
            k[g] = key_words(keys_ + g * kGroup * words_, group.k, args_.kv_type, group.k_scales, dim_);
            v[g] = value_words(values_ + g * kGroup * words_, group.v, args_.kv_type, group.v_scales, dim_);
        }
        for (int strip = 0; strip < strips_; ++strip) {
            const int left = columns_ - strip * kStrip;
            left > kWidth ? pass<2>(block, k, v, strip) : pass<1>(block, k, v, strip);
        }
    }

    void finish() override {
        for (int c = 0; c < columns_; ++c) {
            const float* o = o_ + std::size_t(c / kStrip) * dim_ * kStrip + c % kStrip;
            write_row(args_, item_.out(args_, c), o, kStrip, sums_[c]);
        }
    }

    void finish_part(float* part) override {
        for (int c = 0; c < columns_; ++c, part += dim_ + 2) {
            const float* o = o_ + std::size_t(c / kStrip) * dim_ * kStrip + c % kStrip;
            for (int d = 0; d < dim_; ++d) part[d] = o[d * kStrip];
            part[dim_] = highest_[c];
            part[dim_ + 1] = sums_[c];
        }
    }

private:
    void pack() {
        packed_ = true;
        for (int c = 0; c < strips_ * kStrip; ++c) {
            Word* q = q_ + std::size_t(c / kStrip) * words_ * kStrip + c % kStrip;
            const char* row = c < columns_ ? item_.query(args_, c, rotation_) : nullptr;
            for (int d = 0; d < words_; ++d) q[d * kStrip] = row == nullptr ? Word(0) : word_at(row, args_.q_type, d);
        }
    }

    template <int N> LR_TARGET void pass(const Block& block, const Word* const* k, const Word* const* v, int strip) {
        const std::int32_t* positions = positions_ + strip * kStrip;
        const std::int32_t earliest = *std::min_element(positions, positions + kStrip);
        std::int32_t latest = 0;
        for (int i = 0; i < std::min(kStrip, columns_ - strip * kStrip); ++i) latest = std::max(latest, positions[i]);
        const Word* visited[kGroups];
        int groups = 0;
        for (int g = 0; g < block.count; ++g) {
            if (block.groups[g].first > latest) continue;
            float* s = s_ + groups * kGroup * kStrip;
            scores<N>(s, k[g], q_ + std::size_t(strip) * words_ * kStrip, words_);
            if (block.groups[g].last > earliest) mask<N>(s, block.positions + g * kGroup, positions);
            visited[groups++] = v[g];
        }
        if (groups == 0) return;
        float* o = o_ + std::size_t(strip) * dim_ * kStrip;
        for (int j = 0; j < N; ++j) {
            softmax(s_ + j * kWidth, groups * kGroup, strip * kStrip + j * kWidth, o + j * kWidth);
        }
        int d = 0;
        const Word* p = reinterpret_cast<const Word*>(s_);
        for (; d + kRows <= dim_; d += kRows) weigh<N, kRows>(o, visited, p, groups, dim_, d);
        for (; d < dim_; ++d) weigh<N, 1>(o, visited, p, groups, dim_, d);
    }

    template <int N> LR_TARGET void mask(float* s, const std::int32_t* keys, const std::int32_t* columns) {
        const Vec masked = Vec{} + kMasked;
        for (int r = 0; r < kGroup; ++r, s += kStrip) {
            for (int j = 0; j < N; ++j) {
                Vec& row = reinterpret_cast<Vec*>(s)[j];
                choose(row, reinterpret_cast<const Ints*>(columns)[j] >= keys[r], row, masked);
            }
        }
    }

    // Scores of one vector of columns to words of weights, in place.
    LR_TARGET void softmax(float* s, int keys, int column, float* o) {
        Vec& highest = *reinterpret_cast<Vec*>(highest_ + column);
        const Vec scale = *reinterpret_cast<const Vec*>(scales_ + column);
        Vec top = *reinterpret_cast<const Vec*>(s);
        for (int r = 1; r < keys; ++r) {
            const Vec row = *reinterpret_cast<const Vec*>(s + r * kStrip);
            choose(top, row > top, row, top);
        }
        top *= scale;
        const Ints above = top > highest + kLazy;
        bool raise = false;
        for (int i = 0; i < kWidth; ++i) raise |= above[i] != 0;
        Vec& sum = *reinterpret_cast<Vec*>(sums_ + column);
        if (raise) {
            Vec higher;
            choose(higher, top > highest, top, highest);
            Vec factor = highest - higher;
            exp2(factor);
            highest = higher;
            sum *= factor;
            for (int d = 0; d < dim_; ++d) *reinterpret_cast<Vec*>(o + d * kStrip) *= factor;
        }
        Vec total = {};
        for (int r = 0; r < keys; r += kPair) {
            Vec x[kPair];
            for (int i = 0; i < kPair; ++i) {
                x[i] = *reinterpret_cast<const Vec*>(s + (r + i) * kStrip) * scale - highest;
                exp2(x[i]);
                total += x[i];
            }
            *reinterpret_cast<Words*>(s + r / kPair * kStrip) = words_of(x);
        }
        sum += total;
    }

    const int words_ = dim_ / kPair;  // of a query or key
    Word *q_, *keys_, *values_;  // [strip][words][columns of the strip]; [block][words] twice
    float* s_;  // [block][columns of a strip]: scores, then words of weights; `o_` is [strip][D][columns of the strip]
};

}  // namespace

Engine* LR_MAKE(const Args& args, int max_columns, Arena& arena) { return make<Simd>(args, max_columns, arena); }

}  // namespace longreach::attention
