// The products of packed rows and panels of a weight, plain or quantised.
#pragma once

#include <algorithm>

#include "gemm/weights.h"

namespace longreach::gemm {

// Memory of a task, of the thread, of unspecified content; `a` is null when there is no room.
struct TaskMemory {
    bf16* a;         // packed rows of x, [rows, k]
    float* c;        // the sums of a panel
    bf16* hidden;    // packed rows, [rows, width]
    bf16* unpacked;  // two strips of kSlice tiles
    float* sums;     // [groups, rows]: of `sum_groups`
    TaskMemory(long rows, long k, long width, long groups);
};

// Groups of a weight whose rows must be summed.
inline long groups_with_zeros(const Weights& weights, long k) { return weights.zeros ? weights.groups(k) : 0; }

// Some panels of a packed weight: a panel is two strips, the last one a single strip where their number is odd.
struct Panels {
    Weights weight;
    long strips, k_tiles;
    long part, parts;  // the panels to compute: one of equal parts
    bool few;          // rows in the whole call: kStrip at most
    long start() const { return (strips + 1) / 2 * part / parts; }
    long stop() const { return (strips + 1) / 2 * (part + 1) / parts; }
    bool two(long panel) const { return 2 * panel + 1 < strips; }
    const char* at(long panel) const { return weight.values + panel * panel_bytes(); }
    long panel_bytes() const { return weight.bytes(2 * k_tiles * kTile); }
    // Weights that come into L2 while a panel is computed in so many steps.
    Ahead ahead(long panel, long steps) const {
        if (panel + 1 == stop()) return {nullptr, 0};
        return {at(panel + 1), (panel_bytes() / long(kLine) + steps - 1) / steps};
    }
};

// Both functions call finish(panel, c of the block, its first row, its rows) for every block of 32 rows; c, 32 floats a
// row, holds the sums. K is cut into slices, so that a slice of the panel stays in L1 while all rows pass by.
template <typename Finish>
void run_plain(const Engine& engine, float* c, const bf16* a, long rows, const Panels& panels, const Finish& finish) {
    const long k_tiles = panels.k_tiles, strip = k_tiles * kTile;
    const long blocks = (rows + kBlock - 1) / kBlock, depth = blocks == 1 ? k_tiles : kSlice;
    for (long panel = panels.start(); panel < panels.stop(); ++panel) {
        const bf16* b = reinterpret_cast<const bf16*>(panels.at(panel));
        Ahead ahead = panels.ahead(panel, blocks * k_tiles);
        for (long k = 0; k < k_tiles; k += depth) {
            const long slice = std::min(depth, k_tiles - k);
            const bf16 *b0 = b + k * kTile, *b1 = panels.two(panel) ? b0 + strip : nullptr;
            for (long first = 0; first < rows; first += kBlock, ahead.at += slice * ahead.lines * long(kLine)) {
                const long count = std::min(kBlock, rows - first);
                const bf16* from = a + first * k_tiles * kDepth + k * kTile;
                float* sums = c + first * kBlock;
                engine.block(sums, {from, count, b0, b1, slice, strip, k > 0}, ahead);
                if (k + slice == k_tiles) finish(panel, sums, first, count);
            }
        }
    }
}

template <typename Finish> void run_quantized(int path, const TaskMemory& memory, float* c, const bf16* a, long rows,
                                              const Panels& panels, const Finish& finish) {
    const Engine& use = engine(path);
    const Decoder& decode = decoder(path);
    const Weights& weight = panels.weight;
    const long k_tiles = panels.k_tiles, strip = k_tiles * kTile, groups = weight.groups(k_tiles * kDepth);
    const long blocks = (rows + kBlock - 1) / kBlock;
    const bool by_group = scales_sums(weight, path, panels.few);
    const float* sums = by_group && weight.zeros ? memory.sums : nullptr;
    if (sums) sum_groups(memory.sums, a, rows, k_tiles, weight.group);
    const long parts = by_group ? parts_of_tile(weight) : 1;
    GroupScales scales{};
    for (long panel = panels.start(); panel < panels.stop(); ++panel) {
        const bool two = panels.two(panel);
        Ahead ahead = panels.ahead(panel, blocks * k_tiles);
        if (rows <= kFewRows && by_group && decode.few_rows != nullptr) {
            decode.few_rows(c, a, {weight, {2 * panel, k_tiles, 0, k_tiles}, rows, two, sums}, ahead);
            finish(panel, c, 0, rows);
            continue;
        }
        for (long k = 0, slice, left = 0; k < k_tiles; k += slice, left -= slice) {
            const bool starts = left == 0;  // a group
            if (starts) left = std::min(by_group ? tiles_of_group(weight) : k_tiles, k_tiles - k);
            slice = std::min(kSlice, left);
            for (long s = 0; s < (two ? 2 : 1); ++s) {
                const Tiles tiles{2 * panel + s, k_tiles, k, slice};
                (by_group ? decode.codes : decode.weights)(memory.unpacked + s * kSlice * kTile, weight, tiles);
            }
            const bf16 *b0 = memory.unpacked, *b1 = b0 + kSlice * kTile;
            for (long part = 0; part < parts; ++part) {
                const long group = (k * kDepth + part * kStrip) / weight.group, skipped = part * kTile / 2;
                if (by_group) decode.scales(scales, weight, 2 * panel, two, groups, group);
                for (long first = 0; first < rows; first += kBlock) {
                    const long count = std::min(kBlock, rows - first);
                    const bf16* from = a + first * k_tiles * kDepth + k * kTile + part * kStrip;
                    Operands some{from, count, b0 + skipped, two ? b1 + skipped : nullptr, slice, strip, k + part > 0};
                    if (by_group) some.scales = &scales, some.lines = kStrip / parts;
                    if (sums && starts) some.sums = sums + group * rows + first;
                    use.block(c + first * kBlock, some, part == 0 ? ahead : Ahead{nullptr, 0});
                    if (part == 0) ahead.at += slice * ahead.lines * long(kLine);
                    if (k + slice == k_tiles && part + 1 == parts) finish(panel, c + first * kBlock, first, count);
                }
            }
        }
    }
}

template <typename Finish> void run_panels(int path, const TaskMemory& memory, float* c, const bf16* a, long rows,
                                           const Panels& panels, const Finish& finish) {
    const Engine& use = engine(path);
    const bool halves = scales_sums(panels.weight, path, panels.few) && parts_of_tile(panels.weight) == 2;
    use.enter(rows, halves ? kStrip / 2 : kStrip);
    if (panels.weight.kind == kPlain)
        run_plain(use, c, a, rows, panels, finish);
    else
        run_quantized(path, memory, c, a, rows, panels, finish);
    use.leave();
}

}  // namespace longreach::gemm
