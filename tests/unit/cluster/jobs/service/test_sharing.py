"""Who shares computed prompts with whom: the jobs of one API key, or all; documents that are shared always."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cluster.jobs.model import JobConflict, JobInput, JobSpec
from cluster.jobs.tenants.tenant import Tenant
from protos.jobs.sampling import AnswerOptions
from tests.support.rigs.service import Bench

ALICE = Tenant("alice")
PROMPT = JobInput(token_ids=tuple(range(5, 105)))


def set_sharing(bench: Bench, share_across_keys: bool) -> None:
    deployment = bench.runtime.deployment
    prefill = deployment.config.prefill.model_copy(update={"share_across_keys": share_across_keys})
    config = deployment.config.model_copy(update={"prefill": prefill})
    bench.runtime.deployment = replace(deployment, config=config)


def cached(bench: Bench, key_name: str, given: JobInput = PROMPT, salt: str = "") -> int:
    record = bench.service.submit(JobSpec(given, AnswerOptions(max_tokens=2), cache_salt=salt), Tenant(key_name))
    bench.service.wait(record.id, 20)
    return bench.service.get(record.id).answers[0].cached_tokens


@pytest.mark.parametrize("share_across_keys", [True, False])
def test_jobs_of_another_key_find_nothing_unless_keys_share(bench: Bench, share_across_keys: bool) -> None:
    set_sharing(bench, share_across_keys)
    assert cached(bench, "alice") == 0
    assert cached(bench, "bob") == (96 if share_across_keys else 0)
    assert cached(bench, "alice") == 96


@pytest.mark.parametrize("share_across_keys", [True, False])
def test_a_request_may_share_with_those_of_its_own_salt_only(bench: Bench, share_across_keys: bool) -> None:
    set_sharing(bench, share_across_keys)
    assert [cached(bench, "alice", salt=salt) for salt in ("", "x", "x", "y", "alice")] == [0, 0, 96, 0, 0]
    assert cached(bench, "bob", salt="x") == (96 if share_across_keys else 0)


@pytest.mark.parametrize("shared", [False, True])
def test_kv_of_a_document_is_its_owners_unless_it_is_shared(bench: Bench, shared: bool) -> None:
    set_sharing(bench, False)
    found = {}
    for name in ("alice", "bob"):
        document = bench.service.documents.put("a", [b"words " * 100], 1 << 20, tenant=Tenant(name), shared=shared)
        found[name] = cached(bench, name, JobInput(document_id=document.id, questions=("why?",)))
    assert found["alice"] == 0
    assert (found["bob"] > 0) == shared


def test_no_salt_is_taken_for_another_key(bench: Bench) -> None:
    set_sharing(bench, False)
    document = bench.service.documents.put("a", [b"words " * 100], 1 << 20, tenant=Tenant("bob"), shared=True)
    given = JobInput(document_id=document.id, questions=("why?",))
    assert cached(bench, "alice") == 0
    assert cached(bench, "bob", salt="alice") == 0
    prompt = bench.service.get(bench.service.submit(JobSpec(given, AnswerOptions(), cache_salt="alice")).id)
    assert prompt.spec.cache_salt == "\nalice"


def test_a_repeated_submission_is_the_same_job_whatever_is_shared(bench: Bench) -> None:
    set_sharing(bench, False)
    spec = JobSpec(PROMPT, AnswerOptions(max_tokens=2), idempotency_key="once")
    first = bench.service.submit(spec, ALICE)
    set_sharing(bench, True)
    assert bench.service.submit(spec, ALICE).id == first.id
    with pytest.raises(JobConflict):
        bench.service.submit(replace(spec, priority=3), ALICE)
    assert JobSpec.from_json(bench.service.get(first.id).spec.to_json()).cache_salt == "alice"


def test_what_a_key_asks_about_a_shared_document_is_its_own(bench: Bench) -> None:
    """Or a guess would tell by its cached tokens that somebody has asked just that."""
    set_sharing(bench, False)
    document = bench.service.documents.put("a", [b"words " * 100], 1 << 20, tenant=ALICE, shared=True)
    given = JobInput(document_id=document.id, questions=("why is it secret? " * 20,))
    prefix = bench.service.document_tokens.head_tokens() + bench.service.count_document(document.id)
    assert cached(bench, "alice", given) == 0
    whole = cached(bench, "alice", given)
    assert whole > prefix + 32
    assert prefix - 16 <= cached(bench, "bob", given) <= prefix
    assert cached(bench, "bob", given) == whole
