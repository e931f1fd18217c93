// The engine for bfloat16 queries on AMX.
//
// Both products run in tiles of 16 lines of 64 bytes:
//   S^T[key, column] = K Q^T   K is the left operand as it lies in memory; Q^T is packed once a tile of rows
//   O[column, dim] = P V       P comes from S^T by a transposition in registers; V is packed in pairs of keys
// Statistics of the softmax belong to columns, so they are vectors of 16 columns and never reduced across lanes.
#if defined(__x86_64__)
#include <algorithm>
#include <new>

#include "attention_columns.h"
#include "attention_registers.h"

namespace longreach {
namespace attention {
namespace {

class Amx final : public Engine {
public:
    Amx(const Args& args, int max_columns, Arena& arena) : args_(args), at_{args}, dim_(int(args.dim)) {
        const std::size_t padded = (max_columns + kTile - 1) / kTile * kTile;
        q_ = arena.take<char>(padded * dim_ * sizeof(bf16));
        o_ = arena.take<float>(padded * dim_);
        keys_ = arena.take<bf16>(args.kv_type == kInt8 ? std::size_t(kBlock) * dim_ : 0);
        values_ = arena.take<char>(std::size_t(kBlock) * dim_ * sizeof(bf16));
        s_ = arena.take<float>(2 * kBlock * kTile);
        p_ = arena.take<char>(2 * kBlock * kTile * sizeof(bf16));
        highest_ = arena.take<float>(padded);
        sums_ = arena.take<float>(padded);
        scales_ = arena.take<float>(padded);
        positions_ = arena.take<std::int32_t>(padded);
    }

    AMX void attach() {
        static const TileConfig config;
        _tile_storeconfig(previous_);  // others (oneDNN) may rely on theirs
        _tile_loadconfig(&config);
        attached_ = true;
    }

    AMX ~Amx() override {
        if (attached_) _tile_loadconfig(previous_);
    }

    void begin(const Item& item) override {
        at_.item = item;
        columns_ = item.columns();
        tiles_ = (columns_ + kTile - 1) / kTile;
        const int padded = tiles_ * kTile;
        at_.describe(padded, scales_, positions_);
        std::fill(highest_, highest_ + padded, kUnseen);
        std::fill(sums_, sums_ + padded, 0.0f);
        std::fill(o_, o_ + std::size_t(padded) * dim_, 0.0f);
    }

    void rotate(int rotation) override { rotation_ = rotation; packed_ = false; }

    void block(const Block& block) override;
    void finish() override;
    void finish_part(float* part) override;

private:
    void pack_queries();
    const bf16* prepare(const Group& group, int place);
    template <int N> void pass(const Block& block, const bf16* const* k, int tile);
    template <int N> void scores(float* s, const bf16* k, const char* q);
    void mask(float* s, const std::int32_t* keys, const std::int32_t* columns);
    void softmax(const float* s, char* p, int groups, int tile);
    template <int N> void weigh(const char* const* v, int groups, int tile);
    void row(int c, float factor, float* to);

    const Args& args_;
    Columns at_;
    const int dim_;
    int columns_ = 0, tiles_ = 0, rotation_ = 0;
    bool packed_ = false, attached_ = false;
    alignas(64) char previous_[64];
    char* q_;       // [tile of columns][D / 32] tiles: line i holds dims 2i and 2i + 1 of 16 columns
    float* o_;      // [tile of columns][D / 16] tiles: a line a column, dims in the order of `pair_rows`
    bf16* keys_;    // [block][D], only for int8
    char* values_;  // [group][D / 16] tiles: line i holds keys 2i and 2i + 1
    float* s_;      // [2][block][16 columns]
    char* p_;       // [2][group] tiles: a line a column
    float *highest_, *sums_, *scales_;  // a column each; logits are in units of ln 2
    std::int32_t* positions_;
};

AMX void Amx::pack_queries() {
    packed_ = true;
    for (int tile = 0; tile < tiles_; ++tile) {
        for (int d = 0; d < dim_; d += 32) {
            __m512i lines[16];
            for (int i = 0; i < 16; ++i) {
                const int c = tile * kTile + i;
                lines[i] = _mm512_setzero_si512();
                if (c < columns_) lines[i] = _mm512_loadu_si512(at_.query(c, rotation_) + d * sizeof(bf16));
            }
            transpose(lines);
            char* to = q_ + (std::size_t(tile) * dim_ / 32 + d / 32) * kTileBytes;
            for (int i = 0; i < 16; ++i) _mm512_store_si512(to + 64 * i, lines[i]);
        }
    }
}

AMX const bf16* Amx::prepare(const Group& group, int place) {
    auto* k = reinterpret_cast<const bf16*>(group.k);
    char* packed = values_ + std::size_t(place) * kGroup * dim_ * sizeof(bf16);
    if (args_.kv_type == kInt8) {
        bf16* wide = keys_ + std::size_t(place) * kGroup * dim_;
        auto* bytes = reinterpret_cast<const signed char*>(group.k);
        for (int i = 0; i < kGroup; ++i) {
            for (int d = 0; d < dim_; d += 32) widen(wide + i * dim_ + d, bytes + i * dim_ + d, group.k_scales[i]);
        }
        k = wide;
        bytes = reinterpret_cast<const signed char*>(group.v);
        alignas(64) bf16 rows[64];
        for (int i = 0; i < kGroup; i += 2) {
            for (int d = 0; d < dim_; d += 32) {
                widen(rows, bytes + i * dim_ + d, group.v_scales[i]);
                widen(rows + 32, bytes + (i + 1) * dim_ + d, group.v_scales[i + 1]);
                char* to = packed + d / 16 * kTileBytes + i * 32;
                pair_rows(to, to + kTileBytes, rows, rows + 32);
            }
        }
        return k;
    }
    auto* v = reinterpret_cast<const bf16*>(group.v);
    for (int i = 0; i < kGroup; i += 2) {
        for (int d = 0; d < dim_; d += 32) {
            char* to = packed + d / 16 * kTileBytes + i * 32;
            pair_rows(to, to + kTileBytes, v + i * dim_ + d, v + (i + 1) * dim_ + d);
        }
    }
    return k;
}

void Amx::block(const Block& block) {
    if (!packed_) pack_queries();
    const bf16* k[kGroups];
    for (int g = 0; g < block.count; ++g) k[g] = prepare(block.groups[g], g);
    for (int tile = 0; tile < tiles_; tile += 2) tile + 1 < tiles_ ? pass<2>(block, k, tile) : pass<1>(block, k, tile);
}

// One block against one or two tiles of columns.
template <int N> AMX void Amx::pass(const Block& block, const bf16* const* k, int tile) {
    const std::int32_t* positions = positions_ + tile * kTile;
    const int real = std::min(N * kTile, columns_ - tile * kTile);
    const std::int32_t earliest = *std::min_element(positions, positions + real);
    const std::int32_t latest = *std::max_element(positions, positions + real);
    const char* v[kGroups];
    int groups = 0;
    for (int g = 0; g < block.count; ++g) {
        if (block.groups[g].first > latest) continue;
        float* s = s_ + groups * kGroup * kTile;
        scores<N>(s, k[g], q_ + std::size_t(tile) * kTile * dim_ * sizeof(bf16));
        if (block.groups[g].last > earliest) {
            for (int j = 0; j < N; ++j) {
                mask(s + j * kBlock * kTile, block.positions + g * kGroup, positions + j * kTile);
            }
        }
        v[groups++] = values_ + std::size_t(g) * kGroup * dim_ * sizeof(bf16);
    }
    if (groups == 0) return;
    for (int j = 0; j < N; ++j) {
        softmax(s_ + j * kBlock * kTile, p_ + j * kGroups * kTileBytes, groups, tile + j);
    }
    weigh<N>(v, groups, tile);
}

// 32 keys against N tiles of columns.
template <int N> AMX void Amx::scores(float* s, const bf16* k, const char* q) {
    const int steps = dim_ / 32;
    const std::size_t stride = dim_ * sizeof(bf16);
    _tile_zero(0);
    _tile_zero(2);
    if (N == 2) _tile_zero(1);
    if (N == 2) _tile_zero(3);
    for (int i = 0; i < steps; ++i) {
        _tile_loadd(6, q + i * kTileBytes, 64);
        _tile_loadd(4, k + i * 32, stride);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(5, k + kTile * dim_ + i * 32, stride);
        _tile_dpbf16ps(2, 5, 6);
        if (N == 2) {
            _tile_loadd(7, q + (steps + i) * kTileBytes, 64);
            _tile_dpbf16ps(1, 4, 7);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, s, 64);
    _tile_stored(2, s + kScores, 64);
    if (N == 2) {
        _tile_stored(1, s + kBlock * kTile, 64);
        _tile_stored(3, s + kBlock * kTile + kScores, 64);
    }
}

AMX void Amx::mask(float* s, const std::int32_t* keys, const std::int32_t* columns) {
    const __m512i rows = _mm512_load_si512(columns);
    for (int i = 0; i < kGroup; ++i) {
        const __mmask16 later = _mm512_cmplt_epi32_mask(rows, _mm512_set1_epi32(keys[i]));
        _mm512_mask_storeu_ps(s + i * kTile, later, _mm512_set1_ps(kMasked));
    }
}

// Scores of a tile of columns to weights.
AMX void Amx::softmax(const float* s, char* p, int groups, int tile) {
    const __m512 scale = _mm512_load_ps(scales_ + tile * kTile);
    __m512 tops[4];
    for (int i = 0; i < 4; ++i) tops[i] = _mm512_load_ps(s + i * kTile);
    for (int i = 4; i < groups * kGroup; i += 4) {
        for (int j = 0; j < 4; ++j) tops[j] = _mm512_max_ps(tops[j], _mm512_load_ps(s + (i + j) * kTile));
    }
    __m512 top = _mm512_max_ps(_mm512_max_ps(tops[0], tops[1]), _mm512_max_ps(tops[2], tops[3]));
    top = _mm512_mul_ps(top, scale);
    __m512 highest = _mm512_load_ps(highest_ + tile * kTile);
    __m512 sum = _mm512_load_ps(sums_ + tile * kTile);
    if (_mm512_cmp_ps_mask(top, _mm512_add_ps(highest, _mm512_set1_ps(kLazy)), _CMP_GT_OQ)) {
        const __m512 higher = _mm512_max_ps(top, highest);
        alignas(64) float factors[16];
        const __m512 factor = exp2(_mm512_sub_ps(highest, higher));
        _mm512_store_ps(factors, factor);
        highest = higher;
        _mm512_store_ps(highest_ + tile * kTile, highest);
        sum = _mm512_mul_ps(sum, factor);
        float* o = o_ + std::size_t(tile) * kTile * dim_;
        for (int d = 0; d < dim_; d += 16) {
            for (int c = 0; c < 16; ++c, o += 16) {
                _mm512_store_ps(o, _mm512_mul_ps(_mm512_load_ps(o), _mm512_set1_ps(factors[c])));
            }
        }
    }
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                           21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    __m512 odd = _mm512_setzero_ps();
    for (int g = 0; g < groups; ++g, s += 2 * kScores, p += kTileBytes) {
        __m512i lines[16];
        for (int i = 0; i < 16; ++i) {
            const __m512 a = exp2(_mm512_fmsub_ps(_mm512_load_ps(s + 2 * i * kTile), scale, highest));
            const __m512 b = exp2(_mm512_fmsub_ps(_mm512_load_ps(s + (2 * i + 1) * kTile), scale, highest));
            sum = _mm512_add_ps(sum, a);
            odd = _mm512_add_ps(odd, b);
            lines[i] = _mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(b, a));
        }
        transpose(lines);
        for (int i = 0; i < 16; ++i) _mm512_store_si512(p + 64 * i, lines[i]);
    }
    _mm512_store_ps(sums_ + tile * kTile, _mm512_add_ps(sum, odd));
}

template <int N> AMX void Amx::weigh(const char* const* v, int groups, int tile) {
    float* o = o_ + std::size_t(tile) * kTile * dim_;
    for (int d = 0; d < dim_ / 16; d += 2, o += 2 * kScores) {
        float* second = o + kTile * dim_;
        _tile_loadd(0, o, 64);
        _tile_loadd(1, o + kScores, 64);
        if (N == 2) _tile_loadd(2, second, 64);
        if (N == 2) _tile_loadd(3, second + kScores, 64);
        for (int g = 0; g < groups; ++g) {
            _tile_loadd(4, p_ + g * kTileBytes, 64);
            _tile_loadd(6, v[g] + d * kTileBytes, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_loadd(7, v[g] + (d + 1) * kTileBytes, 64);
            _tile_dpbf16ps(1, 4, 7);
            if (N == 2) {
                _tile_loadd(5, p_ + (kGroups + g) * kTileBytes, 64);
                _tile_dpbf16ps(2, 5, 6);
                _tile_dpbf16ps(3, 5, 7);
            }
        }
        _tile_stored(0, o, 64);
        _tile_stored(1, o + kScores, 64);
        if (N == 2) _tile_stored(2, second, 64);
        if (N == 2) _tile_stored(3, second + kScores, 64);
    }
}

// Weighted values of a column, dims in their order.
AMX void Amx::row(int c, float factor, float* to) {
    const __m512i low = _mm512_set_epi32(23, 22, 21, 20, 7, 6, 5, 4, 19, 18, 17, 16, 3, 2, 1, 0);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
    const float* o = o_ + std::size_t(c / kTile) * kTile * dim_ + c % kTile * kTile;
    for (int d = 0; d < dim_; d += 32, o += 2 * kScores) {
        const __m512 scale = _mm512_set1_ps(factor);
        const __m512 a = _mm512_mul_ps(_mm512_load_ps(o), scale), b = _mm512_mul_ps(_mm512_load_ps(o + kScores), scale);
        _mm512_storeu_ps(to + d, _mm512_permutex2var_ps(a, low, b));
        _mm512_storeu_ps(to + d + 16, _mm512_permutex2var_ps(a, high, b));
    }
}

AMX void Amx::finish() {
    float values[4096];
    for (int c = 0; c < columns_; ++c) {
        row(c, sums_[c] == 0.0f ? 0.0f : 1.0f / sums_[c], values);
        char* out = at_.out(c);
        for (int d = 0; d < dim_; d += 32) {
            const __m512 a = _mm512_loadu_ps(values + d), b = _mm512_loadu_ps(values + d + 16);
            _mm512_storeu_si512(out + d * sizeof(bf16), (__m512i)_mm512_cvtne2ps_pbh(b, a));
        }
    }
}

void Amx::finish_part(float* part) {
    for (int c = 0; c < columns_; ++c, part += dim_ + 2) {
        row(c, 1.0f, part);
        part[dim_] = highest_[c];
        part[dim_ + 1] = sums_[c];
    }
}

}  // namespace

Engine* make_amx(const Args& args, int max_columns, char* memory, std::size_t* bytes) {
    Arena arena{memory};
    void* place = arena.take<Amx>(1);
    if (memory == nullptr) {
        const Amx counted(args, max_columns, arena);
        *bytes = arena.used;
        return nullptr;
    }
    Amx* engine = new (place) Amx(args, max_columns, arena);
    engine->attach();
    return engine;
}

}  // namespace attention
}  // namespace longreach
#endif
