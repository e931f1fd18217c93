// Attention over paged keys and values: what the parts of the kernel share.
//
//   attention_keys    the keys that a tile of rows visits, in blocks of up to 256 keys
//   attention_simd    engines in vector code from one source: for any type (portable, AVX2, AVX-512), for bfloat16
//                     queries (AVX-512 BF16)
//   attention_amx     the engine for bfloat16 queries on AMX
//   attention         checks, choice of the engine, work items, joining of parts
//
// A work item is a tile of rows of one query head, or of all query heads of a KV head where they share their keys. Its
// (head, row) pairs are the columns of the scores S^T = K Q^T; an engine streams blocks of keys past them with an
// online softmax in float32.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <new>

#include "abi.h"
#include "bfloat16.h"

namespace longreach::attention {

constexpr int kGroup = 32;  // keys that lie one after the other in memory
constexpr int kGroups = 8;  // groups of a block
constexpr int kBlock = kGroup * kGroups;
constexpr std::int64_t kMaxDim = 1024;  // of a head
constexpr int kNever = INT32_MAX;       // position of padding: after every row
constexpr float kMasked = -1e37f;       // score of a masked pair; its weight is exactly 0
constexpr float kUnseen = -1e30f;       // running maximum of a column without keys so far
constexpr float kLazy = 8.0f;           // log2 by which a maximum may be exceeded before sums are rescaled

// Mirrored by `AttentionArgs` in workers/kernels/abi.py. Strides count elements.
struct Args {
    const void* q[3];  // [T, H, D] under the rotations intra, succ, inter
    std::int64_t q_row[3], q_head[3];
    void* out;         // [T, H, D], contiguous
    const void* keys;  // [K, slots, D]
    const void* values;
    std::int64_t key_head, value_head;
    const float* key_scales;  // [K, slots], int8 only
    const float* value_scales;
    std::int64_t key_scale_head, value_scale_head;
    const std::int32_t* pages;  // first slot of every page
    std::int64_t num_pages, page_size, slots;
    const float* scales;  // [T], > 0
    std::int64_t heads, kv_heads, dim;
    std::int64_t start, length, distance, tile;
    const std::int32_t* const* offsets;  // [H] -> [n, 2]; null: dense
    const std::int64_t* num_offsets;
    const std::int32_t* const* columns;  // [H] -> [m]
    const std::int64_t* num_columns;
    std::int64_t* visited;  // [H], or null
    int q_type, kv_type, threads, path;
};

inline std::size_t type_bytes(int type) { return type == kFloat32 ? 4 : type == kBfloat16 ? 2 : 1; }

INLINE float value_at(const void* values, int type, std::int64_t i) {  // float32 or bfloat16
    return type == kFloat32 ? static_cast<const float*>(values)[i] : widen(static_cast<const bf16*>(values)[i]);
}

// A tile of rows and the heads that share its keys. Keys outside `key_low .. key_high - 1` belong to another part.
// Column `c` is row `c % rows` of the tile, of head `c / rows` of the item.
struct Item {
    int head, heads, kv_head;
    int first_row, rows;  // within the plan
    int key_low, key_high;

    int columns() const { return heads * rows; }
    int row(int c) const { return first_row + c % rows; }
    const char* query(const Args& args, int c, int rotation) const {
        const std::int64_t at = row(c) * args.q_row[rotation] + (head + c / rows) * args.q_head[rotation];
        return static_cast<const char*>(args.q[rotation]) + at * type_bytes(args.q_type);
    }
    char* out(const Args& args, int c) const {
        const std::int64_t at = (row(c) * args.heads + head + c / rows) * args.dim;
        return static_cast<char*>(args.out) + at * type_bytes(args.q_type);
    }
};

// A row of the result: weighted values, `step` apart, by the sum of their weights.
inline void write_row(const Args& args, char* out, const float* values, int step, float sum) {
    const float factor = sum == 0.0f ? 0.0f : 1.0f / sum;
    for (std::int64_t d = 0; d < args.dim; ++d) {
        const float x = values[d * step] * factor;
        if (args.q_type == kFloat32) {
            reinterpret_cast<float*>(out)[d] = x;
        } else {
            reinterpret_cast<bf16*>(out)[d] = narrow(x);
        }
    }
}

// `kGroup` keys, some of which may be padding (position `kNever`, all zero).
struct Group {
    const char* k;
    const char* v;
    const float* k_scales;  // null unless int8
    const float* v_scales;
    std::int32_t first, last;  // lowest and highest position
};

struct Block {
    Group groups[kGroups];
    alignas(64) std::int32_t positions[kBlock];
    int count;  // groups
};

// Bump allocator over memory aligned to 64 bytes; with `nullptr` as base it only counts.
struct Arena {
    char* base;
    std::size_t used = 0;
    template <class T> T* take(std::size_t count) {
        T* at = reinterpret_cast<T*>(base + used);
        used += (count * sizeof(T) + 63) / 64 * 64;
        return at;
    }
};

// Computes one work item after the other: `begin`, `rotate` and `block` as the keys come, then one of the last two.
class Engine {
public:
    virtual ~Engine() = default;
    virtual void block(const Block& block) = 0;
    virtual void finish() = 0;                  // writes rows of the output
    virtual void finish_part(float* part) = 0;  // writes [columns][D + 2]: weighted values, maximum, sum

    void begin(const Item& item) {
        item_ = item;
        columns_ = item.columns();
        strips_ = (columns_ + strip_ - 1) / strip_;
        const int padded = strips_ * strip_;
        for (int c = 0; c < padded; ++c) {  // those beyond the last column see every key
            const bool real = c < columns_;
            scales_[c] = real ? args_.scales[item.row(c)] * 1.44269504088896341f : 0.1f;
            positions_[c] = real ? std::int32_t(args_.start + item.row(c)) : kNever - 1;
        }
        std::fill(highest_, highest_ + padded, kUnseen);
        std::fill(sums_, sums_ + padded, 0.0f);
        std::fill(o_, o_ + std::size_t(padded) * dim_, 0.0f);
    }

    // The next blocks meet the queries under this rotation.
    void rotate(int rotation) {
        rotation_ = rotation;
        packed_ = false;
    }

protected:
    Engine(const Args& args, int max_columns, int strip, Arena& arena)
        : args_(args), dim_(int(args.dim)), strip_(strip) {
        const std::size_t padded = (max_columns + strip - 1) / strip * strip;
        o_ = arena.take<float>(padded * dim_);
        highest_ = arena.take<float>(padded);
        sums_ = arena.take<float>(padded);
        scales_ = arena.take<float>(padded);
        positions_ = arena.take<std::int32_t>(padded);
    }

    const Args& args_;
    const int dim_;
    const int strip_;  // columns that are computed together
    Item item_{};
    int columns_ = 0, strips_ = 0, rotation_ = 0;
    bool packed_ = false;               // queries, under the rotation
    float* o_;                          // weighted values of the columns, in the order of the engine
    float *highest_, *sums_, *scales_;  // a column each; logits are in units of ln 2
    std::int32_t* positions_;
};

// Makes an engine in the memory of the arena, which keeps it; null where the arena only counts.
using Make = Engine*(const Args& args, int max_columns, Arena& arena);
Make make_portable, make_avx2, make_avx512, make_bf16, make_amx;

template <class Made> Engine* make(const Args& args, int max_columns, Arena& arena) {
    void* place = arena.take<Made>(1);
    if (arena.base != nullptr) return new (place) Made(args, max_columns, arena);
    const Made counted(args, max_columns, arena);
    return nullptr;
}

// Attention of the rows of a plan; a `Status`.
EXPORT int longreach_attend(const Args* args);

}  // namespace longreach::attention
