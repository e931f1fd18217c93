"""Copies to devices."""

from __future__ import annotations

import pytest
import torch

from workers.kernels.device import moved


def test_what_is_there_stays_as_it_is() -> None:
    tensor = torch.arange(3)
    assert moved(tensor, "cpu") is tensor
    assert moved(tensor, "meta").shape == (3,)


def test_host_memory_is_pinned_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy from other memory would wait for the device."""
    log: list[object] = []

    class Host:
        device = torch.device("cpu")

        def pin_memory(self) -> Host:
            log.append("pinned")
            return self

        def to(self, device: torch.device, non_blocking: bool) -> Host:
            log.append((str(device), non_blocking))
            return self

    moved(Host(), "cuda")  # type: ignore[arg-type]
    assert log == ["pinned", ("cuda", True)]
