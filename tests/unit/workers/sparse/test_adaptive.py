"""What choosing the keys of a cell takes beside the cache: at most 16 bytes a key and head."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT
from workers.kernels import build

# In a process of its own, whose peak can be set back; the small cell loads what is loaded once.
MEASURE = """
import gc, json, sys, torch
from protos.model.spec import HeadBudget
from tests.support.data.sparse_cells import Shape, random_cell
from workers.sparse.vertical_slash import choose

def status(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))

stop, heads, kind = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
spec = {"adaptive": {}, "fixed": {"uniform": HeadBudget(1024, 2048)}}[kind]
torch.set_num_threads(2)
of = [random_cell(Shape(size - 4096, 4096, page_size=256, heads=heads, kv_heads=1, dim=32, dtype=torch.bfloat16))
      for size in (8192, stop)]
choose(*of[0].args(**spec))
gc.collect()
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
kept = choose(*of[1].args(**spec))
print(json.dumps({"peak": status("VmHWM") - before, "columns": [len(one.columns) for one in kept.selections]}))
"""


@pytest.mark.skipif(build.compiler() is None, reason="no C++ compiler: the twin keeps whole matrices")
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="no Linux: the peak cannot be measured")
@pytest.mark.parametrize(("kind", "heads"), [("fixed", 8), ("fixed", 1), ("adaptive", 8), ("adaptive", 3)])
def test_memory_in_flight(kind: str, heads: int) -> None:
    stop = 1 << 19
    command = [sys.executable, "-c", MEASURE, str(stop), str(heads), kind]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert 4 * stop * heads < found["peak"] <= 16 * stop * heads
    assert min(found["columns"]) >= 1000
