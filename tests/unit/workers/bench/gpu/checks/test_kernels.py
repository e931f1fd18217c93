"""What a check lets pass: errors up to one and a half times those of the twin; what must be equal has to be."""

from __future__ import annotations

import math

import pytest
import torch

from workers.bench.cases.attention import attend_reference, attend_rounded
from workers.bench.cases.paged_cells import CELLS, paged_cell, selections
from workers.bench.gpu.checks.kernels import ALLOWED, Worst, error_of


def test_the_error_is_a_share_of_the_norm_and_nan_never_passes() -> None:
    wanted = torch.tensor([3.0, 4.0])
    assert error_of(torch.tensor([3.0, 4.5]), wanted) == pytest.approx(0.1)
    assert error_of(torch.tensor([3.0, math.nan]), wanted) == math.inf


def test_a_kernel_may_err_by_half_more_than_its_twin() -> None:
    wanted = torch.ones(100)
    fine, wrong = Worst(), Worst()
    fine.compare("a", wanted + 0.0014, wanted + 0.001, wanted)
    line = fine.line()
    assert line["ok"] is True
    assert line["ratio"] == pytest.approx(1.4, rel=1e-3)
    wrong.compare("a", wanted, wanted, wanted)
    wrong.compare("b", wanted + 0.0016, wanted + 0.001, wanted)
    with pytest.raises(AssertionError, match="'worst': 'b'"):
        wrong.line()
    damaged = Worst()
    damaged.compare("a", wanted, wanted, wanted)
    damaged.compare("b", wanted * math.nan, wanted * math.nan, wanted)
    with pytest.raises(AssertionError, match="'worst': 'b'"):
        damaged.line()
    unequal = Worst()
    unequal.equal("codes", torch.tensor([1, 2]), torch.tensor([1, 3]))
    with pytest.raises(AssertionError, match="codes"):
        unequal.line()
    assert ALLOWED == 1.5


@pytest.mark.parametrize(("start", "rows", "distance"), [CELLS[2], CELLS[5]])
def test_the_twin_rounds_where_kernels_do(start: int, rows: int, distance: int) -> None:
    heads = tuple(selections(start + rows).values())[:4]
    cell = paged_cell(start, rows, distance, selections=heads)
    given = cell.q, cell.k, cell.v, cell.plan, cell.scales
    wanted = cell.reference()
    assert error_of(attend_rounded(*given, torch.float32), wanted) < 1e-6
    assert 1e-4 < error_of(attend_rounded(*given, torch.bfloat16), wanted) < 1e-2
    torch.testing.assert_close(attend_reference(*given), wanted.float(), atol=1e-5, rtol=1e-5)
