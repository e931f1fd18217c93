"""Groups of a row."""

from __future__ import annotations

import pytest

from protos.model.quant.scheme import QuantScheme


@pytest.mark.parametrize(("group", "columns", "expected"), [(0, 96, 1), (32, 96, 3), (32, 97, 4), (128, 96, 1)])
def test_groups(group: int, columns: int, expected: int) -> None:
    assert QuantScheme("gptq", 4, group=group).groups_of(columns) == expected
