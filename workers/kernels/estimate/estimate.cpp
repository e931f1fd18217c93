// Column and diagonal sums of the attention of sampled rows, and how much of it a selection keeps. The contract is that of
// `Estimate` in workers/sparse/estimate.py.
//
// Keys are cut into chunks at fixed positions; a thread computes a chunk for all query heads of the KV head. Chunks are
// joined in the order of their positions, so that the results do not depend on the number of threads.
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <new>
#include <vector>

#include "cpu.h"
#include "estimate/estimate_work.h"

namespace longreach::estimate {
namespace {

constexpr float kLn2 = 0.6931471805599453f;
constexpr float kNothing = 1e30f;  // lse of padding rows: their weights are 0

// Softmax denominators of a strip, as logarithms to the base 2.
struct Lse {
    alignas(64) float rows[kRows];
    Lse() { std::fill_n(rows, kRows, kNothing); }
};

using Bits = std::vector<std::uint64_t>;

// Bits `i .. i + 63` of a map.
std::uint64_t bits_from(const Bits& map, std::uint64_t i) {
    return map[i / 64] >> i % 64 | map[i / 64 + 1] << 1 << (63 - i % 64);
}

void set_bits(Bits& map, std::int64_t low, std::int64_t high) {  // high is included
    while (low <= high) {
        const std::int64_t n = std::min<std::int64_t>(64 - low % 64, high + 1 - low);
        map[low / 64] |= (n == 64 ? ~0ull : (1ull << n) - 1) << low % 64;
        low += n;
    }
}

// What a head keeps of `stop` keys, as bits. Offsets run backwards, bit stop - 1 - offset, so that neighbouring keys of
// a row are neighbouring bits; after them come zeros for keys after the row.
struct Maps {
    Bits offsets, columns;
    std::int64_t stop;

    Maps(const Selection& chosen, std::int64_t s) : offsets(2 * s / 64 + 4), columns(s / 64 + 3), stop(s) {
        for (std::int64_t i = 0; i < chosen.num_offsets; ++i) {
            const auto low = chosen.offsets[2 * i], high = chosen.offsets[2 * i + 1];
            set_bits(offsets, s - 1 - std::min<std::int64_t>(high, s - 1), s - 1 - low);
        }
        for (std::int64_t i = 0; i < chosen.num_columns; ++i) {
            columns[chosen.columns[i] / 64] |= 1ull << chosen.columns[i] % 64;
        }
    }

    // Bit i: whether the row at `position` keeps key `low` + i by its offset.
    std::uint64_t row(std::int64_t position, std::int64_t low) const {
        return bits_from(offsets, stop - 1 - position + low);
    }
};

// Offsets as bits in their own order, kRows further on: neighbouring rows of a key are neighbouring bits.
Bits forward(const Selection& chosen, std::int64_t s) {
    Bits map((s + 2 * kRows) / 64 + 3);
    for (std::int64_t i = 0; i < chosen.num_offsets; ++i) {
        set_bits(map, chosen.offsets[2 * i] + kRows, std::min<std::int64_t>(chosen.offsets[2 * i + 1], s - 1) + kRows);
    }
    return map;
}

bool valid(const Args& a) {
    if (a.path < 0 || a.path > best_path()) return false;
    if (a.path >= kAvx512Bf16 && (a.dim % 32 != 0 || a.q_type != kBfloat16 || a.kv_type == kFloat32)) return false;
    return a.num_rows >= 1 && a.dim >= 1 && a.heads >= 1 && a.kv_heads >= 1 && a.heads % a.kv_heads == 0 &&
           a.page_size >= 1 && a.kv_head >= 0 && a.kv_head < a.kv_heads && a.borders[3] >= 1 &&
           a.borders[3] <= INT32_MAX - 2 * kKeys && a.q_type >= 0 && a.q_type <= kBfloat16 && a.kv_type >= 0 &&
           a.kv_type <= kInt8 && (a.kv_type == kInt8) == (a.key_scales != nullptr);
}

// Computes the softmax denominators of every strip, with `maps` also the kept share [G].
void stream(const Work& work, const std::vector<Maps>* maps, std::vector<Lse>& lse, double* share) {
    const int strips = work.group * work.strips, chunks = int(work.chunks.size());
    std::vector<Running> parts(std::size_t(strips) * chunks);
    parallel(work, chunks, 1, [&](Reader& reader, int i) {
        reader.walk(work.chunks[i],
                    [&](std::int32_t low, const Block&, int at, const Strip& strip, const float* s, const Next& next) {
                        Running& state = parts[std::size_t(i) * strips + at];
                        if (maps == nullptr) return work.engine.running(state, s, strip, next);
                        const Maps& map = (*maps)[at / work.strips];
                        const std::uint64_t columns = bits_from(map.columns, low);
                        alignas(64) std::int32_t words[2][kRows] = {};
                        for (int r = 0; r < kRows && strip.positions[r] >= 0; ++r) {
                            const std::uint64_t word = columns | map.row(strip.positions[r], low);
                            words[0][r] = std::int32_t(word);
                            words[1][r] = std::int32_t(word >> 32);
                        }
                        work.engine.kept(state, s, strip, words[0], next);
                    });
    });
    for (int at = 0; at < strips; ++at) {
        const Strip& strip = work.of(2)[at];
        const auto part = [&](int i) -> const Running& { return parts[std::size_t(i) * strips + at]; };
        for (int r = 0; r < kRows && strip.positions[r] >= 0; ++r) {
            float maximum = kUnseen;
            for (int i = 0; i < chunks; ++i) maximum = std::max(maximum, part(i).maximum[r]);
            double sum = 0, kept = 0;
            for (int i = 0; i < chunks; ++i) {
                const double weight = std::exp2((double(part(i).maximum[r]) - maximum) * strip.factor[r]);
                sum += weight * part(i).sum[r];
                kept += weight * part(i).kept[r];
            }
            lse[at].rows[r] = float(double(maximum) * strip.factor[r] + std::log2(sum));
            if (share != nullptr) share[at / work.strips] += kept / sum / double(work.args.num_rows);
        }
    }
}

// Offsets `first .. first + kSpan - 1` of a head; what lies outside of 0 .. S - 1 is zero.
void add_offsets(float* offsets, std::int64_t stop, std::int64_t first, const float* add) {
    const std::int64_t low = std::max<std::int64_t>(0, -first), high = std::min<std::int64_t>(kSpan, stop - first);
    for (std::int64_t i = low; i < high; ++i) offsets[first + i] += add[i];
}

void sum_up(const Work& work, const std::vector<Lse>& lse, float* columns, float* offsets) {
    const std::int64_t stop = work.args.borders[3];
    // Neighbouring chunks share some offsets: first the even ones are computed, then the odd ones.
    parallel(work, int(work.chunks.size()), 2, [&](Reader& reader, int i) {
        alignas(64) float lanes[kKeys * kLanes], by_key[kKeys], by_offset[kSpan];
        reader.walk(work.chunks[i], [&](std::int32_t low, const Block& block, int at, const Strip& strip,
                                        const float* s, const Next& next) {
            const int head = at / work.strips, index = at % work.strips;
            if (index == 0) std::memset(lanes, 0, sizeof lanes);
            work.engine.sums(s, strip, lse[at].rows, lanes, by_offset, next);
            add_offsets(offsets + head * stop, stop, std::int64_t(strip.first) - low - (kKeys - 1), by_offset);
            if (index + 1 < work.strips) return;
            work.engine.fold(by_key, lanes);
            std::memcpy(columns + head * stop + low, by_key, block.count * sizeof(float));
        });
    });
}

// Mass of the pairs that a head keeps both by a column and by an offset; needs neighbouring rows.
double twice(const Work& work, Reader& reader, int head, const Selection& chosen, const Bits& map,
             const std::vector<Lse>& lse) {
    double total = 0;
    const std::int32_t *column = chosen.columns, *end = column + chosen.num_columns;
    for (int region = 0; region < 3; ++region) {
        while (column < end && *column < work.args.borders[region + 1]) {
            const std::int32_t* stop = std::min(end, column + kKeys);
            const int count = int(std::lower_bound(column, stop, work.args.borders[region + 1]) - column);
            const Block& block = reader.gather(column, count);
            for (int at = head * work.strips; at < (head + 1) * work.strips; ++at) {
                const Strip& strip = work.of(region)[at];
                std::uint64_t words[kKeys] = {};
                bool some = false;
                for (int i = 0; i < count; ++i) {
                    const std::int64_t offset = std::int64_t(strip.first) - block.positions[i];  // of the first row
                    words[i] = offset <= -kRows ? 0 : bits_from(map, offset + kRows);
                    some |= words[i] != 0;
                }
                if (some) total += work.engine.mass(reader.scores(strip), strip, lse[at].rows, words);
            }
            column += count;
        }
    }
    return total;
}

// Calls `copy(strip, row of it, place in [G, R])` for every row.
template <class Copy> void each_row(const Work& work, const Copy& copy) {
    for (int i = 0; i < work.group * work.strips; ++i) {
        for (int r = 0; r < kRows && i % work.strips * kRows + r < work.args.num_rows; ++r) {
            copy(i, r, i / work.strips * work.args.num_rows + i % work.strips * kRows + r);
        }
    }
}

template <class Call> int guarded(const Args* args, const Call& call) {
    if (!valid(*args)) return kInvalid;
    try {
        const Work work(*args);
        call(work, std::vector<Lse>(work.group * work.strips));
    } catch (const std::bad_alloc&) { return kNoMemory; }
    return kOk;
}

}  // namespace

// columns, offsets: [G, S]; natural: [G, R].
EXPORT int longreach_estimate_sums(const Args* args, float* columns, float* offsets, float* natural) {
    return guarded(args, [&](const Work& work, std::vector<Lse> lse) {
        stream(work, nullptr, lse, nullptr);
        std::memset(offsets, 0, sizeof(float) * work.group * args->borders[3]);
        sum_up(work, lse, columns, offsets);
        each_row(work, [&](int strip, int r, std::int64_t row) { natural[row] = lse[strip].rows[r] * kLn2; });
    });
}

// chosen, share: [G].
EXPORT int longreach_estimate_kept(const Args* args, const Selection* chosen, double* share) {
    return guarded(args, [&](const Work& work, std::vector<Lse> lse) {
        std::vector<Maps> maps;
        for (int head = 0; head < work.group; ++head) maps.emplace_back(chosen[head], args->borders[3]);
        std::fill_n(share, work.group, 0.0);
        stream(work, &maps, lse, share);
    });
}

// columns, offsets: [G, S] and natural: [G, R] of the same rows; chosen, mass: [G].
EXPORT int longreach_estimate_mass(const Args* args, const float* columns, const float* offsets, const float* natural,
                                   const Selection* chosen, double* mass) {
    return guarded(args, [&](const Work& work, std::vector<Lse> lse) {
        each_row(work, [&](int strip, int r, std::int64_t row) { lse[strip].rows[r] = natural[row] * kLog2e; });
        std::vector<Bits> maps;
        for (int head = 0; head < work.group; ++head) maps.push_back(forward(chosen[head], args->borders[3]));
        parallel(work, work.group, 1, [&](Reader& reader, int head) {
            const Selection& one = chosen[head];
            const float* by_key = columns + head * args->borders[3];
            const float* by_offset = offsets + head * args->borders[3];
            double total = 0;
            for (std::int64_t i = 0; i < one.num_columns; ++i) total += by_key[one.columns[i]];
            for (std::int64_t i = 0; i < one.num_offsets; ++i) {
                for (std::int64_t at = one.offsets[2 * i]; at <= one.offsets[2 * i + 1]; ++at) total += by_offset[at];
            }
            mass[head] = total - twice(work, reader, head, one, maps[head], lse);
        });
    });
}

}  // namespace longreach::estimate
