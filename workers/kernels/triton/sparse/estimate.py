"""The estimate of sparse cells on a GPU: softmax of each cell's last rows over all keys, summed by key and by distance.

Two passes over the staged keys, each one launch for all cells and heads of a step. The first computes the log-sum-exp
of every row by chunks of keys, which are then merged. The second computes the probabilities again: with keys along the
rows of a tile, a sum over query rows stays inside a thread. For sums along diagonals a program keeps its last three
tiles in global memory (they stay in the L2 cache) and reads them back shifted by one key a row; every diagonal is
summed by one program, in the order of rows, so that results do not depend on the grid.

Legend: `C` cells of a step, `H` query heads, `K` KV heads, `G = H // K`, `R` sampled rows, `S` keys a cell sees (at
most `N`), `D` head dim, `P` query heads of a KV head that share a tile of keys.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from workers.kernels.triton.layer.rows import dot_type as dot_type_of
from workers.kernels.triton.sparse.cells import NUM_CELL_FIELDS, NUM_CHUNK_FIELDS, CellTables, TileShape

SLOTS = tl.constexpr(3)  # tiles of probabilities that a program keeps: two are read while one is written
_FP16_SCALE = tl.constexpr(32768.0)  # probabilities down to 2e-9 keep 11 bits in float16
_CELL_FIELDS, _CHUNK_FIELDS = tl.constexpr(NUM_CELL_FIELDS), tl.constexpr(NUM_CHUNK_FIELDS)


@triton.jit
def load_queries(
    queries: tl.tensor, rotation: tl.tensor, cell: tl.tensor, head: tl.tensor, own: tl.tensor, num_cells: tl.tensor,
    HEADS: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, DOT: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Load `[P * R, D]`: rows of the heads `head` `[P * R]`, 0 where `own` is not set."""
    m, dim = tl.arange(0, head.shape[0]), tl.arange(0, DIM)
    at = ((rotation * num_cells + cell) * HEADS + head) * ROWS + m % ROWS
    return tl.load(queries + at[:, None].to(tl.int64) * DIM + dim[None, :], mask=own[:, None], other=0.0).to(DOT)


@triton.jit(do_not_specialize=["num_cells"])
def lse_kernel(
    partial: tl.tensor, queries: tl.tensor, scales: tl.tensor, keys: tl.tensor, cells: tl.tensor, chunks: tl.tensor,
    num_cells: tl.tensor, key_head: tl.tensor,
    HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, SHARED: tl.constexpr, BLOCK:
    tl.constexpr, DOT: tl.constexpr,
) -> None:  # fmt: skip
    """Compute the log-sum-exp (base 2) of the rows of up to `SHARED` heads over one chunk of keys.

    Program `(chunk, heads)`; `partial` `[chunks, H, R]`. Rows are the last of their cell, the last one at `R - 1`.
    """
    SETS: tl.constexpr = (GROUP + SHARED - 1) // SHARED
    item, part = tl.program_id(0) // (HEADS // GROUP * SETS), tl.program_id(0) % (HEADS // GROUP * SETS)
    chunk = chunks + item * _CHUNK_FIELDS
    cell, start, stop, rotation = tl.load(chunk), tl.load(chunk + 1), tl.load(chunk + 2), tl.load(chunk + 3)
    seen, first_row = tl.load(cells + cell * _CELL_FIELDS), tl.load(cells + cell * _CELL_FIELDS + 1)
    kv_head = part // SETS
    m = tl.arange(0, SHARED * ROWS)
    of_group = part % SETS * SHARED + m // ROWS
    head, own = kv_head * GROUP + of_group, of_group < GROUP
    q = load_queries(queries, rotation, cell, head, own, num_cells, HEADS, ROWS, DIM, DOT)
    scale = tl.load(scales + cell * ROWS + m % ROWS)
    limit = tl.minimum(seen - ROWS + m % ROWS, stop - 1)  # the last key of the chunk that the row sees
    n = tl.arange(0, BLOCK)
    base = keys + kv_head.to(tl.int64) * key_head + first_row.to(tl.int64) * DIM
    largest = tl.full([SHARED * ROWS], float("-inf"), tl.float32)
    total = tl.zeros([SHARED * ROWS], tl.float32)
    for at in range(start, stop, BLOCK):
        key = at + n
        logits = tl.dot(q, tl.trans(load_keys(base, key, stop, DIM).to(DOT))) * scale[:, None]
        logits = tl.where(key[None, :] <= limit[:, None], logits, float("-inf"))
        new = tl.maximum(largest, tl.max(logits, 1))
        finite = tl.where(new == float("-inf"), 0.0, new)
        total = total * tl.exp2(largest - finite) + tl.sum(tl.exp2(logits - finite[:, None]), 1)
        largest = new
    tl.store(partial + (item * HEADS + head) * ROWS + m % ROWS, largest + tl.log2(total), mask=own)


@triton.jit
def merge_kernel(lse: tl.tensor, partial: tl.tensor, cells: tl.tensor, HEADS: tl.constexpr, ROWS: tl.constexpr) -> None:
    """Merge the chunks of one cell and head, program `(cell, head)`: `lse` `[C, H, R]`, plus infinity for no row."""
    cell, head = tl.program_id(0), tl.program_id(1)
    row = tl.arange(0, ROWS)
    fields = cells + cell * _CELL_FIELDS
    num_rows, first, last = tl.load(fields + 2), tl.load(fields + 3), tl.load(fields + 4)
    largest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for item in range(first, last):
        one = tl.load(partial + (item * HEADS + head) * ROWS + row)
        new = tl.maximum(largest, one)
        finite = tl.where(new == float("-inf"), 0.0, new)
        total = total * tl.exp2(largest - finite) + tl.exp2(one - finite)
        largest = new
    merged = tl.where(row >= ROWS - num_rows, largest + tl.log2(total), float("inf"))
    tl.store(lse + (cell * HEADS + head) * ROWS + row, merged)


@triton.jit
def load_keys(base: tl.tensor, key: tl.tensor, stop: tl.tensor, DIM: tl.constexpr) -> tl.tensor:
    """Load keys `[keys, D]`, 0 from `stop` on."""
    at = base + key[:, None].to(tl.int64) * DIM + tl.arange(0, DIM)[None, :]
    return tl.load(at, mask=key[:, None] < stop, other=0.0)


@triton.jit
def _add_diagonals(
    offsets: tl.tensor, own: tl.tensor, slot: tl.tensor, before: tl.tensor, key: tl.tensor, seen: tl.tensor, stop:
    tl.tensor, first_head: tl.tensor, num_heads: tl.tensor, width: tl.tensor,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, SHARED: tl.constexpr, SKIP: tl.constexpr,
) -> None:  # fmt: skip
    """Sum the diagonals whose last row meets one of the keys `key`, from the tiles `before` and `slot` of `own`."""
    row, n = tl.arange(0, ROWS), tl.arange(0, BLOCK)
    back = n[None, :] - (ROWS - 1 - row[:, None])  # a row before the last meets an earlier key
    inside = tl.where(back >= 0, slot * BLOCK + back, before * BLOCK + BLOCK + back)
    exists = key[None, :] - n[None, :] + back >= 0
    distance = seen - 1 - key
    for one in range(SHARED):
        at = own + (one * ROWS + row[:, None]) * (SLOTS * BLOCK) + inside
        mass = tl.sum(tl.load(at, mask=exists, other=0.0).to(tl.float32), 0) * (1 / _FP16_SCALE)
        mass = tl.where(distance >= SKIP, mass, 0.0)
        is_kept = (key < stop) & (first_head + one < num_heads)
        tl.store(offsets + one * width + distance, mass, mask=is_kept)


@triton.jit(do_not_specialize=["num_items", "num_cells"])
def sums_kernel(
    columns: tl.tensor, offsets: tl.tensor, scratch: tl.tensor, lse: tl.tensor, queries: tl.tensor, scales:
    tl.tensor, keys: tl.tensor, cells: tl.tensor, chunks: tl.tensor, num_items: tl.tensor, num_cells: tl.tensor,
    key_head: tl.tensor, width: tl.tensor,
    HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, SHARED: tl.constexpr, BLOCK:
    tl.constexpr, DOT: tl.constexpr, SKIP_COLUMNS: tl.constexpr, SKIP_OFFSETS: tl.constexpr,
) -> None:  # fmt: skip
    """Sum probabilities by key and by distance: `columns` and `offsets` `[C, H, width]`, each value written once.

    Programs take items `(chunk, heads)` in turn. A chunk begins with the keys before it, whose probabilities belong to
    diagonals that end in it. Pairs with a key below `SKIP_COLUMNS` or a distance below `SKIP_OFFSETS` count in neither.

    Args:
        scratch: float16, `P * R * 3 * BLOCK` values a program.
        lse: `[C, H, R]` of `merge_kernel`.
    """
    SETS: tl.constexpr = (GROUP + SHARED - 1) // SHARED
    n, m = tl.arange(0, BLOCK), tl.arange(0, SHARED * ROWS)
    row = m % ROWS
    own = scratch + tl.program_id(0).to(tl.int64) * (SHARED * ROWS * SLOTS * BLOCK)
    slot = 0
    for step in range(tl.cdiv(num_items - tl.program_id(0), tl.num_programs(0))):
        item = tl.program_id(0) + step * tl.num_programs(0)
        chunk = chunks + item // (HEADS // GROUP * SETS) * _CHUNK_FIELDS
        cell, start, stop = tl.load(chunk), tl.load(chunk + 1), tl.load(chunk + 2)
        seen, first_row = tl.load(cells + cell * _CELL_FIELDS), tl.load(cells + cell * _CELL_FIELDS + 1)
        kv_head, part = item // SETS % (HEADS // GROUP), item % SETS
        of_group = part * SHARED + m // ROWS
        head, is_head = kv_head * GROUP + of_group, of_group < GROUP
        first = (cell * HEADS + kv_head * GROUP + part * SHARED).to(tl.int64) * width
        scale = tl.load(scales + cell * ROWS + row)
        total = tl.load(lse + (cell * HEADS + head) * ROWS + row, mask=is_head, other=float("inf"))
        position = seen - ROWS + row - SKIP_OFFSETS  # the last key that counts
        base = keys + kv_head.to(tl.int64) * key_head + first_row.to(tl.int64) * DIM
        for turn in range(2):  # the keys before the chunk, then its own
            q = load_queries(queries, tl.load(chunk + 4 - turn), cell, head, is_head, num_cells, HEADS, ROWS, DIM, DOT)
            low, high = tl.where(turn == 0, tl.maximum(start - BLOCK, 0), start), tl.where(turn == 0, start, stop)
            k = load_keys(base, low + n, high, DIM)
            for at in range(low, high, BLOCK):
                before, slot = slot, (slot + 1) % SLOTS
                key = at + n
                mass = tl.exp2(tl.dot(k.to(DOT), tl.trans(q)) * scale[None, :] - total[None, :])
                is_counted = (key < high) & (key >= SKIP_COLUMNS)
                mass = tl.where((key[:, None] <= position[None, :]) & is_counted[:, None], mass, 0.0)
                k = load_keys(base, key + BLOCK, high, DIM)  # of the next turn: the barrier keeps Triton from it
                put = own + m[None, :] * (SLOTS * BLOCK) + slot * BLOCK + n[:, None]
                tl.store(put, (mass * _FP16_SCALE).to(tl.float16))
                tl.debug_barrier()  # between its threads; a slot is written again two barriers after it was read
                if turn == 1:
                    by_head = tl.sum(tl.reshape(mass, (BLOCK, SHARED, ROWS)), 2)
                    one = tl.arange(0, SHARED)
                    at_column = columns + first + one[None, :] * width + key[:, None]
                    tl.store(at_column, by_head, mask=(key[:, None] < stop) & (part * SHARED + one[None, :] < GROUP))
                    _add_diagonals(
                        offsets + first, own, slot, before, key, seen, stop, part * SHARED, GROUP, width,
                        ROWS, BLOCK, SHARED, SKIP_OFFSETS,
                    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class SampledQueries:
    """Sampled rows of all cells: queries `[3, C, H, R, D]` by rotation, and factors of their logits `[C, R]` float32.

    `R` is a power of two from 16 on; places without a row have finite values. The factors are for powers of two: those
    for natural logits times log2(e).
    """

    queries: torch.Tensor
    scales: torch.Tensor


@dataclass(frozen=True, slots=True)
class DeviceSums:
    """Sums over the sampled rows `[C, H, N]` by key position and by distance, and log-sum-exps `[C, H, R]` (base 2).

    Values from the end of a cell on are 0.
    """

    columns: torch.Tensor
    offsets: torch.Tensor
    lse: torch.Tensor


def estimate(
    sample: SampledQueries, keys: torch.Tensor, tables: CellTables, shape: TileShape, programs: int,
    forced: tuple[int, int] = (0, 0),
) -> DeviceSums:  # fmt: skip
    """Sum the softmax of the last rows of every cell over all keys they see, by key position and by distance.

    Args:
        sample: the last rows of each cell, the very last at `R - 1`.
        keys: staged rows `[K, rows, D]`, contiguous but for the stride of heads.
        programs: how many run at once in the second pass: two a multiprocessor.
        forced: pairs with a key below the first or a distance below the second number are left out of the sums.
    """
    _, num_cells, heads, rows, dim = sample.queries.shape
    group = heads // keys.shape[0]
    assert keys.stride()[1:] == (dim, 1)
    assert sample.queries.is_contiguous()
    assert rows <= shape.block
    partial = keys.new_empty((len(tables.chunks), heads, rows), dtype=torch.float32)
    lse = keys.new_empty((num_cells, heads, rows), dtype=torch.float32)
    columns, offsets = torch.zeros((2, num_cells, heads, tables.width), device=keys.device)
    sizes = {
        "HEADS": heads, "GROUP": group, "ROWS": rows, "DIM": dim, "BLOCK": shape.block, "DOT": dot_type(keys),
        "num_warps": shape.warps,
    }  # fmt: skip
    arrays = (sample.queries, sample.scales, keys, tables.cells, tables.chunks)
    shared, items = shared_heads(shape.shared, heads, group, len(tables.chunks))
    lse_kernel[(items,)](partial, *arrays, num_cells, keys.stride(0), **sizes, SHARED=shared)
    merge_kernel[(num_cells, heads)](lse, partial, tables.cells, heads, rows)
    shared, items = shared_heads(shape.shared_sums, heads, group, len(tables.chunks))
    programs = min(programs, items)
    scratch = keys.new_empty((programs, shared * rows * SLOTS.value * shape.block), dtype=torch.float16)
    sums_kernel[(programs,)](
        columns, offsets, scratch, lse, *arrays, items, num_cells, keys.stride(0), tables.width, **sizes,
        SHARED=shared, SKIP_COLUMNS=forced[0], SKIP_OFFSETS=forced[1],
    )  # fmt: skip
    return DeviceSums(columns, offsets, lse)


def dot_type(keys: torch.Tensor) -> tl.dtype:
    """Return the type that operands of products have: float32 where kernels are interpreted."""
    return dot_type_of(keys.dtype)


def shared_heads(wanted: int, heads: int, group: int, chunks: int) -> tuple[int, int]:
    """Return how many heads of a KV head share a tile, a power of two, and how many programs that makes."""
    shared = min(wanted, triton.next_power_of_2(group))
    return shared, chunks * (heads // group) * -(-group // shared)
