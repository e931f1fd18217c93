"""Norm, linear layers and gated MLP in float32, against float64."""

import pytest
import torch
import torch.nn.functional as F

from workers.model.layers import gated_mlp, inverse_rms, linear, rms_norm, swiglu

SIZES = (1, 17, 67, 193)


def close(got: torch.Tensor, wanted: torch.Tensor) -> None:
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rows", SIZES)
def test_rms_norm(rows: int):
    x, weight = torch.randn(rows, 67), torch.randn(67)
    factor = (x.double().square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    close(inverse_rms(x, 1e-6), factor)
    close(rms_norm(x, weight, 1e-6), x.double() * factor * weight.double())


@pytest.mark.parametrize("rows", SIZES)
@pytest.mark.parametrize("bias", [False, True])
def test_linear(rows: int, bias: bool):
    x, weight, added = torch.randn(rows, 17), torch.randn(67, 17), torch.randn(67) if bias else None
    wanted = x.double() @ weight.double().T + (0.0 if added is None else added.double())
    close(linear(x, weight, added), wanted)


@pytest.mark.parametrize("rows", SIZES)
@pytest.mark.parametrize("bias", [False, True])
def test_gated_mlp(rows: int, bias: bool):
    x, gate_up, down = torch.randn(rows, 17), torch.randn(2 * 33, 17), torch.randn(17, 33)
    biases = (torch.randn(66), torch.randn(17)) if bias else (None, None)
    both = F.linear(*(None if one is None else one.double() for one in (x, gate_up, biases[0])))  # type: ignore[arg-type]
    gate, up = both.chunk(2, dim=-1)
    close(swiglu(both.float()), F.silu(gate) * up)
    wanted = F.linear(F.silu(gate) * up, down.double(), None if biases[1] is None else biases[1].double())
    torch.testing.assert_close(gated_mlp(x, gate_up, down, *biases).double(), wanted, atol=1e-4, rtol=1e-4)
