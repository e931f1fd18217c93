"""What a shard reports of its steps for measuring: moments, the cost of links and reductions, tokens of each expert.

There is none unless `StartRequest.trace` asks for it. Moments are `time.perf_counter()`, which on Linux is the
monotonic clock that all processes of a machine share.
"""

from __future__ import annotations

import platform
import time

import torch

from protos.stage.messages import ExpertCounts, StepTrace
from workers.transport.collectives import Collectives


class TimedCollectives(Collectives):
    """The reductions of a group, with the time spent in them; who joins and leaves uses the group itself."""

    def __init__(self, group: Collectives) -> None:
        self.rank, self.size = group.rank, group.size
        self.seconds = 0.0
        self.bytes = 0
        self._group = group

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        began = time.perf_counter()
        out = self._group.all_reduce(tensor)
        self._note(began, tensor)
        return out

    def all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        began = time.perf_counter()
        out = self._group.all_gather(tensor)
        self._note(began, tensor)
        return out

    def _note(self, began: float, tensor: torch.Tensor) -> None:
        self.seconds += time.perf_counter() - began
        self.bytes += tensor.nbytes


class Tracer:
    """Collects the trace of one step after the other; used by the thread that computes."""

    def __init__(self, group: Collectives, num_experts: int) -> None:
        self.collectives = TimedCollectives(group) if group.size > 1 else group
        self._num_experts = num_experts
        self._node = platform.node()
        self._experts: dict[int, torch.Tensor] = {}  # layer -> tokens of each expert
        self._trace: StepTrace | None = None

    def count_experts(self, layer: int, experts: torch.Tensor) -> None:
        """Count the tokens of each expert in a layer; `experts` `[T, k]` are ids."""
        self._experts[layer] = torch.bincount(experts.flatten(), minlength=self._num_experts)

    def end_step(self, began: float, came: float, ended: float, sent_bytes: int) -> None:
        """Note a step that has been handed to the link just now; moments are seconds of `perf_counter`."""
        reduced = self.collectives if isinstance(self.collectives, TimedCollectives) else None
        self._trace = StepTrace(
            self._node, _us(began), _us(came), _us(ended), _us(time.perf_counter()), sent_bytes,
            _us(reduced.seconds) if reduced else 0, reduced.bytes if reduced else 0,
            tuple(ExpertCounts(layer, counts.tolist()) for layer, counts in sorted(self._experts.items())),
        )  # fmt: skip
        self._experts.clear()
        if reduced is not None:
            reduced.seconds, reduced.bytes = 0.0, 0

    def take(self) -> StepTrace | None:
        """Return the trace of the step that ended last, once; None where nothing was computed."""
        trace, self._trace = self._trace, None
        return trace


def _us(seconds: float) -> int:
    return round(seconds * 1e6)
