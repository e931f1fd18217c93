"""The absolute grid of a prompt: where prefill steps may be cut. Scheduler and stages must agree on it.

Cells are `sparse.cell` tokens from position 0 on, cut at the boundaries of DCA chunks and at the end of the prompt.
"""

from __future__ import annotations

from protos.model.spec import ModelSpec


def is_sparse(spec: ModelSpec, position: int, prompt_len: int) -> bool:
    """Return whether the row at `position` of a prompt of `prompt_len` tokens selects its keys."""
    return spec.sparse is not None and prompt_len > spec.sparse.threshold and position < prompt_len


def next_cut(spec: ModelSpec, position: int, prompt_len: int) -> int | None:
    """Return the first position after `position` that no attention plan crosses, None when there is none.

    Dense rows are cut at the boundaries of DCA chunks only, and where the sparse rows of the prompt end.
    """
    cuts = [(position // spec.chunk_distance + 1) * spec.chunk_distance] if spec.chunk_distance else []
    if spec.sparse is not None and is_sparse(spec, position, prompt_len):
        cuts += [(position // spec.sparse.cell + 1) * spec.sparse.cell, prompt_len]
    return min(cuts, default=None)


def split(spec: ModelSpec, start: int, stop: int, prompt_len: int) -> list[tuple[int, int]]:
    """Return positions `start .. stop - 1` as half-open pieces of one attention plan each."""
    pieces = []
    while start < stop:
        cut = next_cut(spec, start, prompt_len)
        end = stop if cut is None else min(cut, stop)
        pieces.append((start, end))
        start = end
    return pieces


def whole_cells(spec: ModelSpec, start: int, budget: int, prompt_len: int) -> int:
    """Return the tokens from `start` (of a cell) that fill as many whole cells as `budget` holds, at least one."""
    total = 0
    while is_sparse(spec, start + total, prompt_len):
        cut = next_cut(spec, start + total, prompt_len)
        assert cut is not None
        if total and cut - start > budget:
            break
        total = cut - start
    return total


def last_cut(spec: ModelSpec, position: int, prompt_len: int) -> int:
    """Return the last position up to `position` at which a step of the prompt may start: any when rows are dense.

    KV before the last cut of a whole prompt does not depend on its end (but for the length scale).
    """
    if spec.sparse is None or not is_sparse(spec, 0, prompt_len):
        return position
    grids = (spec.sparse.cell, spec.chunk_distance or spec.sparse.cell)
    return max(position // grid * grid for grid in grids)


def largest_cell(spec: ModelSpec) -> int:
    """Return the tokens of the largest cell of any prompt, 0 when every row is dense."""
    if spec.sparse is None:
        return 0
    return min(spec.sparse.cell, spec.chunk_distance or spec.sparse.cell)
