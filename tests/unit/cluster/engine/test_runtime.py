"""The runtime over a fake pipeline: questions, states, failures, and the cluster that users import."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from cluster.common.errors import EngineError, PreflightError, StageError
from cluster.config.deployment import ConfigError, Deployment
from cluster.engine import runtime as runtime_module
from cluster.engine.outputs import Generation, OutputToken, PrefillProgress
from cluster.engine.pipeline import Pipeline
from cluster.engine.request_handle import EngineEvent, RequestHandle
from cluster.engine.runtime import ClusterRuntime, LocalCluster
from cluster.latency.balance import stage_layers, with_layers
from cluster.stages.ray_cluster import RayCluster
from cluster.text.prompts import PromptError
from cluster.text.templates.process import ChatTemplateError
from cluster.text.tools.formats import ToolFormat
from protos.jobs.chat import ChatMessage, Tool, ToolChoice
from protos.jobs.sampling import AnswerOptions
from tests.support.fakes.runtime import FakeRuntime
from tests.support.fakes.stage import eventually
from tests.support.oracles.integrity import check_engine
from tests.support.paths import CONFIGS

TEXT = "The code of dark river is 12345. The grass is green. "
THREE = AnswerOptions(max_tokens=3)


@pytest.fixture
def runtime(tmp_path: Path) -> Iterator[FakeRuntime]:
    made = FakeRuntime(tmp_path)
    with made:
        yield made


def test_questions_about_a_text_and_about_a_file(runtime: FakeRuntime, tmp_path: Path) -> None:
    events: list[tuple[int, EngineEvent]] = []
    first, second = runtime.ask_all(
        TEXT, ["What?", "Where?"], THREE, lambda index, event: events.append((index, event))
    )
    assert first.token_ids == second.token_ids == (100, 101, 102)
    assert first.prompt_tokens == len(runtime.document_prompts(TEXT, ["What?"], THREE)[0])
    for index, result in enumerate((first, second)):
        mine = [event for which, event in events if which == index]
        assert isinstance(mine[0], PrefillProgress)
        assert [event.token_id for event in mine if isinstance(event, OutputToken)] == [100, 101, 102]
        assert mine[-1] is result
    path = tmp_path / "document.txt"
    path.write_text(TEXT)
    again = runtime.ask(path, "What?", THREE)
    assert (again.prompt_tokens, again.token_ids) == (first.prompt_tokens, first.token_ids)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PromptError, match="UTF-8"):
        runtime.ask(path, "What?")
    assert isinstance(runtime.ask(TEXT, "What?"), Generation), "options may be left out"
    check_engine(runtime.engine)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("why? <think>\n", ("so it is", "")),
        ("why? <think>\n</think>\n", (None, "so it is")),
        ("why?", (None, "so it is")),
    ],
)
def test_a_raw_prompt_that_ends_inside_the_tag_is_reasoned_on(
    runtime: FakeRuntime, monkeypatch: pytest.MonkeyPatch, prompt: str, expected: tuple[str | None, str]
) -> None:
    """As `run` does, cut off while it reasons; the same rule as for jobs."""
    ids = runtime.tokenizer.encode("so it is")
    monkeypatch.setattr(runtime.shard, "script", lambda sequence, index: ids[index])
    (result,) = runtime.generate([runtime.tokenizer.encode(prompt)], AnswerOptions(max_tokens=len(ids)))
    assert (result.reasoning, result.text) == expected


def test_each_question_decides_whether_it_is_reasoned_on(runtime: FakeRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime.tokenizer.chat_template = (
        "{{ messages[-1].content }}<think>\n{% if '/no_think' in messages[-1].content %}\n</think>\n\n{% endif %}"
    )
    ids = runtime.tokenizer.encode("so it is")
    monkeypatch.setattr(runtime.shard, "script", lambda sequence, index: ids[index])
    answers = runtime.ask_all(TEXT, ["Why?", "Why? /no_think"], AnswerOptions(max_tokens=len(ids)))
    assert [(answer.reasoning, answer.text) for answer in answers] == [("so it is", ""), (None, "so it is")]


def test_a_template_that_cannot_be_rendered_is_found_before_a_start(runtime: FakeRuntime) -> None:
    runtime.check_chat_template()
    runtime.tokenizer.chat_template = None
    runtime.check_chat_template()
    runtime.tokenizer.chat_template = "{% for %}"
    with pytest.raises(ChatTemplateError, match="in line 1"):
        runtime.check_chat_template()


@pytest.mark.parametrize("kind", ["document", "question", "prompt", "message", "messages", "system"])
def test_texts_far_beyond_the_model_are_refused_before_they_are_read(
    runtime: FakeRuntime, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    size = 9_000_000
    build = {
        "document": lambda: runtime.document_prompts("a" * size, ["q"], THREE),
        "question": lambda: runtime.document_prompts("d", ["q", "世" * (size // 3)], THREE),
        "prompt": lambda: runtime.text_prompt("a" * size),
        "message": lambda: runtime.chat_prompt([ChatMessage("user", "a" * size)], THREE),
        "messages": lambda: runtime.chat_prompt([ChatMessage("user", "a" * (size // 100))] * 100, THREE),
        "system": lambda: runtime.chat_prompt([ChatMessage("system", "a" * size), ChatMessage("user", "hi")], THREE),
    }
    names = {"message": "conversation", "messages": "conversation", "system": "conversation"}

    def never(*_: object, **__: object) -> list[int]:
        raise AssertionError("it was tokenised")

    monkeypatch.setattr(runtime.tokenizer, "encode_parts", never)
    with pytest.raises(PromptError, match=rf"^{names.get(kind, kind)}: 900000[02] bytes are at least \d+ tokens"):
        build[kind]()


def test_a_wait_that_is_interrupted_cancels_every_question(
    runtime: FakeRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(handle: RequestHandle) -> Generation:
        raise KeyboardInterrupt

    runtime.shard.hold()
    monkeypatch.setattr(RequestHandle, "wait", interrupt)
    with pytest.raises(KeyboardInterrupt):
        runtime.generate([[5] * 100, [6] * 100], THREE)
    runtime.shard.let(1000)
    eventually(lambda: runtime.kv_usage == 0)
    check_engine(runtime.engine)


def test_states_from_start_to_close(tmp_path: Path) -> None:
    runtime = FakeRuntime(tmp_path)
    assert (runtime.status()["stages"], runtime.status()["kv_tokens"], runtime.kv_usage) == ([], 0, 0.0)
    for call in (lambda: runtime.engine, lambda: runtime.launched, lambda: runtime.generate([[5]], THREE)):
        with pytest.raises(EngineError, match="the cluster is not running"):
            call()
    with runtime:
        runtime.generate([[5, 6]], THREE)
        (stage,) = runtime.status()["stages"]
        assert stage == {"stage": 0, "rank": 0, "state": "running", "steps_done": 3, "resident_bytes": 0, "late": 0}
        recovered = [runtime.status()[key] for key in ("repairs", "full_restarts", "last_recovery_s", "epoch")]
        assert recovered == [0, 0, 0.0, 1]
        assert runtime.status()["kv_tokens"] == 512 * 64
        assert any(runtime.latency_coefficients)
        runtime.shard.close()
        assert runtime.status()["stages"] == [{"stage": 0, "rank": 0, "state": "unreachable"}]
    assert runtime.status()["stages"] == [{"stage": 0, "rank": 0, "state": "stopped"}]
    assert set(runtime.latency_coefficients) == {0.0}
    assert runtime.launched.fingerprint == "f", "what it was is still known"


def test_a_failed_pipeline_until_it_is_started_again(runtime: FakeRuntime) -> None:
    runtime.shard.hold()
    (handle,) = runtime.submit([[5, 6]], THREE)
    runtime.fail()
    with pytest.raises(EngineError, match="stage 0 shard 0 is gone"):
        handle.wait(20)
    with pytest.raises(EngineError, match="stage 0 shard 0 is gone"):
        runtime.submit([[5, 6]], THREE)
    runtime.restart()
    assert runtime.generate([[5, 6]], THREE)[0].token_ids == (100, 101, 102)
    assert runtime.starts == 2


def test_a_local_cluster_is_a_runtime_from_a_file(tmp_path: Path) -> None:
    cluster = LocalCluster(CONFIGS / "single.yaml", {"model.max_model_len": "2k", "data_dir": str(tmp_path)})
    assert isinstance(cluster, ClusterRuntime)
    assert cluster.deployment.max_model_len == 2000
    with pytest.raises(ConfigError, match=r"missing\.yaml"):
        LocalCluster(tmp_path / "missing.yaml")


def test_ray_outlives_a_pipeline_but_not_a_failed_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    closed: list[object] = []
    monkeypatch.setattr(RayCluster, "close", lambda self: closed.append(self))
    outcomes: list[Exception | None] = [None, StageError("no stage")]

    def launch(*_: object) -> Pipeline:
        if (error := outcomes.pop(0)) is not None:
            raise error
        return Pipeline(SimpleNamespace(error=""), SimpleNamespace(shards=(), num_pages=512, epoch=1), lambda: None)  # type: ignore[arg-type]

    monkeypatch.setattr(runtime_module, "launch_pipeline", launch)
    runtime = LocalCluster(CONFIGS / "single.yaml", {"data_dir": str(tmp_path)})
    runtime.start()
    runtime.supervisor.close()
    assert not closed
    with pytest.raises(StageError):
        runtime.start()
    assert len(closed) == 1
    runtime.close()
    assert len(closed) == 2


def test_stages_that_do_not_fit_by_cost_are_split_by_weights_from_then_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    launched: list[tuple[int, ...]] = []

    def launch(deployment: Deployment, *_: object) -> Pipeline:
        launched.append(stage_layers(deployment))
        if launched[-1] != (2, 2):
            raise PreflightError("no room")
        return Pipeline(SimpleNamespace(error=""), SimpleNamespace(shards=(), num_pages=512, epoch=1), lambda: None)  # type: ignore[arg-type]

    monkeypatch.setattr(runtime_module, "balance_stages", lambda given: with_layers(given, [3, 1]))
    monkeypatch.setattr(runtime_module, "launch_pipeline", launch)
    runtime = LocalCluster(CONFIGS / "demo.yaml", {"data_dir": str(tmp_path)})
    assert stage_layers(runtime.deployment) == (3, 1)
    runtime.start()
    assert stage_layers(runtime.deployment) == (2, 2)
    runtime.restart()
    runtime.close()
    assert launched == [(3, 1), (2, 2), (2, 2)]


def test_the_form_of_tool_calls_is_that_of_the_chat_template(runtime: FakeRuntime) -> None:
    assert runtime.tool_format is ToolFormat.NONE
    assert runtime.call_grammar([Tool("f")], ToolChoice("required")) is None
    runtime.tokenizer.chat_template = "{{ tools }}<tool_call>"
    assert runtime.tool_format is ToolFormat.QWEN3_JSON
    assert "f" in (runtime.call_grammar([Tool("f")], ToolChoice("required")) or "")
    assert runtime.call_grammar([Tool("f")], ToolChoice()) is runtime.call_grammar([], ToolChoice()) is None
    model = runtime.deployment.config.model.model_copy(update={"tool_parser": "none"})
    config = runtime.deployment.config.model_copy(update={"model": model})
    runtime.deployment = replace(runtime.deployment, config=config)
    assert runtime.tool_format is ToolFormat.NONE
