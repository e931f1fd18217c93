"""The optimisers: Muon for projection and expert matrices, AdamW for embeddings, norms and routers.

Muon (Keller Jordan, 2024, https://kellerjordan.github.io/posts/muon): the momentum of a matrix is replaced by the
nearest orthogonal matrix, approximated by five Newton-Schulz steps, so that every direction moves equally far.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # quintic coefficients: singular values land in about 0.7 .. 1.2
MUON_RATE = 6.0  # Muon's learning rate as a multiple of AdamW's


def orthogonalise(matrices: Tensor, steps: int = 5, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the approximate nearest orthogonal matrices of [..., rows, columns] in float32, computed in `dtype`."""
    a, b, c = NEWTON_SCHULZ
    x = matrices / (matrices.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    tall = x.shape[-2] > x.shape[-1]
    x = (x.mT if tall else x).to(dtype)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).float()


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised; leading dimensions of a parameter are independent matrices (experts)."""

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        *,
        lr: float,
        momentum: float = 0.95,
        decay: float = 0.02,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "decay": decay})
        self.compute_dtype = dtype

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient; matrices shrink by decay * lr."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
                ahead = parameter.grad.lerp(state["momentum"], group["momentum"])
                rows, columns = parameter.shape[-2:]
                parameter.mul_(1 - group["decay"] * group["lr"])
                update = orthogonalise(ahead, dtype=self.compute_dtype)
                parameter.add_(update, alpha=-group["lr"] * max(1.0, rows / columns) ** 0.5)


def is_matrix(name: str) -> bool:
    """Return whether Muon trains the parameter: attention and expert projections, no embeddings, norms or routers."""
    return "proj" in name


def build_optimisers(
    model: nn.Module, rate: float, dtype: torch.dtype = torch.float32
) -> tuple[Muon, torch.optim.AdamW]:
    """Return both optimisers for all parameters of `model`; `dtype` is that of Muon's matrix products."""
    matrices = [p for name, p in model.named_parameters() if is_matrix(name)]
    others = [p for name, p in model.named_parameters() if not is_matrix(name)]
    return (
        Muon(matrices, lr=MUON_RATE * rate, decay=0.02 / MUON_RATE, dtype=dtype),
        torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.95), weight_decay=0.0),
    )


def set_rate(optimisers: tuple[Muon, torch.optim.AdamW], rate: float) -> None:
    """Give AdamW the learning rate `rate` and Muon its multiple."""
    muon, adamw = optimisers
    for group in muon.param_groups:
        group["lr"] = MUON_RATE * rate
    for group in adamw.param_groups:
        group["lr"] = rate
