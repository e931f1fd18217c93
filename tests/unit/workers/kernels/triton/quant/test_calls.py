"""What is computed where: kernels for types and groups that they take, else weights that are dequantised."""

from __future__ import annotations

import pytest
import torch

from protos.stage.messages import Span
from workers.bench.cases.quantised import random_weight
from workers.kernels.triton.layer import calls as layer_calls
from workers.kernels.triton.quant import calls
from workers.model import layers, moe


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Host memory passes for that of a GPU of 9.0."""
    monkeypatch.setattr(layer_calls, "supports", lambda device: True)
    monkeypatch.setattr(calls, "capability", lambda device: (9, 0))


@pytest.mark.usefixtures("gpu")
def test_supported() -> None:
    x = torch.ones(1, 96, dtype=torch.bfloat16)
    some, other = random_weight("int4", (4, 96), 32), random_weight("int8", (4, 96), 24)
    assert calls.supports(x, some)
    assert not calls.supports(x, some, other)
    assert not calls.supports(x.float(), some)


def test_not_on_processors() -> None:
    x, weight = torch.ones(2, 96, dtype=torch.bfloat16), random_weight("int4", (4, 96), 32)
    assert not calls.supports(x, weight)
    assert torch.equal(layers.linear(x, weight), x @ weight.dequantize(torch.bfloat16).T)


@pytest.mark.usefixtures("gpu")
def test_layers_call_the_kernels() -> None:
    """The interpreter truncates results to bfloat16."""
    x, weight = torch.randn(5, 96).bfloat16(), random_weight("int4", (40, 96), 32)
    got, wanted = layers.linear(x, weight), x.float() @ weight.dequantize(torch.float32).T
    assert (got.float() - wanted).abs().max() <= 2e-2 * wanted.abs().max()


def test_experts_call_the_kernels(monkeypatch: pytest.MonkeyPatch, gpu: None) -> None:
    x, chosen, weights = torch.randn(5, 96).bfloat16(), torch.randint(0, 2, (5, 1)), torch.rand(5, 1)
    gate_up, down = random_weight("float8_e4m3", (2, 64, 96), 128), random_weight("float8_e4m3", (2, 96, 32), 128)
    got = moe.run_experts(x, chosen, weights, gate_up, down, Span(0, 2))
    monkeypatch.setattr(calls, "supports", lambda *_: False)
    monkeypatch.setattr(layer_calls, "supports", lambda _: False)
    wanted = moe.run_experts(x, chosen, weights, gate_up, down, Span(0, 2))
    assert (got.float() - wanted.float()).norm() <= 0.1 * wanted.float().norm()
