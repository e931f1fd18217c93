"""Random quantised weights are slices of one model; matrices of files are in tests/identity/files/test_quantized.py."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from protos.model.quant.scheme import QuantScheme
from protos.stage.messages import Span
from tests.unit.workers.model.test_weights import MOE, shards
from workers.model.quantized_sources import RandomMatrices
from workers.model.weights import dummy_shard
from workers.quant.weight import QuantizedWeight

SPEC = replace(MOE, hidden_size=64, head_dim=16, num_attention_heads=8, intermediate_size=128, moe_intermediate_size=48)
SCHEMES = [
    QuantScheme("gptq", 4, group=32, zero_offset=1), QuantScheme("awq", 4, group=16, has_zeros=True),
    QuantScheme("int-quantized", 8, has_zeros=True), QuantScheme("fp8", 8, is_float=True, group=32, block_rows=32),
]  # fmt: skip


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.format)
def test_regions_and_scale(scheme: QuantScheme) -> None:
    spec = replace(SPEC, quant=scheme, intermediate_size=4096)
    source, name = RandomMatrices(spec, scheme, 0), "model.layers.1.mlp.down_proj.weight"
    whole = source.read(name, Span(0, 64), Span(0, 4096)).dequantize(torch.float32)
    assert source.has(name)
    assert not source.has("model.layers.0.mlp.gate.weight")
    assert 0.018 < float(whole.std()) < 0.022
    part = source.read(name, Span(3, 64), Span(64, 1024)).dequantize(torch.float32)
    assert torch.equal(part, whole[3:, 64:1024])
    assert not torch.equal(whole, RandomMatrices(spec, scheme, 1).read(name, Span(0, 64), Span(0, 4096)).dequantize(
        torch.float32
    ))  # fmt: skip


@pytest.mark.parametrize("has_head", [False, True])
def test_a_random_output_matrix(has_head: bool) -> None:
    scheme = replace(SCHEMES[0], head=has_head)
    spec = replace(SPEC, quant=scheme, tie_word_embeddings=False)
    weights = dummy_shard(spec, shards(spec, 1, 1)[0][0], torch.float32, "cpu")
    assert isinstance(weights.lm_head, QuantizedWeight) == has_head
    assert isinstance(weights.embed, torch.Tensor)


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.format)
def test_shards_of_random_experts(scheme: QuantScheme) -> None:
    spec = replace(SPEC, quant=scheme)
    held = [
        [dummy_shard(spec, shard, torch.float32, "cpu").layers[0] for shard in shards(spec, 1, ranks)[0]]
        for ranks in (1, 2)
    ]
    for field in ("experts_gate_up", "experts_down"):
        whole, *parts = (getattr(layer, field) for layer in [*held[0], *held[1]])
        assert isinstance(whole, QuantizedWeight)
        both = torch.cat([part.dequantize(torch.float32) for part in parts])
        assert torch.equal(both, whole.dequantize(torch.float32))
    outputs = torch.cat([layer.o_weight.dequantize(torch.float32) for layer in held[1]], dim=1)  # type: ignore[union-attr]
    assert torch.equal(outputs, held[0][0].o_weight.dequantize(torch.float32))  # type: ignore[union-attr]
