"""Checks of quantised products in the interpreter: right kernels pass, and a wrong one does not."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from workers.bench.gpu.checks import quantised
from workers.bench.gpu.context import Case, Context
from workers.bench.gpu.journal import Journal
from workers.kernels.triton.quant import products, rows

CASES = list(quantised.cases())
CONTEXT = Context(Journal(Path("unused"), "x", True), torch.device("cpu"), time.monotonic() + 600)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_right_kernels_pass(case: Case) -> None:
    found = case.run(CONTEXT)
    assert isinstance(found, dict)
    assert found["ok"] is True


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_wrong_kernels_do_not(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in ((products, "linear"), (products, "run_experts")):
        right = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *given, right=right: right(*given) * 1.2)
    quantise = rows.quantise_rows
    monkeypatch.setattr(rows, "quantise_rows", lambda x: quantise(x)._replace(scales=quantise(x).scales * 1.0001))
    with pytest.raises(AssertionError):
        case.run(CONTEXT)
