"""Messages keep every value on their way through protobuf; parameters out of range are refused on arrival."""

import dataclasses
import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protos.jobs.convert import read_message
from protos.stage import codec
from protos.stage import stage_pb2 as pb
from protos.stage.messages import (
    CellReport,
    ExpertCounts,
    LoadProgress,
    SampledToken,
    SampleSpec,
    SamplingParams,
    SequenceSlice,
    ShardSpec,
    Span,
    StepPlan,
    StepResult,
    StepTrace,
    TokenBias,
    TokenLogprob,
)

U32 = st.integers(0, 2**32 - 1)
U64 = st.integers(0, 2**64 - 1)
IDS = st.lists(U32, max_size=5).map(tuple)
REAL = st.floats(allow_nan=False)
PARAMS = st.builds(
    SamplingParams,
    temperature=st.floats(0, 100),
    top_k=st.integers(0, 1 << 30),
    top_p=st.floats(0, 1, exclude_min=True),
    min_p=st.floats(0, 1),
    repetition_penalty=st.floats(0.01, 100),
    presence_penalty=st.floats(-2, 2),
    frequency_penalty=st.floats(-2, 2),
    seed=st.integers(0, (1 << 63) - 1),
    logprobs=st.none() | st.integers(0, 100),
)
SAMPLES = st.builds(
    SampleSpec, params=PARAMS, token_index=U32, history=IDS, mask=st.binary(max_size=9), outputs=IDS,
    bias=st.lists(st.builds(TokenBias, U32, REAL), max_size=3).map(tuple), is_biased=st.booleans(), banned=IDS,
    forced=st.none() | U32,
)  # fmt: skip
SLICES = st.builds(
    SequenceSlice,
    sequence=U64, start=U32, length=U32, prompt_len=U32, token_ids=IDS, new_pages=IDS, num_pages=U32,
    sample=st.none() | SAMPLES, scale_len=U32, targets=IDS, top=U32,
)  # fmt: skip
PLANS = st.builds(
    StepPlan,
    step=U64,
    slices=st.lists(SLICES, max_size=3).map(tuple),
    released=st.lists(U64, max_size=3).map(tuple),
)
TOKENS = st.builds(
    SampledToken,
    sequence=U64,
    token_id=U32,
    logprob=st.none() | REAL,
    top=st.lists(st.builds(TokenLogprob, U32, REAL), max_size=3).map(tuple),
)
FRACTIONS = st.lists(st.floats(allow_nan=False, width=32), max_size=4).map(tuple)
CELLS = st.builds(
    CellReport,
    sequence=U64, layer=U32, first_head=U32, start=U32, length=U32, density=FRACTIONS, estimated_recall=FRACTIONS,
    held_out_recall=FRACTIONS, dense=st.lists(st.booleans(), max_size=4).map(tuple),
)  # fmt: skip
TRACES = st.builds(
    StepTrace,
    node=st.text(max_size=9), began_us=U64, input_us=U64, ended_us=U64, sent_us=U64, sent_bytes=U64, reduce_us=U64,
    reduce_bytes=U64, experts=st.lists(st.builds(ExpertCounts, U32, IDS), max_size=3).map(tuple),
)  # fmt: skip
RESULTS = st.builds(
    StepResult,
    step=U64, stage=U32, rank=U32, compute_us=U64, samples=st.lists(TOKENS, max_size=3).map(tuple),
    error=st.text(max_size=20), cells=st.lists(CELLS, max_size=3).map(tuple), estimate_us=U64,
    targets=st.lists(TOKENS, max_size=3).map(tuple), trace=st.none() | TRACES,
)  # fmt: skip
PROGRESS = st.builds(
    LoadProgress,
    loaded_bytes=U64, total_bytes=U64, ready=st.booleans(), anonymous_growth_bytes=U64, available_bytes=U64,
    error=st.text(max_size=20),
)  # fmt: skip
SPANS = st.builds(Span, U32, U32)
SHARDS = st.builds(
    ShardSpec,
    stage=U32, num_stages=U32, rank=U32, num_ranks=U32, layers=SPANS, heads=SPANS, kv_heads=SPANS, experts=SPANS,
    intermediate=SPANS, vocab=SPANS,
)  # fmt: skip


def wire(message):
    return type(message).FromString(message.SerializeToString())


def round_trip(plan: StepPlan, with_tokens: bool = True) -> StepPlan:
    (message,) = wire(codec.plans_to_pb([plan], with_tokens)).plans
    return read_message(StepPlan, message)


@settings(max_examples=150, deadline=None)
@given(PLANS)
def test_plans(plan: StepPlan):
    assert round_trip(plan) == plan


@settings(max_examples=50, deadline=None)
@given(PLANS)
def test_plans_for_later_stages_lose_their_token_ids_only(plan: StepPlan):
    bare = replace(plan, slices=tuple(replace(part, token_ids=()) for part in plan.slices))
    assert round_trip(plan, with_tokens=False) == bare


@settings(max_examples=50, deadline=None)
@given(PLANS)
def test_plans_for_earlier_stages_lose_their_masks_only(plan: StepPlan):
    (message,) = wire(codec.plans_to_pb([plan], with_masks=False)).plans
    bare = [
        replace(part, targets=(), sample=None if part.sample is None else replace(part.sample, mask=b""))
        for part in plan.slices
    ]
    assert read_message(StepPlan, message) == replace(plan, slices=tuple(bare))


@settings(max_examples=100, deadline=None)
@given(RESULTS)
def test_results(result: StepResult):
    assert read_message(StepResult, wire(codec.encode(result))) == result


@settings(max_examples=30, deadline=None)
@given(st.lists(PLANS, max_size=7), st.lists(RESULTS, max_size=7))
def test_bursts_keep_their_order(plans: list[StepPlan], results: list[StepResult]):
    sent = wire(pb.StepResults(results=map(codec.encode, results)))
    assert [read_message(StepPlan, plan) for plan in wire(codec.plans_to_pb(plans)).plans] == plans
    assert [read_message(StepResult, result) for result in sent.results] == results
    bare = [read_message(StepPlan, plan) for plan in wire(codec.plans_to_pb(plans, with_tokens=False)).plans]
    assert not any(len(part.token_ids) for plan in bare for part in plan.slices)


@settings(max_examples=50, deadline=None)
@given(PROGRESS)
def test_progress(progress: LoadProgress):
    assert read_message(LoadProgress, wire(codec.encode(progress))) == progress


@settings(max_examples=50, deadline=None)
@given(SHARDS)
def test_shards(shard: ShardSpec):
    assert read_message(ShardSpec, wire(codec.encode(shard))) == shard


def test_nothing_is_not_zero():
    for logprobs in (None, 0):
        sample = SampleSpec(SamplingParams(logprobs=logprobs), 0)
        part = SequenceSlice(1, 0, 1, 1, (), (), 1, sample)
        assert round_trip(StepPlan(1, (part,))).slices[0].sample == sample


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("temperature", -0.1), ("temperature", 100.1), ("temperature", math.nan), ("temperature", math.inf),
        ("top_k", -1), ("top_k", (1 << 30) + 1), ("top_p", 0.0), ("top_p", -1.0), ("top_p", 1.01), ("top_p", math.nan),
        ("min_p", -0.1), ("min_p", 1.1), ("repetition_penalty", 0.0), ("repetition_penalty", 101.0), ("seed", -1),
        ("seed", 1 << 63), ("logprobs", -1), ("logprobs", 101),
    ],
)  # fmt: skip
def test_parameters_out_of_range_name_their_key(key: str, value: float):
    with pytest.raises(ValueError, match=f"^{key}: .*must be"):
        SamplingParams(**{key: value})


def test_parameters_are_checked_where_they_arrive():
    message = codec.plans_to_pb([StepPlan(1, (SequenceSlice(1, 0, 1, 1, (), (), 1, SampleSpec(SamplingParams(), 0)),))])
    message.plans[0].slices[0].sample.params.temperature = -1
    with pytest.raises(ValueError, match="temperature"):
        read_message(StepPlan, message.plans[0])


def test_every_field_of_a_message_has_its_place_in_protobuf():
    pairs = [
        (SamplingParams, pb.SamplingParams), (SampleSpec, pb.SampleSpec), (SequenceSlice, pb.SequenceSlice),
        (StepPlan, pb.StepPlan), (SampledToken, pb.SampledToken), (StepResult, pb.StepResult),
        (LoadProgress, pb.LoadProgress), (ShardSpec, pb.ShardSpec), (CellReport, pb.CellReport),
    ]  # fmt: skip
    for plain, message in pairs:
        assert {field.name for field in dataclasses.fields(plain)} == set(message.DESCRIPTOR.fields_by_name), plain


def test_counts():
    parts = tuple(SequenceSlice(i, 0, length, 9, (), (), 1) for i, length in enumerate((1, 5, 7)))
    assert StepPlan(1, parts).num_tokens == 13
    assert StepPlan(1, ()).num_tokens == 0
    assert [StepPlan(1, parts[:n]).is_decode for n in range(4)] == [True, True, False, False]
    assert Span(3, 7).size == 4
