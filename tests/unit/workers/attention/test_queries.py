"""Query rows under their rotations."""

from __future__ import annotations

import pytest
import torch

from workers.attention.plan import Rotation
from workers.attention.queries import Queries


def test_rows_by_rotation() -> None:
    intra, succ, inter = torch.randn(3, 67, 4, 32)
    queries = Queries(intra, succ, inter)
    for rotation, rows in zip(Rotation, (intra, succ, inter), strict=True):
        assert queries.of(rotation) is rows
    part = queries[17:18]
    assert torch.equal(part.of(Rotation.INTER), inter[17:18])
    assert part.intra.data_ptr() == intra[17].data_ptr()


def test_a_rotation_that_is_not_there_is_named() -> None:
    queries = Queries(torch.randn(1, 4, 32))[0:1]
    assert queries.succ is None
    with pytest.raises(AssertionError, match="needs SUCC queries"):
        queries.of(Rotation.SUCC)
