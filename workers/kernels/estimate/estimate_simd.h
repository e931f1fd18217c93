// The vector code of the estimate, in float32. Included once for every instruction set by a source that defines
//   LR_SPACE    namespace of this copy
//   LR_TARGET   attribute that allows the instructions
//   LR_WIDTH    floats of a vector, at most kLanes; 16 means AVX-512
#define LR_INLINE LR_TARGET inline __attribute__((always_inline))

namespace longreach::estimate::LR_SPACE {

constexpr int kWidth = LR_WIDTH;
constexpr int kBatch = kWidth == 16 ? 4 : 2;  // keys whose products are computed together
typedef float Vec __attribute__((vector_size(4 * kWidth)));
typedef float Loose __attribute__((vector_size(4 * kWidth), aligned(4), may_alias));
typedef std::int32_t Ints __attribute__((vector_size(4 * kWidth)));

LR_INLINE const Vec& at(const float* x) { return *reinterpret_cast<const Vec*>(x); }
LR_INLINE Vec& at(float* x) { return *reinterpret_cast<Vec*>(x); }
LR_INLINE const Ints& at(const std::int32_t* x) { return *reinterpret_cast<const Ints*>(x); }

// 2^x; exactly 0 below -150, above 2^16 wherever x is above 17.
LR_INLINE void exp2(Vec& x) {
#if LR_WIDTH == 16
    __asm__("" : "+v"(x));  // else f may be taken of a product before it is rounded, which is far off where x is large
#else
    const Ints huge = x > 127.0f;
    x = (Vec)((~huge & (Ints)x) | (huge & (Ints)(Vec{} + 127.0f)));
#endif
    const Vec shifted = x + 12582912.0f;  // 1.5 * 2^23: the low bits are the nearest integer
    const Vec nearest = shifted - 12582912.0f, f = x - nearest;
#if LR_WIDTH == 16  // relative error 3e-6
    Vec p = f * 9.5701e-3f + 5.591786e-2f;
    p = p * f + 2.4024744e-1f;
    p = p * f + 6.931218e-1f;
    p = p * f + 9.999993e-1f;
    x = (Vec)_mm512_scalef_ps((__m512)p, (__m512)nearest);
#else  // 2e-7, and 0 below -126
    const Ints whole = x > -126.0f;  // what the rest makes of other values is dropped
    Vec p = f * 1.3276460e-3f + 9.6755413e-3f;
    p = p * f + 5.5507133e-2f;
    p = p * f + 2.4022120e-1f;
    p = p * f + 6.9314697e-1f;
    p = p * f + 1.0f;
    x = (Vec)(((Ints)p + ((Ints)shifted << 23)) & whole);
#endif
}

LR_TARGET void pack(void* to, const void* q, int q_type, std::int64_t stride, int rows, int dim) {
    float* packed = static_cast<float*>(to);  // [D, kRows]
    for (int d = 0; d < dim; ++d) {
        for (int r = 0; r < kRows; ++r) {
            packed[d * kRows + r] = r < rows ? attention::value_at(q, q_type, r * stride + d) : 0.0f;
        }
    }
}

// To float or bfloat16; int8 is exact in both.
template <class T> LR_TARGET void convert(void* to, const void* from, int kv_type, std::int64_t count) {
    T* converted = static_cast<T*>(to);
    const auto* halves = static_cast<const bf16*>(from);
    const auto* bytes = static_cast<const std::int8_t*>(from);
    if (attention::type_bytes(kv_type) == sizeof(T)) {
        std::memcpy(to, from, count * sizeof(T));
    } else if constexpr (sizeof(T) == sizeof(bf16)) {
        for (std::int64_t i = 0; i < count; ++i) converted[i] = narrow(float(bytes[i]));
    } else if (kv_type == kBfloat16) {
        for (std::int64_t i = 0; i < count; ++i) converted[i] = widen(halves[i]);
    } else {
        for (std::int64_t i = 0; i < count; ++i) converted[i] = float(bytes[i]);
    }
}

LR_TARGET void scale(float* s, const Strip& strip, const Block& block) {
    for (int i = 0; i < kKeys; ++i) {
        for (int r = 0; r < strip.groups * kLanes; r += kWidth) at(s + i * kRows + r) *= block.scales[i];
    }
}

// N vectors of rows, from row `r` on.
template <int N> LR_INLINE void products(float* s, const float* q, const float* keys, int dim, int r) {
    for (int i = 0; i < kKeys; i += kBatch) {
        Vec sum[kBatch][N] = {};
        for (int d = 0; d < dim; ++d) {
            for (int k = 0; k < kBatch; ++k) {
                const float key = keys[(i + k) * dim + d];
                for (int v = 0; v < N; ++v) sum[k][v] += at(q + d * kRows + r + v * kWidth) * key;
            }
        }
        for (int k = 0; k < kBatch; ++k) {
            for (int v = 0; v < N; ++v) at(s + (i + k) * kRows + r + v * kWidth) = sum[k][v];
        }
    }
}

LR_TARGET void scores(float* s, const Strip& strip, const Block& block, int dim) {
    const auto* q = static_cast<const float*>(strip.q);
    const auto* keys = static_cast<const float*>(block.keys);
    for (int r = 0; r < strip.groups * kLanes; r += 4 * kWidth) {
        const int vectors = strip.groups * kLanes / kWidth - r / kWidth;
        if (vectors == 1) products<1>(s, q, keys, dim, r);
        if (vectors == 2) products<2>(s, q, keys, dim, r);
        if (vectors == 3) products<3>(s, q, keys, dim, r);
        if (vectors >= 4) products<4>(s, q, keys, dim, r);
    }
    if (block.scales != nullptr) scale(s, strip, block);
}

LR_TARGET void mask(float* s, const Strip& strip, const Block& block) {
    for (int r = 0; r < strip.groups * kLanes; r += kWidth) {
        const Ints rows = at(strip.positions + r);
        for (int i = 0; i < kKeys; ++i) {
            Vec& x = at(s + i * kRows + r);
            const Ints seen = rows >= block.positions[i];
            x = (Vec)((seen & (Ints)x) | (~seen & (Ints)(Vec{} + kMasked)));
        }
    }
}

LR_INLINE void maximum_of(Vec& maximum, const Vec& x) {
    const Ints more = x > maximum;
    maximum = (Vec)((more & (Ints)x) | (~more & (Ints)maximum));
}

// Updates the maxima with those of the block; `shift` becomes the `-maximum * factor` to add to its scores.
LR_INLINE void raise(Vec& shift, Running& state, const float* s, const Strip& strip, int r) {
    const Vec old = at(state.maximum + r), factor = at(strip.factor + r);
    Vec a = old, b = old, c = old, d = old;  // four, so that they need not wait for each other
    for (int i = 0; i < kKeys; i += 4) {
        maximum_of(a, at(s + i * kRows + r));
        maximum_of(b, at(s + (i + 1) * kRows + r));
        maximum_of(c, at(s + (i + 2) * kRows + r));
        maximum_of(d, at(s + (i + 3) * kRows + r));
    }
    maximum_of(a, b);
    maximum_of(c, d);
    maximum_of(a, c);
    Vec less = (old - a) * factor;
    exp2(less);
    at(state.sum + r) *= less;
    at(state.kept + r) *= less;
    at(state.maximum + r) = a;
    shift = -a * factor;
}

LR_INLINE bool any(const Ints& lanes) {
#if LR_WIDTH == 16
    return _mm512_movepi32_mask((__m512i)lanes) != 0;
#else
    std::int32_t all = 0;
    for (int lane = 0; lane < kWidth; ++lane) all |= lanes[lane];
    return all != 0;
#endif
}

// Calls add(shift, sum, kept) for a vector of rows and accumulates the two sums. The maximum is searched only where
// there is none yet, or where the sum shows that scores lie far above it: most blocks are read once.
template <class Add>
LR_INLINE void under_maximum(Running& state, const float* s, const Strip& strip, int r, const Add& add) {
    Vec sum{}, kept{}, shift = -at(state.maximum + r) * at(strip.factor + r);
    const bool fresh = any(at(state.maximum + r) <= kUnseen);
    if (!fresh) add(shift, sum, kept);
    if (fresh || any(~(sum <= kHighest))) {
        sum = kept = Vec{};
        raise(shift, state, s, strip, r);
        add(shift, sum, kept);
    }
    at(state.sum + r) += sum;
    at(state.kept + r) += kept;
}

// Computes the next scores at the end. Others do so step by step: step() is called kSteps times or more.
constexpr int kSteps = 8;
template <void (*compute)(float*, const Strip&, const Block&, int)> struct Apart {
    const Next& next;
    explicit Apart(const Next& n) : next(n) {}
    LR_INLINE void step() {}
    LR_INLINE void finish() {
        if (next.strip != nullptr) compute(next.s, *next.strip, *next.block, next.dim);
    }
};

template <class Weave> LR_TARGET void running(Running& state, const float* s, const Strip& strip, const Next& next) {
    constexpr int kEvery = kKeys * kRows / kWidth / kSteps;
    Weave weave(next);
    for (int r = 0; r < strip.groups * kLanes; r += kWidth) {
        const Vec factor = at(strip.factor + r);
        under_maximum(state, s, strip, r, [&](const Vec& shift, Vec& sum, Vec&) LR_TARGET {
            Vec even{}, odd{};
            for (int i = 0; i < kKeys; i += 2) {
                if (i % kEvery == 0) weave.step();
                Vec p = at(s + i * kRows + r) * factor + shift;
                Vec q = at(s + (i + 1) * kRows + r) * factor + shift;
                exp2(p);
                exp2(q);
                even += p;
                odd += q;
            }
            sum = even + odd;
        });
    }
    weave.finish();
}

template <class Weave>
LR_TARGET void kept(Running& state, const float* s, const Strip& strip, const std::int32_t* words, const Next& next) {
    constexpr int kEvery = kKeys * kRows / kWidth / kSteps;
    Weave weave(next);
    for (int r = 0; r < strip.groups * kLanes; r += kWidth) {
        const Vec factor = at(strip.factor + r);
        under_maximum(state, s, strip, r, [&](const Vec& shift, Vec& sum, Vec& kept) LR_TARGET {
            for (int half = 0; half < 2; ++half) {
                const Ints word = at(words + half * kRows + r);
                Ints bit = Ints{} + 1;
                for (int i = 0; i < kKeys / 2; ++i) {
                    if (i % kEvery == 0) weave.step();
                    Vec p = at(s + (32 * half + i) * kRows + r) * factor + shift;
                    exp2(p);
                    sum += p;
                    kept += (Vec)((Ints)p & ((word & bit) != 0));
                    bit += bit;
                }
            }
        });
    }
    weave.finish();
}

LR_TARGET double mass(const float* s, const Strip& strip, const float* lse, const std::uint64_t* words) {
    Ints bits;
    for (int lane = 0; lane < kWidth; ++lane) bits[lane] = 1 << lane;
    Vec sum{};
    for (int r = 0; r < strip.groups * kLanes; r += kWidth) {
        const Vec factor = at(strip.factor + r), shift = -at(lse + r);
        for (int i = 0; i < kKeys; ++i) {
            Vec p = at(s + i * kRows + r) * factor + shift;
            exp2(p);
            const Ints hit = (bits & std::int32_t(words[i] >> r & ((1 << kWidth) - 1))) != 0;
            sum += (Vec)((Ints)p & hit);
        }
    }
    double total = 0;
    for (int lane = 0; lane < kWidth; ++lane) total += sum[lane];
    return total;
}

// With vectors of w rows, key w a + b and vector g have the offsets (g - a) * w - b + lane from the first row's. For
// one b, pairs (a, g) of the same g - a add up; only then the w values of b are shifted against each other.
template <int Groups, class Weave> LR_INLINE void add_up(const float* s, const Strip& strip, const float* lse,
                                                         float* lanes, float* offsets, Weave& weave) {
    constexpr int kVectors = Groups * kLanes / kWidth, kTiles = kKeys / kWidth, kDiagonals = kVectors + kTiles - 1;
    constexpr int kPitch = (kDiagonals + 2) * kWidth;
    alignas(64) float shifted[kWidth * kPitch];
    for (int b = 0; b < kWidth; ++b) {
        if (b * kSteps % kWidth < kSteps) weave.step();
        Vec diagonal[kDiagonals] = {};
#pragma GCC unroll 4
        for (int a = 0; a < kTiles; ++a) {
            Vec column{};
#pragma GCC unroll 4
            for (int g = 0; g < kVectors; ++g) {
                const int r = g * kWidth;
                Vec p = at(s + (a * kWidth + b) * kRows + r) * at(strip.factor + r) - at(lse + r);
                exp2(p);
                column += p;
                diagonal[g - a + kTiles - 1] += p;
            }
            at(lanes + (a * kWidth + b) * kWidth) += column;
        }
        float* line = shifted + b * kPitch;  // a vector of zeros on either side
        at(line) = at(line + kPitch - kWidth) = Vec{};
#pragma GCC unroll 8
        for (int w = 0; w < kDiagonals; ++w) at(line + (w + 1) * kWidth) = diagonal[w];
    }
    // Value 0 of b = 0 has the offset -(kTiles - 1) * w, index kWidth - 1 of the result.
    for (int u = 0; u < kSpan; u += kWidth) {
        Vec sum{};
        if (u < (kDiagonals + 1) * kWidth) {
            for (int b = 0; b < kWidth; ++b) sum += *reinterpret_cast<const Loose*>(shifted + b * kPitch + u + b + 1);
        }
        at(offsets + u) = sum;
    }
}

template <class Weave> LR_TARGET void sums(const float* s, const Strip& strip, const float* lse, float* lanes,
                                           float* offsets, const Next& next) {
    Weave weave(next);
    if (strip.groups == 1) add_up<1>(s, strip, lse, lanes, offsets, weave);
    if (strip.groups == 2) add_up<2>(s, strip, lse, lanes, offsets, weave);
    weave.finish();
}

#if LR_WIDTH == 16
// Sums of 16 vectors, one a lane. After the first step, lane 4 j + k of four[i] adds up quarter j of x[4 i + k].
LR_INLINE __m512 sums_of(const __m512* x) {
    __m512 four[4], pairs[2];
    for (int i = 0; i < 4; ++i) {
        const __m512* at = x + 4 * i;
        const __m512 a = _mm512_add_ps(_mm512_unpacklo_ps(at[0], at[1]), _mm512_unpackhi_ps(at[0], at[1]));
        const __m512 b = _mm512_add_ps(_mm512_unpacklo_ps(at[2], at[3]), _mm512_unpackhi_ps(at[2], at[3]));
        four[i] = _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xee));
    }
    for (int i = 0; i < 2; ++i) {
        const __m512 low = _mm512_shuffle_f32x4(four[2 * i], four[2 * i + 1], 0x88);
        const __m512 high = _mm512_shuffle_f32x4(four[2 * i], four[2 * i + 1], 0xdd);
        pairs[i] = _mm512_add_ps(low, high);  // quarters 0 + 1, 2 + 3 of each
    }
    const __m512 low = _mm512_shuffle_f32x4(pairs[0], pairs[1], 0x88);
    return _mm512_add_ps(low, _mm512_shuffle_f32x4(pairs[0], pairs[1], 0xdd));
}

LR_TARGET void fold(float* columns, const float* lanes) {
    for (int i = 0; i < kKeys; i += 16) {
        at(columns + i) = (Vec)sums_of(reinterpret_cast<const __m512*>(lanes + i * kWidth));
    }
}
#else
LR_TARGET void fold(float* columns, const float* lanes) {
    for (int i = 0; i < kKeys; ++i) {
        float sum = 0.0f;
        for (int l = 0; l < kWidth; ++l) sum += lanes[i * kWidth + l];
        columns[i] = sum;
    }
}
#endif

inline void nothing() {}

template <class Weave = Apart<scores>> Engine make() {
    return {kFloat32,    pack,        convert<float>, scores, mask,    running<Weave>,
            kept<Weave>, sums<Weave>, fold,           mass,   nothing, nothing};
}

}  // namespace longreach::estimate::LR_SPACE

#undef LR_INLINE
#undef LR_SPACE
#undef LR_TARGET
#undef LR_WIDTH
