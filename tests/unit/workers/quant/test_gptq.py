"""GPTQ matrices are read as they were packed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from protos.model.quant.scheme import QuantScheme
from protos.stage.messages import Span
from tests.support.quant.checkpoints import pack
from tests.support.quant.reading import SIZES, check_regions, store
from workers.quant.registry import read_matrix


@pytest.mark.parametrize(("rows", "columns"), SIZES)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("has_zeros", [False, True])
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("group", [0, 16, 32, 128])
def test_values(rows: int, columns: int, bits: int, has_zeros: bool, offset: int, group: int) -> None:
    scheme = QuantScheme("gptq", bits, group=group, has_zeros=has_zeros, zero_offset=offset)
    check_regions(scheme, *store(scheme, rows, columns))


@pytest.mark.parametrize("bits", [4, 8])
def test_inputs_in_the_order_of_activation(bits: int) -> None:
    scheme = QuantScheme("gptq", bits, group=32, has_zeros=True, zero_offset=1, ordered=True)
    made, stored = store(scheme, 40, 96, shuffled=True)
    check_regions(scheme, made, stored, columns=False)
    with pytest.raises(ValueError, match="desc_act"):
        read_matrix(stored, scheme, Span(0, 8), Span(0, 32))
    stored.tensors["g_idx"][:2] = 0
    stored.tensors["g_idx"][2:] = 1
    with pytest.raises(LookupError, match="g_idx: groups of other sizes than 32"):
        read_matrix(stored, scheme, Span(0, 8), Span(0, 96))


@pytest.mark.parametrize("bits", [4, 8])
def test_a_zero_point_of_zero_borrows_from_the_next_one(bits: int) -> None:
    """As the reference takes one off all of an int32, which its reader undoes."""
    scheme = QuantScheme("gptq", bits, group=32, has_zeros=True)
    made, stored = store(scheme, 40, 96)
    zeros = np.array(made.zeros)
    zeros[::3] = 0
    plain = torch.from_numpy(np.ascontiguousarray(pack(zeros.T, bits)))
    stored.tensors["qzeros"] = plain
    second = read_matrix(stored, scheme, Span(0, 40), Span(0, 96))
    stored.tensors["qzeros"] = plain - (0x11111111 if bits == 4 else 0x01010101)
    first = read_matrix(stored, replace(scheme, zero_offset=1), Span(0, 40), Span(0, 96))
    assert first.zeros is not None
    assert torch.equal(first.zeros.int() + (128 if bits == 8 else 0), torch.from_numpy(zeros).int())
    assert torch.equal(first.dequantize(torch.float32), second.dequantize(torch.float32))


def test_zero_points_of_a_symmetric_checkpoint_must_not_differ() -> None:
    scheme = QuantScheme("gptq", 4, group=32, has_zeros=True, zero_offset=1)
    _, stored = store(scheme, 40, 96)
    with pytest.raises(LookupError, match=r"qzeros: zero points differ, and config\.json says sym: true"):
        read_matrix(stored, replace(scheme, has_zeros=False), Span(0, 40), Span(0, 96))
    stored.tensors.pop("g_idx")
    assert read_matrix(stored, scheme, Span(0, 40), Span(0, 96)).order is None
