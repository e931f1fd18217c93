"""Metrics by API key: what is counted, and how many names there may be. All others are in tests/integration/server."""

from __future__ import annotations

from prometheus_client import CollectorRegistry

from cluster.jobs.model import JobAnswer, JobRecord, JobState
from cluster.jobs.rows import NO_SPEC
from cluster.server.metrics import MAX_KEYS, OTHER_KEYS, KeyMetrics


def record(owner: str) -> JobRecord:
    answers = (JobAnswer(0, 100, 96), JobAnswer(1, 50, 0))
    return JobRecord(f"job_of_{owner}", JobState.SUCCEEDED, NO_SPEC, 1.0, answers=answers, owner=owner)


def test_jobs_and_tokens_are_counted_by_key() -> None:
    registry = CollectorRegistry()
    metrics = KeyMetrics(registry)
    for owner in ("law", "law", "ops", ""):
        metrics.observe(record(owner), {0: 3, 1: 4})
    values = {
        tuple(sample.labels.values()): sample.value
        for family in registry.collect() for sample in family.samples if not sample.name.endswith("_created")
    }  # fmt: skip
    assert values == {
        ("law", "succeeded"): 2, ("ops", "succeeded"): 1, ("law", "prompt"): 300, ("law", "cached"): 192,
        ("law", "generated"): 14, ("ops", "prompt"): 150, ("ops", "cached"): 96, ("ops", "generated"): 7,
    }  # fmt: skip


def test_the_number_of_names_is_bounded() -> None:
    registry = CollectorRegistry()
    metrics = KeyMetrics(registry)
    for number in range(MAX_KEYS + 50):
        metrics.observe(record(f"key {number}"), {})
    metrics.observe(record("key 0"), {})
    names = {
        sample.labels["key"]: sample.value
        for family in registry.collect() for sample in family.samples if sample.name == "longreach_key_jobs_total"
    }  # fmt: skip
    assert (len(names), names["key 0"], names[OTHER_KEYS]) == (MAX_KEYS + 1, 2, 50)
