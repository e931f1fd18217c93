"""Memory of a shard on a GPU beside weights and KV pages: the tensors of its largest step, and what libraries take.

The terms follow the code of a step (workers/model/decoder.py and what it calls) on a GPU from Hopper on, where experts
go through PyTorch's grouped product and dense attention through a library. Traced steps of a real shape stay within
10 % below them (tests/unit/workers/bench/test_trace.py), so a change of what a step keeps is a change here.

Legend: `T` tokens of the step, `M` hidden size, `H` and `K` query and KV heads of the shard, `D` head dim, `S` keys
that the last row sees, `k` experts a token uses, `I` their intermediate size, `C` sparse cells of the step.
"""

from __future__ import annotations

from dataclasses import dataclass

from protos.model.spec import ModelSpec
from protos.stage.messages import ShardSpec

WIDTH = 2  # bytes of an activation: kernels for GPUs compute in bfloat16
# cuBLAS and cuBLASLt keep one workspace each; 32 MiB is what NVIDIA recommends on Hopper (cublasSetWorkspace) and
# PyTorch allocates there.
LIBRARY_BYTES = 2 * (32 << 20)
# Captured decode steps: their memory pool and the driver's part. vLLM's logs say 0.26 to 0.46 GiB for models of this
# kind; nothing was measured here.
GRAPH_BYTES = 512 << 20
FRAGMENTS = 1.1  # what PyTorch's allocator holds of a step's tensors and cannot give to others; assumed
_TABLES_BYTES = 1 << 20  # page tables, and those of sparse cells
_TILES, _BLOCK = (128, 64), 64  # rows of tiles, of which heads choose, and keys of a block of the attention kernels
_COLUMN_BYTES, _ENTRY_BYTES = 1 << 30, 512 << 20  # what they take at once for columns and for entries, at most
_SAMPLED_ROWS = 64 + 32  # of a cell: of the estimate, and held out
_CHUNK = 4096  # keys that one program estimates
_SUMS_BYTES = 2 * 132 * 2 * 64 * 3 * 64 * 2  # tiles that programs of the estimate keep, on 132 multiprocessors
_LINK_STEPS = 4  # tensors that a link from GPU to GPU holds at either end, at most (workers/transport/device.py)
_SAMPLING_BYTES = 56  # of a token of the vocabulary, while one row is sampled in float64
# rows whose log-probabilities are asked for, at a time; of a token of the vocabulary in each: float32, twice float64
_SCORED_ROWS, _SCORED_BYTES = 64, 4 + 2 * 8


@dataclass(frozen=True, slots=True)
class GpuStep:
    """The size of a step: its tokens, the keys that its last row sees, and the rows that are sampled.

    `cell` are the tokens of a sparse cell, 0 where attention is dense; `columns` the most that a head keeps.
    """

    tokens: int
    context: int
    sampled: int = 1
    cell: int = 0
    columns: int = 0


def largest_steps(spec: ModelSpec, tokens: int, context: int, sampled: int) -> list[GpuStep]:
    """Return the steps of `tokens` tokens among which the one with most memory is: dense, and sparse where there is."""
    context = max(context, 1)
    steps = [GpuStep(min(tokens, context), context, sampled)]
    if spec.sparse is not None and context > spec.sparse.threshold:
        steps.append(GpuStep(tokens, context, sampled, spec.sparse.cell, most_columns(spec, context)))
    return steps


def most_columns(spec: ModelSpec, context: int) -> int:
    """Return the most columns that a head keeps of a context."""
    assert spec.sparse is not None
    sparse = spec.sparse
    if sparse.is_adaptive:
        return context
    patterns = [head for layer in sparse.patterns or () for head in layer if head is not None]
    budgets = patterns or ([sparse.uniform] if sparse.uniform is not None else [])
    return min(context, max((budget.n_vertical for budget in budgets), default=0))


def gpu_scratch_bytes(spec: ModelSpec, shard: ShardSpec, tokens: int, context: int, sampled: int) -> int:
    """Return the bytes that a shard on a GPU needs beside weights and KV for steps of at most so many tokens."""
    most = max(step_bytes(spec, shard, step) for step in largest_steps(spec, tokens, context, sampled))
    return int(FRAGMENTS * most) + link_bytes(spec, shard, tokens) + LIBRARY_BYTES + GRAPH_BYTES


def link_bytes(spec: ModelSpec, shard: ShardSpec, tokens: int) -> int:
    """Return the bytes of hidden states that came before their step, or have not left after it.

    They are those of the steps in flight but the one that is computed: in prefill as many as there are stages, and two
    at least.
    """
    links = (not shard.is_first) + (not shard.is_last)
    steps = min(max(2, shard.num_stages) - 1, _LINK_STEPS * links)
    return steps * tokens * WIDTH * spec.hidden_size


def rehearsed_scratch_bytes(peak: int) -> int:
    """Return the same from the peak of a step that was rehearsed, as PyTorch's allocator counts it, libraries included.

    The libraries are told of apart, as those that load their own memory do it in the rehearsal, before memory is asked.
    """
    return int(FRAGMENTS * peak) + GRAPH_BYTES


def step_bytes(spec: ModelSpec, shard: ShardSpec, step: GpuStep) -> int:
    """Return the bytes of all tensors of a step at its fullest moment: in attention, in the MLP or at the end."""
    hidden, dim = spec.hidden_size, spec.head_dim
    rotations = _regions(spec, step)
    # all along: the step's input, positions and slots, and cos and sin of every rotation but the constant one
    kept = WIDTH * hidden + 2 * 8 + min(rotations, 2) * 4 * dim
    stream = 2 * WIDTH * hidden  # the residual stream, and its norm
    heads, kv_heads = shard.heads.size, shard.kv_heads.size
    row = WIDTH * dim * (heads + 2 * kv_heads + rotations * heads + heads)  # heads, rotated queries, output
    attention = step.tokens * (stream + row) + _attention_bytes(spec, shard, step)
    mlp = step.tokens * (stream + WIDTH * hidden + _mlp_row(spec, shard))  # its output beside
    head = 0
    if shard.is_last:
        vocab = shard.vocab.size
        head = step.tokens * 2 * WIDTH * hidden
        sampled = max(step.sampled * vocab * (WIDTH + 4), step.sampled * vocab * 4 + vocab * _SAMPLING_BYTES)
        head += max(sampled, min(step.tokens, _SCORED_ROWS) * vocab * _SCORED_BYTES)
    return _TABLES_BYTES + step.tokens * kept + max(attention, mlp, head)


def _regions(spec: ModelSpec, step: GpuStep) -> int:
    """Return how many regions of keys the rows of a step see, and so how many rotations queries have."""
    distance = spec.chunk_distance
    return min(3, -(-step.context // distance)) if distance else 1


def _mlp_row(spec: ModelSpec, shard: ShardSpec) -> int:
    """Return the bytes of a row while experts, or the dense MLP, are computed."""
    widest = 3 * WIDTH * shard.intermediate.size  # gate and up, and their product
    if spec.num_experts:
        chosen = spec.num_experts_per_tok
        routed = chosen * (8 + 4 + 2 * 4 + 4)  # ids and weights, the sorted entries, their tokens
        gathered = chosen * WIDTH * (spec.hidden_size + 2 * spec.moe_intermediate_size)  # inputs, gate and up
        widest = max(widest, routed + gathered)
    return widest


def _attention_bytes(spec: ModelSpec, shard: ShardSpec, step: GpuStep) -> int:
    """Return what attention takes beside the rows' own tensors: staged keys, partial results or selections."""
    heads, dim = shard.heads.size, spec.head_dim
    staged = 4 * dim * shard.kv_heads.size * (-(-step.context // _TILES[0]) * _TILES[0] + _TILES[0])
    if step.cell:
        return staged + _selection_bytes(spec, shard, step)
    parts = _regions(spec, step) + (step.context > step.tokens)  # the rows' own keys apart from those before
    merged = parts + 1 if parts > 1 else 1
    return staged + step.tokens * heads * (merged * WIDTH * dim + 4 * parts)


def _selection_bytes(spec: ModelSpec, shard: ShardSpec, step: GpuStep) -> int:
    """Return what sparse cells take: columns, their sums and lists, and the entries of one cell."""
    heads, dim, context = shard.heads.size, spec.head_dim, step.context
    cells = -(-step.tokens // step.cell)
    room = -(-step.columns // _BLOCK) * _BLOCK
    columns = 4 * dim * room * min(heads, max(1, _COLUMN_BYTES // max(1, 4 * dim * room)))
    kept = cells * heads * (2 * context // 8 + 4 * step.columns)  # bits of columns and offsets, indices of columns
    queries = 3 * cells * heads * _SAMPLED_ROWS * dim * WIDTH
    runs = [context // (tile + 1) for tile in _TILES]
    lists = cells * heads * 4 * sum(2 * (context // _BLOCK + own) + context // 32 + 3 * own for own in runs)
    sums = cells * (8 * heads * context + 4 * heads * 64 * -(-context // _CHUNK)) + _SUMS_BYTES
    # at the small tile; a group of heads after the other, while that of the last one is still held
    most = 6 * (context + _TILES[1]) // (10 * _BLOCK) + 1
    entries = heads * (step.cell // _TILES[1]) * 12 * (min(most, context // _BLOCK + runs[1]) + room // _BLOCK)
    return columns + kept + queries + max(sums, lists + 2 * min(entries, _ENTRY_BYTES))
