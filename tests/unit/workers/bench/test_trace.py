"""Traced steps of the real shape of Qwen3-30B-A3B: no reads by the host, few launches, memory as the account says."""

from __future__ import annotations

import importlib.util
from dataclasses import replace

import pytest
import torch

from cluster.config.gpu_memory import GpuStep, gpu_scratch_bytes, step_bytes
from protos.model.config_json import load_model_spec
from protos.model.spec import DualChunkSpec, HeadBudget, ModelSpec, SparseSpec
from protos.stage.messages import SampleSpec, SamplingParams, SequenceSlice, StepPlan
from tests.support.planner.models import config_json
from workers.bench.trace import META, Trace, meta_runner, trace_step
from workers.model.weights import whole_model

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

LAYERS, PAGE, TOKENS = 2, 64, 32768  # each layer does the same: two show what one keeps for the next
CACHES = [torch.bfloat16, torch.int8]
DCA = DualChunkSpec(chunk_size=262144, local_size=8192, original_max_position_embeddings=262144)
SPARSE = SparseSpec(cell=8192, uniform=HeadBudget(1000, 6096))
ADAPTIVE = SparseSpec(cell=8192)
BENCHMARKED = SparseSpec(cell=8192, uniform=HeadBudget(17_408, 23_552))  # budgets of `workers.bench gpu`
MOST_PREFILL, MOST_DECODE = 40, 20  # launches a layer
MOST_FAR, MOST_A_CELL = 3, 10  # more with sparse cells: where their keys lie in several DCA chunks, and for each cell


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    folder = tmp_path_factory.mktemp("model")
    config_json(folder, num_hidden_layers=LAYERS)
    return load_model_spec(folder)


def step(start: int, length: int, prompt: int, rows: int = 1) -> StepPlan:
    """A step of `rows` sequences, all of which sample; their pages lie in descending order, in no run of slots."""
    pages, sample = -(-(start + length) // PAGE), SampleSpec(SamplingParams(temperature=0.0), 0)
    return StepPlan(
        0,
        tuple(
            SequenceSlice(
                number,
                start,
                length,
                prompt,
                [5] * length,
                range((number + 1) * pages - 1, number * pages - 1, -1),
                pages,
                sample,
            )
            for number in range(rows)
        ),
    )


def traced(spec: ModelSpec, plan: StepPlan, cache: torch.dtype) -> Trace:
    pages = sum(part.num_pages for part in plan.slices)
    found = trace_step(meta_runner(spec, whole_model(spec), pages, PAGE, cache), plan)
    assert {phase for phase, _ in found.reads} <= {"sample", "reports"}
    assert [phase for phase, _ in found.reads].count("sample") == 1
    assert {phase for phase, _ in found.waits} <= {"prepare"}
    assert found.count("head") < 20
    return found


def launches_a_layer(spec: ModelSpec, plan: StepPlan, cache: torch.dtype) -> float:
    """Return the launches that a layer adds to a step: what a step does once, such as uploads, does not count."""
    few, many = (
        traced(replace(spec, num_hidden_layers=layers), plan, cache).count("layers") for layers in (LAYERS, 2 * LAYERS)
    )
    return (many - few) / LAYERS


def check_memory(spec: ModelSpec, size: GpuStep, found: Trace) -> None:
    account = step_bytes(spec, whole_model(spec), size)
    assert 0.9 * account <= found.peak_bytes <= account, found.peak_bytes / account


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("start", [0, 65536, 999424 - TOKENS])
def test_dense_steps(model: ModelSpec, cache: torch.dtype, start: int) -> None:
    plan = step(start, TOKENS, start + TOKENS)
    assert launches_a_layer(model, plan, cache) <= MOST_PREFILL
    check_memory(model, GpuStep(TOKENS, start + TOKENS), traced(model, plan, cache))


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("start", [254 * 1024, 2 * 254 * 1024, 1_000_000 - 14848])
def test_dual_chunk_attention(model: ModelSpec, cache: torch.dtype, start: int) -> None:
    spec, length = replace(model, dual_chunk=DCA), min(TOKENS, 1_000_000 - start)
    plan = step(start, length, 1_000_000)
    assert launches_a_layer(spec, plan, cache) <= MOST_PREFILL
    check_memory(spec, GpuStep(length, start + length), traced(spec, plan, cache))


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize(("cells", "start"), [(1, 122880), (4, 98304), (4, 960 * 1024 - TOKENS)])
def test_sparse_steps(model: ModelSpec, cache: torch.dtype, cells: int, start: int) -> None:
    spec, length = replace(model, sparse=SPARSE), cells * SPARSE.cell
    plan = step(start, length, 1_000_000)
    assert launches_a_layer(spec, plan, cache) <= MOST_PREFILL + MOST_A_CELL * cells
    found = traced(spec, plan, cache)
    assert [phase for phase, _ in found.reads] == ["sample", "reports"]
    check_memory(spec, GpuStep(length, start + length, 1, SPARSE.cell, 1000), found)


@pytest.mark.parametrize(
    ("sparse", "start"), [(SPARSE, 98 * 8192), (BENCHMARKED, 98 * 8192), (BENCHMARKED, 120 * 8192)]
)
def test_sparse_steps_of_a_million_tokens_under_dual_chunk_attention(
    model: ModelSpec, sparse: SparseSpec, start: int
) -> None:
    """Four cells whose keys lie in every region, and the three at the end of the prompt."""
    spec, length = replace(model, sparse=sparse, dual_chunk=DCA), min(TOKENS, 1_000_000 - start)
    cells, plan = -(-length // sparse.cell), step(start, length, 1_000_000)
    assert launches_a_layer(spec, plan, torch.int8) <= MOST_PREFILL + MOST_FAR + MOST_A_CELL * cells
    assert sparse.uniform is not None
    size = GpuStep(length, start + length, 1, sparse.cell, sparse.uniform.n_vertical)
    check_memory(spec, size, traced(spec, plan, torch.int8))


def test_adaptive_budgets(model: ModelSpec) -> None:
    spec, start = replace(model, sparse=ADAPTIVE), 960 * 1024 - TOKENS
    found = traced(spec, step(start, TOKENS, 1_000_000), torch.int8)
    check_memory(spec, GpuStep(TOKENS, start + TOKENS, 1, ADAPTIVE.cell, start + TOKENS), found)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize(("start", "rows"), [(4095, 1), (4095, 64), (999_999, 1)])
def test_decode(model: ModelSpec, cache: torch.dtype, start: int, rows: int) -> None:
    spec = replace(model, dual_chunk=DCA, sparse=SPARSE)
    plan = step(start, 1, start + 1 - rows, rows)
    assert launches_a_layer(spec, plan, cache) <= MOST_DECODE
    found = traced(spec, plan, cache)
    assert found.peak_bytes <= gpu_scratch_bytes(spec, whole_model(spec), rows, start + 1, rows)


class Wrapped:
    """A runner whose layers do one more thing with the activations `[T, M]`."""

    def __init__(self, spec: ModelSpec, change: object) -> None:
        self.runner = meta_runner(spec, whole_model(spec), 64, PAGE, torch.bfloat16)
        layers = self.runner.decoder.layers

        def changed(x: torch.Tensor, *others: object) -> torch.Tensor:
            change(x)  # type: ignore[operator]
            return layers(x, *others)  # type: ignore[arg-type]

        self.runner.decoder.layers = changed  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda x: x.sum().item(), "item"),
        (lambda x: x[0, :2].tolist(), "_to_copy"),
        (lambda x: bool((x > 0).any()), "is_nonzero"),
        (lambda x: x.cpu(), "_to_copy"),
        (lambda x: (x > 0).nonzero(), "nonzero"),
    ],
)
def test_reads_by_the_host_are_seen(model: ModelSpec, change: object, name: str) -> None:
    found = trace_step(Wrapped(model, change).runner, step(0, 64, 64))
    assert ("layers", name) in found.reads


def test_shapes_that_depend_on_contents_end_the_trace(model: ModelSpec) -> None:
    runner = Wrapped(model, lambda x: x[x[:, 0] > 0]).runner
    with pytest.raises(NotImplementedError, match="nonzero"):
        trace_step(runner, step(0, 64, 64))


def test_copies_that_wait_and_memory_are_seen(model: ModelSpec) -> None:
    def change(x: torch.Tensor) -> None:
        torch.ones(3).to(META)
        torch.ones(3).to(META, non_blocking=True)
        x.new_empty(1 << 30, dtype=torch.int8)

    plain = trace_step(Wrapped(model, lambda x: None).runner, step(0, 64, 64))
    found = trace_step(Wrapped(model, change).runner, step(0, 64, 64))
    assert [one for one in found.waits if one[0] == "layers"] == [("layers", "_to_copy")]
    assert plain.peak_bytes < 1 << 29 < found.peak_bytes < (1 << 30) + (1 << 29)
    assert found.count("layers") == plain.count("layers") + 2
