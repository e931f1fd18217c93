"""What PyTorch says of this machine is one JSON object."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from tests.support.paths import ROOT
from workers import doctor
from workers.doctor import kernel_facts, torch_facts
from workers.kernels.build import best_path


def test_facts_are_plain_data() -> None:
    facts = torch_facts()
    assert json.loads(json.dumps(facts)) == facts
    assert facts["torch"] == torch.__version__
    assert facts["threads"] == torch.get_num_threads()
    assert len(facts["devices"]) == (torch.cuda.device_count() if torch.cuda.is_available() else 0)


def test_facts_about_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine that has two of them and everything for them; here torch was told so."""
    properties = SimpleNamespace(name="H200", major=9, minor=0, total_memory=141 << 30)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(doctor, "compute_family", lambda device, dtype, dim: f"{device} {dtype} {dim}")
    monkeypatch.setattr(doctor.dist, "is_nccl_available", lambda: True)
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 29, 3))
    monkeypatch.setattr(doctor, "version_of", lambda name: f"{name} 3.6.0")
    facts = torch_facts()
    assert (facts["nccl"], facts["nccl_version"], facts["triton"]) == (True, "2.29.3", "triton 3.6.0")
    kernels = ["cuda:0 torch.bfloat16 128", "cuda:1 torch.bfloat16 128"]
    device = {"name": "H200", "capability": "9.0", "is_proven": False, "memory_bytes": 141 << 30}
    assert facts["devices"] == [device | {"kernels": each} for each in kernels]

    def refuse(*_: object) -> str:
        raise torch.OutOfMemoryError("CUDA out of memory\nmore")

    monkeypatch.setattr(doctor, "compute_family", refuse)
    assert [each["kernels"] for each in torch_facts()["devices"]] == ["unknown: CUDA out of memory"] * 2
    monkeypatch.setattr(doctor.dist, "is_nccl_available", lambda: False)
    facts = torch_facts()
    assert (facts["nccl"], facts["nccl_version"]) == (False, None)


def test_the_process_prints_one_line() -> None:
    printed = subprocess.check_output([sys.executable, "-m", "workers.doctor"], cwd=ROOT, text=True)
    assert printed.count("\n") == 1
    assert json.loads(printed)["gloo"] in (True, False)
    printed = subprocess.check_output([sys.executable, "-m", "workers.doctor", "kernels"], cwd=ROOT, text=True)
    assert json.loads(printed) == kernel_facts()


def test_the_instruction_set_of_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    path = best_path()
    facts = kernel_facts()
    if path is None:
        assert (facts["path"], facts["family"][:6]) == (None, "torch-")
        assert facts["reason"]
    else:
        assert facts == {"path": path.name.lower(), "family": path.name.lower(), "reason": ""}
    monkeypatch.setattr(doctor, "best_path", lambda: None)
    assert doctor.kernel_facts()["path"] is None
