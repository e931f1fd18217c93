"""Prometheus metrics of the job service: vLLM's names under `longreach_`, with buckets that reach hours."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest, make_wsgi_app
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from cluster.common.errors import PreflightError
from cluster.common.watched_thread import WatchedThreads
from cluster.jobs.model import JobRecord
from cluster.latency.step_work import UNITS
from cluster.server.metrics_http import BoundedServer

if TYPE_CHECKING:
    from cluster.engine.runtime import ClusterRuntime
    from cluster.jobs.service import JobService

# bucket bounds of the histograms
SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200, 14400)
TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
TOKENS = (128, 1024, 8192, 32768, 65536, 131072, 262144, 524288, 1048576)
DENSITIES = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1)
RECALLS = (0.5, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98, 0.99, 1)


MAX_KEYS = 100  # names of API keys that are told apart in a process; jobs of further ones count together
OTHER_KEYS = "(others)"


class KeyMetrics:
    """Counters of ended jobs by the name of the API key that owns them; without keys there are none."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._names: set[str] = set()
        self._jobs = Counter(
            "longreach_key_jobs", "Ended jobs by API key and state.", ["key", "state"], registry=registry
        )
        self._tokens = Counter(
            "longreach_key_tokens", "Tokens of ended jobs by API key: of prompts, found computed, generated.",
            ["key", "kind"], registry=registry,
        )  # fmt: skip

    def observe(self, record: JobRecord, generated: dict[int, int]) -> None:
        """Count an ended job; `generated`: tokens by question."""
        if not record.owner:
            return
        if len(self._names) < MAX_KEYS:
            self._names.add(record.owner)
        key = record.owner if record.owner in self._names else OTHER_KEYS
        self._jobs.labels(key, record.state.value).inc()
        self._tokens.labels(key, "prompt").inc(sum(answer.prompt_tokens for answer in record.answers))
        self._tokens.labels(key, "cached").inc(sum(answer.cached_tokens for answer in record.answers))
        self._tokens.labels(key, "generated").inc(sum(generated.values()))


class JobMetrics:
    """Counters and histograms of ended jobs."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"longreach_{name}", text, buckets=buckets, registry=registry)

        self._jobs = Counter("longreach_jobs", "Ended jobs by state.", ["state"], registry=registry)
        self._prompt = Counter("longreach_prompt_tokens", "Prompt tokens of ended questions.", registry=registry)
        self._cached = Counter("longreach_prefix_cache_hits", "Prompt tokens found computed.", registry=registry)
        self._generated = Counter("longreach_generation_tokens", "Tokens generated.", registry=registry)
        self._ttft = histogram("time_to_first_token_seconds", "From submission to the first token.", SECONDS)
        self._queue = histogram("request_queue_time_seconds", "From submission to the first step.", SECONDS)
        self._prefill = histogram("request_prefill_time_seconds", "From the first step to the first token.", SECONDS)
        self._decode = histogram("request_decode_time_seconds", "From the first token to the last.", SECONDS)
        self._e2e = histogram("e2e_request_latency_seconds", "From submission to the end.", SECONDS)
        self._per_token = histogram("time_per_output_token_seconds", "Mean of an answer.", TOKEN_SECONDS)
        self._length = histogram("request_prompt_tokens", "Length of prompts.", TOKENS)
        self._density = Histogram(
            "longreach_sparse_density", "Visited share of the causal pairs of a head, mean of a prompt's cells.",
            ["layer"], buckets=DENSITIES, registry=registry,
        )  # fmt: skip
        self._recall = Histogram(
            "longreach_sparse_recall", "Attention mass of held-out rows that a head keeps, mean of a prompt's cells.",
            ["layer"], buckets=RECALLS, registry=registry,
        )  # fmt: skip
        self._fallbacks = Counter(
            "longreach_sparse_dense_fallbacks", "Heads of cells that turned dense.", ["layer"], registry=registry
        )

    def observe(self, record: JobRecord, generated: dict[int, int]) -> None:
        """Count an ended job.

        Args:
            generated: tokens by question, as far as this head generated them.
        """
        self._jobs.labels(record.state.value).inc()
        for answer in record.answers:
            tokens, timings = generated.get(answer.question, 0), answer.timings
            self._prompt.inc(answer.prompt_tokens)
            self._cached.inc(answer.cached_tokens)
            self._generated.inc(tokens)
            self._length.observe(answer.prompt_tokens)
            for layer in answer.attention.get("layers", ()):
                self._observe_layer(layer)
            if not timings:
                continue
            self._queue.observe(timings["queued_s"])
            self._e2e.observe(timings["total_s"])
            if tokens:
                self._ttft.observe(timings["ttft_s"])
                self._prefill.observe(timings["prefill_s"])
                self._decode.observe(timings["decode_s"])
            if tokens > 1:
                self._per_token.observe(timings["decode_s"] / (tokens - 1))

    def _observe_layer(self, layer: Mapping[str, Any]) -> None:
        """Count one layer (fields of `LayerAttention`); every attention head counts once a prompt."""
        label = str(layer["layer"])
        for density, recall in zip(layer["density"], layer["held_out_recall"], strict=True):
            self._density.labels(label).observe(density)
            self._recall.labels(label).observe(recall)
        self._fallbacks.labels(label).inc(sum(layer["fallbacks"]))


class _Gauges(Collector):
    """Values of the moment: read when metrics are collected."""

    def __init__(self, service: JobService, runtime: ClusterRuntime) -> None:
        self._service = service
        self._runtime = runtime

    def collect(self) -> Iterator[Metric]:
        waiting, running = self._service.counts()
        for name, text, value in (
            ("num_requests_waiting", "Jobs that wait.", waiting),
            ("num_requests_running", "Jobs that run.", running),
            ("kv_cache_usage_perc", "Share of KV pages in use, 0 to 1.", self._runtime.kv_usage),
        ):
            yield GaugeMetricFamily(f"longreach_{name}", text, value=value)
        family = GaugeMetricFamily("longreach_step_model_seconds", "Fitted cost of a step.", labels=["per"])
        coefficients = self._runtime.latency_coefficients
        for label, value in zip(UNITS, coefficients, strict=True):
            family.add_metric([label], value)
        yield family
        yield from self._stored_kv()
        yield from self._recoveries()

    def _recoveries(self) -> Iterator[Metric]:
        supervisor = self._runtime.supervisor
        family = CounterMetricFamily(
            "longreach_recoveries", "Failures of the pipeline that it got over.", labels=["kind"]
        )
        family.add_metric(["repair"], supervisor.num_repaired)
        family.add_metric(["full_restart"], supervisor.num_restarted)
        yield family
        for name, text, value in (
            ("last_recovery_seconds", "How long the newest recovery took.", supervisor.last_recovery_s),
            ("epoch", "Of the pipeline: 1 at its start, one more with each repair.", self._runtime.epoch),
        ):
            yield GaugeMetricFamily(f"longreach_{name}", text, value=value)

    def _stored_kv(self) -> Iterator[Metric]:
        store = self._runtime.kv_store
        counters = store.stats.counters()
        family = CounterMetricFamily("longreach_kv_store_blocks", "Blocks of KV and their fate.", labels=["event"])
        for event in ("stored", "loaded", "found", "damaged", "evicted", "not_stored"):
            family.add_metric([event], counters[f"{event}_blocks"])
        yield family
        family = CounterMetricFamily("longreach_kv_store_bytes", "Bytes written and read.", labels=["event"])
        for event in ("stored", "loaded"):
            family.add_metric([event], counters[f"{event}_bytes"])
        yield family
        family = CounterMetricFamily("longreach_kv_store_seconds", "Time of writing and reading.", labels=["event"])
        for event, name in (("stored", "store_s"), ("loaded", "load_s")):
            family.add_metric([event], counters[name])
        yield family
        for name, text, value in (
            ("size_bytes", "Bytes of stored KV on all nodes.", store.size_bytes),
            ("max_bytes", "Quota of stored KV on all nodes.", store.max_bytes),
            ("is_full", "1 while storing pauses because the disk is full.", store.is_full),
        ):
            yield GaugeMetricFamily(f"longreach_kv_store_{name}", text, value=value)


class MetricsServer:
    """Serves `/metrics` over HTTP on `server.metrics_port`; port 0 means that there is no server."""

    def __init__(self, service: JobService, runtime: ClusterRuntime, host: str, port: int) -> None:
        self.registry = CollectorRegistry()
        self.jobs = JobMetrics(self.registry)
        self.registry.register(_Gauges(service, runtime))
        Gauge("longreach_info", "Version.", ["version"], registry=self.registry).labels(runtime.version).set(1)
        self._host, self._port = host, port
        self._server: BoundedServer | None = None
        self.threads = WatchedThreads("metrics")
        service.on_ended(self.jobs.observe)
        service.on_ended(KeyMetrics(self.registry).observe)

    def text(self) -> bytes:
        """Return all metrics in the text format."""
        return generate_latest(self.registry)

    def start(self) -> None:
        """Bind the port and answer. Raises PreflightError when it is taken."""
        if not self._port:
            return
        try:
            self._server = BoundedServer(self._host, self._port, make_wsgi_app(self.registry))
        except OSError as error:
            raise PreflightError(f"server.metrics_port: {self._port}: cannot be bound ({error.strerror})") from error
        thread = threading.Thread(target=self._server.serve_forever, name="metrics", daemon=True)
        thread.start()
        self.threads.watch([thread])

    def close(self) -> None:
        """Stop answering; may be called twice."""
        if self._server is not None:
            if not self.threads.is_dead:  # it would be waited for
                self._server.shutdown()
            self.threads.release()
            self._server.server_close()
            self._server = None
