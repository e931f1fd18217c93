"""Ids of documents that were appended to each other."""

from __future__ import annotations

import hashlib
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.jobs.document.chain import ChainDigest, chain_ids


def reference(content: bytes, seams: list[int]) -> list[str]:
    ids: list[str] = []
    for begin, end in pairwise([0, *seams, len(content)]):
        before = f"{ids[-1]}\n".encode() if ids else b""
        ids.append(f"doc_{hashlib.sha256(before + content[begin:end]).hexdigest()[:32]}")
    return ids


@given(st.binary(min_size=8, max_size=40), st.sets(st.integers(1, 7)), st.integers(1, 9))
def test_in_pieces_and_at_once(content: bytes, cuts: set[int], size: int) -> None:
    seams = sorted(cuts)
    chain = ChainDigest(seams)
    for at in range(0, len(content), size):
        chain.update(content[at : at + size])
    assert [*chain.ids, chain.document_id] == chain_ids(content, seams) == reference(content, seams)


@pytest.mark.parametrize("seams", [[], [3]])
def test_seams_decide(seams: list[int]) -> None:
    whole = chain_ids(b"abcdef", [])[-1]
    assert (chain_ids(b"abcdef", seams)[-1] == whole) == (not seams)
