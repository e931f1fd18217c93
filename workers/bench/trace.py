"""Trace a step of a model without a GPU: its launches, its reads by the host, and the device memory that it takes.

All tensors are on the `meta` device: they have shapes and no content. The runner and the decoder run as on a GPU;
kernels of Triton are replaced where they are launched, PyTorch's operators compute shapes. What the host reads is
noted, and is 1 everywhere. Memory is counted by storages, from the operator that makes one to its end, as PyTorch's
allocator on a GPU counts it; what libraries allocate inside an operator is not seen.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from protos.model.spec import ModelSpec
from protos.stage.messages import ShardSpec, StepPlan
from workers.kv.paged import PagedKV
from workers.model.weights import dummy_shard
from workers.runner.model_runner import ModelRunner
from workers.transport.collectives import Collectives

META = torch.device("meta")
_ROUNDED = 512  # bytes: PyTorch's allocator on a GPU gives multiples
_ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
_SCALARS = {"item", "is_nonzero", "_local_scalar_dense"}
_SHAPES = {"nonzero", "masked_select", "bincount", "_unique2"}  # of results that depend on contents
_VIEWS = {"_unsafe_view", "detach", "alias", "lift_fresh"}  # which their schema does not say


@dataclass(slots=True)
class Trace:
    """What a step did, by phases: `prepare` (embedding included), `layers`, `head`, `sample` and `reports`.

    Operators of PyTorch count as one launch each, though some of them (sort) launch several kernels.
    """

    launches: dict[str, Counter[str]] = field(default_factory=dict)  # by name
    reads: list[tuple[str, str]] = field(default_factory=list)  # phase and operator: the host waits for the device
    waits: list[tuple[str, str]] = field(default_factory=list)  # copies to the device that wait for it
    peak_bytes: int = 0

    def count(self, phase: str) -> int:
        """Return the launches of a phase."""
        return sum(self.launches.get(phase, Counter()).values())


class _Recorder(TorchDispatchMode):
    """Notes what operators do with tensors on `meta`."""

    def __init__(self, trace: Trace) -> None:
        super().__init__()
        self.trace, self.phase = trace, "prepare"
        self._live = 0
        self._known: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def launch(self, name: str) -> None:
        self.trace.launches.setdefault(self.phase, Counter())[name] += 1

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        name = func.overloadpacket.__name__
        tensors = [one for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)]
        of_device = [one for one in tensors if one.is_meta]
        for one in of_device:
            self._known.setdefault(one.untyped_storage(), None)  # made before the step: not counted
        if of_device and _is_read(name, args, kwargs):
            self.trace.reads.append((self.phase, name))
            return 1 if name in _SCALARS else torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        with self:  # operators that consist of others are seen as these
            out = func.decompose(*args, **kwargs)
        if out is not NotImplemented:
            return out
        if _is_upload(name, args, kwargs) and not (kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2)):
            self.trace.waits.append((self.phase, name))
        out = func(*args, **kwargs)
        made = [one for one in tree_leaves(out) if isinstance(one, torch.Tensor) and one.is_meta]
        for one in made:
            self._count(one.untyped_storage())
        if (made or of_device) and not (name in _ALLOCATIONS or name in _VIEWS or _is_view(func)):
            self.launch(name)
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        self._known[storage] = None
        size = -(-storage.nbytes() // _ROUNDED) * _ROUNDED
        self._live += size
        self.trace.peak_bytes = max(self.trace.peak_bytes, self._live)
        weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self._live -= size


def _is_on(kwargs: Mapping[str, Any], kind: str) -> bool:
    device = kwargs.get("device")
    return device is not None and torch.device(device).type == kind


def _is_read(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Return whether the host waits for what an operator returns: contents, or a shape that depends on them."""
    if name == "copy_":
        return args[1].is_meta and not args[0].is_meta
    return name in _SCALARS or name in _SHAPES or (name == "_to_copy" and _is_on(kwargs, "cpu"))


def _is_upload(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Return whether an operator copies from the host to the device."""
    if name == "copy_":
        return args[0].is_meta and not args[1].is_meta
    return name == "_to_copy" and _is_on(kwargs, "meta") and not args[0].is_meta


def _is_view(func: Any) -> bool:
    return any(one.alias_info is not None and not one.alias_info.is_write for one in func._schema.returns)


def meta_runner(
    spec: ModelSpec, shard: ShardSpec, num_pages: int, page_size: int, kv_dtype: torch.dtype
) -> ModelRunner:
    """Return the runner of a shard in bfloat16, whose weights and KV have shapes only."""
    weights = dummy_shard(spec, shard, torch.bfloat16, META)
    kv = PagedKV(shard.layers.size, shard.kv_heads.size, spec.head_dim, num_pages, page_size, kv_dtype, META)
    return ModelRunner(spec, shard, weights, kv, Collectives(), META)


def trace_step(runner: ModelRunner, plan: StepPlan) -> Trace:
    """Execute a plan by a runner on `meta` and return what it did."""
    from triton.runtime.jit import JITFunction

    trace = Trace()
    recorder = _Recorder(trace)

    def launch(kernel: Any, *args: Any, **options: Any) -> None:
        recorder.launch(kernel.__name__)

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(JITFunction, "run", launch))
        for owner, method, before, after in (
            (runner.decoder, "layers", "layers", "head"),
            (runner._sampler, "sample_rows", "sample", "reports"),
        ):
            stack.enter_context(_phases(owner, method, recorder, before, after))
        stack.enter_context(recorder)
        runner.execute(plan)
    return trace


def _phases(owner: object, method: str, recorder: _Recorder, before: str, after: str) -> AbstractContextManager[Any]:
    """Make a method name the phase while it runs and the one that follows."""
    call = getattr(owner, method)

    def traced(*args: Any, **kwargs: Any) -> Any:
        recorder.phase = before
        out = call(*args, **kwargs)
        recorder.phase = after
        return out

    return mock.patch.object(owner, method, traced)
