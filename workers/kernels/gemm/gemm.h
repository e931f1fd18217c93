// Matrix products in bfloat16 over weights packed once at load: shared by the dense layers and the experts.
//
// A weight [N, K] is stored as strips of 16 outputs, a strip as tiles of 32 inputs, a tile as 16 lines of 64 bytes:
// line i holds inputs 2i and 2i + 1 of each of the 16 outputs. AMX takes a tile as it is, AVX-512 a line. Rows of
// activations are packed likewise: strips of 16 rows, tiles of 32 columns, a line per row. Every path sums a product
// in one fixed order over K, so a row's result does not depend on the rows beside it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "abi.h"
#include "bfloat16.h"

#if defined(__x86_64__)
#define LR_AVX2 __attribute__((target("avx2,fma,f16c")))
#define LR_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq")))
#else
#define LR_AVX2
#define LR_AVX512
#endif

// Before loops over registers: an array stays in registers only where no loop over it is left when the compiler looks.
#define UNROLL _Pragma("GCC unroll 8")

namespace longreach::gemm {

constexpr long kStrip = 16;  // rows or outputs of a tile
constexpr long kDepth = 32;  // values of K in a tile
constexpr long kTile = kStrip * kDepth;
constexpr long kBlock = 2 * kStrip;    // rows and outputs of a block, at most
constexpr long kSlice = 8;             // tiles of K: two strips of them are 16 KiB
constexpr long kTaskBytes = 1L << 20;  // of packed rows: they stay in L2 while the weights pass
constexpr long kTasksPerThread = 4;    // finer tasks balance the threads
constexpr std::size_t kLine = 64;      // bytes

// Weights to prefetch into L2 while a block is computed: `lines` after each tile of K.
struct Ahead {
    const char* at;
    long lines;
};

// Scales and zero points of two strips in one group; the zero points are those of codes as `Decoder::codes` writes them.
struct alignas(kLine) GroupScales {
    float scale[2][kStrip], zero[2][kStrip];
};

// Packed operands of one block: up to 32 rows, one or two strips of outputs (`b1` null: one), some of K.
struct Operands {
    const bf16* a;
    long rows;
    const bf16* b0;
    const bf16* b1;
    long k_tiles;
    long a_stride;  // values from the first strip of rows to the second
    bool add;       // to what c holds
    // weights of one group as codes, whose sum is scaled, and moved where there are zero points
    const GroupScales* scales = nullptr;  // null: weights
    const float* sums = nullptr;  // of the group's inputs of each row; null: no zero points
    long lines = kStrip;  // of each tile, from where `a` and `b0` point
};

// The destination of a block: row r goes to `out + place[r] * stride`, as bf16(scale[r] * c + bias).
struct Target {
    bf16* out;
    long stride;
    const std::int32_t* place;  // null: r
    const float* scale;  // null: 1
    const bf16* bias;  // null: 0
    bool stream;  // bypass the caches where whole lines are written
};

// A function that is inlined always, compiled for every instruction set: `of[path]`.
template <auto function> struct Compiled;
template <typename R, typename... A, R (*function)(A...)> struct Compiled<function> {
    static R portable(A... a) { return function(a...); }
    LR_AVX2 static R avx2(A... a) { return function(a...); }
    LR_AVX512 static R avx512(A... a) { return function(a...); }
    static constexpr R (*of[])(A...) = {portable, avx2, avx512, avx512, avx512};
};

inline void nothing() {}
inline void nothing(long, long) {}

// One instruction set. `block` fills c, 32 x 32 floats, or adds to it; `store` and `swiglu` consume c.
struct Engine {
    void (*block)(float* c, const Operands& operands, Ahead ahead);
    void (*store)(const float* c, long rows, long columns, const Target& target);
    // silu(first 16 columns) * last 16 columns, to 16 columns of packed rows; their strips are `stride` values apart
    void (*swiglu)(const float* c, long rows, bf16* out, long stride);
    // out = the sum of `count` rows of n values, n a multiple of 16
    void (*sum)(bf16* out, const bf16* const* rows, long count, long n);
    void (*enter)(long rows, long lines);  // on a thread before blocks of so many rows, and lines of each tile
    void (*leave)();  // after them
};

// The engine of a path that the CPU has.
const Engine& engine(int path);
const Engine& avx2_engine();
const Engine& avx512_engine(Path path);  // and AMX

// Rows of x, `rows` or (null) consecutive ones, packed; the last strip is filled up with zeros.
void pack_rows(bf16* out, const bf16* x, long stride, const std::int32_t* rows, long count, long k);

// Whether results bypass the caches: they are larger, so a line would be evicted before it is read.
inline bool streams(const bf16* out, long rows, long stride) {
    constexpr long cached = 2L << 20;  // bytes
    const auto odd = reinterpret_cast<std::uintptr_t>(out) | std::uintptr_t(stride) * sizeof(bf16);
    return odd % kLine == 0 && rows * stride * long(sizeof(bf16)) > cached;
}

inline long round_up(long value, long step) { return (value + step - 1) / step * step; }

}  // namespace longreach::gemm
