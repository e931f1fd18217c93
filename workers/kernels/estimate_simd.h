// The vector code of the estimate, in float32. Included once for every instruction set by a source that defines
//   LR_SPACE    namespace of this copy
//   LR_TARGET   attribute that allows the instructions
//   LR_BATCH    keys whose products are computed together
#define LR_INLINE LR_TARGET inline __attribute__((always_inline))

namespace longreach {
namespace estimate {
namespace LR_SPACE {

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef float Loose __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
typedef std::int32_t Ints __attribute__((vector_size(4 * kLanes)));

LR_INLINE const Vec& at(const float* x) { return *reinterpret_cast<const Vec*>(x); }
LR_INLINE Vec& at(float* x) { return *reinterpret_cast<Vec*>(x); }
LR_INLINE const Ints& at(const std::int32_t* x) { return *reinterpret_cast<const Ints*>(x); }

// 2^x for x < 128; exactly 0 below -126; relative error 2e-7.
LR_INLINE void exp2(Vec& x) {
    const Ints whole = x > -126.0f;
    x = (Vec)((whole & (Ints)x) | (~whole & (Ints)(Vec{} - 126.0f)));
    const Vec shifted = x + 12582912.0f;               // 1.5 * 2^23: the low bits are the nearest integer
    const Vec f = x - (shifted - 12582912.0f);
    Vec p = f * 1.3276460e-3f + 9.6755413e-3f;
    p = p * f + 5.5507133e-2f;
    p = p * f + 2.4022120e-1f;
    p = p * f + 6.9314697e-1f;
    p = p * f + 1.0f;
    x = (Vec)(((Ints)p + ((Ints)shifted << 23)) & whole);
}

LR_TARGET void pack(void* to, const void* q, int q_type, std::int64_t stride, int rows, int dim) {
    float* packed = static_cast<float*>(to);           // [D, kRows]
    for (int d = 0; d < dim; ++d) {
        for (int r = 0; r < kRows; ++r) {
            const std::int64_t i = r * stride + d;
            packed[d * kRows + r] = r >= rows ? 0.0f
                                    : q_type == kFloat32 ? static_cast<const float*>(q)[i]
                                                         : widen(static_cast<const std::uint16_t*>(q)[i]);
        }
    }
}

LR_TARGET void convert(void* to, const void* from, int kv_type, std::int64_t count) {
    float* wide = static_cast<float*>(to);
    if (kv_type == kFloat32) {
        std::memcpy(wide, from, count * sizeof(float));
    } else if (kv_type == kBfloat16) {
        const auto* x = static_cast<const std::uint16_t*>(from);
        for (std::int64_t i = 0; i < count; ++i) wide[i] = widen(x[i]);
    } else {
        const auto* x = static_cast<const std::int8_t*>(from);
        for (std::int64_t i = 0; i < count; ++i) wide[i] = float(x[i]);
    }
}

// int8 -> bfloat16 is exact
LR_TARGET void convert_bfloat16(void* to, const void* from, int kv_type, std::int64_t count) {
    auto* narrow = static_cast<std::uint16_t*>(to);
    if (kv_type == kBfloat16) {
        std::memcpy(narrow, from, count * sizeof(std::uint16_t));
        return;
    }
    const auto* x = static_cast<const std::int8_t*>(from);
    for (std::int64_t i = 0; i < count; ++i) {
        const float value = float(x[i]);
        std::uint32_t bits;
        std::memcpy(&bits, &value, sizeof bits);
        narrow[i] = std::uint16_t(bits >> 16);
    }
}

LR_TARGET void scale(float* s, const Strip& strip, const Block& block) {
    for (int i = 0; i < kKeys; ++i) {
        for (int g = 0; g < strip.groups; ++g) at(s + i * kRows + g * kLanes) *= block.scales[i];
    }
}

template <int N> LR_INLINE void products(float* s, const float* q, const float* keys, int dim) {
    for (int i = 0; i < kKeys; i += LR_BATCH) {
        Vec sum[LR_BATCH][N] = {};
        for (int d = 0; d < dim; ++d) {
            for (int k = 0; k < LR_BATCH; ++k) {
                const float key = keys[(i + k) * dim + d];
                for (int g = 0; g < N; ++g) sum[k][g] += at(q + d * kRows + g * kLanes) * key;
            }
        }
        for (int k = 0; k < LR_BATCH; ++k) {
            for (int g = 0; g < N; ++g) at(s + (i + k) * kRows + g * kLanes) = sum[k][g];
        }
    }
}

LR_TARGET void scores(float* s, const Strip& strip, const Block& block, int dim) {
    const auto* q = static_cast<const float*>(strip.q);
    const auto* keys = static_cast<const float*>(block.keys);
    if (strip.groups == 1) products<1>(s, q, keys, dim);
    if (strip.groups == 2) products<2>(s, q, keys, dim);
    if (strip.groups == 3) products<3>(s, q, keys, dim);
    if (strip.groups == 4) products<4>(s, q, keys, dim);
    if (block.scales != nullptr) scale(s, strip, block);
}

LR_TARGET void mask(float* s, const Strip& strip, const Block& block) {
    for (int g = 0; g < strip.groups; ++g) {
        const Ints rows = at(strip.positions + g * kLanes);
        for (int i = 0; i < kKeys; ++i) {
            Vec& x = at(s + i * kRows + g * kLanes);
            const Ints seen = rows >= block.positions[i];
            x = (Vec)((seen & (Ints)x) | (~seen & (Ints)(Vec{} + kMasked)));
        }
    }
}

// Takes the block's maxima over; returns the factor `-maximum * factor` of the new scores.
LR_INLINE void raise(Vec& shift, Running& state, const float* s, const Strip& strip, int at_row) {
    Vec most = at(state.maximum + at_row);
    const Vec old = most, factor = at(strip.factor + at_row);
    for (int i = 0; i < kKeys; ++i) {
        const Vec x = at(s + i * kRows + at_row);
        const Ints more = x > most;
        most = (Vec)((more & (Ints)x) | (~more & (Ints)most));
    }
    Vec less = (old - most) * factor;
    exp2(less);
    at(state.sum + at_row) *= less;
    at(state.kept + at_row) *= less;
    at(state.maximum + at_row) = most;
    shift = -most * factor;
}

LR_TARGET void running(Running& state, const float* s, const Strip& strip) {
    for (int r = 0; r < strip.groups * kLanes; r += kLanes) {
        Vec shift, sum[2] = {};
        raise(shift, state, s, strip, r);
        const Vec factor = at(strip.factor + r);
        for (int i = 0; i < kKeys; ++i) {
            Vec p = at(s + i * kRows + r) * factor + shift;
            exp2(p);
            sum[i & 1] += p;
        }
        at(state.sum + r) += sum[0] + sum[1];
    }
}

LR_TARGET void kept(Running& state, const float* s, const Strip& strip, const std::uint64_t* words,
                    std::uint64_t columns) {
    for (int r = 0; r < strip.groups * kLanes; r += kLanes) {
        Vec shift, sum[2] = {}, kept[2] = {};
        raise(shift, state, s, strip, r);
        const Vec factor = at(strip.factor + r);
        for (int half = 0; half < 2; ++half) {
            alignas(64) std::int32_t lanes[kLanes];
            for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = std::int32_t((words[r + lane] | columns) >> 32 * half);
            const Ints word = at(lanes);
            for (int i = 0; i < kKeys / 2; ++i) {
                Vec p = at(s + (32 * half + i) * kRows + r) * factor + shift;
                exp2(p);
                sum[i & 1] += p;
                kept[i & 1] += (Vec)((Ints)p & (word << (31 - i) >> 31));
            }
        }
        at(state.sum + r) += sum[0] + sum[1];
        at(state.kept + r) += kept[0] + kept[1];
    }
}

LR_TARGET double mass(const float* s, const Strip& strip, const float* lse, const std::uint64_t* words) {
    Vec sum{};
    for (int r = 0; r < strip.groups * kLanes; r += kLanes) {
        const Vec factor = at(strip.factor + r), shift = -at(lse + r);
        for (int half = 0; half < 2; ++half) {
            alignas(64) std::int32_t lanes[kLanes];
            for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = std::int32_t(words[r + lane] >> 32 * half);
            const Ints word = at(lanes);
            for (int i = 0; i < kKeys / 2; ++i) {
                Vec p = at(s + (32 * half + i) * kRows + r) * factor + shift;
                exp2(p);
                sum += (Vec)((Ints)p & (word << (31 - i) >> 31));
            }
        }
    }
    double total = 0;
    for (int lane = 0; lane < kLanes; ++lane) total += sum[lane];
    return total;
}

// Key 16 a + b and vector g of the rows have the offsets (g - a) * 16 - b + lane from the first row's. For one b, pairs
// (a, g) of the same g - a add up in registers; only then the 16 values of b are shifted against each other.
template <int N> LR_INLINE void add_up(const float* s, const Strip& strip, const float* lse, float* columns,
                                       float* offsets) {
    constexpr int kTiles = kKeys / kLanes, kDiagonals = N + kTiles - 1, kPitch = (kDiagonals + 2) * kLanes;
    alignas(64) float by_key[kKeys][kLanes];
    alignas(64) float shifted[kLanes * kPitch];
    for (int b = 0; b < kLanes; ++b) {
        Vec diagonal[kDiagonals] = {};
#pragma GCC unroll 4
        for (int a = 0; a < kTiles; ++a) {
            Vec column{};
#pragma GCC unroll 4
            for (int g = 0; g < N; ++g) {
                Vec p = at(s + (a * kLanes + b) * kRows + g * kLanes) * at(strip.factor + g * kLanes) - at(lse + g * kLanes);
                exp2(p);
                column += p;
                diagonal[g - a + kTiles - 1] += p;
            }
            at(by_key[a * kLanes + b]) = column;
        }
        float* line = shifted + b * kPitch;            // 16 zeros on either side
        at(line) = at(line + kPitch - kLanes) = Vec{};
#pragma GCC unroll 8
        for (int w = 0; w < kDiagonals; ++w) at(line + (w + 1) * kLanes) = diagonal[w];
    }
    for (int i = 0; i < kKeys; ++i) {
        float* x = by_key[i];
        for (int l = 0; l < 8; ++l) x[l] += x[l + 8];
        for (int l = 0; l < 4; ++l) x[l] += x[l + 4];
    }
    for (int i = 0; i < kKeys; ++i) columns[i] += (by_key[i][0] + by_key[i][1]) + (by_key[i][2] + by_key[i][3]);
    for (int u = 0; u < kSpan; u += kLanes) {
        Vec sum{};
        if (u < (kDiagonals + 1) * kLanes) {
            for (int b = 0; b < kLanes; ++b) {
                sum += *reinterpret_cast<const Loose*>(shifted + b * kPitch + kLanes + u - (kLanes - 1) + b);
            }
        }
        at(offsets + u) = sum;
    }
}

LR_TARGET void sums(const float* s, const Strip& strip, const float* lse, float* columns, float* offsets) {
    if (strip.groups == 1) add_up<1>(s, strip, lse, columns, offsets);
    if (strip.groups == 2) add_up<2>(s, strip, lse, columns, offsets);
    if (strip.groups == 3) add_up<3>(s, strip, lse, columns, offsets);
    if (strip.groups == 4) add_up<4>(s, strip, lse, columns, offsets);
}

inline void nothing() {}

inline Engine make() {
    return {false, pack, convert, scores, mask, running, kept, sums, mass, nothing, nothing};
}

}  // namespace LR_SPACE
}  // namespace estimate
}  // namespace longreach

#undef LR_INLINE
#undef LR_SPACE
#undef LR_TARGET
#undef LR_BATCH
