"""The engine when something breaks: steps, shards, the engine itself, the submitter's callback; and closing."""

import threading
import time
from collections.abc import Callable

import pytest

from cluster.common.errors import EngineError
from cluster.engine.outputs import Generation, OutputToken, PrefillProgress
from cluster.engine.request_handle import EngineEvent, RequestHandle
from cluster.scheduler.request import FinishReason
from tests.support.data.specs import generation_spec
from tests.support.fakes.stage import WAIT, Rig, eventually, submit
from tests.support.oracles.integrity import check_engine


def test_a_failed_step_ends_every_request_with_its_error():
    with Rig(pages=5) as rig:
        rig.shards[0].fail_at = 2
        handles = [rig.submit([i] * 40, 20)[0] for i in range(3)]
        for handle in handles:
            with pytest.raises(EngineError, match="stage 0 shard 0, step 1: broken"):
                handle.wait(WAIT)
            assert handle.result is not None
            assert handle.result.finish_reason is FinishReason.ERROR
        with pytest.raises(EngineError, match="broken"):
            rig.submit([1])


def test_a_lost_shard_ends_every_request_and_the_first_reason_stays():
    with Rig() as rig:
        rig.last.hold()
        handle, events = rig.submit([1])
        eventually(lambda: bool(rig.last.plans))
        rig.shards[0].lose("stage 0 shard 0 is gone")
        rig.shards[1].lose("stage 1 shard 0 is gone")
        with pytest.raises(EngineError, match="stage 0 shard 0 is gone"):
            handle.wait(WAIT)
        assert isinstance(events[-1], Generation)
        eventually(lambda: raises(EngineError, lambda: rig.submit([1])))
        with pytest.raises(EngineError, match="stage 0 shard 0 is gone"):
            rig.submit([1])


def raises(kind: type[Exception], call: Callable[[], object]) -> bool:
    try:
        call()
    except kind:
        return True
    return False


def test_close_while_running_ends_what_is_unfinished():
    rig = Rig()
    rig.engine.start()
    rig.last.hold()
    handles = [rig.submit([i])[0] for i in range(3)]
    rig.engine.close()
    rig.engine.close()
    for handle in handles:
        with pytest.raises(EngineError, match="the cluster was stopped"):
            handle.wait(WAIT)
    with pytest.raises(EngineError, match="the cluster was stopped"):
        rig.submit([1])
    assert all(shard.closed for shard in rig.shards)


def test_close_before_start_refuses_later_submissions():
    rig = Rig()
    waiting, _ = rig.submit([1])
    rig.engine.close()
    with pytest.raises(EngineError, match="the cluster was stopped"):
        waiting.wait(WAIT)
    with pytest.raises(EngineError, match="the cluster was stopped"):
        rig.submit([1])


def test_submissions_race_with_close_and_none_hangs():
    for _ in range(20):
        rig = Rig()
        rig.engine.start()
        handles: list[RequestHandle] = []

        def submit(rig: Rig = rig, handles: list[RequestHandle] = handles) -> None:
            while not raises(EngineError, lambda: handles.append(rig.submit([1], 1)[0])):
                pass

        thread = threading.Thread(target=submit, daemon=True)
        thread.start()
        eventually(lambda handles=handles: bool(handles))
        rig.engine.close()
        thread.join(WAIT)
        assert all(handle.done.wait(WAIT) for handle in handles)


def test_an_error_of_the_engine_itself_ends_every_request(monkeypatch: pytest.MonkeyPatch):
    def broken(*_: object) -> None:
        raise KeyError("a bug of ours")

    with Rig() as rig:
        rig.last.hold()
        handle, _ = rig.submit([1])
        eventually(lambda: bool(rig.last.plans))
        monkeypatch.setattr(rig.engine.scheduler, "schedule", broken)
        other, _ = rig.submit([1] * 20)
        rig.last.let(1)
        for waiting in (handle, other):
            with pytest.raises(EngineError, match="the engine failed: KeyError: 'a bug of ours'"):
                waiting.wait(WAIT)
            assert waiting.result is not None
            assert not waiting.result.is_own_error
        assert rig.engine.suspects == {handle.request.sequence, other.request.sequence}, "any may be the reason"
        with pytest.raises(EngineError):
            rig.submit([1])


class Panic(BaseException):
    """Such as extensions in Rust raise."""


@pytest.mark.parametrize("error", [KeyError("odd"), MemoryError(), Panic("odd"), SystemExit(1)])
@pytest.mark.parametrize("where", ["add", "start", "text", "attention", "progress", "result"])
def test_an_error_about_one_request_ends_that_one_alone(
    where: str, error: BaseException, monkeypatch: pytest.MonkeyPatch
):
    with Rig() as rig:
        rig.last.hold()
        before, _ = rig.submit(range(100), 5)
        bad = 2  # its sequence
        places = {
            "add": (rig.engine.scheduler, "add", lambda request: request.sequence),
            "start": (rig.engine, "_progress", lambda request: request.sequence),
            "text": (rig.engine, "_token", lambda handle: handle.request.sequence),
            "progress": (rig.engine, "_progress", lambda request: request.sequence * bool(request.num_computed)),
        }
        if where in places:
            owner, name, number = places[where]
            original = getattr(owner, name)

            def broken(item):
                if number(item) == bad:
                    raise error
                return original(item)

            monkeypatch.setattr(owner, name, broken)
        handle, _ = rig.submit(range(200, 300), 5)
        after, _ = rig.submit(range(300, 400), 5)

        def fail(*_: object) -> None:
            raise error

        if where == "attention":
            handle.attention = type("Broken", (), {"add": fail, "summary": fail})()  # type: ignore[assignment]
        if where == "result":
            monkeypatch.setattr(type(handle.text), "result", _only(handle.text, fail))
        rig.last.let(10_000)
        for good in (before, after):
            assert len(good.wait(WAIT).token_ids) == 5
        with pytest.raises(EngineError, match=type(error).__name__):
            handle.wait(WAIT)
        assert handle.result is not None
        assert handle.result.is_own_error
        assert rig.engine.error == ""
        check_engine(rig.engine)


def _only(one: object, fail: Callable[[], None]) -> Callable[[object], object]:
    """Return a method that fails for one object and works for others."""
    original = type(one).result  # type: ignore[attr-defined]
    return lambda text: fail() if text is one else original(text)


def test_suspects_are_those_in_flight():
    with Rig(stages=1, budget=64) as rig:
        rig.last.hold()
        first, _ = rig.submit(range(300), 5)
        eventually(lambda: bool(rig.last.plans))
        rig.submit(range(400, 420), 5)
        rig.last.lose("stage 0 shard 0 is gone")
        eventually(lambda: bool(rig.engine.error))
        assert rig.engine.suspects == {first.request.sequence}


def test_the_end_of_every_request_is_told_even_when_one_cannot_be_built(monkeypatch: pytest.MonkeyPatch):
    def fail() -> None:
        raise Panic("no text")

    told: list[str] = []
    with Rig() as rig:
        rig.last.hold()
        first, _ = rig.submit([1] * 9, 5)
        second, _ = rig.submit([2] * 9, 5)
        monkeypatch.setattr(type(first.text), "result", _only(first.text, fail))
        rig.engine.on_failure = lambda: told.append(rig.engine.error)
        rig.engine.fail("hung")
        rig.engine.fail("hung again")
        for handle in (first, second):
            with pytest.raises(EngineError, match="hung"):
                handle.wait(WAIT)
        eventually(lambda: bool(told))
        assert told == ["hung"]


@pytest.mark.parametrize("kind", [OutputToken, PrefillProgress, Generation])
def test_a_callback_that_raises_harms_nobody(kind: type, caplog: pytest.LogCaptureFixture):
    calls: list[EngineEvent] = []

    def bad(event: EngineEvent) -> None:
        calls.append(event)
        if isinstance(event, kind):
            raise KeyError("broken pipe of the caller")

    with Rig() as rig:
        handle = submit(rig.engine, generation_spec(range(100), 3), bad)
        other, events = rig.submit(range(200, 300), 3)
        assert handle.wait(WAIT).token_ids == (1000, 1001, 1002)
        assert other.wait(WAIT).token_ids == (1000, 1001, 1002)
        assert isinstance(events[-1], Generation)
        assert sum(isinstance(event, kind) for event in calls) == 1, "it is not called again"
        assert "broken pipe of the caller" in caplog.text
        check_engine(rig.engine)


def test_the_last_event_comes_before_wait_returns():
    events: list[EngineEvent] = []

    def slow(event: EngineEvent) -> None:
        if isinstance(event, Generation):
            time.sleep(0.05)
        events.append(event)

    with Rig() as rig:
        submit(rig.engine, generation_spec([1], 1), slow).wait(WAIT)
        assert isinstance(events[-1], Generation)
