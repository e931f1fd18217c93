from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.text.tools.json_value import JsonValueEnd
from tests.support.tools.texts import json_values


@given(value=json_values, indent=st.sampled_from([None, 1]), rest=st.sampled_from([",", "}", " ", "\n}"]))
def test_the_end_of_a_value(value: Any, indent: int | None, rest: str) -> None:
    text = json.dumps(value, indent=indent)
    for pieces in ([text + rest], list(text + rest)):
        end, read = JsonValueEnd(), ""
        for piece in pieces:
            if not end.done:
                read += piece[: end.read(piece)]
        assert (read, end.done, end.broken) == (text, True, False)


@pytest.mark.parametrize("text", ["<", "{'a'", "[1, <", "1<", '{"a": `'])
def test_what_no_json_has(text: str) -> None:
    end = JsonValueEnd()
    assert end.read(text) < len(text)
    assert end.broken
    assert not end.done
