// Entry of the attention kernel; see attention.h.
#include "attention/attention.h"

#include <algorithm>
#include <cmath>
#include <new>
#include <vector>

#include "attention/attention_keys.h"
#include "cpu.h"
#include "memory.h"

namespace longreach::attention {
namespace {

constexpr int kFewItems = 64;    // with fewer, keys are split into parts so that every thread has work
constexpr int kPartKeys = 2048;  // minimum of a part
constexpr std::size_t kKeptBytes = 4 << 20;  // of a thread between calls

thread_local Scratch engine_memory, part_memory;

struct Work {
    std::vector<Item> items;
    int max_columns = 0;
    int parts = 1;  // of every tile; `items` has them one after the other
};

bool valid_selection(const std::int32_t* offsets, std::int64_t n, const std::int32_t* columns, std::int64_t m) {
    if (n < 0 || m < 0 || (n > 0 && offsets == nullptr) || (m > 0 && columns == nullptr)) return false;
    bool good = (n == 0 || offsets[0] >= 0) && (m == 0 || columns[0] >= 0);
    for (std::int64_t i = 0; i < n; ++i) {
        good &= offsets[2 * i] <= offsets[2 * i + 1] && (i == 0 || offsets[2 * i] > offsets[2 * i - 1]);
    }
    for (std::int64_t i = 1; i < m; ++i) good &= columns[i] > columns[i - 1];
    return good;
}

bool valid(const Args& a) {
    if (a.length < 1 || a.start < 0 || a.start + a.length >= kNever || a.distance < 0 || a.tile < 1) return false;
    if (a.dim < 1 || a.dim > kMaxDim || a.kv_heads < 1 || a.heads < 1 || a.heads % a.kv_heads) return false;
    if (a.q_type != kFloat32 && a.q_type != kBfloat16) return false;
    if (a.kv_type < kFloat32 || a.kv_type > kInt8 || a.threads < 1 || a.path < kPortable) return false;
    if (!a.out || !a.keys || !a.values || !a.pages || !a.scales || a.page_size < 1) return false;
    if (a.kv_type == kInt8 && (!a.key_scales || !a.value_scales)) return false;
    const std::int64_t stop = a.start + a.length;
    if (stop > a.num_pages * a.page_size) return false;
    bool good = true;
    for (std::int64_t i = 0; i * a.page_size < stop; ++i) {
        good &= a.pages[i] >= 0 && a.pages[i] + std::min(a.page_size, stop - i * a.page_size) <= a.slots;
    }
    const std::int64_t chunk = a.distance ? a.start / a.distance : 0;
    if (a.distance && (stop - 1) / a.distance != chunk) return false;
    if (!a.q[0] || (chunk >= 1 && !a.q[1]) || (chunk >= 2 && !a.q[2])) return false;
    if (a.offsets != nullptr) {
        for (std::int64_t h = 0; h < a.heads; ++h) {
            good &= valid_selection(a.offsets[h], a.num_offsets[h], a.columns[h], a.num_columns[h]);
        }
    }
    return good;
}

int choose_path(const Args& a) {
    const int path = std::min(a.path, best_path());
    if (path >= kAvx512Bf16 && (a.q_type != kBfloat16 || a.kv_type == kFloat32 || a.dim % 32)) return kAvx512;
    return path;
}

#if defined(__x86_64__)
constexpr Make* kMakes[] = {make_portable, make_avx2, make_avx512, make_bf16, make_amx};
#else
constexpr Make* kMakes[] = {make_portable};
#endif

Work plan_work(const Args& a) {
    Work work;
    const bool dense = a.offsets == nullptr;
    const int group = dense ? int(a.heads / a.kv_heads) : 1;
    std::int64_t rows = a.tile;
    if (dense) {  // keys are read once for many columns; results of 512 x 128 fit L2
        rows = std::max<std::int64_t>(1, std::min<std::int64_t>(512, 65536 / a.dim) / group);
        if (rows > 16) rows = rows / 16 * 16;
    }
    rows = std::min(rows, a.length);
    const std::int64_t tiles = (a.length + rows - 1) / rows, heads = a.heads / group;
    work.max_columns = int(rows * group);
    std::int64_t step = a.start + a.length;
    const std::int64_t few = work.max_columns > 64 ? kFewItems / 4 : kFewItems;
    if (dense && tiles * heads < few) {
        const std::int64_t wanted = std::min((step + kPartKeys - 1) / kPartKeys, few / (tiles * heads));
        step = (step + wanted * kBlock - 1) / (wanted * kBlock) * kBlock;
        work.parts = int((a.start + a.length + step - 1) / step);
    }
    for (std::int64_t h = 0; h < heads; ++h) {
        for (std::int64_t tile = tiles - 1; tile >= 0; --tile) {
            const std::int64_t row = tile * rows, last = std::min(row + rows, a.length);
            for (int part = 0; part < work.parts; ++part) {
                const auto stop = std::min(a.start + last, (part + 1) * step);
                work.items.push_back({int(h * group), group, int(h * group / (a.heads / a.kv_heads)), int(row),
                                      int(last - row), int(part * step), int(std::max(part * step, stop))});
            }
        }
    }
    if (dense && work.parts == 1) {  // the longest first
        std::stable_sort(work.items.begin(), work.items.end(),
                         [](const Item& x, const Item& y) { return x.first_row > y.first_row; });
    }
    return work;
}

// One column of a tile: the parts' sums under their common maximum.
void join(const Args& a, const Item& item, int column, const float* parts, std::size_t stride, int count) {
    const std::int64_t dim = a.dim;
    float highest = kUnseen, sum = 0.0f, values[kMaxDim] = {};
    for (int i = 0; i < count; ++i) highest = std::max(highest, parts[i * stride + dim]);
    for (int i = 0; i < count; ++i, parts += stride) {
        const float factor = std::exp2(parts[dim] - highest);
        sum += factor * parts[dim + 1];
        for (std::int64_t d = 0; d < dim; ++d) values[d] += factor * parts[d];
    }
    write_row(a, item.out(a, column), values, 1, sum);
}

int attend(const Args& a) {
    Make& make = *kMakes[choose_path(a)];
    const Work work = plan_work(a);
    const int items = int(work.items.size()), columns = work.max_columns;
    Arena counted{nullptr};
    make(a, columns, counted);
    KeyStream(a, counted);
    const std::size_t stride = columns * std::size_t(a.dim + 2);
    float* parts = nullptr;
    if (work.parts > 1) {
        parts = reinterpret_cast<float*>(part_memory.get(items * stride * sizeof(float)));
        if (parts == nullptr) return kNoMemory;
    }
    int status = kOk;
#pragma omp parallel num_threads(a.threads)
    {
        Arena arena{engine_memory.get(counted.used)};
        Engine* engine = arena.base == nullptr ? nullptr : make(a, columns, arena);
        KeyStream stream(a, arena);
#pragma omp for schedule(dynamic, 1)
        for (int i = 0; i < items; ++i) {
            const Item& item = work.items[i];
            try {
                if (engine == nullptr) throw std::bad_alloc();
                engine->begin(item);
                stream.run(item, *engine);
                parts == nullptr ? engine->finish() : engine->finish_part(parts + i * stride);
            } catch (const std::bad_alloc&) {
#pragma omp atomic write
                status = kNoMemory;
            }
        }
        if (engine != nullptr) engine->~Engine();
        if (parts != nullptr) {
            const int tiles = items / work.parts;
#pragma omp for schedule(static)
            for (int i = 0; i < tiles * columns; ++i) {
                const Item& item = work.items[i / columns * work.parts];
                const float* first = parts + std::size_t(i / columns * work.parts) * stride;
                const int column = i % columns;
                if (column >= item.columns()) continue;
                join(a, item, column, first + column * (a.dim + 2), stride, work.parts);
            }
        }
        engine_memory.free_above(kKeptBytes);
    }
    part_memory.free_above(kKeptBytes);
    return status;
}

}  // namespace

EXPORT int longreach_attend(const Args* args) try {
    if (args->visited != nullptr) std::fill(args->visited, args->visited + args->heads, 0);
    return valid(*args) ? attend(*args) : kInvalid;
} catch (const std::bad_alloc&) { return kNoMemory; }

}  // namespace longreach::attention
