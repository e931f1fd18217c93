"""What is asked of a device: a tensor on meta stands for one of an H200; what is moved to a CPU stays what it is."""

from __future__ import annotations

import pytest
import torch

from workers.kernels import device as devices

CPU, META, CUDA = torch.device("cpu"), torch.device("meta"), torch.device("cuda", 0)


def test_meta_stands_for_an_h200_and_a_cpu_for_the_interpreter() -> None:
    assert (devices.capability(META), devices.processors(META)) == ((9, 0), 132)
    assert (devices.capability(CPU), devices.processors(CPU)) == (devices.AMPERE, 1)


def test_a_gpu_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        multi_processor_count = 108

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    assert (devices.capability(CUDA), devices.processors(CUDA)) == ((8, 6), 108)


@pytest.mark.parametrize(
    ("device", "found", "installed", "expected"),
    [(CUDA, (8, 0), True, True), (CUDA, (7, 5), True, False), (CUDA, (9, 0), False, False), (CPU, (9, 0), True, False)],
)
def test_where_triton_runs(
    monkeypatch: pytest.MonkeyPatch, device: torch.device, found: tuple[int, int], installed: bool, expected: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: found)
    monkeypatch.setattr(devices, "has_triton", lambda: installed)
    assert devices.runs_triton(device) is expected


def test_moving() -> None:
    host = torch.arange(3)
    assert devices.moved(host, CPU) is host
    assert devices.moved(host, "meta").is_meta
    elsewhere = torch.empty(3, device=META)
    assert devices.moved(elsewhere, META) is elsewhere


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

    devices.moved(Host(), "cuda")  # type: ignore[arg-type]
    assert log == ["pinned", ("cuda", True)]
