"""Figures of products with quantised weights."""

from __future__ import annotations

import pytest

from workers.bench import quantized
from workers.model import compiled

pytestmark = pytest.mark.skipif(compiled.path() is None, reason="no compiled kernels")


def test_products_of_every_form() -> None:
    figures = {figure.name: figure for figure in quantized.run_quantized(17, 2, 64)}
    names = ["bfloat16", *(name for name, *_ in quantized._FORMS)]
    assert list(figures) == [f"product, {name}, {rows} rows" for name in names for rows in (1, 4, 17)]
    assert all(figure.unit == "ms" and figure.value > 0 for figure in figures.values())
    assert figures["product, bfloat16, 1 rows"].note.endswith("GB/s")
    assert figures["product, bfloat16, 17 rows"].note.endswith("TFLOP/s")


def test_experts_of_a_token() -> None:
    figures = list(quantized.run_experts_of_a_token(1, experts=9, least_bytes=1))
    forms = ["bfloat16", "int4, groups of 128", "int8, groups of 128", "float8_e4m3, groups of 128"]
    assert [figure.name for figure in figures] == [f"8 of 9 experts, {form}, 1 row" for form in forms]
    assert all(figure.repeats == 4 and figure.value > 0 and figure.note.endswith("GB/s") for figure in figures)


def test_without_compiled_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "path", lambda: None)
    for figures in (quantized.run_quantized(1, 1, 64), quantized.run_experts_of_a_token(1)):
        with pytest.raises(ValueError, match="no compiled kernels on this machine: install a C"):
            next(figures)
