"""Files with token ids: lists of whole numbers, and what is said of everything else."""

import json

import pytest

from cluster.tools.token_ids import check_num_bytes, parse_token_ids


@pytest.mark.parametrize(
    ("data", "ids"), [(b"[]", []), (b"[1]", [1]), (b" [0, -1, 99999999999]\n", [0, -1, 99999999999])]
)
def test_lists(data: bytes, ids: list[int]) -> None:
    assert parse_token_ids(data) == ids


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "not JSON"), (b"[1,", "not JSON"), (b"\xff", "not JSON"), (b"[" * 100_000, "not JSON"),
        (b"{}", "must be a JSON list"), (b"7", "must be a JSON list"), (b"[1.0]", "whole numbers"),
        (b"[true]", "whole numbers"), (b'["1"]', "whole numbers"), (b"[[1]]", "whole numbers"),
    ],
)  # fmt: skip
def test_everything_else_is_refused(data: bytes, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        parse_token_ids(data)


def test_a_file_is_measured_before_it_is_read() -> None:
    ids = json.dumps([2**32 - 1] * 4096, indent=8).encode()
    check_num_bytes(len(ids), 4096)
    with pytest.raises(ValueError, match=r"^10000000000 bytes: must be at most 262208 for max_model_len 4096$"):
        check_num_bytes(10**10, 4096)
