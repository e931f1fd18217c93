"""One at a time is at work on a stored block."""

from cluster.kv_store.claims import KeyClaims


def test_a_key_has_one_owner() -> None:
    claims = KeyClaims()
    assert claims.take([b"a", b"b"]) == {b"a", b"b"}
    assert claims.take([b"b", b"c"]) == {b"c"}
    claims.give_back([b"b"])
    assert claims.take([b"a", b"b", b"c"]) == {b"b"}
