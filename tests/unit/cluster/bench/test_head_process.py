"""How the processes of a head are found."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.bench.head_process import HeadProcess, marked_processes, marking, until


@pytest.mark.parametrize("prelude", ["", "from ray import _raylet; _raylet.setproctitle('ray::Agent' + 9000 * 'x'); "])
def test_processes_are_found_by_the_mark_they_inherit(prelude: str):
    """Also those of Ray, which write their titles over it, unless told not to."""
    child = subprocess.Popen(
        [sys.executable, "-c", prelude + "print(flush=True); input()"], env=os.environ | marking("one"),
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert child.stdout is not None
    child.stdout.read(1)
    assert [process.pid for process in marked_processes("one")] == [child.pid]
    assert marked_processes("other") == []
    child.communicate(b"\n")
    assert marked_processes("one") == []


def test_closing_a_head_ends_all_that_it_started(tmp_path: Path):
    """Also what is started by a process that is about to be killed."""
    head = HeadProcess(tmp_path / "head.yaml", tmp_path, tmp_path / "log")
    head.mark = "two"
    script = "import os, time\nwhile True:\n  if not os.fork(): os.execvp('sleep', ['sleep', '9'])\n  time.sleep(0.02)"
    starter = subprocess.Popen([sys.executable, "-c", script], env=os.environ | marking("two"))
    until(lambda: len(marked_processes("two")) > 3, "children", 20)
    head.close()
    assert marked_processes("two") == []
    starter.wait()


def test_waiting_ends_with_what_did_not_happen():
    until(lambda: True, "nothing")
    with pytest.raises(TimeoutError, match=r"within 0\.05 s: a pipeline"):
        until(lambda: False, "a pipeline", 0.05)
