"""One run of a benchmark: rows of repeats, written after each, with progress."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from cluster.bench.speed.head import Layout, MeasuredHead, measured_head
from cluster.bench.speed.machine import LoadOfOthers, describe_machine
from cluster.bench.speed.repeats import Repeats, Values, summarise
from cluster.bench.speed.settings import Bench
from cluster.common.units import format_count
from cluster.tools.display import Display

Write = Callable[[dict[str, Any]], object]


@dataclass
class Run:
    """A benchmark that runs: collects rows in `report` and hands it to `write` after each of them."""

    bench: Bench
    display: Display
    write: Write = lambda report: None
    total: int = 0  # rows that are expected, for the progress bar
    load: LoadOfOthers | None = None
    report: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        machine = describe_machine()
        self.load = self.load or LoadOfOthers(machine["cores_of_machine"])
        self.report |= {
            "what": f"bench {self.bench.settings.bench}",
            "config": self.bench.as_json(),
            "seed": self.bench.settings.seed,
            "machine": machine,
            "complete": False,
            "rows": [],
        }

    @property
    def repeats(self) -> Repeats:
        settings = self.bench.settings
        return Repeats(settings.repeats, settings.retries, settings.max_others)

    def seed(self, *parts: int) -> int:
        """Return a seed of a prompt that no other of this run begins with."""
        seed = self.bench.settings.seed
        for part in parts:
            seed = (seed * 1_000_003 + part + 1) % (1 << 61)
        return seed

    def head(self, mode: str, layout: Layout, tokens: int, **more: Any) -> Any:
        """Return a context that starts a head; see `measured_head`. What the model is goes to the report."""
        self.display.label(f"{mode}, {layout}")
        return measured_head(self.bench, mode, layout, tokens, on_status=self.display.launch, **more)

    def note_model(self, head: MeasuredHead) -> None:
        """Say in the report which model and sizes were measured."""
        config, spec = head.deployment.config, head.deployment.spec
        self.report["model"] = {
            "name": config.model.served_model_name, "fingerprint": head.runtime.launched.fingerprint,
            "layers": spec.num_hidden_layers, "hidden": spec.hidden_size, "experts": spec.num_experts,
            "experts_a_token": spec.num_experts_per_tok, "dtype": head.runtime.launched.dtype,
            "kernels": head.runtime.launched.kernel_family,
        }  # fmt: skip
        self.report.setdefault("chunk", {})[self.display_label(head)] = config.prefill.max_num_batched_tokens

    @staticmethod
    def display_label(head: MeasuredHead) -> str:
        """Return how the report names the layout of a head."""
        cluster = head.deployment.config.cluster
        return f"{cluster.pipeline_parallel_size} x {cluster.expert_parallel_size}"

    def row(
        self, key: Mapping[str, Any], measure: Callable[[int], Values],
        after: Callable[[], Mapping[str, Any]] = dict,
    ) -> dict[str, Any]:  # fmt: skip
        """Measure one row in repeats, and add it to the report. A row of an earlier round gets them as further ones.

        Args:
            key: what the row is about.
            measure: gives the figures of the repeat with this number, counted over all rounds.
            after: gives more for the row, once its repeats are done.
        """
        assert self.load is not None
        rows: list[dict[str, Any]] = self.report["rows"]
        earlier = next((row for row in rows if key.items() <= row.items()), None)
        runs = [] if earlier is None else list(earlier["runs"])
        first = len(runs)
        runs += self.repeats.run(
            lambda number: measure(first + number), self.load, lambda number: self._show(key, first + number)
        )
        measured = {**key, **summarise(runs), **after()}
        if earlier is None:
            return self.add(measured)
        earlier |= measured
        self.write(self.report)
        return earlier

    def add(self, row: dict[str, Any]) -> dict[str, Any]:
        """Add a row to the report and write it."""
        self.report["rows"].append(row)
        self.write(self.report)
        return row

    def finish(self) -> None:
        """Say in the report that nothing is missing."""
        self.report["complete"] = True
        self.write(self.report)

    def _show(self, key: Mapping[str, Any], number: int) -> None:
        self.display.label("")
        jobs = f", {key['jobs']} jobs" if "jobs" in key else ""
        what = f"{key['mode']}, {key['stages']} x {key['shards']}, {format_count(key['length'])} tokens{jobs}"
        self.display.count(f"{what}, repeat {number + 1}: rows", len(self.report["rows"]), self.total)
