"""The GPU of a process and the cores near it, on machines of files."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.support.paths import ROOT
from workers.stage import gpu
from workers.stage.gpu import check_kv_dtype, gpu_id, near_cores, pci_address, use_gpu

ADDRESS = "0000:1a:00.0"


def machine(folder: Path, node: str, cores: str | None) -> Path:
    device = folder / "bus/pci/devices" / ADDRESS
    device.mkdir(parents=True)
    (device / "numa_node").write_text(f"{node}\n")
    if cores is not None:
        place = folder / f"devices/system/node/node{node}"
        place.mkdir(parents=True)
        (place / "cpulist").write_text(f"{cores}\n")
    return folder


@pytest.mark.parametrize(
    ("node", "text", "cores"),
    [("0", "0-3", {0, 1, 2, 3}), ("1", "4-5,12-13,20", {4, 5, 12, 13, 20}), ("1", "", set()), ("-1", None, set())],
)
def test_cores_of_the_node_of_a_gpu(tmp_path: Path, node: str, text: str | None, cores: set[int]):
    assert near_cores(ADDRESS, machine(tmp_path, node, text)) == cores


@pytest.mark.parametrize(("node", "text"), [("x", "0-3"), ("2", None), ("0", "a-b")])
def test_a_machine_that_does_not_say_has_no_near_cores(tmp_path: Path, node: str, text: str | None):
    assert near_cores(ADDRESS, machine(tmp_path, node, text)) == frozenset()
    assert near_cores("0000:ff:00.0", tmp_path) == frozenset()


def test_addresses_are_written_as_linux_does():
    assert pci_address(SimpleNamespace(pci_domain_id=0, pci_bus_id=26, pci_device_id=0)) == ADDRESS
    assert pci_address(SimpleNamespace(pci_bus_id=26)) == ""


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core")
def test_all_threads_of_a_process_stay_on_cores():
    """Also those that are there already; cores the process may not use are not asked for."""
    code = """
import os, threading
from workers.stage.gpu import stay_on
first, *rest = sorted(os.sched_getaffinity(0))
wait, other = threading.Event(), []
thread = threading.Thread(target=lambda: (wait.wait(), other.append(os.sched_getaffinity(0))))
thread.start()
kept = [stay_on([]), stay_on([4096]), stay_on([first, *rest]), stay_on([first, 4096])]
wait.set()
thread.join()
print([sorted(each) for each in kept] == [[], [], [], [first]], other == [{first}], os.sched_getaffinity(0) == {first})
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.split() == ["True"] * 3


def test_the_argument_chooses_the_gpu(monkeypatch: pytest.MonkeyPatch):
    used: list[torch.device] = []
    properties = SimpleNamespace(pci_domain_id=0, pci_bus_id=26, pci_device_id=0, uuid="GPU-1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", used.append)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(gpu, "near_cores", lambda address: frozenset({4096} if address == ADDRESS else {0}))
    assert use_gpu(1) == torch.device("cuda", 1)
    assert used == [torch.device("cuda", 1)]
    with pytest.raises(ValueError, match="gpu: 2: must be below 2, the number of GPUs that this process sees"):
        use_gpu(2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ValueError, match="gpu: 0: there is no GPU that this process sees"):
        use_gpu(0)


def test_a_gpu_has_a_name_where_others_can_reach_it(monkeypatch: pytest.MonkeyPatch):
    """Without NCCL hidden states go over the host."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="GPU-1"))
    for has_nccl in (True, False):
        monkeypatch.setattr(gpu.dist, "is_nccl_available", lambda has_nccl=has_nccl: has_nccl)
        assert gpu_id(torch.device("cuda", 1)) == ("GPU-1" if has_nccl else "")
        assert gpu_id(torch.device("cpu")) == ""


@pytest.mark.parametrize(
    ("capability", "dtype", "is_refused"),
    [
        ((8, 0), torch.float8_e4m3fn, True),
        ((8, 6), torch.float8_e4m3fn, True),
        ((8, 9), torch.float8_e4m3fn, False),
        ((9, 0), torch.float8_e4m3fn, False),
        ((8, 0), torch.int8, False),
        ((8, 0), torch.bfloat16, False),
    ],
)
def test_fp8_kv_needs_a_gpu_that_converts_it(
    capability: tuple[int, int], dtype: torch.dtype, is_refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    check_kv_dtype(dtype, torch.device("cpu"))
    if not is_refused:
        check_kv_dtype(dtype, torch.device("cuda", 0))
        return
    name = "".join(map(str, capability))
    with pytest.raises(
        ValueError, match=f"^kv_cache.dtype: fp8: needs .* sm_89 or later, this is sm_{name}; use int8$"
    ):
        check_kv_dtype(dtype, torch.device("cuda", 0))
