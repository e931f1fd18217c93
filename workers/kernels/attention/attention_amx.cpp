// The engine for bfloat16 queries on AMX.
//
// Both products run in tiles of 16 lines of 64 bytes:
//   S^T[key, column] = K Q^T   K is the left operand as it lies in memory; Q^T is packed once a tile of rows
//   O[column, dim] = P V       P comes from S^T by a transposition in registers; V is packed in pairs of keys
// Statistics of the softmax belong to columns, so they are vectors of 16 columns and never reduced across lanes.
#if defined(__x86_64__)
#include <algorithm>

#include "attention/attention_registers.h"
#include "cpu.h"

namespace longreach::attention {
namespace {

template <int Dim> class Amx final : public Engine {
public:
    Amx(const Args& args, int max_columns, Arena& arena) : Engine(args, max_columns, kTile, arena) {
        const std::size_t padded = (max_columns + kTile - 1) / kTile * kTile;
        q_ = arena.take<char>(padded * dim_ * sizeof(bf16));
        keys_ = arena.take<bf16>(std::size_t(kBlock) * dim_);
        for (auto& each : values_) each = arena.take<char>(std::size_t(kBlock) * dim_ * sizeof(bf16));
        for (auto& each : s_) each = arena.take<float>(2 * kBlock * kTile);
        for (auto& each : p_) each = arena.take<char>(2 * kBlock * kTile * sizeof(bf16));
        if (arena.base != nullptr) attach();
    }

    AMX ~Amx() override {
        if (attached_) _tile_loadconfig(previous_);
    }

    AMX void block(const Block& block) override {
        if (!packed_) pack_queries();
        ++blocks_;
        const bf16* k[kGroups];
        for (int g = 0; g < block.count; ++g) k[g] = prepare(block.groups[g], g);
        for (int tile = 0; tile < strips_; tile += 2) add(block, k, tile, std::min(2, strips_ - tile));
    }

    AMX void finish() override {
        advance();
        advance();
        float values[4096];
        for (int c = 0; c < columns_; ++c) {
            row(c, sums_[c] == 0.0f ? 0.0f : 1.0f / sums_[c], values);
            char* out = item_.out(args_, c);
            for (int d = 0; d < dim(); d += 32) {
                const __m512 a = _mm512_loadu_ps(values + d), b = _mm512_loadu_ps(values + d + 16);
                _mm512_storeu_si512(out + d * sizeof(bf16), (__m512i)_mm512_cvtne2ps_pbh(b, a));
            }
        }
    }

    AMX void finish_part(float* part) override {
        advance();
        advance();
        for (int c = 0; c < columns_; ++c, part += dim() + 2) {
            row(c, 1.0f, part);
            part[dim()] = highest_[c];
            part[dim() + 1] = sums_[c];
        }
    }

private:
    int dim() const { return Dim ? Dim : dim_; }

    AMX void attach() {
        _tile_storeconfig(previous_);  // oneDNN may rely on it
        _tile_loadconfig(&kTileConfig);
        attached_ = true;
    }

    AMX void pack_queries() {
        packed_ = true;
        for (int tile = 0; tile < strips_; ++tile) {
            for (int d = 0; d < dim(); d += 32) {
                __m512i lines[16];
                for (int i = 0; i < 16; ++i) {
                    const int c = tile * kTile + i;
                    lines[i] = _mm512_setzero_si512();
                    if (c < columns_)
                        lines[i] = _mm512_loadu_si512(item_.query(args_, c, rotation_) + d * sizeof(bf16));
                }
                transpose(lines);
                char* to = q_ + (std::size_t(tile) * dim() / 32 + d / 32) * kTileBytes;
                for (int i = 0; i < 16; ++i) _mm512_store_si512(to + 64 * i, lines[i]);
            }
        }
    }

    // Packs the values of a group; returns its keys in bfloat16. Keys are read here once, line after line: the order in
    // which tiles load them is none the hardware foresees, and fetches beyond its buffers are dropped.
    AMX const bf16* prepare(const Group& group, int place) {
        char* packed = values_[blocks_ % 3] + std::size_t(place) * kGroup * dim() * sizeof(bf16);
        if (args_.kv_type == kBfloat16) {
            auto *k = reinterpret_cast<const bf16*>(group.k), *v = reinterpret_cast<const bf16*>(group.v);
            for (int i = 0; i < kGroup; i += 2, k += 2 * dim(), v += 2 * dim()) {
                for (int d = 0; d < dim(); d += 32) {
                    touch(k + d);
                    touch(k + dim() + d);
                    char* to = packed + d / 16 * kTileBytes + i * 32;
                    pair_rows(to, to + kTileBytes, _mm512_loadu_si512(v + d), _mm512_loadu_si512(v + dim() + d));
                }
            }
            return reinterpret_cast<const bf16*>(group.k);
        }
        bf16* wide = keys_ + std::size_t(place) * kGroup * dim();
        const char *k = group.k, *v = group.v;
        fetch(k + kGroup * dim());
        for (int i = 0; i < kGroup; ++i, k += dim()) {
            const __m512 scale = _mm512_set1_ps(group.k_scales[i]);
            for (int d = 0; d < dim(); d += 32) _mm512_store_si512(wide + i * dim() + d, widen(k + d, scale));
        }
        fetch(v + kGroup * dim());
        for (int i = 0; i < kGroup; i += 2, v += 2 * dim()) {
            const __m512 scale = _mm512_set1_ps(group.v_scales[i]), next = _mm512_set1_ps(group.v_scales[i + 1]);
            for (int d = 0; d < dim(); d += 32) {
                char* to = packed + d / 16 * kTileBytes + i * 32;
                pair_rows(to, to + kTileBytes, widen(v + d, scale), widen(v + dim() + d, next));
            }
        }
        return wide;
    }

    // A group of 8-bit rows that most often comes next: one has 4 KiB, where the hardware stops to look ahead.
    void fetch(const char* rows) const {
        for (int at = 0; at < kGroup * dim(); at += 64) __builtin_prefetch(rows + at, 0, 2);
    }

    AMX void add(const Block& block, const bf16* const* k, int tile, int tiles) {
        const std::int32_t* positions = positions_ + tile * kTile;
        const int real = std::min(tiles * kTile, columns_ - tile * kTile);
        const std::int32_t latest = *std::max_element(positions, positions + real);
        Pass& pass = passes_[count_ % 3];
        int active[kGroups];
        pass.groups = 0;
        for (int g = 0; g < block.count; ++g) {
            if (block.groups[g].first > latest) continue;
            active[pass.groups] = g;
            pass.v[pass.groups++] = values_[blocks_ % 3] + std::size_t(g) * kGroup * dim() * sizeof(bf16);
        }
        if (pass.groups == 0) return;
        pass.tile = tile;
        pass.tiles = tiles;
        pass.s = s_[count_ % 2];
        pass.p = p_[count_ % 2];
        full_[count_ % 3] = true;
        tiles == 2 ? scores<2>(pass, block, k, active) : scores<1>(pass, block, k, active);
        advance();
    }

    // Ends the work on the oldest pass, and on the weights of the one before the newest.
    AMX void advance() {
        const int newest = count_ % 3, oldest = (count_ + 1) % 3;
        if (full_[oldest]) passes_[oldest].tiles == 2 ? weigh<2>(passes_[oldest]) : weigh<1>(passes_[oldest]);
        full_[oldest] = false;
        while (softmax_.busy()) softmax_.step();
        if (full_[newest]) softmax_.start(passes_[newest], scales_, highest_, sums_);
        ++count_;
        AMX_FENCE();
    }

    template <int N> AMX void scores(Pass& pass, const Block& block, const bf16* const* k, const int* active) {
        const int steps = dim() / 32, ticks = (127 + dim()) / dim();
        const std::size_t stride = dim() * sizeof(bf16);
        const char* q = q_ + std::size_t(pass.tile) * kTile * dim() * sizeof(bf16);
        const std::int32_t* positions = positions_ + pass.tile * kTile;
        const std::int32_t earliest = *std::min_element(positions, positions + N * kTile);
        float* s = pass.s;
        for (int g = 0; g < pass.groups; ++g, s += 2 * kScores) {
            const bf16* keys = k[active[g]];
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
            for (int i = 0; i < steps; ++i) {
                _tile_loadd(6, q + i * kTileBytes, 64);
                _tile_loadd(4, keys + i * 32, stride);
                _tile_dpbf16ps(0, 4, 6);
                _tile_loadd(5, keys + kTile * dim() + i * 32, stride);
                _tile_dpbf16ps(2, 5, 6);
                if (N == 2) {
                    _tile_loadd(7, q + (steps + i) * kTileBytes, 64);
                    _tile_dpbf16ps(1, 4, 7);
                    _tile_dpbf16ps(3, 5, 7);
                }
                for (int t = 0; t < ticks; ++t) softmax_.step();
            }
            _tile_stored(0, s, 64);
            _tile_stored(2, s + kScores, 64);
            if (N == 2) {
                _tile_stored(1, s + kBlock * kTile, 64);
                _tile_stored(3, s + kBlock * kTile + kScores, 64);
            }
            AMX_FENCE();
            if (block.groups[active[g]].last <= earliest) continue;
            for (int j = 0; j < N; ++j) {
                mask(s + j * kBlock * kTile, block.positions + active[g] * kGroup, positions + j * kTile);
            }
        }
    }

    AMX void mask(float* s, const std::int32_t* keys, const std::int32_t* columns) {
        const __m512i rows = _mm512_load_si512(columns);
        for (int i = 0; i < kGroup; ++i) {
            const __mmask16 later = _mm512_cmplt_epi32_mask(rows, _mm512_set1_epi32(keys[i]));
            _mm512_mask_storeu_ps(s + i * kTile, later, _mm512_set1_ps(kMasked));
        }
    }

    template <int N> AMX void weigh(const Pass& pass) {
        const int ticks = (127 + dim()) / dim();
        float* o = o_ + std::size_t(pass.tile) * kTile * dim();
        for (int j = 0; j < N; ++j) {
            if (!pass.raised[j]) continue;
            for (int i = 0; i < dim(); ++i) {  // lines of the tiles
                float* line = o + (j * dim() + i) * kTile;
                const __m512 factor = _mm512_set1_ps(pass.factors[j][i % kTile]);
                _mm512_store_ps(line, _mm512_mul_ps(_mm512_load_ps(line), factor));
            }
        }
        AMX_FENCE();
        for (int d = 0; d < dim() / 16; d += 2, o += 2 * kScores) {
            float* second = o + kTile * dim();
            _tile_loadd(0, o, 64);
            _tile_loadd(1, o + kScores, 64);
            _tile_loadd(2, N == 2 ? second : o, 64);
            _tile_loadd(3, N == 2 ? second + kScores : o, 64);
            for (int g = 0; g < pass.groups; ++g) {
                _tile_loadd(4, pass.p + g * kTileBytes, 64);
                _tile_loadd(6, pass.v[g] + d * kTileBytes, 64);
                _tile_dpbf16ps(0, 4, 6);
                _tile_loadd(7, pass.v[g] + (d + 1) * kTileBytes, 64);
                _tile_dpbf16ps(1, 4, 7);
                if (N == 2) {
                    _tile_loadd(5, pass.p + (kGroups + g) * kTileBytes, 64);
                    _tile_dpbf16ps(2, 5, 6);
                    _tile_dpbf16ps(3, 5, 7);
                }
                for (int t = 0; t < ticks; ++t) softmax_.step();
            }
            _tile_stored(0, o, 64);
            _tile_stored(1, o + kScores, 64);
            if (N == 2) _tile_stored(2, second, 64);
            if (N == 2) _tile_stored(3, second + kScores, 64);
        }
    }

    // Weighted values of a column, dims in their order.
    AMX void row(int c, float factor, float* to) {
        const __m512i low = _mm512_set_epi32(23, 22, 21, 20, 7, 6, 5, 4, 19, 18, 17, 16, 3, 2, 1, 0);
        const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
        const float* o = o_ + std::size_t(c / kTile) * kTile * dim() + c % kTile * kTile;
        for (int d = 0; d < dim(); d += 32, o += 2 * kScores) {
            const __m512 scale = _mm512_set1_ps(factor);
            const __m512 a = _mm512_mul_ps(_mm512_load_ps(o), scale);
            const __m512 b = _mm512_mul_ps(_mm512_load_ps(o + kScores), scale);
            _mm512_storeu_ps(to + d, _mm512_permutex2var_ps(a, low, b));
            _mm512_storeu_ps(to + d + 16, _mm512_permutex2var_ps(a, high, b));
        }
    }

    bool attached_ = false;
    alignas(64) char previous_[64];
    // `o_` is [tile of columns][D / 16] tiles: a line a column, dims in the order of `pair_rows`
    char* q_;          // [tile of columns][D / 32] tiles: line i holds dims 2i and 2i + 1 of 16 columns
    bf16* keys_;       // [block][D], only for int8
    char* values_[3];  // of the last three blocks: [group][D / 16] tiles: line i holds keys 2i and 2i + 1
    float* s_[2];
    char* p_[2];
    // Three passes are under way: one is scored, one becomes weights, the oldest is added to the result.
    Pass passes_[3];
    unsigned count_ = 0, blocks_ = 0;
    bool full_[3] = {};
    Softmax softmax_;
};

}  // namespace

Engine* make_amx(const Args& args, int max_columns, Arena& arena) {
    const auto make_dim = args.dim == 128 ? make<Amx<128>> : args.dim == 64 ? make<Amx<64>> : make<Amx<0>>;
    return make_dim(args, max_columns, arena);
}

}  // namespace longreach::attention
#endif
