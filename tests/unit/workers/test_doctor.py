"""What PyTorch says of this machine is one JSON object."""

from __future__ import annotations

import json
import subprocess
import sys

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
