"""The tensors of one matrix in every format."""

from __future__ import annotations

import pytest

from protos.model.quant.parts import is_quantized, is_unused_part, parts_of
from protos.model.quant.scheme import QuantScheme

INT4 = QuantScheme("gptq", 4, group=128)
BLOCKS = QuantScheme("fp8", 8, is_float=True, group=128, block_rows=128)
NAMES = [
    (INT4, {"qweight": (32, 768), "qzeros": (2, 96), "scales": (2, 768), "g_idx": (256,)}),
    (QuantScheme("awq", 4, group=128), {"qweight": (256, 96), "qzeros": (2, 96), "scales": (2, 768)}),
    (
        QuantScheme("pack-quantized", 4, group=128),
        {"weight_packed": (768, 32), "weight_scale": (768, 2), "weight_shape": (2,), "weight_zero_point": (96, 2),
         "weight_g_idx": (256,)},
    ),
    (BLOCKS, {"weight": (768, 256), "weight_scale_inv": (6, 2)}),
    (QuantScheme("fp8", 8, is_float=True), {"weight": (768, 256), "weight_scale": (768, 1)}),
    (
        QuantScheme("int-quantized", 8, group=128),
        {"weight": (768, 256), "weight_scale": (768, 2), "weight_zero_point": (768, 2)},
    ),
]  # fmt: skip


@pytest.mark.parametrize(("scheme", "expected"), NAMES, ids=lambda value: getattr(value, "format", ""))
def test_names_and_shapes(scheme: QuantScheme, expected: dict[str, tuple[int, ...]]) -> None:
    assert {part.name: part.shapes[0] for part in parts_of(scheme, 768, 256)} == expected


def test_sizes_that_do_not_fill_words_and_blocks() -> None:
    assert {part.name: part.shapes[0] for part in parts_of(INT4, 13, 130)}["qweight"] == (17, 13)
    assert parts_of(BLOCKS, 300, 130)[1].shapes == ((3, 2),)


def test_what_is_quantised_is_what_is_stored_so() -> None:
    assert is_quantized(INT4, "a.q_proj", {"a.q_proj.qweight"}, None)
    assert not is_quantized(INT4, "a.q_proj", {"a.q_proj.weight"}, "BF16")
    assert not is_quantized(None, "a.q_proj", {"a.q_proj.qweight"}, None)
    assert is_quantized(BLOCKS, "a.q_proj", set(), "F8_E4M3")
    assert not is_quantized(BLOCKS, "a.q_proj", set(), "BF16")
    assert is_unused_part("model.layers.0.self_attn.k_proj.input_scale")
    assert not is_unused_part("model.layers.0.self_attn.k_proj.weight_scale")
