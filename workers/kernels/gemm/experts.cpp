// Mixture of experts over packed weights: tokens sorted by expert, gated MLP of each expert on its rows, weighted sum.
//
// Legend: T tokens, M hidden size, I intermediate, k experts per token; a choice is one of the T * k (token, expert).
#include "gemm/calls.h"

#include <algorithm>
#include <atomic>
#include <new>
#include <vector>

#include "memory.h"

namespace longreach::gemm {
namespace {

// Rows of one expert: choices [start, start + rows) of the sorted order.
struct Task {
    long expert, start, rows, place;  // `place`: its first row among the packed rows of all tasks
};

struct Sorted {
    std::vector<std::int32_t> token, choice;  // of every local choice, by expert, then by token
    std::vector<float> weight;
    std::vector<Task> tasks;
    long places = 0, max_task_rows = 0;  // packed rows of all tasks, and of the largest one
};

Sorted sort_choices(const ExpertsCall& call) {
    const long choices = call.tokens * call.top_k;
    std::vector<long> next(call.experts + 1, 0);
    const auto local = [&](long choice) { return call.chosen[choice] - call.first; };
    for (long choice = 0; choice < choices; ++choice) {
        if (local(choice) >= 0 && local(choice) < call.experts) ++next[local(choice) + 1];
    }
    Sorted sorted;
    const long max_rows = std::max(kBlock, kTaskBytes / long(sizeof(bf16)) / std::max(call.hidden_size, call.width));
    for (long expert = 0, start = 0; expert < call.experts; ++expert) {
        const long rows = next[expert + 1], parts = (rows + max_rows - 1) / max_rows;
        const long step = parts == 0 ? 0 : round_up((rows + parts - 1) / parts, kBlock);
        for (long row = 0; row < rows; row += step) {
            const long count = std::min(step, rows - row);
            sorted.tasks.push_back({expert, start + row, count, sorted.places});
            sorted.places += round_up(count, kStrip);
            sorted.max_task_rows = std::max(sorted.max_task_rows, count);
        }
        next[expert + 1] = start += rows;
    }
    const long total = next[call.experts];
    sorted.token.resize(total);
    sorted.choice.resize(total);
    sorted.weight.resize(total);
    for (long choice = 0; choice < choices; ++choice) {
        if (local(choice) < 0 || local(choice) >= call.experts) continue;
        const long at = next[local(choice)]++;
        sorted.token[at] = std::int32_t(choice / call.top_k);
        sorted.choice[at] = std::int32_t(choice);
        sorted.weight[at] = call.weights[choice];
    }
    return sorted;
}

// A part of the panels, one strip of gate and one of up each: silu(x gate) * (x up), packed for the next product.
void gate_and_up(const Engine& use, const ExpertsCall& call, const Task& task, const TaskMemory& memory, bf16* hidden,
                 long part, long parts) {
    const long m = call.hidden_size, width = call.width, strips = 2 * width / kStrip;
    const Panels panels{
        call.gate_up.matrix(task.expert, 2 * width, m), strips, m / kDepth, part, parts, call.tokens <= kStrip};
    const auto finish = [&](long panel, const float* sums, long row, long count) {
        use.swiglu(sums, count, hidden + row * width + panel / 2 * kTile + panel % 2 * kStrip, kStrip * width);
    };
    run_panels(call.path, memory, memory.c, memory.a, task.rows, panels, finish);
}

// A part of the panels, two strips of M each: weight * (hidden down), to the rows of the choices.
void weighted_down(const Engine& use, const ExpertsCall& call, const Sorted& sorted, const Task& task,
                   const TaskMemory& memory, const bf16* hidden, long part, long parts) {
    const long m = call.hidden_size, width = call.width;
    const bool stream = streams(call.rows, call.tokens * call.top_k, m);
    const Panels panels{
        call.down.matrix(task.expert, m, width), m / kStrip, width / kDepth, part, parts, call.tokens <= kStrip};
    const auto finish = [&](long panel, const float* sums, long row, long count) {
        const long at = task.start + row;
        bf16* out = call.rows + panel * kBlock;
        use.store(sums, count, kBlock, {out, m, &sorted.choice[at], &sorted.weight[at], nullptr, stream});
    };
    run_panels(call.path, memory, memory.c, hidden, task.rows, panels, finish);
    std::atomic_thread_fence(std::memory_order_seq_cst);  // streamed lines
}

// Sum over the local choices of a token, in their order; zeros where there is none.
void combine(const Engine& use, const ExpertsCall& call, long token) {
    const bf16* rows[kMaxTopK];
    long count = 0;
    for (long choice = token * call.top_k; choice < (token + 1) * call.top_k; ++choice) {
        const long expert = call.chosen[choice] - call.first;
        if (expert >= 0 && expert < call.experts) rows[count++] = call.rows + choice * call.hidden_size;
    }
    use.sum(call.out + token * call.hidden_size, rows, count, call.hidden_size);
}

}  // namespace

// The weighted sum of the local experts; a `Status`.
EXPORT int longreach_experts(const ExpertsCall* arguments) try {
    const ExpertsCall& call = *arguments;
    const Engine& use = engine(call.path);
    const Sorted sorted = sort_choices(call);
    const long tasks = long(sorted.tasks.size()), wanted = kTasksPerThread * call.threads;
    // with few tasks their columns are divided among threads too, and hidden rows are exchanged between the products
    const long parts =
        tasks == 0 || tasks >= wanted ? 1 : std::min((wanted + tasks - 1) / tasks, call.hidden_size / kBlock);
    const long zeros =
        std::max(groups_with_zeros(call.gate_up, call.hidden_size), groups_with_zeros(call.down, call.width));
    Lines exchange(parts == 1 ? 0 : lines_of(sorted.places * call.width * sizeof(bf16)));
    bf16* shared = reinterpret_cast<bf16*>(exchange.data());
    std::atomic<bool> failed{false};
    const auto each_part = [&](const auto& compute) {
#pragma omp for schedule(dynamic)
        for (long i = 0; i < tasks * parts; ++i) {
            const TaskMemory memory(sorted.max_task_rows, call.hidden_size, call.width, zeros);
            if (memory.a == nullptr)
                failed = true;
            else
                compute(sorted.tasks[i / parts], i % parts, memory);
        }
    };
#pragma omp parallel num_threads(call.threads)
    {
        each_part([&](const Task& task, long part, const TaskMemory& memory) {
            bf16* hidden = parts == 1 ? memory.hidden : shared + task.place * call.width;
            pack_rows(memory.a, call.x, call.stride, &sorted.token[task.start], task.rows, call.hidden_size);
            gate_and_up(use, call, task, memory, hidden, part, parts);
            if (parts == 1) weighted_down(use, call, sorted, task, memory, hidden, part, parts);
        });
        if (parts > 1) {
            each_part([&](const Task& task, long part, const TaskMemory& memory) {
                bf16* hidden = shared + task.place * call.width;
                weighted_down(use, call, sorted, task, memory, hidden, part, parts);
            });
        }
#pragma omp for schedule(static)
        for (long token = 0; token < call.tokens; ++token) combine(use, call, token);
    }
    return failed ? kNoMemory : kOk;
} catch (const std::bad_alloc&) { return kNoMemory; }

}  // namespace longreach::gemm
