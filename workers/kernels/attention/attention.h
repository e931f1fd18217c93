// Attention over paged keys and values: what the parts of the kernel share.
//
//   attention_keys    the keys that a tile of rows visits, in blocks of up to 256 keys
//   attention_simd    an engine in vector code for any type (portable, AVX2 and AVX-512 from one source)
//   attention_amx     the engine for bfloat16 queries on AMX
//   attention         checks, choice of the engine, work items, joining of parts
//
// A work item is a tile of rows of one query head, or of all query heads of a KV head where they share their keys. Its
// (head, row) pairs are the columns of the scores S^T = K Q^T; an engine streams blocks of keys past them with an
// online softmax in float32.
#pragma once

#include <cstddef>
#include <cstdint>

#include "abi.h"

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

// A tile of rows and the heads that share its keys. Keys outside `key_low .. key_high - 1` belong to another part.
struct Item {
    int head, heads, kv_head;
    int row, rows;  // within the plan
    int key_low, key_high;
    int columns() const { return heads * rows; }
};

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

// Computes one work item after the other: `begin`, `rotate` and `block` as the keys come, then one of the last two.
class Engine {
public:
    virtual ~Engine() = default;
    virtual void begin(const Item& item) = 0;
    virtual void rotate(int rotation) = 0;  // the next blocks meet the queries under this rotation
    virtual void block(const Block& block) = 0;
    virtual void finish() = 0;                  // writes rows of the output
    virtual void finish_part(float* part) = 0;  // writes [columns][D + 2]: weighted values, maximum, sum
};

// Bump allocator; with `nullptr` as base it only counts.
struct Arena {
    char* base;
    std::size_t used = 0;
    template <class T> T* take(std::size_t count) {
        T* at = reinterpret_cast<T*>(base + used);
        used += (count * sizeof(T) + 63) / 64 * 64;
        return at;
    }
};

// Engines are placed in `memory` (64 byte aligned), which they do not own; with null the needed bytes are counted.
Engine* make_portable(const Args& args, int max_columns, char* memory, std::size_t* bytes);
Engine* make_avx2(const Args& args, int max_columns, char* memory, std::size_t* bytes);
Engine* make_avx512(const Args& args, int max_columns, char* memory, std::size_t* bytes);
Engine* make_amx(const Args& args, int max_columns, char* memory, std::size_t* bytes);

inline std::size_t type_bytes(int type) { return type == kFloat32 ? 4 : type == kBfloat16 ? 2 : 1; }

// Attention of the rows of a plan; a `Status`.
EXPORT int longreach_attend(const Args* args);

}  // namespace longreach::attention
