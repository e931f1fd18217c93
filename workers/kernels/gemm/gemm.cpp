// Packing, the portable engine and the dense product; see gemm.h.
#include "gemm/calls.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>

#include "memory.h"

namespace longreach::gemm {
namespace {

// Rows from `row` on times strip 0 or 1.
template <int Rows> void some_rows(float* c, const bf16* a, const Operands& o, long row, long strip) {
    const bf16* b = strip == 0 ? o.b0 : o.b1;
    float sum[Rows][kStrip] = {};
    const bool scales = o.scales != nullptr;
    for (int r = 0; o.add && !scales && r < Rows; ++r) std::memcpy(sum[r], c + r * kBlock, sizeof sum[r]);
    for (long k = 0; k < o.k_tiles; ++k, a += kTile, b += kTile) {
        for (long i = 0; i < o.lines; ++i) {
            std::uint32_t pairs[kStrip];
            std::memcpy(pairs, b + i * kDepth, sizeof pairs);
            for (int r = 0; r < Rows; ++r) {
                const float even = widen(a[r * kDepth + 2 * i]);
                const float odd = widen(a[r * kDepth + 2 * i + 1]);
                for (long n = 0; n < kStrip; ++n) sum[r][n] += even * as_float(pairs[n] << 16);
                for (long n = 0; n < kStrip; ++n) sum[r][n] += odd * as_float(pairs[n] & 0xffff0000u);
            }
        }
    }
    for (int r = 0; r < Rows; ++r) {
        float* to = c + r * kBlock;
        const float inputs = o.sums ? o.sums[row + r < o.rows ? row + r : row] : 0.0f;
        for (long n = 0; scales && n < kStrip; ++n) {
            const float value = o.scales->scale[strip][n] * (sum[r][n] - o.scales->zero[strip][n] * inputs);
            sum[r][n] = o.add ? to[n] + value : value;
        }
        std::memcpy(to, sum[r], sizeof sum[r]);
    }
}

void block(float* c, const Operands& o, Ahead) {
    for (long row = 0; row < o.rows; row += 4) {
        const bf16* a = o.a + row / kStrip * o.a_stride + row % kStrip * kDepth;
        for (long strip = 0; strip < (o.b1 ? 2 : 1); ++strip) {
            float* to = c + row * kBlock + strip * kStrip;
            o.rows - row == 1 ? some_rows<1>(to, a, o, row, strip) : some_rows<4>(to, a, o, row, strip);
        }
    }
}

void store(const float* c, long rows, long columns, const Target& t) {
    for (long r = 0; r < rows; ++r) {
        bf16* out = t.out + (t.place ? t.place[r] : r) * t.stride;
        const float scale = t.scale ? t.scale[r] : 1.0f;
        for (long n = 0; n < columns; ++n) {
            const float bias = t.bias ? widen(t.bias[n]) : 0.0f;
            out[n] = narrow(scale * c[r * kBlock + n] + bias);
        }
    }
}

void swiglu(const float* c, long rows, bf16* out, long stride) {
    for (long r = 0; r < rows; ++r, c += kBlock) {
        bf16* to = out + r / kStrip * stride + r % kStrip * kDepth;
        for (long n = 0; n < kStrip; ++n) to[n] = narrow(c[n] / (1.0f + std::exp(-c[n])) * c[n + kStrip]);
    }
}

void sum_rows(bf16* out, const bf16* const* rows, long count, long n) {
    for (long i = 0; i < n; ++i) {
        float sum = 0.0f;
        for (long r = 0; r < count; ++r) sum += widen(rows[r][i]);
        out[i] = narrow(sum);
    }
}

constexpr Engine kEngine{block, store, swiglu, sum_rows, nothing, nothing};

}  // namespace

const Engine& engine(int path) {
#if defined(__x86_64__)
    if (path >= kAvx512) return avx512_engine(Path(path));
    if (path == kAvx2) return avx2_engine();
#endif
    return kEngine;
}

void pack_rows(bf16* out, const bf16* x, long stride, const std::int32_t* rows, long count, long k) {
    const long tiles = k / kDepth;
    for (long first = 0; first < count; first += kStrip) {
        const long here = std::min(kStrip, count - first);
        const bf16* from[kStrip];
        for (long r = 0; r < here; ++r) from[r] = x + (rows ? rows[first + r] : first + r) * stride;
        for (long tile = 0; tile < tiles; ++tile, out += kTile) {
            for (long r = 0; r < here; ++r) std::memcpy(out + r * kDepth, from[r] + tile * kDepth, kLine);
            if (here < kStrip) std::memset(out + here * kDepth, 0, (kStrip - here) * kLine);
        }
    }
}

TaskMemory::TaskMemory(long rows, long k, long width, long groups) {
    thread_local Scratch memory;
    const std::size_t strips = round_up(rows, kStrip) * sizeof(bf16);
    const std::size_t sizes[] = {strips * k, round_up(rows, kBlock) * kBlock * sizeof(float), strips * width,
                                 2 * kSlice * kTile * sizeof(bf16), round_up(rows * groups, kStrip) * sizeof(float)};
    std::size_t total = 0;
    for (const std::size_t size : sizes) total += size;
    char* at = memory.get(total);
    char* parts[5];
    for (int i = 0; i < 5; ++i) {
        parts[i] = at;
        if (at != nullptr) at += sizes[i];
    }
    a = reinterpret_cast<bf16*>(parts[0]);
    c = reinterpret_cast<float*>(parts[1]);
    hidden = reinterpret_cast<bf16*>(parts[2]);
    unpacked = reinterpret_cast<bf16*>(parts[3]);
    sums = reinterpret_cast<float*>(parts[4]);
}

// Rows [first, first + rows) of a weight [n, k] to their place in the packed weight; `source` rows are `stride` apart.
// With `half`, strips of the first and of the second `half` rows take turns: a gate beside its up.
EXPORT void longreach_pack(bf16* packed, const bf16* source, long first, long rows, long k, long stride, long half) {
    for (long row = first; row < first + rows; ++row, source += stride) {
        const long strip = half == 0 ? row / kStrip : row % half / kStrip * 2 + row / half;
        bf16* to = packed + strip * kStrip * k + row % kStrip * 2;
        for (long column = 0; column < k; column += 2) {
            std::memcpy(to + column / 2 * kDepth, source + column, 2 * sizeof(bf16));
        }
    }
}

// out = x @ weight.T + bias; a `Status`.
EXPORT int longreach_linear(const LinearCall* call) {
    const Engine& use = engine(call->path);
    const long k = call->k, strips = call->n / kStrip, panels = (strips + 1) / 2;
    // where rows are few, columns make the tasks
    const long max_rows = std::max(kBlock, kTaskBytes / long(sizeof(bf16)) / k / kBlock * kBlock);
    const long groups = (call->rows + max_rows - 1) / max_rows;
    const long group = round_up((call->rows + groups - 1) / groups, kBlock);
    const long pieces = std::min(panels, std::max(1L, (kTasksPerThread * call->threads + groups - 1) / groups));
    const bool stream = streams(call->out, call->rows, call->n);
    const long zeros = groups_with_zeros(call->weight, k);
    int status = kOk;
#pragma omp parallel num_threads(call->threads)
    {
#pragma omp for schedule(dynamic) collapse(2)
        for (long g = 0; g < groups; ++g) {
            for (long piece = 0; piece < pieces; ++piece) {
                const long first = g * group, rows = std::min<long>(group, call->rows - first);
                const TaskMemory memory(group, k, 0, zeros);
                if (memory.a == nullptr) {
#pragma omp atomic write
                    status = kNoMemory;
                } else if (rows > 0) {
                    pack_rows(memory.a, call->x + first * call->stride, call->stride, nullptr, rows, k);
                    const Panels some{call->weight, strips, k / kDepth, piece, pieces, call->rows <= kStrip};
                    run_panels(call->path, memory, memory.c, memory.a, rows, some,
                               [&](long panel, const float* sums, long row, long count) {
                                   bf16* out = call->out + (first + row) * call->n + panel * kBlock;
                                   const bf16* bias = call->bias ? call->bias + panel * kBlock : nullptr;
                                   const long columns = std::min(kBlock, call->n - panel * kBlock);
                                   use.store(sums, count, columns, {out, call->n, nullptr, nullptr, bias, stream});
                               });
                    std::atomic_thread_fence(std::memory_order_seq_cst);  // streamed lines
                }
            }
        }
    }
    return status;
}

}  // namespace longreach::gemm
