"""Dataclasses to protobuf and back. Numbers that could address memory are checked where they arrive."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from typing import Any

from protos.model.spec import DualChunkSpec, HeadBudget, ModelSpec, RopeSpec, SparseSpec
from protos.stage import stage_pb2 as pb
from protos.stage.messages import (
    CellReport,
    LoadProgress,
    SampledToken,
    SampleSpec,
    SamplingParams,
    SequenceSlice,
    ShardSpec,
    Span,
    StepPlan,
    StepResult,
    TokenLogprob,
)

_CELL_FIELDS = tuple(field.name for field in dataclasses.fields(CellReport))
_SPANS = ("layers", "heads", "kv_heads", "experts", "intermediate", "vocab")


def model_spec_to_json(spec: ModelSpec) -> str:
    return json.dumps(dataclasses.asdict(spec))


def model_spec_from_json(text: str) -> ModelSpec:
    """Inverse of `model_spec_to_json`; raises ValueError or TypeError on anything else."""
    fields: dict[str, Any] = json.loads(text)
    try:
        fields["rope"] = RopeSpec(**fields["rope"])
        for key in ("eos_token_ids", "mlp_only_layers"):
            fields[key] = tuple(fields[key])
        if fields.get("dual_chunk") is not None:
            fields["dual_chunk"] = DualChunkSpec(**fields["dual_chunk"])
        if fields.get("sparse") is not None:
            fields["sparse"] = _sparse_from_json(fields["sparse"])
    except KeyError as error:
        raise ValueError(f"model spec: key {error} is missing") from error
    return ModelSpec(**fields)


def _sparse_from_json(fields: dict[str, Any]) -> SparseSpec:
    def budget(value: dict[str, int] | None) -> HeadBudget | None:
        return None if value is None else HeadBudget(**value)

    patterns = fields["patterns"]
    if patterns is not None:
        patterns = tuple(tuple(budget(head) for head in layer) for layer in patterns)
    return SparseSpec(**(fields | {"patterns": patterns, "uniform": budget(fields["uniform"])}))


def shard_to_pb(shard: ShardSpec) -> pb.ShardSpec:
    spans = {name: pb.Span(start=span.start, stop=span.stop) for name in _SPANS for span in [getattr(shard, name)]}
    return pb.ShardSpec(
        stage=shard.stage, num_stages=shard.num_stages, rank=shard.rank, num_ranks=shard.num_ranks, **spans
    )


def shard_from_pb(message: pb.ShardSpec) -> ShardSpec:
    spans = {name: Span(span.start, span.stop) for name in _SPANS for span in [getattr(message, name)]}
    return ShardSpec(
        stage=message.stage, num_stages=message.num_stages, rank=message.rank, num_ranks=message.num_ranks, **spans
    )


def plan_to_pb(plan: StepPlan, with_tokens: bool = True) -> pb.StepPlan:
    """`with_tokens=False` leaves out the token ids, which only the first stage reads."""
    return pb.StepPlan(
        step=plan.step,
        slices=[_slice_to_pb(part, with_tokens) for part in plan.slices],
        released=plan.released,
    )


def plan_from_pb(message: pb.StepPlan) -> StepPlan:
    return StepPlan(
        step=message.step,
        slices=tuple(_slice_from_pb(part) for part in message.slices),
        released=tuple(message.released),
    )


def plans_to_pb(plans: Iterable[StepPlan], with_tokens: bool = True) -> pb.StepPlans:
    return pb.StepPlans(plans=[plan_to_pb(plan, with_tokens) for plan in plans])


def plans_from_pb(message: pb.StepPlans) -> list[StepPlan]:
    return [plan_from_pb(plan) for plan in message.plans]


def _slice_to_pb(part: SequenceSlice, with_tokens: bool) -> pb.SequenceSlice:
    return pb.SequenceSlice(
        sequence=part.sequence,
        start=part.start,
        length=part.length,
        prompt_len=part.prompt_len,
        token_ids=part.token_ids if with_tokens else (),
        new_pages=part.new_pages,
        num_pages=part.num_pages,
        sample=None if part.sample is None else _sample_to_pb(part.sample),
        scale_len=part.scale_len,
    )


def _slice_from_pb(message: pb.SequenceSlice) -> SequenceSlice:
    return SequenceSlice(
        sequence=message.sequence,
        start=message.start,
        length=message.length,
        prompt_len=message.prompt_len,
        token_ids=tuple(message.token_ids),
        new_pages=tuple(message.new_pages),
        num_pages=message.num_pages,
        sample=_sample_from_pb(message.sample) if message.HasField("sample") else None,
        scale_len=message.scale_len,
    )


def _sample_to_pb(sample: SampleSpec) -> pb.SampleSpec:
    history = None if sample.history is None else pb.History(token_ids=sample.history)
    given = sample.params  # spelled out: `asdict` copies deeply, which costs more than all the rest of a decode plan
    params = pb.SamplingParams(
        temperature=given.temperature,
        top_k=given.top_k,
        top_p=given.top_p,
        min_p=given.min_p,
        repetition_penalty=given.repetition_penalty,
        seed=given.seed,
        logprobs=given.logprobs,
    )
    return pb.SampleSpec(params=params, token_index=sample.token_index, history=history)


def _sample_from_pb(message: pb.SampleSpec) -> SampleSpec:
    params = message.params
    return SampleSpec(
        params=SamplingParams(
            temperature=params.temperature,
            top_k=params.top_k,
            top_p=params.top_p,
            min_p=params.min_p,
            repetition_penalty=params.repetition_penalty,
            seed=params.seed,
            logprobs=params.logprobs if params.HasField("logprobs") else None,
        ),
        token_index=message.token_index,
        history=tuple(message.history.token_ids) if message.HasField("history") else None,
    )


def result_to_pb(result: StepResult) -> pb.StepResult:
    return pb.StepResult(
        step=result.step,
        stage=result.stage,
        rank=result.rank,
        compute_us=result.compute_us,
        samples=[
            pb.SampledToken(
                sequence=token.sequence,
                token_id=token.token_id,
                logprob=token.logprob,
                top=[pb.TokenLogprob(token_id=i, logprob=p) for i, p in token.top],
            )
            for token in result.samples
        ],
        error=result.error,
        cells=[pb.CellReport(**{key: getattr(cell, key) for key in _CELL_FIELDS}) for cell in result.cells],
        estimate_us=result.estimate_us,
    )


def result_from_pb(message: pb.StepResult) -> StepResult:
    return StepResult(
        step=message.step,
        stage=message.stage,
        rank=message.rank,
        compute_us=message.compute_us,
        samples=tuple(
            SampledToken(
                sequence=token.sequence,
                token_id=token.token_id,
                logprob=token.logprob if token.HasField("logprob") else None,
                top=tuple(TokenLogprob(item.token_id, item.logprob) for item in token.top),
            )
            for token in message.samples
        ),
        error=message.error,
        cells=tuple(_cell_from_pb(cell) for cell in message.cells),
        estimate_us=message.estimate_us,
    )


def results_to_pb(results: Iterable[StepResult]) -> pb.StepResults:
    return pb.StepResults(results=[result_to_pb(result) for result in results])


def results_from_pb(message: pb.StepResults) -> list[StepResult]:
    return [result_from_pb(result) for result in message.results]


def _cell_from_pb(message: pb.CellReport) -> CellReport:
    return CellReport(
        sequence=message.sequence,
        layer=message.layer,
        first_head=message.first_head,
        start=message.start,
        length=message.length,
        density=tuple(message.density),
        estimated_recall=tuple(message.estimated_recall),
        held_out_recall=tuple(message.held_out_recall),
        dense=tuple(message.dense),
    )


def progress_to_pb(progress: LoadProgress) -> pb.LoadProgress:
    return pb.LoadProgress(**dataclasses.asdict(progress))


def progress_from_pb(message: pb.LoadProgress) -> LoadProgress:
    return LoadProgress(
        loaded_bytes=message.loaded_bytes,
        total_bytes=message.total_bytes,
        ready=message.ready,
        anonymous_growth_bytes=message.anonymous_growth_bytes,
        available_bytes=message.available_bytes,
        error=message.error,
    )
