"""Which chunks count as those around a moment."""

import pytest

from cluster.bench.rig import Chunks
from protos.stage.messages import SequenceSlice, StepPlan


def plan(*lengths: int) -> StepPlan:
    return StepPlan(1, tuple(SequenceSlice(n, 0, length, length, (), (), 1) for n, length in enumerate(lengths)))


@pytest.mark.parametrize(
    ("start", "stop", "expected"),
    [(0.5, 0.6, 1.5), (3.5, 3.6, 3.0), (3.5, 6.5, 3.0), (100.0, 101.0, 4.0), (-9.0, -8.0, 1.0)],
)
def test_chunks_around_a_moment(start: float, stop: float, expected: float):
    chunks = Chunks(200)
    for seconds, ended in ((1.0, 1.0), (2.0, 3.0), (3.0, 6.0), (4.0, 10.0)):
        chunks.note(plan(2048), seconds, ended)
        chunks.note(plan(200), 50.0, ended)  # the short job alone
        chunks.note(plan(1024, 200), 70.0, ended)  # shared
    assert chunks.seconds == [1.0, 2.0, 3.0, 4.0]
    assert chunks.around(start, stop) == expected
