"""The engine over fake shards: events, ends, cancelling, submitting. The clock is injected."""

import time

import pytest

from cluster.engine.outputs import Generation, OutputToken, PrefillProgress
from cluster.scheduler.request import FinishReason
from cluster.scheduler.scheduler import DoesNotFit
from cluster.text.tokenizer import TextTokenizer
from protos.stage.messages import SamplingParams
from tests.support.data.specs import generation_spec
from tests.support.fakes.stage import NEEDLE, WAIT, Rig, eventually, submit
from tests.support.oracles.integrity import check_engine


def test_events_come_in_order_and_progress_rises():
    with Rig(budget=64) as rig:
        result, events = rig.run(range(200), 3)
    kinds = [type(event) for event in events]
    progress = [event for event in events if isinstance(event, PrefillProgress)]
    assert kinds == [PrefillProgress] * len(progress) + [OutputToken] * 3 + [Generation]
    assert [event.processed for event in progress] == [0, 64, 128, 192, 200]
    assert all((event.total, event.cached) == (200, 0) for event in progress)
    assert progress[0].eta_ms is None
    etas = [event.eta_ms for event in progress[1:]]
    assert etas == sorted(etas, reverse=True)
    assert etas[-1] == 0
    assert events[-1] == result
    assert [event.token_id for event in events if isinstance(event, OutputToken)] == [1000, 1001, 1002]
    assert result.token_ids == (1000, 1001, 1002)
    assert result.finish_reason is FinishReason.LENGTH
    assert result.prompt_tokens == 200


def test_who_measures_gets_every_result():
    with Rig(stages=1, budget=64) as rig:
        seen: list[int] = []
        rig.engine.on_result = lambda result: seen.append(result.step)
        rig.run(range(200), 1)
    assert len(seen) == 4
    assert seen == sorted(seen)


def test_a_second_question_reports_what_was_cached():
    with Rig() as rig:
        rig.run(range(100))
        result, events = rig.run([*range(96), 5])
    assert result.cached_tokens == 96
    assert isinstance(events[0], PrefillProgress)
    assert (events[0].cached, events[0].processed) == (96, 96)


def test_timings_add_up():
    with Rig(stages=1, budget=16) as rig:
        timings = rig.run(range(64), 3)[0].timings
    assert timings.queued_s == 0
    assert timings.ttft_s == timings.queued_s + timings.prefill_s
    assert timings.total_s == pytest.approx(timings.ttft_s + timings.decode_s)
    assert timings.prefill_s >= 4 * 0.5
    assert timings.decode_s >= 2 * 0.5


@pytest.mark.parametrize("max_tokens", [1, 2, 17])
def test_max_tokens(max_tokens: int):
    with Rig() as rig:
        result, _ = rig.run([1], max_tokens)
    assert len(result.token_ids) == max_tokens
    assert result.finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize(
    ("spec", "count", "reason"),
    [
        ({}, 3, FinishReason.STOP),
        ({"ignore_eos": True}, 6, FinishReason.LENGTH),
        ({"stop_token_ids": (1001,)}, 2, FinishReason.STOP),
        ({"stop_token_ids": (1004,), "ignore_eos": True}, 5, FinishReason.STOP),
    ],
)
def test_end_and_stop_ids(spec: dict, count: int, reason: FinishReason):
    with Rig(eos=(1002,)) as rig:
        result, _ = rig.run([1], 6, **spec)
    assert (len(result.token_ids), result.finish_reason) == (count, reason)


@pytest.mark.parametrize(
    ("stop", "text", "reason"),
    [
        ((), "the river ran by the old mill", FinishReason.LENGTH),
        (("old",), "the river ran by the ", FinishReason.STOP),
        (("n by t",), "the river ra", FinishReason.STOP),
        (("mill", "ran by"), "the river ", FinishReason.STOP),
        (("mill!",), "the river ran by the old mill", FinishReason.LENGTH),
        (("mill",), "the river ran by the old ", FinishReason.STOP),
    ],
)
def test_stop_strings(stop: tuple[str, ...], text: str, reason: FinishReason):
    ids = TextTokenizer.open(NEEDLE).encode("the river ran by the old mill")
    with Rig(lambda _, index: ids[index], text=True) as rig:
        result, events = rig.run([1], len(ids), stop=stop)
    assert (result.text, result.finish_reason) == (text, reason)
    assert "".join(event.text for event in events if isinstance(event, OutputToken)) == text
    assert len(result.token_ids) == len(result.samples) == sum(isinstance(event, OutputToken) for event in events)


@pytest.mark.parametrize("source", ["eos", "stop_token_ids"])
@pytest.mark.parametrize("stop", [(), ("old man",), ("man",)])
@pytest.mark.parametrize("more", [0, 1])  # tokens that the answer might still have had
def test_the_text_of_an_end_token_is_left_out(source: str, stop: tuple[str, ...], more: int):
    ids = TextTokenizer.open(NEEDLE).encode("the river ran by the old man")
    with Rig(lambda _, index: ids[min(index, 6)], text=True, eos=ids[-1:] if source == "eos" else ()) as rig:
        spec = {"stop_token_ids": tuple(ids[-1:])} if source == "stop_token_ids" else {}
        result, events = rig.run([1], len(ids) + more, stop=stop, **spec)
        resumed = generation_spec([1], len(ids) + more, stop=stop, resume=result.samples, **spec)
        again = submit(rig.engine, resumed).wait(WAIT)
    assert (result.text, result.finish_reason, result.token_ids) == (
        "the river ran by the old", FinishReason.STOP, tuple(ids),
    )  # fmt: skip
    assert "".join(event.text for event in events if isinstance(event, OutputToken)) == result.text == again.text


def test_an_end_token_that_does_not_end_is_text():
    ids = TextTokenizer.open(NEEDLE).encode("the river ran")
    with Rig(lambda _, index: ids[index], text=True, eos=ids[1:2]) as rig:
        assert rig.run([1], len(ids), ignore_eos=True)[0].text == "the river ran"
        assert rig.run([1], len(ids))[0].text == "the"


def test_logprobs_reach_the_result():
    with Rig() as rig:
        result, _ = rig.run([1], 2, sampling=SamplingParams(logprobs=1))
    assert [sample.logprob for sample in result.samples] == [-0.5, -0.5]


@pytest.mark.parametrize("stages", [2, 3, 5])
def test_a_prompt_alone_has_one_plan_per_stage_in_flight_and_one_more(stages: int):
    with Rig(stages=stages, budget=16, pages=200) as rig:
        rig.last.hold()
        handle, _ = rig.submit(range(1600))
        depth = stages + 1
        eventually(lambda: len(rig.last.plans) == depth)
        rig.last.let(3)
        eventually(lambda: len(rig.last.plans) == depth + 3)
        time.sleep(0.02)
        assert len(rig.shards[0].plans) == depth + 3
        rig.last.let(1 << 20)
        handle.wait(WAIT)


def test_a_single_stage_gets_decode_steps_ahead_but_nothing_behind_a_long_chunk():
    with Rig(stages=1, budget=16, pages=200) as rig:  # a fake step takes half a second of the fake clock
        rig.last.hold()
        handle, _ = rig.submit(range(48), 9)
        for sent in (1, 2, 3):
            eventually(lambda sent=sent: len(rig.last.plans) == sent)
            time.sleep(0.02)
            assert len(rig.last.plans) == sent
            rig.last.let(1)
        eventually(lambda: len(rig.last.plans) == 5)
        assert [list(plan.slices[0].token_ids) for plan in rig.last.plans[3:]] == [[1000], []]
        rig.last.let(1 << 20)
        assert handle.wait(WAIT).token_ids == tuple(range(1000, 1009))
        assert len(rig.last.plans) == 3 + 8


@pytest.mark.parametrize("stages", [1, 2])
def test_the_next_plan_leaves_before_anybody_hears_of_the_last_result(stages: int):
    with Rig(stages=stages) as rig:
        sent: list[int] = []
        spec = generation_spec([1, 2, 3], 5)
        token = lambda event: sent.append(len(rig.last.plans)) if isinstance(event, OutputToken) else None  # noqa: E731
        submit(rig.engine, spec, token).wait(WAIT)
    assert sent[:4] == sorted(sent[:4])
    assert all(plans >= index + 2 for index, plans in enumerate(sent[:4]))


@pytest.mark.parametrize("stages", [1, 2])
def test_a_stop_string_drops_the_step_in_flight(stages: int):
    ids = TextTokenizer.open(NEEDLE).encode("the river ran by the old mill")
    with Rig(lambda _, index: ids[index], stages=stages, text=True) as rig:
        result, events = rig.run([1], len(ids), stop=("ran",))
        again, _ = rig.run([1], 3)
    assert (result.text, result.finish_reason) == ("the river ", FinishReason.STOP)
    assert len(result.token_ids) == sum(isinstance(event, OutputToken) for event in events) < len(ids)
    assert list(again.token_ids) == ids[:3]


# --- cancelling ------------------------------------------------------------------------------------------------------


def test_cancel_a_queued_request():
    with Rig(pages=4) as rig:
        rig.last.hold()
        first, _ = rig.submit(range(60))
        second, events = rig.submit(range(100, 160))
        rig.engine.cancel(second)
        result = second.wait(WAIT)
        assert result.finish_reason is FinishReason.CANCELLED
        assert (result.token_ids, events) == ((), [result])
        rig.last.let(1000)
        assert first.wait(WAIT).finish_reason is FinishReason.LENGTH
        check_engine(rig.engine)


def test_cancel_while_prefilling():
    with Rig(budget=16) as rig:
        rig.last.hold()
        handle, events = rig.submit(range(400))
        eventually(lambda: len(rig.last.plans) == 3)
        rig.engine.cancel(handle)
        rig.engine.cancel(handle)
        rig.last.let(1000)
        result = handle.wait(WAIT)
        assert result.finish_reason is FinishReason.CANCELLED
        assert not any(isinstance(event, OutputToken) for event in events)
        assert sum(isinstance(event, Generation) for event in events) == 1
        assert len(rig.last.plans) == 3, "nothing is computed for it any more"
        check_engine(rig.engine)
        assert rig.run(range(30))[0].finish_reason is FinishReason.LENGTH


def test_cancel_while_decoding_keeps_the_tokens_so_far_and_repeats_none():
    with Rig() as rig:
        rig.last.hold()
        rig.last.let(3)
        handle, events = rig.submit(range(10), 50)
        eventually(lambda: len(rig.last.plans) == 5)
        rig.engine.cancel(handle)
        check_engine(rig.engine)  # the cancel has been seen
        rig.last.let(1000)
        result = handle.wait(WAIT)
    assert result.finish_reason is FinishReason.CANCELLED
    assert result.token_ids == (1000, 1001, 1002)
    tokens = [event.token_id for event in events if isinstance(event, OutputToken)]
    assert tokens == [1000, 1001, 1002]


def test_cancel_after_the_end_changes_nothing():
    with Rig() as rig:
        handle, events = rig.submit([1])
        result = handle.wait(WAIT)
        rig.engine.cancel(handle)
        check_engine(rig.engine)
        assert handle.wait(0) == result
        assert sum(isinstance(event, Generation) for event in events) == 1


# --- submitting ------------------------------------------------------------------------------------------------------


def test_all_are_accepted_or_none():
    with Rig(pages=4) as rig:
        with pytest.raises(DoesNotFit):
            rig.engine.submit_all([(generation_spec([1], 1), print), (generation_spec(range(1000), 1), print)])
        with pytest.raises(ValueError, match="prompt: 0 tokens"):
            rig.submit([])
        with pytest.raises(ValueError, match="max_tokens: 0"):
            rig.submit([1], 0)
        with pytest.raises(ValueError, match="stop"):
            rig.submit([1], 1, stop=("",))
        check_engine(rig.engine)
        assert all(not shard.plans for shard in rig.shards)


def test_tokens_of_one_submission_are_numbered_together():
    with Rig(pages=200) as rig:
        events: list[OutputToken] = []
        keep = lambda event: events.append(event) if isinstance(event, OutputToken) else None  # noqa: E731
        specs = [generation_spec([1] * (index + 1), 2 + index, question=index) for index in (0, 3, 5)]
        for handle in rig.engine.submit_all([(spec, keep) for spec in specs], after=7):
            handle.wait(WAIT)
        assert [token.number for token in events] == list(range(8, 8 + sum(spec.options.max_tokens for spec in specs)))
        for spec in specs:
            ids = [token.token_id for token in events if token.question == spec.question]
            assert ids == [1000 + index for index in range(spec.options.max_tokens)]


THOUGHT = TextTokenizer.open(NEEDLE).encode("<think>why not</think>\n\nso it is")


@pytest.mark.parametrize("opened", [False, True])
@pytest.mark.parametrize("stop", [(), ("it",)])
@pytest.mark.parametrize("done", [0, 1, 3, 5, 8, 12, len(THOUGHT) - 1])
def test_a_resumed_answer_is_split_as_if_it_had_never_stopped(done: int, opened: bool, stop: tuple[str, ...]):
    ids = THOUGHT[5:] if opened else THOUGHT
    spec = {"stop": stop, "sampling": SamplingParams(logprobs=1)}
    prompt = TextTokenizer.open(NEEDLE).encode("<think>\n" if opened else "x")
    with Rig(lambda _, index: ids[index], text=True) as rig:
        whole, events = rig.run(prompt, len(ids), **spec)
        tokens = [event for event in events if isinstance(event, OutputToken)]
        resume = whole.samples[:done]
        rest: list[OutputToken] = []
        keep = lambda event: rest.append(event) if isinstance(event, OutputToken) else None  # noqa: E731
        (handle,) = rig.engine.submit_all(
            [(generation_spec(prompt, len(ids), resume=resume, **spec), keep)], after=done
        )
        again = handle.wait(WAIT)
    assert rest == tokens[done:]
    assert (again.text, again.reasoning) == (whole.text, whole.reasoning) == ("so " if stop else "so it is", "why not")
    assert "".join(token.reasoning for token in tokens) == whole.reasoning
    assert "".join(token.answer for token in tokens) == whole.text


def test_waiting_has_a_limit():
    with Rig() as rig:
        rig.last.hold()
        handle, _ = rig.submit([1])
        with pytest.raises(TimeoutError):
            handle.wait(0.01)


def test_many_requests_at_once():
    with Rig(lambda sequence, index: sequence * 10 + index, pages=200) as rig:
        specs = [(generation_spec([i] * (i + 1), 1 + i % 4), lambda event: None) for i in range(40)]
        handles = rig.engine.submit_all(specs)
        for handle, (spec, _) in zip(handles, specs, strict=True):
            sequence = handle.request.sequence
            assert handle.wait(WAIT).token_ids == tuple(sequence * 10 + i for i in range(spec.options.max_tokens))
        check_engine(rig.engine)
