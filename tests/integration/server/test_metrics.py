"""The metrics endpoint as Prometheus sees it: names, types, buckets, what moves after jobs, who may read it."""

from __future__ import annotations

import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from prometheus_client import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families

from cluster.common.errors import PreflightError
from cluster.config.deployment import Config
from cluster.jobs.model import JobState
from cluster.server.metrics import MetricsServer
from tests.support.fakes.runtime import CHUNK
from tests.support.fakes.stage import eventually
from tests.support.rigs.head import free_port
from tests.support.rigs.service import Bench

LABELLED = {  # counters by event or kind
    "kv_store_blocks", "kv_store_bytes", "kv_store_seconds", "recoveries", "key_jobs", "key_tokens",
}  # fmt: skip
COUNTERS = {"jobs", "prompt_tokens", "prefix_cache_hits", "generation_tokens"} | LABELLED
GAUGES = {
    "num_requests_waiting", "num_requests_running", "kv_cache_usage_perc", "step_model_seconds", "info",
    "kv_store_size_bytes", "kv_store_max_bytes", "kv_store_is_full", "last_recovery_seconds", "epoch",
}  # fmt: skip
HISTOGRAMS = {
    "time_to_first_token_seconds", "request_queue_time_seconds", "request_prefill_time_seconds",
    "request_decode_time_seconds", "e2e_request_latency_seconds", "time_per_output_token_seconds",
    "request_prompt_tokens",
}  # fmt: skip
BY_LAYER = {"sparse_density": "histogram", "sparse_recall": "histogram", "sparse_dense_fallbacks": "counter"}
HOUR = 3600.0


@dataclass
class Endpoint:
    bench: Bench
    port: int

    def scrape(self, accept: str = "text/plain") -> tuple[str, str]:
        """(content type, text)."""
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}/metrics", headers={"Accept": accept})
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.headers["Content-Type"], answer.read().decode()

    def families(self) -> dict[str, Metric]:
        return {family.name.removeprefix("longreach_"): family for family in text_string_to_metric_families(
            self.scrape()[1])}  # fmt: skip

    def value(self, name: str, **labels: str) -> float:
        for family in self.families().values():
            for sample in family.samples:
                if sample.name == f"longreach_{name}" and sample.labels == labels:
                    return sample.value
        return 0.0


@pytest.fixture
def endpoint(tmp_path: Path) -> Iterator[Endpoint]:
    bench = Bench(tmp_path)
    port = free_port()
    server = MetricsServer(bench.service, bench.runtime, "127.0.0.1", port)
    server.start()
    yield Endpoint(bench, port)
    server.close()
    server.close()
    bench.close()


def test_names_types_and_help(endpoint: Endpoint) -> None:
    families = endpoint.families()
    named = COUNTERS | GAUGES | HISTOGRAMS | set(BY_LAYER)
    assert {name for name in families if not name.endswith("_created")} == named
    assert {name: families[name].type for name in BY_LAYER} == BY_LAYER
    for names, kind in ((COUNTERS, "counter"), (GAUGES, "gauge"), (HISTOGRAMS, "histogram")):
        for name in names:
            assert families[name].type == kind, name
            assert families[name].documentation.endswith("."), name
    text = endpoint.scrape()[1]
    for line in text.splitlines():
        assert line.startswith(("# HELP longreach_", "# TYPE longreach_", "longreach_")), line
    for name in COUNTERS - {"jobs"} - LABELLED:
        assert f"\nlongreach_{name}_total " in text


def test_stored_kv_is_counted_by_event(endpoint: Endpoint) -> None:
    store = endpoint.bench.runtime.kv_store
    store.stats.add(stored_blocks=3, stored_bytes=300, store_s=1.5, not_stored_blocks=2)
    store.is_full = True
    found = {event: endpoint.value("kv_store_blocks_total", event=event) for event in (
        "stored", "loaded", "found", "damaged", "evicted", "not_stored",
    )}  # fmt: skip
    assert found == {"stored": 3, "loaded": 0, "found": 0, "damaged": 0, "evicted": 0, "not_stored": 2}
    assert endpoint.value("kv_store_bytes_total", event="stored") == 300
    assert endpoint.value("kv_store_seconds_total", event="stored") == 1.5
    assert endpoint.value("kv_store_is_full") == 1


def test_recoveries_are_counted_by_kind(endpoint: Endpoint) -> None:
    supervisor = endpoint.bench.runtime.supervisor
    assert endpoint.value("recoveries_total", kind="repair") == 0
    supervisor.num_repaired, supervisor.num_restarted, supervisor.last_recovery_s = 2, 1, 1.5
    assert [endpoint.value("recoveries_total", kind=kind) for kind in ("repair", "full_restart")] == [2, 1]
    assert (endpoint.value("last_recovery_seconds"), endpoint.value("epoch")) == (1.5, 1)


def test_both_formats_parse(endpoint: Endpoint) -> None:
    endpoint.bench.reaches(endpoint.bench.submit(), JobState.SUCCEEDED)
    kind, text = endpoint.scrape("application/openmetrics-text; version=1.0.0")
    assert kind.startswith("application/openmetrics-text")
    assert {family.name for family in parse_openmetrics(text)} >= {"longreach_jobs", "longreach_prompt_tokens"}
    assert endpoint.scrape()[0].startswith("text/plain")


def test_buckets_reach_hours(endpoint: Endpoint) -> None:
    endpoint.bench.reaches(endpoint.bench.submit(), JobState.SUCCEEDED)
    for name in HISTOGRAMS:
        buckets = [
            float(sample.labels["le"])
            for sample in endpoint.families()[name].samples
            if sample.name.endswith("_bucket")
        ]
        assert buckets == sorted(buckets)
        assert buckets[-1] == float("inf")
        if name == "request_prompt_tokens":
            assert buckets[-2] >= 1 << 20
        elif name == "time_per_output_token_seconds":
            assert (buckets[0], buckets[-2]) == (0.001, 10.0)
        else:
            assert buckets[0] <= 0.05
            assert buckets[-2] >= 4 * HOUR


def test_counters_move_after_jobs(endpoint: Endpoint) -> None:
    bench = endpoint.bench
    eventually(lambda: endpoint.value("jobs_total", state="succeeded") == 0)
    bench.reaches(bench.submit(tokens=20, max_tokens=5), JobState.SUCCEEDED)
    eventually(lambda: endpoint.value("jobs_total", state="succeeded") == 1)
    assert endpoint.value("prompt_tokens_total") == 20
    assert endpoint.value("generation_tokens_total") == 5
    for name in HISTOGRAMS:
        assert endpoint.value(f"{name}_count") == 1, name
    assert endpoint.value("request_prompt_tokens_sum") == 20
    assert 0 < endpoint.value("e2e_request_latency_seconds_sum") < 60
    ttft, e2e = (endpoint.value(f"{n}_sum") for n in ("time_to_first_token_seconds", "e2e_request_latency_seconds"))
    assert ttft <= e2e
    bench.reaches(bench.submit(tokens=20, max_tokens=5), JobState.SUCCEEDED)  # the same prompt: 16 tokens a page
    eventually(lambda: endpoint.value("jobs_total", state="succeeded") == 2)
    assert endpoint.value("prefix_cache_hits_total") == 16
    bench.runtime.shard.hold()
    running = [bench.submit(tokens=3 * CHUNK, first=10 + i) for i in range(3)]
    bench.runtime.shard.let(1)
    eventually(lambda: endpoint.value("num_requests_running") >= 1)
    assert endpoint.value("num_requests_running") + endpoint.value("num_requests_waiting") == 3
    assert 0 < endpoint.value("kv_cache_usage_perc") <= 1
    bench.runtime.shard.let(10_000)
    for job_id in running:
        bench.service.cancel(job_id)
    eventually(lambda: endpoint.value("num_requests_running") + endpoint.value("num_requests_waiting") == 0)
    ended = sum(endpoint.value("jobs_total", state=state.value) for state in JobState)
    assert ended == 5


def test_nothing_of_the_jobs_is_shown(endpoint: Endpoint) -> None:
    secret = "s3cr3t-word"
    job_id = endpoint.bench.submit(labels={secret: secret}, idempotency_key=secret)
    endpoint.bench.reaches(job_id, JobState.SUCCEEDED)
    text = endpoint.scrape()[1]
    assert secret not in text
    assert job_id not in text
    assert str(endpoint.bench.folder) not in text
    labels = {key for family in endpoint.families().values() for sample in family.samples for key in sample.labels}
    assert labels == {"le", "state", "per", "version", "event", "kind"}


def test_only_this_machine_can_read_it(endpoint: Endpoint) -> None:
    assert Config.model_validate({"model": {"path": "x"}}).server.metrics_host == "127.0.0.1"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # sends nothing: asks for the outward address
        try:
            probe.connect(("192.0.2.1", 9))
            outward = probe.getsockname()[0]
        except OSError:
            pytest.skip("this machine has no other address")
    if outward.startswith("127."):
        pytest.skip("this machine has no other address")
    with pytest.raises(OSError):
        socket.create_connection((outward, endpoint.port), timeout=2).close()


def test_a_taken_port_and_no_port(endpoint: Endpoint) -> None:
    second = MetricsServer(endpoint.bench.service, endpoint.bench.runtime, "127.0.0.1", endpoint.port)
    with pytest.raises(PreflightError, match=rf"server\.metrics_port: {endpoint.port}: cannot be bound"):
        second.start()
    second.close()
    MetricsServer(endpoint.bench.service, endpoint.bench.runtime, "127.0.0.1", 0).start()


def test_what_is_no_scrape_does_not_close_it(endpoint: Endpoint) -> None:
    for noise in (b"\x16\x03\x01\x02\x00" * 50, b"GET /metrics\r\n\r\n", b"X" * 100_000):
        with socket.create_connection(("127.0.0.1", endpoint.port), timeout=5) as connection:
            connection.sendall(noise)
    request = urllib.request.Request(f"http://127.0.0.1:{endpoint.port}/metrics", data=b"x", method="POST")
    with pytest.raises(urllib.error.HTTPError, match="405"):
        urllib.request.urlopen(request, timeout=10)
    assert endpoint.value("num_requests_running") == 0
