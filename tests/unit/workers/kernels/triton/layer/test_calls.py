"""The calls of a layer's kernels: where they are made, and that none loads Triton before its time."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from workers.kernels.triton.layer import calls

CPU = torch.device("cpu")


def test_cpus_are_not_supported_and_gpus_only_with_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not calls.supports(CPU)
    capability = (8, 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert calls.supports(torch.device("cuda", 0))
    capability = (7, 5)
    assert not calls.supports(torch.device("cuda", 0))
    capability = (9, 0)
    monkeypatch.setattr("workers.kernels.device.has_triton", lambda: False)
    assert not calls.supports(torch.device("cuda", 0))


def test_a_device_that_is_new_to_the_kernels_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    calls.warn_unproven.cache_clear()
    calls.warn_unproven(CPU)
    calls.warn_unproven(CPU)
    calls.warn_unproven.cache_clear()
    assert [record.getMessage() for record in caplog.records] == [
        "kernels of Triton were never run on compute capability 8.0: pytest tests/gpu checks them"
    ]


def test_the_model_is_imported_without_triton() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import workers.runner.model_runner, workers.stage.worker; print('triton.language' in sys.modules)"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False"


def test_every_call_reaches_its_kernel() -> None:
    x, weight = torch.randn(3, 8), torch.rand(8)
    total, normed = calls.add_rms_norm(x, x.clone(), weight, 1e-6)
    torch.testing.assert_close(total, 2 * x)
    torch.testing.assert_close(normed, torch.nn.functional.rms_norm(2 * x, (8,), weight, 1e-6))
    gate, up = x.chunk(2, dim=1)
    torch.testing.assert_close(calls.swiglu(x), torch.nn.functional.silu(gate) * up)
    experts, weights = calls.route(x, 2, True)
    assert torch.equal(experts, x.topk(2).indices)
    out = calls.run_experts(x, experts, weights, torch.zeros(8, 16, 8), torch.ones(8, 8, 8), 0)
    assert torch.equal(out, torch.zeros(3, 8))
    x[1, 4] = torch.nan
    tokens, finite = calls.choose_greedily(x).tolist()
    assert [tokens[0], tokens[2]] == [int(x[0].argmax()), int(x[2].argmax())]
    assert finite == [1, 0, 1]
