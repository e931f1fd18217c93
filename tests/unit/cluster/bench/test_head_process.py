"""How the processes of a head are found."""

import os
import subprocess
import sys

import pytest

from cluster.bench.head_process import MARK, marked_processes, until


def test_processes_are_found_by_the_mark_they_inherit():
    child = subprocess.Popen(
        [sys.executable, "-c", "print(flush=True); input()"], env=os.environ | {MARK: "one"},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert child.stdout is not None
    child.stdout.read(1)
    assert [process.pid for process in marked_processes("one")] == [child.pid]
    assert marked_processes("other") == []
    child.communicate(b"\n")
    assert marked_processes("one") == []


def test_waiting_ends_with_what_did_not_happen():
    until(lambda: True, "nothing")
    with pytest.raises(TimeoutError, match=r"within 0\.05 s: a pipeline"):
        until(lambda: False, "a pipeline", 0.05)
