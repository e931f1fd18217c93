"""The kernels of the data plane, one by one, at the sizes of the built-in benchmark model.

Legend: `T` tokens of a step, `S` keys, `H` and `K` query and KV heads, `D` head dim, `M` hidden size, `E` experts.
"""

from __future__ import annotations

import io
import statistics
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from protos.stage.messages import SampleSpec, SamplingParams, Span
from workers.attention.attend import attend
from workers.attention.plan import AttentionPlan, Queries
from workers.bench.model import PAGE, benchmark_spec
from workers.bench.timing import Figure, measure, median_figure
from workers.kv.paged import LayerKV, PageTable
from workers.model.compiled import packed
from workers.model.layers import linear, rms_norm
from workers.model.moe import ExpertScratch, route, run_experts
from workers.model.rope import Rotary, norm_and_rotate_, row_scales
from workers.runner.sampler import Sampler
from workers.transport.collectives import join_group
from workers.transport.frames import read_tensor, split

_SPEC = benchmark_spec()
_VOCAB = 151936  # of the published Qwen3 models
_RANKS = 2


@dataclass(frozen=True, slots=True)
class KernelSetup:
    """Device and sizes of a run: `keys` are the context lengths of attention, `tokens` the rows of a step."""

    device: torch.device
    dtype: torch.dtype
    tokens: int
    keys: tuple[int, ...]
    repeats: int

    def random(self, *shape: int) -> torch.Tensor:
        """Return normal random values in the type and on the device of the run, always the same."""
        generator = torch.Generator().manual_seed(0)
        return torch.randn(shape, generator=generator).to(self.device, self.dtype)

    def time(self, name: str, call: Callable[[], object], flop: float = 0.0) -> Figure:
        """Measure a call in milliseconds; with `flop` the figure's note has the rate."""
        milliseconds = [seconds * 1e3 for seconds in measure(call, self.device, self.repeats)]
        rate = f"{flop / statistics.median(milliseconds) / 1e9:.3g} TFLOP/s" if flop else ""
        return median_figure(name, milliseconds, "ms", rate)


def run_kernels(setup: KernelSetup) -> Iterator[Figure]:
    """Measure every kernel in turn."""
    with torch.inference_mode():
        for keys in setup.keys:
            yield from _attention(setup, keys)
        yield from _experts(setup)
        yield from _row_operations(setup)
        yield _all_reduce(setup)
        yield from _frames(setup)
        yield from _sampler(setup)


def _attention(setup: KernelSetup, keys: int) -> Iterator[Figure]:
    rows, heads, dim = min(setup.tokens, keys), _SPEC.num_attention_heads, _SPEC.head_dim
    q = setup.random(rows, heads, dim)
    kv = LayerKV(*setup.random(2, _SPEC.num_key_value_heads, -(-keys // PAGE) * PAGE, dim))
    table = PageTable(PAGE)
    table.append(range(-(-keys // PAGE)))
    plan, last = AttentionPlan(keys - rows, rows), AttentionPlan(keys - 1, 1)
    scales = row_scales(torch.arange(rows), keys, dim, None)
    flop = 4.0 * plan.causal_pairs * heads * dim
    name = f"{rows} queries at the end of {keys} keys"
    yield setup.time(f"attention, {name}", lambda: attend(Queries(q), kv, table, plan, scales), flop)
    query, k, v = q.transpose(0, 1)[None], kv.keys[None, :, :keys], kv.values[None, :, :keys]
    yield setup.time(
        f"torch SDPA without mask, {name}",
        lambda: F.scaled_dot_product_attention(query, k, v, scale=dim**-0.5, enable_gqa=True),
        4.0 * rows * keys * heads * dim,
    )
    one = Queries(q[-1:])
    yield setup.time(f"attention, 1 query, {keys} keys", lambda: attend(one, kv, table, last, scales[-1:]))


def _experts(setup: KernelSetup) -> Iterator[Figure]:
    hidden, width, count = _SPEC.hidden_size, _SPEC.moe_intermediate_size, _SPEC.num_experts
    router = setup.random(count, hidden)
    gate_up, down = setup.random(count, 2 * width, hidden) * 0.02, setup.random(count, hidden, width) * 0.02
    scratch = ExpertScratch()
    for tokens in (setup.tokens, 1):
        x = setup.random(tokens, hidden)
        experts, weights = route(x, router, _SPEC.num_experts_per_tok, True)
        flop = 6.0 * tokens * _SPEC.num_experts_per_tok * hidden * width
        yield setup.time(f"route, {tokens} tokens", lambda x=x: route(x, router, _SPEC.num_experts_per_tok, True))  # type: ignore[misc]
        for kind, first, second in _kinds((gate_up, packed(gate_up, True)), (down, packed(down))):
            yield setup.time(
                f"experts{kind}, {tokens} tokens",
                lambda x=x, e=experts, w=weights, a=first, b=second: run_experts(
                    x, e, w, a, b, Span(0, count), scratch
                ),  # type: ignore[misc]
                flop,
            )


def _kinds(*weights: tuple[torch.Tensor, torch.Tensor]) -> list[tuple[Any, ...]]:
    """Return a name and plain weights, and the same for packed ones where the compiled products take them."""
    plain, compact = zip(*weights, strict=True)
    kinds: list[tuple[Any, ...]] = [("", *plain)]
    return kinds if compact[0] is plain[0] else [*kinds, (", packed", *compact)]


def _row_operations(setup: KernelSetup) -> Iterator[Figure]:
    hidden, heads, dim = _SPEC.hidden_size, _SPEC.num_attention_heads, _SPEC.head_dim
    x, weight = setup.random(setup.tokens, hidden), setup.random(hidden)
    yield setup.time(f"rms_norm [{setup.tokens}, {hidden}]", lambda: rms_norm(x, weight, 1e-6))
    q = setup.random(setup.tokens, heads, dim)
    cos_sin = Rotary(_SPEC.rope, dim, setup.device).cos_sin(torch.arange(setup.tokens, device=setup.device))
    yield setup.time(f"rotate [{setup.tokens}, {heads}, {dim}]", lambda: norm_and_rotate_(q.clone(), cos_sin))
    out = (heads + 2 * _SPEC.num_key_value_heads) * dim
    matrix = setup.random(out, hidden)
    for tokens in (setup.tokens, 1):
        for kind, weight in _kinds((matrix, packed(matrix))):
            yield setup.time(
                f"linear{kind} [{tokens}, {hidden}] -> {out}",
                lambda rows=x[:tokens], w=weight: linear(rows, w),  # type: ignore[misc]
                2.0 * tokens * hidden * out,
            )


def _all_reduce(setup: KernelSetup) -> Figure:
    """Measure two ranks in this process, over gloo on the loopback interface, always in host memory."""
    store, device = dist.HashStore(), torch.device("cpu")
    tensors = [torch.zeros(setup.tokens, _SPEC.hidden_size, dtype=setup.dtype) for _ in range(_RANKS)]
    with ThreadPoolExecutor(1, "all-reduce") as other:
        joining = other.submit(join_group, store, 1, _RANKS, device, 60.0)
        groups = [join_group(store, 0, _RANKS, device, 60.0), joining.result()]

        def call() -> None:
            done = other.submit(groups[1].all_reduce, tensors[1])
            groups[0].all_reduce(tensors[0])
            done.result()

        seconds = measure(call, device, setup.repeats)
        closing = other.submit(groups[1].close)
        groups[0].close()
        closing.result()
    shape = list(tensors[0].shape)
    return median_figure(f"all-reduce {shape}, gloo, {_RANKS} members", [s * 1e3 for s in seconds], "ms")


def _frames(setup: KernelSetup) -> Iterator[Figure]:
    tensor = torch.zeros(setup.tokens, _SPEC.hidden_size, dtype=setup.dtype)
    frames = b"".join(split(tensor, 0))

    def assemble() -> None:
        stream = io.BytesIO(frames)
        read_tensor(stream.readinto)

    host = replace(setup, device=torch.device("cpu"))
    yield host.time(f"frames, split {list(tensor.shape)}", lambda: list(split(tensor, 0)))
    yield host.time(f"frames, assemble {list(tensor.shape)}", assemble)


def _sampler(setup: KernelSetup) -> Iterator[Figure]:
    logits = setup.random(_VOCAB).float()
    sampler = Sampler(_VOCAB)
    for name, params in (
        ("greedy", SamplingParams()),
        ("temperature 0.7, top-k 20, top-p 0.8", SamplingParams(temperature=0.7, top_k=20, top_p=0.8)),
    ):
        sample = SampleSpec(params, 0)
        yield setup.time(f"sampler, {name}, {_VOCAB} ids", lambda s=sample: sampler.sample(0, logits, s))  # type: ignore[misc]
