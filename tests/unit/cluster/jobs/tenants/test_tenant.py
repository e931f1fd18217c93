"""Whose a thing is: names, ids of documents, salts of KV."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cluster.jobs.model import DocumentRecord, check_id
from cluster.jobs.tenants.tenant import ANYONE, Tenant, cache_salt, kv_owner_of, owned_id

NAMES = st.text(st.characters(codec="ascii", categories=("L", "N", "P")), max_size=12)
DOCUMENT = "doc_" + "0" * 32


def test_a_tenant_sees_its_own_and_an_admin_all() -> None:
    for owner in ("", "a", "b", None):
        assert Tenant("a").sees(owner) == (owner == "a")
        assert Tenant("a", is_admin=True).sees(owner)
        assert ANYONE.sees(owner)
    assert not Tenant("").sees(None)


@given(NAMES, NAMES)
def test_a_text_is_another_document_for_each_owner(one: str, other: str) -> None:
    ids = owned_id(one, DOCUMENT), owned_id(other, DOCUMENT)
    assert (ids[0] == ids[1]) == (one == other)
    for document_id in ids:
        check_id(document_id, "doc")
    assert owned_id("", DOCUMENT) == DOCUMENT
    assert owned_id(one, "doc_" + "1" * 32) != ids[0]


@given(NAMES, st.text(max_size=12), NAMES, st.text(max_size=12))
def test_no_salt_is_that_of_another_owner(one: str, salt: str, other: str, another: str) -> None:
    assert (cache_salt(one, salt) == cache_salt(other, another)) == ((one, salt) == (other, another))


def test_the_kv_of_a_shared_document_is_everybodys() -> None:
    record = DocumentRecord(DOCUMENT, "a", 1, 0.0, 0.0, owner="law")
    assert kv_owner_of(record) == "law"
    assert kv_owner_of(DocumentRecord(DOCUMENT, "a", 1, 0.0, 0.0, owner="law", shared=True)) == ""
