"""The running of an evaluation that has a cell a mode and document: what the needle and task evaluations share.

Each mode is one cluster. A cell that fails holds the reason and leaves the others as they are.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Generic, TypeVar

from cluster.common.errors import ClusterError, EngineError
from cluster.common.text_format import one_line
from cluster.config.deployment import Deployment
from cluster.engine.attention_report import describe_sparsity
from cluster.engine.outputs import Generation
from cluster.engine.runtime import ClusterRuntime
from cluster.tools.display import Display
from protos.errors import UserError
from protos.model.spec import ModelSpec
from protos.node.node_check import NodeError

_BROKEN = (ClusterError, NodeError)  # the cluster's fault, not the input's
Cell = dict[str, Any]
D = TypeVar("D")  # what makes a cell in every mode


def check_grid(lengths: Sequence[int], modes: Sequence[str]) -> None:
    """Raise UserError unless a grid has lengths and modes, and each of them once."""
    for name, values in (("--lengths", lengths), ("--modes", modes)):
        if not values or len(set(values)) < len(values):
            raise UserError(f"{name}: {','.join(map(str, values))}: must name at least one, and each once")


class GridRun(ABC, Generic[D]):
    """One evaluation, run once by `run`; `report` can be written at any time. Subclasses set all four attributes."""

    deployments: Mapping[str, Deployment]  # by mode
    documents: Sequence[D]
    report: dict[str, Any]  # with `cells`
    display: Display

    @abstractmethod
    def ask(self, runtime: ClusterRuntime, document: D) -> Cell:
        """Return the outcome of one document. Raises UserError, EngineError or another error of the cluster."""

    @abstractmethod
    def place(self, document: D) -> Cell:
        """Return the fields that say which document a cell is about."""

    @abstractmethod
    def name(self, document: D) -> str:
        """Return what progress calls a document."""

    @abstractmethod
    def summary(self, cell: Cell) -> str:
        """Return the line about a finished cell."""

    def run(self, on_cell: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
        """Run every mode, but for cells the report has, and return the report.

        Args:
            on_cell: called with the report after every cell, and once it is complete.

        Raises:
            UserError: a checkpoint cannot be loaded. A cluster that fails is reported in its cells.
        """
        for mode, deployment in self.deployments.items():
            self._run_mode(mode, deployment, on_cell)
        self.report["complete"] = True
        on_cell(self.report)
        return self.report

    def _run_mode(self, mode: str, deployment: Deployment, on_cell: Callable[[dict[str, Any]], None]) -> None:
        waiting = [document for document in self.documents if not self._has(mode, document)]
        if not waiting:
            return
        self.display.label(mode)
        runtime = ClusterRuntime(deployment, self.display.launch)
        start: Callable[[], None] | None = runtime.start
        try:
            while waiting:
                if start is not None:
                    start()
                start = None
                self.display.label(f"{mode} {self.name(waiting[0])}")
                try:
                    cell = self.ask(runtime, waiting[0])
                except (UserError, *_BROKEN) as error:
                    cell = {"error": str(error)}
                    start = runtime.restart if isinstance(error, _BROKEN) else None
                self._add(mode, waiting.pop(0), cell, on_cell)
        except _BROKEN as error:
            for document in waiting:
                self._add(mode, document, {"error": f"the cluster did not start: {error}"}, on_cell)
        finally:
            runtime.close()
            self.display.label("")

    def _has(self, mode: str, document: D) -> bool:
        wanted = {"mode": mode} | self.place(document)
        return any(all(cell.get(key) == value for key, value in wanted.items()) for cell in self.report["cells"])

    def _add(self, mode: str, document: D, cell: Cell, on_cell: Callable[[dict[str, Any]], None]) -> None:
        self.report["cells"].append({"mode": mode} | self.place(document) | cell)
        on_cell(self.report)
        done, total = len(self.report["cells"]), len(self.documents) * len(self.deployments)
        said = f"failed: {cell['error']}" if "error" in cell else self.summary(cell)
        self.display.say(f"[{done}/{total}] {mode} {self.name(document)}: {one_line(said)}")


def raise_failed(answers: Sequence[Generation]) -> None:
    """Raise EngineError for the first answer that failed."""
    failed = [answer.error for answer in answers if answer.error]
    if failed:
        raise EngineError(failed[0])


def measurements(answers: Sequence[Generation]) -> dict[str, Any]:
    """Return what reading took, by the question that computed most of it (seconds, tokens a second)."""
    reader = min(answers, key=lambda answer: answer.cached_tokens)
    computed, seconds = reader.prompt_tokens - reader.cached_tokens, reader.timings.prefill_s
    figures: dict[str, Any] = {
        "ttft_s": round(min(answer.timings.ttft_s for answer in answers), 3),
        "prefill_tokens_per_s": round(computed / seconds, 1) if seconds > 0 else None,
        "cached_tokens": sum(answer.cached_tokens for answer in answers),
    }
    if reader.attention is not None and reader.attention.mode == "sparse":
        figures["attention"] = reader.attention.to_json()
        del figures["attention"]["layers"]  # `eval recall` is for the figures of single heads
    return figures


def positions(spec: ModelSpec) -> dict[str, Any]:
    """Return what distinguishes a mode from the others, as the model will compute it."""
    facts: dict[str, Any] = {"rope": spec.rope.kind, "factor": spec.rope.factor}
    if spec.dual_chunk is not None:
        facts["dual_chunk"] = asdict(spec.dual_chunk)
    if spec.sparse is not None:
        facts["sparse"] = describe_sparsity(spec)
    return facts


def layout(deployment: Deployment) -> str:
    """Return stages and shards as results name them."""
    cluster = deployment.config.cluster
    return f"{cluster.pipeline_parallel_size} x {cluster.expert_parallel_size}"
