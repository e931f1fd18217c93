"""What PyTorch says of this machine is one JSON object."""

from __future__ import annotations

import json
import subprocess
import sys

import torch

from tests.support.paths import ROOT
from workers.doctor import torch_facts


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
