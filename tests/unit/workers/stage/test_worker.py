"""A shard's process without its process: load, start with a type of KV cache, run plans, report sparse cells."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from protos.jobs.convert import read_message
from protos.model.spec import DualChunkSpec, HeadBudget, ModelSpec, RopeSpec, SparseSpec
from protos.stage import codec
from protos.stage import stage_pb2 as pb
from protos.stage.messages import SampleSpec, SamplingParams, SequenceSlice, ShardSpec, Span, StepPlan, StepResult
from workers.runner.rehearsal import StepSize
from workers.stage import worker as stage_worker
from workers.stage.worker import StageWorker

LAYERS, HEADS, PAGE = 2, 4, 16
SPEC = ModelSpec(
    "qwen3", 100, 64, LAYERS, HEADS, 2, 16, 96, 1e-6, False, False, False, False, True, RopeSpec(1e4), 1024, "float32",
    (), dual_chunk=DualChunkSpec(128, 48, 64),
    sparse=SparseSpec(threshold=100, last_q=16, cell=64, uniform=HeadBudget(31, 101)),
)  # fmt: skip
SHARD = ShardSpec(
    0, 1, 0, 1, Span(0, LAYERS), Span(0, HEADS), Span(0, 2), Span(0, 0), Span(0, 96), Span(0, 100)
)  # fmt: skip


def loaded(folder: Path, spec: ModelSpec = SPEC) -> StageWorker:
    worker = StageWorker("", 1, 10.0)
    request = pb.LoadRequest(
        model_spec_json=spec.to_json(), shard=codec.encode(SHARD), dtype="float32",
        device="cpu", load_format="dummy", store_path=str(folder / "store"), group_timeout_s=10,
    )  # fmt: skip
    assert worker.load(request, lambda progress: None).ready
    return worker


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def prefill(length: int, sequence: int = 1) -> StepPlan:
    pages = -(-length // PAGE)
    ids = [7 * at % 100 for at in range(length)]
    sample = SampleSpec(SamplingParams(logprobs=0), 0)
    return StepPlan(1, (SequenceSlice(sequence, 0, length, length, ids, range(pages), pages, sample),))


def result(worker: StageWorker, plan: StepPlan) -> StepResult:
    ((found,),) = worker.run([[plan]])
    worker.close()
    assert not found.error
    return found


def test_sparse_cells_are_reported(tmp_path: Path) -> None:
    worker = loaded(tmp_path)
    worker.start(pb.StartRequest(num_pages=20, page_size=PAGE))
    found = result(worker, prefill(150))
    assert [(cell.layer, cell.start, cell.length) for cell in found.cells] == [
        (layer, start, length) for layer in range(LAYERS) for start, length in ((0, 64), (64, 16), (80, 48), (128, 22))
    ]
    assert all(cell.sequence == 1 and cell.first_head == 0 and len(cell.density) == HEADS for cell in found.cells)
    assert 0 < found.estimate_us <= found.compute_us
    assert read_message(StepResult, codec.encode(found)).samples == found.samples


def test_the_kernels_of_the_type_and_head_dim_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(stage_worker, "compute_family", lambda *args: asked.append(args) or "kernels")
    request = pb.LoadRequest(
        model_spec_json=SPEC.to_json(), shard=codec.encode(SHARD), dtype="bfloat16",
        device="cpu", load_format="dummy", store_path=str(tmp_path / "store"), group_timeout_s=10,
    )  # fmt: skip
    worker = StageWorker("", 1, 10.0)
    assert worker.load(request, lambda progress: None).kernel_family == "kernels"
    assert asked == [(torch.device("cpu"), torch.bfloat16, SPEC.head_dim)]
    worker.close()


def test_the_largest_step_is_rehearsed_on_a_gpu_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def rehearse(
        make_runner: object, kv: object, spec: ModelSpec, size: StepSize, memory: object, must_fit: bool
    ) -> int:
        asked.append((kv, spec, size, memory, must_fit))
        return 123

    monkeypatch.setattr(stage_worker, "rehearse", rehearse)
    monkeypatch.setattr(stage_worker, "PagedKV", lambda *given: given)
    worker, gpu = loaded(tmp_path), torch.device("cuda", 0)
    request = pb.LoadRequest(largest_step=64, max_model_len=500, page_size=PAGE, kv_dtype="int8", sampled_rows=3)
    assert worker._rehearse(request) == 0
    monkeypatch.setattr(worker, "_device", gpu)
    assert worker._rehearse(pb.LoadRequest()) == 0, "not asked for"
    assert worker._rehearse(request) == 123
    kv = (LAYERS, 2, 16, 1, PAGE, torch.int8, gpu)
    assert asked.pop() == (kv, SPEC, StepSize(64, 500, PAGE, 3), torch.cuda, True)
    monkeypatch.setattr(worker, "_available_bytes", lambda: 123_456)
    for token_bytes, context in ((1000, 123), (10, 500), (1 << 20, 1)):
        request.context_token_bytes = token_bytes
        assert worker._rehearse(request) == 123
        assert asked.pop()[2:] == (StepSize(64, context, PAGE, 3), torch.cuda, False), "of a context nobody asked for"
    assert not asked
    worker.close()


def test_fp8_kv_is_refused_before_anything_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the largest step would be rehearsed, whose kernels such a GPU cannot compile."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(stage_worker, "use_gpu", lambda index: torch.device("cuda", index))
    monkeypatch.setattr(stage_worker, "dummy_shard", lambda *given: pytest.fail("weights are made"))
    request = pb.LoadRequest(
        model_spec_json=SPEC.to_json(), shard=codec.encode(SHARD), dtype="bfloat16", device="cuda",
        load_format="dummy", largest_step=64, max_model_len=500, page_size=PAGE, kv_dtype="fp8",
    )  # fmt: skip
    with pytest.raises(
        ValueError, match=r"kv_cache\.dtype: fp8: needs a GPU of sm_89 or later, this is sm_80; use int8"
    ):
        StageWorker("", 1, 10.0).load(request, lambda progress: None)
    request.kv_dtype = "int4"
    with pytest.raises(ValueError, match="kv_dtype: 'int4': must be one of bfloat16, float32, int8, fp8"):
        StageWorker("", 1, 10.0).load(request, lambda progress: None)


def test_dense_steps_report_no_cells(tmp_path: Path) -> None:
    worker = loaded(tmp_path)
    worker.start(pb.StartRequest(num_pages=20, page_size=PAGE))
    found = result(worker, prefill(100))
    assert (found.cells, found.estimate_us) == ((), 0)


@pytest.mark.parametrize(("rows", "trace", "asked"), [(16, False, [16]), (0, False, []), (16, True, [])])
def test_graphs_are_asked_for_after_the_warm_up(
    rows: int, trace: bool, asked: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trace counts the experts of every step, which a graph does not."""
    found: list[int] = []
    monkeypatch.setattr(stage_worker.ModelRunner, "capture_decode", lambda self, capacity: found.append(capacity))
    worker = loaded(tmp_path)
    worker.start(pb.StartRequest(num_pages=20, page_size=PAGE, graph_rows=rows, trace=trace))
    worker.close()
    assert found == asked


def test_a_traced_step_says_when_it_was_computed(tmp_path: Path) -> None:
    worker = loaded(tmp_path)
    worker.start(pb.StartRequest(num_pages=20, page_size=PAGE, trace=True))
    before = time.perf_counter()
    trace = result(worker, prefill(100)).trace
    assert trace is not None
    assert before * 1e6 - 1 <= trace.began_us <= trace.input_us <= trace.ended_us <= trace.sent_us
    assert trace.sent_us <= time.perf_counter() * 1e6 + 1
    assert (trace.sent_bytes, trace.reduce_us, trace.reduce_bytes) == (0, 0, 0)
    per_token = SPEC.num_experts_per_tok if SPEC.num_experts else 0
    assert [sum(layer.tokens) for layer in trace.experts] == [100 * per_token] * (LAYERS if per_token else 0)


def test_steps_are_not_traced_unless_asked_for(tmp_path: Path) -> None:
    worker = loaded(tmp_path)
    worker.start(pb.StartRequest(num_pages=20, page_size=PAGE))
    assert result(worker, prefill(100)).trace is None


@pytest.mark.parametrize(
    ("kv_dtype", "close"), [("", 0.0), ("float32", 0.0), ("bfloat16", 2e-2), ("int8", 2e-2), ("fp8", 5e-2)]
)
def test_types_of_the_kv_cache(kv_dtype: str, close: float, tmp_path: Path) -> None:
    logprobs = []
    for folder, kind in (("plain", ""), ("other", kv_dtype)):
        (tmp_path / folder).mkdir()
        worker = loaded(tmp_path / folder, replace(SPEC, sparse=None))
        worker.start(pb.StartRequest(num_pages=20, page_size=PAGE, kv_dtype=kind))
        logprobs.append(result(worker, prefill(150)).samples[0].logprob)
    assert logprobs[0] is not None
    assert logprobs[1] == pytest.approx(logprobs[0], abs=close)
    assert close == 0 or logprobs[0] != logprobs[1]


def test_an_unknown_type_of_the_kv_cache_is_refused(tmp_path: Path) -> None:
    worker = loaded(tmp_path)
    with pytest.raises(ValueError, match="kv_dtype: 'int4': must be one of bfloat16, float32, int8, fp8"):
        worker.start(pb.StartRequest(num_pages=20, page_size=PAGE, kv_dtype="int4"))
    worker.close()


# --- bursts ----------------------------------------------------------------------------------------------------------


def decode(index: int, step: int | None = None, sequence: int = 1, prompt: int = 20) -> StepPlan:
    """The step that samples token `index` of a sequence that runs ahead."""
    at = prompt + index - 1
    pages = at // PAGE + 1
    new = [pages - 1] if at % PAGE == 0 else []
    sample = SampleSpec(SamplingParams(), index)
    part = SequenceSlice(sequence, at, 1, prompt, (), new, pages, sample)
    return StepPlan(index + 1 if step is None else step, (part,))


@pytest.fixture
def ready(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StageWorker]:
    monkeypatch.setattr(stage_worker, "_BATCH_S", 60.0)
    monkeypatch.setattr(stage_worker, "_SLOW_S", 60.0)  # however busy the machine is
    worker = loaded(tmp_path)
    worker.start(pb.StartRequest(num_pages=20, page_size=PAGE))
    yield worker
    worker.close()


@pytest.mark.parametrize(
    ("decodes", "sizes"),
    [(0, [1]), (1, [1, 1]), (2, [1, 1, 1]), (3, [1, 2, 1]), (5, [1, 4, 1]), (7, [1, 6, 1]), (11, [1, 8, 2, 1])],
)
def test_results_of_decode_steps_come_in_groups(ready: StageWorker, decodes: int, sizes: list[int]) -> None:
    plans = [prefill(20), *map(decode, range(1, decodes + 1))]
    groups = list(ready.run([plans]))
    assert [len(group) for group in groups] == sizes
    together = [result for group in groups for result in group]
    assert [result.step for result in together] == [plan.step for plan in plans]
    singly = [result for group in ready.run([plan] for plan in plans) for result in group]
    assert [r.samples for r in singly] == [r.samples for r in together]
    assert all(len(r.samples) == 1 and not r.error for r in together)


@pytest.mark.parametrize(("decodes", "sizes"), [(1, [1, 1]), (2, [1, 2]), (8, [1, 8]), (11, [1, 8, 3])])
def test_slow_steps_leave_time_for_new_plans(
    ready: StageWorker, decodes: int, sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One plan at hand is enough while it runs."""
    monkeypatch.setattr(stage_worker, "_SLOW_S", 0.0)
    groups = list(ready.run([[prefill(20), *map(decode, range(1, decodes + 1))]]))
    assert [len(group) for group in groups] == sizes


def test_results_no_step_waits_for_are_held_longer(ready: StageWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    plans = [prefill(20), *map(decode, range(1, 12))]
    monkeypatch.setattr(ready, "_shard", replace(SHARD, num_stages=2))
    monkeypatch.setattr(stage_worker, "_LAZY_BATCH_S", 60.0)
    assert [len(group) for group in ready.run([plans])] == [1, 11]
    monkeypatch.setattr(stage_worker, "_LAZY_BATCH", 5)
    assert [len(group) for group in ready.run([plans])] == [1, 5, 5, 1]
    monkeypatch.setattr(stage_worker, "_LAZY_BATCH_S", 0.0)
    assert [len(group) for group in ready.run([plans])] == [1] * 12
    broken = [prefill(20), decode(1), decode(2), decode(3, step=9), decode(4, step=10)]
    monkeypatch.setattr(stage_worker, "_LAZY_BATCH_S", 60.0)
    assert [len(group) for group in ready.run([broken])] == [1, 3, 1], "an error is told at once"


def test_nothing_is_held_for_long(ready: StageWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage_worker, "_BATCH_S", 0.0)
    groups = list(ready.run([[prefill(20), *map(decode, range(1, 8))]]))
    assert [len(group) for group in groups] == [1] * 8


def test_a_prompt_behind_a_burst_holds_nothing_back(ready: StageWorker) -> None:
    late = replace(prefill(3, sequence=2), step=5)
    late = replace(late, slices=(replace(late.slices[0], new_pages=[9]),))
    plans = [prefill(20), *map(decode, (1, 2, 3)), late, *(decode(n, n + 2) for n in (4, 5, 6))]
    assert [len(group) for group in ready.run([plans])] == [1, 2, 1, 1, 2, 1]


def test_first_tokens_are_not_held(ready: StageWorker) -> None:
    one = SequenceSlice(2, 0, 1, 1, [5], [9], 1, SampleSpec(SamplingParams(), 0))
    step = replace(decode(1), slices=(*decode(1).slices, one))
    plans = [prefill(20), step, *map(decode, range(2, 6))]
    assert [len(group) for group in ready.run([plans])] == [1, 1, 3, 1]


def test_an_error_inside_a_burst_comes_after_what_was_held(ready: StageWorker) -> None:
    groups = list(ready.run([[prefill(20), decode(1), decode(2), decode(3, step=9), decode(4, step=10)]]))
    error = "stage 0 shard 0: plan 9 came where 4 was due"
    errors = [[result.error for result in group] for group in groups]
    assert errors == [[""], ["", "", error], [error]]


def test_a_message_that_is_no_plan(ready: StageWorker) -> None:
    def bursts() -> Iterator[list[StepPlan]]:
        yield [prefill(20), decode(1), decode(2)]
        raise ValueError("temperature: -1: must be\nbetween 0 and 100")

    results = [result for group in ready.run(bursts()) for result in group]
    assert [bool(result.error) for result in results] == [False, False, False, True]
    assert results[-1].error == "stage 0 shard 0: a plan cannot be read: temperature: -1: must be between 0 and 100"
