// An engine in vector code, for any type and head dim. Included once for every instruction set by a source that defines
//   LR_WIDTH    floats of a vector
//   LR_TARGET   attribute that allows the instructions
//   LR_MAKE     name of the function that makes the engine
// Products are computed in float32; keys and values of other types are converted block by block.
#include <cstring>

#include "attention/attention.h"

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

LR_TARGET void convert(float* to, const char* from, int type, const float* scales, int rows, int dim) {
    const int n = rows * dim;
    if (type == kFloat32) {
        std::memcpy(to, from, n * sizeof(float));
    } else if (type == kBfloat16) {
        const auto* x = reinterpret_cast<const std::uint16_t*>(from);
        for (int i = 0; i < n; ++i) to[i] = widen(x[i]);
    } else {
        const auto* x = reinterpret_cast<const signed char*>(from);
        for (int r = 0; r < rows; ++r) {
            for (int i = 0; i < dim; ++i) to[r * dim + i] = scales[r] * float(x[r * dim + i]);
        }
    }
}

// s[32][strip] = k[32][dim] q[dim][strip], the first N vectors of a strip.
template <int N> LR_TARGET void scores(float* s, const float* k, const float* q, int dim) {
    for (int r = 0; r < kGroup; r += kRows, k += kRows * dim, s += kRows * kStrip) {
        Vec sums[kRows][N] = {};
        for (int d = 0; d < dim; ++d) {
            const Vec* columns = reinterpret_cast<const Vec*>(q + d * kStrip);
            for (int i = 0; i < kRows; ++i) {
                for (int j = 0; j < N; ++j) sums[i][j] += k[i * dim + d] * columns[j];
            }
        }
        for (int i = 0; i < kRows; ++i) {
            for (int j = 0; j < N; ++j) reinterpret_cast<Vec*>(s + i * kStrip)[j] = sums[i][j];
        }
    }
}

// o[R][strip] += sum over keys of v[key][R] p[key][strip].
template <int N, int R>
LR_TARGET void weigh(float* o, const float* const* v, const float* p, int groups, int dim, int d) {
    Vec sums[R][N];
    for (int i = 0; i < R; ++i) {
        for (int j = 0; j < N; ++j) sums[i][j] = reinterpret_cast<const Vec*>(o + (d + i) * kStrip)[j];
    }
    for (int g = 0; g < groups; ++g) {
        const float* row = v[g] + d;
        for (int k = 0; k < kGroup; ++k, row += dim, p += kStrip) {
            const Vec* weights = reinterpret_cast<const Vec*>(p);
            for (int i = 0; i < R; ++i) {
                for (int j = 0; j < N; ++j) sums[i][j] += row[i] * weights[j];
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
        q_ = arena.take<float>(std::size_t(max_columns + kStrip - 1) / kStrip * kStrip * dim_);
        keys_ = arena.take<float>(std::size_t(kBlock) * dim_);
        values_ = arena.take<float>(std::size_t(kBlock) * dim_);
        s_ = arena.take<float>(kBlock * kStrip);
    }

    LR_TARGET void block(const Block& block) override {
        if (!packed_) pack();
        const float *k[kGroups], *v[kGroups];
        for (int g = 0; g < block.count; ++g) {
            const Group& group = block.groups[g];
            k[g] = wide(keys_ + g * kGroup * dim_, group.k, group.k_scales);
            v[g] = wide(values_ + g * kGroup * dim_, group.v, group.v_scales);
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
    const float* wide(float* to, const char* rows, const float* scales) {
        if (args_.kv_type == kFloat32) return reinterpret_cast<const float*>(rows);
        convert(to, rows, args_.kv_type, scales, kGroup, dim_);
        return to;
    }

    void pack() {
        packed_ = true;
        for (int c = 0; c < strips_ * kStrip; ++c) {
            float* q = q_ + std::size_t(c / kStrip) * dim_ * kStrip + c % kStrip;
            const char* row = c < columns_ ? item_.query(args_, c, rotation_) : nullptr;
            for (int d = 0; d < dim_; ++d) { q[d * kStrip] = row == nullptr ? 0.0f : value_at(row, args_.q_type, d); }
        }
    }

    template <int N> LR_TARGET void pass(const Block& block, const float* const* k, const float* const* v, int strip) {
        const std::int32_t* positions = positions_ + strip * kStrip;
        const std::int32_t earliest = *std::min_element(positions, positions + kStrip);
        std::int32_t latest = 0;
        for (int i = 0; i < std::min(kStrip, columns_ - strip * kStrip); ++i) latest = std::max(latest, positions[i]);
        const float* visited[kGroups];
        int groups = 0;
        for (int g = 0; g < block.count; ++g) {
            if (block.groups[g].first > latest) continue;
            float* s = s_ + groups * kGroup * kStrip;
            scores<N>(s, k[g], q_ + std::size_t(strip) * dim_ * kStrip, dim_);
            if (block.groups[g].last > earliest) mask<N>(s, block.positions + g * kGroup, positions);
            visited[groups++] = v[g];
        }
        if (groups == 0) return;
        float* o = o_ + std::size_t(strip) * dim_ * kStrip;
        for (int j = 0; j < N; ++j) {
            softmax(s_ + j * kWidth, groups * kGroup, strip * kStrip + j * kWidth, o + j * kWidth);
        }
        int d = 0;
        for (; d + kRows <= dim_; d += kRows) weigh<N, kRows>(o, visited, s_, groups, dim_, d);
        for (; d < dim_; ++d) weigh<N, 1>(o, visited, s_, groups, dim_, d);
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

    // Scores of one vector of columns to weights, in place.
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
        for (int r = 0; r < keys; ++r) {
            Vec x = *reinterpret_cast<const Vec*>(s + r * kStrip) * scale - highest;
            exp2(x);
            *reinterpret_cast<Vec*>(s + r * kStrip) = x;
            total += x;
        }
        sum += total;
    }

    float *q_, *keys_, *values_;  // [strip][D][columns of the strip], as `o_`; [block][D] twice
    float* s_;  // [block][columns of a strip]: scores, then weights
};

}  // namespace

Engine* LR_MAKE(const Args& args, int max_columns, Arena& arena) { return make<Simd>(args, max_columns, arena); }

}  // namespace longreach::attention
