"""Steps before the first: a small one, and the largest, to learn what device memory it takes beside weights and KV.

In the largest, one page of KV stands for all pages of the context: kernels read as much as they will, of the same rows.
It samples as many rows as a step may, one of them with noise and filters, and scores as many as it does at a time.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from protos.model.grid import is_sparse, last_cut, whole_cells
from protos.model.spec import ModelSpec
from protos.stage.messages import SampleSpec, SamplingParams, SequenceSlice, StepPlan
from workers.kv.paged import PagedKV
from workers.runner.model_runner import SCORED_ROWS, ModelRunner

_log = logging.getLogger(__name__)
_NOISY = SamplingParams(temperature=1.0, top_p=0.5)  # what takes most memory


class DeviceMemory(Protocol):
    """What `torch.cuda` says of the memory of a device."""

    def synchronize(self, device: torch.device) -> None: ...
    def empty_cache(self) -> None: ...
    def reset_peak_memory_stats(self, device: torch.device) -> None: ...
    def memory_allocated(self, device: torch.device) -> int: ...
    def max_memory_allocated(self, device: torch.device) -> int: ...


@dataclass(frozen=True, slots=True)
class StepSize:
    """The most tokens of a step, the context of its last row, the page size in tokens, and its sampled rows."""

    tokens: int
    context: int
    page_size: int
    sampled: int = 1


def largest_plan(spec: ModelSpec, size: StepSize) -> StepPlan:
    """Return a plan of the last step of a prompt as long as the context, beside sequences of one token.

    All pages are page 0. Sparse cells are not cut, so the others come on top of theirs.
    """
    others = min(size.sampled, size.tokens) - 1
    start = last_cut(spec, max(0, size.context - (size.tokens - others)), size.context)
    length = min(size.tokens - others, size.context - start)
    if is_sparse(spec, start, size.context):
        length = whole_cells(spec, start, size.tokens, size.context)
    pages = -(-(start + length) // size.page_size)
    scored = [0] * min(length, SCORED_ROWS)
    long = SequenceSlice(
        0, start, length, size.context, [0] * length, [0] * pages, pages, SampleSpec(_NOISY, 0), targets=scored, top=1
    )
    greedy = SampleSpec(SamplingParams(), 0)
    short = (SequenceSlice(1 + index, 0, 1, 1, [0], [0], 1, greedy) for index in range(others))
    return StepPlan(0, (long, *short))


def warm_up(runner: ModelRunner, page_size: int) -> None:
    """Execute one small step, so that the first real one does not pay for first-use initialisation."""
    length = min(page_size, 16)
    part = SequenceSlice(0, 0, length, length, [0] * length, [0], 1, SampleSpec(SamplingParams(), 0))
    hidden = None
    if not runner.shard.is_first:
        hidden = torch.zeros(length, runner.hidden_size, dtype=runner.dtype, device=runner.device)
    runner.execute(StepPlan(0, (part,)), hidden)
    runner.reset()


def rehearse(
    make_runner: Callable[[PagedKV], ModelRunner], kv: PagedKV, spec: ModelSpec, size: StepSize, memory: DeviceMemory,
    must_fit: bool = True,
) -> int:  # fmt: skip
    """Execute the largest step and return the bytes it took at most; they are given back to the device.

    Args:
        make_runner: makes the runner of the shard over a cache.
        kv: one page of every layer.
        memory: of the runner's device: `torch.cuda`.
        must_fit: else 0 is returned for a step that does not.

    Raises:
        ValueError: the device is too small, in one line with the way out.
    """
    for layer in range(kv.num_layers):
        rows = kv.layer(layer)
        for side in (rows.keys, rows.values, rows.key_scales, rows.value_scales):
            if side is not None:
                side.zero_()  # finite numbers
    try:
        return _peak(make_runner(kv), largest_plan(spec, size), memory)
    except torch.OutOfMemoryError as error:
        step = f"a step of {size.tokens} tokens at the end of a context of {size.context}"
        if must_fit:
            raise ValueError(
                f"prefill.max_num_batched_tokens: {size.tokens}: {step} does not fit on the device beside the weights: "
                "lower it, lower model.max_model_len, or split the model over more devices"
            ) from error
        _log.warning("%s, the longest that KV may hold, does not fit on the device: its memory is estimated", step)
        return 0
    finally:
        memory.empty_cache()  # what the step had is free by now


def _peak(runner: ModelRunner, plan: StepPlan, memory: DeviceMemory) -> int:
    """Return the bytes that a step takes at most, at least 1."""
    device, hidden = runner.device, None
    if not runner.shard.is_first:
        hidden = torch.zeros(plan.num_tokens, runner.hidden_size, dtype=runner.dtype, device=device)
    memory.synchronize(device)
    memory.reset_peak_memory_stats(device)
    before = memory.memory_allocated(device) - (0 if hidden is None else hidden.nbytes)
    runner.execute(plan, hidden)
    memory.synchronize(device)
    return max(1, memory.max_memory_allocated(device) - before)
