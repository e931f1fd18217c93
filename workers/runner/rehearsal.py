"""Steps before the first: a small one, and the largest, to learn what device memory it takes beside weights and KV.

In the largest, one page of KV stands for all pages of the context: kernels read as much as they will, of the same rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from protos.model.grid import is_sparse, last_cut, whole_cells
from protos.model.spec import ModelSpec
from protos.stage.messages import SampleSpec, SamplingParams, SequenceSlice, StepPlan
from workers.kv.paged import PagedKV
from workers.runner.model_runner import ModelRunner


class DeviceMemory(Protocol):
    """What `torch.cuda` says of the memory of a device."""

    def synchronize(self, device: torch.device) -> None: ...
    def empty_cache(self) -> None: ...
    def reset_peak_memory_stats(self, device: torch.device) -> None: ...
    def memory_allocated(self, device: torch.device) -> int: ...
    def max_memory_allocated(self, device: torch.device) -> int: ...


@dataclass(frozen=True, slots=True)
class StepSize:
    """The most tokens of a step, the context of its last row, and the page size, in tokens."""

    tokens: int
    context: int
    page_size: int


def largest_plan(spec: ModelSpec, size: StepSize) -> StepPlan:
    """Return a plan of the last step of a prompt as long as the context, all of whose pages are page 0."""
    start = last_cut(spec, max(0, size.context - size.tokens), size.context)
    length = min(size.tokens, size.context - start)
    if is_sparse(spec, start, size.context):
        length = whole_cells(spec, start, size.tokens, size.context)
    pages = -(-(start + length) // size.page_size)
    part = SequenceSlice(0, start, length, size.context, [0] * length, [0] * pages, pages, None)
    return StepPlan(0, (part,))


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
    make_runner: Callable[[PagedKV], ModelRunner], kv: PagedKV, spec: ModelSpec, size: StepSize, memory: DeviceMemory
) -> int:
    """Execute the largest step and return the bytes it took at most; they are given back to the device.

    Args:
        make_runner: makes the runner of the shard over a cache.
        kv: one page of every layer.
        memory: of the runner's device: `torch.cuda`.

    Raises:
        ValueError: the device is too small, in one line with the way out.
    """
    for layer in range(kv.num_layers):
        rows = kv.layer(layer)
        for side in (rows.keys, rows.values, rows.key_scales, rows.value_scales):
            if side is not None:
                side.zero_()  # finite numbers
    runner = make_runner(kv)
    device, plan = runner.device, largest_plan(spec, size)
    hidden = None
    if not runner.shard.is_first:
        hidden = torch.zeros(plan.num_tokens, runner.hidden_size, dtype=runner.dtype, device=device)
    memory.synchronize(device)
    memory.reset_peak_memory_stats(device)
    before = memory.memory_allocated(device) - (0 if hidden is None else hidden.nbytes)
    try:
        runner.execute(plan, hidden)
        memory.synchronize(device)
        return max(1, memory.max_memory_allocated(device) - before)
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"prefill.max_num_batched_tokens: {size.tokens}: a step of so many tokens at the end of a context of "
            f"{size.context} does not fit on the device beside the weights: lower it, lower model.max_model_len, or "
            "split the model over more devices"
        ) from error
    finally:
        del runner, hidden
        memory.empty_cache()
