"""How much attention a selection keeps: of held-out rows, in one pass over the keys, and of the estimate's own rows.

Legend: `C` cells, `H` query heads, `R` sampled rows, `N` room for keys, `W = N // 32` words, `V` room for columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from workers.kernels.triton.sparse.cells import NUM_CELL_FIELDS, NUM_CHUNK_FIELDS, CellTables, TileShape
from workers.kernels.triton.sparse.estimate import SampledQueries, dot_type, load_keys, load_queries, shared_heads
from workers.kernels.triton.sparse.selection import Kept

_CELL_FIELDS, _CHUNK_FIELDS = tl.constexpr(NUM_CELL_FIELDS), tl.constexpr(NUM_CHUNK_FIELDS)
_WINDOW = tl.constexpr(64)  # keys of a tile of held-out rows
_OVERLAP_PROGRAMS = 32  # of a head, at most; each takes every 32nd tile of columns


@triton.jit
def _has_bit(words: tl.tensor, index: tl.tensor, mask: tl.tensor) -> tl.tensor:
    """Return whether bits `index` of `words` are set; False where `mask` is not."""
    return (tl.load(words + (index >> 5), mask=mask, other=0) >> (index & 31)) & 1 != 0


@triton.jit
def _window(words: tl.tensor, first: tl.tensor, num_words: tl.tensor, mask: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """Load bits `first .. first + 63` of every row as two words; bits outside of the words are 0.

    Reading them by rows takes no exchange between threads: the layout of a product's rows is that of the words.
    """
    at, shift = first >> 5, (first & 31).to(tl.uint32)
    one = tl.load(words + at, mask=mask & (at >= 0) & (at < num_words), other=0).to(tl.uint32, bitcast=True)
    two = tl.load(words + at + 1, mask=mask & (at >= -1) & (at + 1 < num_words), other=0).to(tl.uint32, bitcast=True)
    three = tl.load(words + at + 2, mask=mask & (at >= -2) & (at + 2 < num_words), other=0).to(tl.uint32, bitcast=True)
    return (one >> shift) | ((two << 1) << (31 - shift)), (two >> shift) | ((three << 1) << (31 - shift))


@triton.jit(do_not_specialize=["num_cells", "num_items", "num_words"])
def held_out_kernel(
    partial: tl.tensor, positions: tl.tensor, offset_words: tl.tensor, column_words: tl.tensor, queries: tl.tensor,
    scales: tl.tensor, keys: tl.tensor, cells: tl.tensor, chunks: tl.tensor, num_cells: tl.tensor, num_items: tl.tensor,
    key_head: tl.tensor, num_words: tl.tensor,
    HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, SHARED: tl.constexpr,
    DOT: tl.constexpr,
) -> None:  # fmt: skip
    """Sum the attention of up to `SHARED` heads' rows over one chunk of keys, all of it and what is kept.

    Program `(chunk, heads)`. `partial` `[3, chunks, H, R]`: the largest logit (base 2), and both sums relative to it.

    Args:
        positions: `[C, R]` int32, of the rows; -1 for no row.
        offset_words, column_words: `[C, H, W]`.
    """
    SETS: tl.constexpr = (GROUP + SHARED - 1) // SHARED
    item, part = tl.program_id(0) // (HEADS // GROUP * SETS), tl.program_id(0) % (HEADS // GROUP * SETS)
    chunk = chunks + item * _CHUNK_FIELDS
    cell, start, stop, rotation = tl.load(chunk), tl.load(chunk + 1), tl.load(chunk + 2), tl.load(chunk + 3)
    first_row = tl.load(cells + cell * _CELL_FIELDS + 1)
    kv_head = part // SETS
    m = tl.arange(0, SHARED * ROWS)
    of_group = part % SETS * SHARED + m // ROWS
    head, own = kv_head * GROUP + of_group, of_group < GROUP
    q = load_queries(queries, rotation, cell, head, own, num_cells, HEADS, ROWS, DIM, DOT)
    scale = tl.load(scales + cell * ROWS + m % ROWS)
    position = tl.load(positions + cell * ROWS + m % ROWS, mask=own, other=-1)
    of_head = (cell * HEADS + head).to(tl.int64) * num_words
    base = keys + kv_head.to(tl.int64) * key_head + first_row.to(tl.int64) * DIM
    largest = tl.full([SHARED * ROWS], float("-inf"), tl.float32)
    total, kept = tl.zeros([SHARED * ROWS], tl.float32), tl.zeros([SHARED * ROWS], tl.float32)
    n = tl.arange(0, _WINDOW)
    for at in range(start, stop, _WINDOW):
        key = at + n
        near, far = _window(offset_words + of_head, position - at - (_WINDOW - 1), num_words, own)
        first, second = _window(column_words + of_head, at + tl.zeros_like(position), num_words, own)
        logits = tl.dot(q, tl.trans(load_keys(base, key, stop, DIM).to(DOT))) * scale[:, None]
        is_seen = key[None, :] <= tl.minimum(position, stop - 1)[:, None]
        logits = tl.where(is_seen, logits, float("-inf"))
        by_offset = tl.where(n[None, :] < 32, far[:, None], near[:, None]) >> (31 - n % 32)[None, :].to(tl.uint32)
        by_column = tl.where(n[None, :] < 32, first[:, None], second[:, None]) >> (n % 32)[None, :].to(tl.uint32)
        is_kept = ((by_offset | by_column) & 1) != 0
        new = tl.maximum(largest, tl.max(logits, 1))
        finite = tl.where(new == float("-inf"), 0.0, new)
        mass, decay = tl.exp2(logits - finite[:, None]), tl.exp2(largest - finite)
        total = total * decay + tl.sum(mass, 1)
        kept = kept * decay + tl.sum(tl.where(is_kept, mass, 0.0), 1)
        largest = new
    out = partial + (item * HEADS + head) * ROWS + m % ROWS
    tl.store(out, largest, mask=own)
    tl.store(out + num_items * HEADS * ROWS, total, mask=own)
    tl.store(out + 2 * num_items * HEADS * ROWS, kept, mask=own)


@triton.jit(do_not_specialize=["num_items"])
def share_kernel(
    shares: tl.tensor, partial: tl.tensor, positions: tl.tensor, cells: tl.tensor, num_items: tl.tensor,
    HEADS: tl.constexpr, ROWS: tl.constexpr,
) -> None:  # fmt: skip
    """Merge the chunks of one cell and head, program `(cell, head)`: `shares` `[C, H]`, the mean share of the rows."""
    cell, head = tl.program_id(0), tl.program_id(1)
    row = tl.arange(0, ROWS)
    is_row = tl.load(positions + cell * ROWS + row) >= 0
    largest = tl.full([ROWS], float("-inf"), tl.float32)
    total, kept = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
    for item in range(tl.load(cells + cell * _CELL_FIELDS + 3), tl.load(cells + cell * _CELL_FIELDS + 4)):
        at = partial + (item * HEADS + head) * ROWS + row
        one = tl.load(at)
        new = tl.maximum(largest, one)
        finite = tl.where(new == float("-inf"), 0.0, new)
        decay, weight = tl.exp2(largest - finite), tl.exp2(one - finite)
        total = total * decay + tl.load(at + num_items * HEADS * ROWS) * weight
        kept = kept * decay + tl.load(at + 2 * num_items * HEADS * ROWS) * weight
        largest = new
    share = tl.where(is_row, kept / tl.where(is_row, total, 1.0), 0.0)
    tl.store(shares + cell * HEADS + head, tl.sum(share) / tl.sum(is_row.to(tl.float32)))


@triton.jit(do_not_specialize=["num_cells", "num_words", "room"])
def overlap_kernel(
    partial: tl.tensor, offset_words: tl.tensor, columns: tl.tensor, totals: tl.tensor, lse: tl.tensor,
    queries: tl.tensor, scales: tl.tensor, keys: tl.tensor, cells: tl.tensor, done: tl.tensor, num_cells: tl.tensor,
    key_head: tl.tensor, num_words: tl.tensor, room: tl.tensor,
    HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr,
    DOT: tl.constexpr, ADAPTIVE: tl.constexpr, SKIP_COLUMNS: tl.constexpr, SKIP_OFFSETS: tl.constexpr,
) -> None:  # fmt: skip
    """Sum the probabilities of the pairs that a head keeps both by column and by offset: `partial` `[C * H, programs]`.

    Program `(cell and head, part)`. Heads that are `done` `[C * H]` are left out (their sums are 0); likewise pairs
    with a key below `SKIP_COLUMNS` or a distance below `SKIP_OFFSETS`. Unless budgets are `ADAPTIVE`, `done` are the
    numbers of offsets that are kept, and heads that keep all are left out.
    """
    own, cell = tl.program_id(0), tl.program_id(0) // HEADS
    head = own % HEADS + tl.zeros([ROWS], tl.int32)
    fields = cells + cell * _CELL_FIELDS
    seen, first_row = tl.load(fields), tl.load(fields + 1)
    row = tl.arange(0, ROWS)
    position = seen - ROWS + row
    scale, total = tl.load(scales + cell * ROWS + row), tl.load(lse + own * ROWS + row)
    base = keys + (own % HEADS // GROUP).to(tl.int64) * key_head + first_row.to(tl.int64) * DIM
    words = offset_words + own.to(tl.int64) * num_words
    least = 1 if ADAPTIVE else seen
    count = tl.where(tl.load(done + own) >= least, 0, tl.load(totals + own))
    mass = tl.zeros([ROWS, BLOCK], tl.float32)
    for rotation in range(3):
        q = load_queries(queries, rotation, cell, head, row >= 0, num_cells, HEADS, ROWS, DIM, DOT)
        low, high = tl.load(fields + 6 - rotation), tl.load(fields + 7 - rotation)
        low, high = tl.where(rotation == 2, 0, low), tl.where(rotation == 0, seen, high)
        for tile in range(tl.program_id(1) * BLOCK, count, tl.num_programs(1) * BLOCK):
            at = tile + tl.arange(0, BLOCK)
            key = tl.load(columns + own.to(tl.int64) * room + at, mask=at < count, other=-1)
            is_here = (key >= tl.maximum(low, SKIP_COLUMNS)) & (key < high)
            if tl.sum(is_here.to(tl.int32)) > 0:
                k = load_keys(base, tl.where(is_here, key, seen), seen, DIM).to(DOT)
                share = tl.exp2(tl.dot(q, tl.trans(k)) * scale[:, None] - total[:, None])
                distance = position[:, None] - key[None, :]
                is_pair = is_here[None, :] & (distance >= SKIP_OFFSETS)
                mass += tl.where(_has_bit(words, distance, is_pair), share, 0.0)
    tl.store(partial + own * tl.num_programs(1) + tl.program_id(1), tl.sum(mass))


def held_out_shares(
    sample: SampledQueries, positions: torch.Tensor, offsets: Kept, columns: Kept, keys: torch.Tensor,
    tables: CellTables, shape: TileShape,
) -> torch.Tensor:  # fmt: skip
    """Compute the share `[C, H]` float32 of the rows' attention on pairs that a head keeps; the mean over rows.

    Args:
        sample: the rows `positions` `[C, R]` int32, in any order; -1 for no row.
    """
    _, num_cells, heads, rows, dim = sample.queries.shape
    group, num_items = heads // keys.shape[0], len(tables.chunks)
    partial = torch.empty((3, num_items, heads, rows), device=keys.device)
    shares = torch.empty((num_cells, heads), device=keys.device)
    shared, items = shared_heads(shape.shared, heads, group, num_items)
    held_out_kernel[(items,)](
        partial, positions, offsets.words, columns.words, sample.queries, sample.scales, keys, tables.cells,
        tables.chunks, num_cells, num_items, keys.stride(0), offsets.words.shape[2], HEADS=heads, GROUP=group,
        ROWS=rows, DIM=dim, SHARED=shared, DOT=dot_type(keys), num_warps=shape.warps,
    )  # fmt: skip
    share_kernel[(num_cells, heads)](shares, partial, positions, tables.cells, num_items, heads, rows)
    return shares


def overlap(
    sample: SampledQueries, lse: torch.Tensor, offsets: Kept, columns: Kept, done: torch.Tensor | None,
    keys: torch.Tensor, tables: CellTables, shape: TileShape, forced: tuple[int, int] = (0, 0),
) -> torch.Tensor:  # fmt: skip
    """Compute the estimate's mass on pairs that are kept both by column and by offset, in parts `[C, H, n]` float32.

    Args:
        sample, lse: of the estimate.
        done: `[C, H]` int32, 1 for heads to leave out, whose parts are 0; None: those that keep every offset.
        forced: as for `estimate`: pairs that do not count.
    """
    assert columns.indices is not None
    _, num_cells, heads, rows, dim = sample.queries.shape
    programs = min(_OVERLAP_PROGRAMS, -(-columns.indices.shape[2] // shape.block))
    partial = torch.empty((num_cells, heads, programs), device=keys.device)
    overlap_kernel[(num_cells * heads, programs)](
        partial, offsets.words, columns.indices, columns.totals, lse, sample.queries, sample.scales, keys, tables.cells,
        offsets.totals if done is None else done, num_cells, keys.stride(0), offsets.words.shape[2],
        columns.indices.shape[2], HEADS=heads, GROUP=heads // keys.shape[0], ROWS=rows, DIM=dim, BLOCK=shape.block,
        DOT=dot_type(keys), ADAPTIVE=done is not None, SKIP_COLUMNS=forced[0], SKIP_OFFSETS=forced[1], num_warps=4,
    )  # fmt: skip
    return partial
