"""The needle evaluation without a cluster: grids, scores, failures, what an interrupt leaves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cluster.common.errors import EngineError
from cluster.config.configs_dir import configs_dir
from cluster.config.deployment import Deployment
from cluster.engine.outputs import Generation
from cluster.text.prompts import PromptError
from cluster.text.tokenizer import TextTokenizer
from cluster.tools.assets import needle_dir
from cluster.tools.display import Display
from cluster.tools.eval import grid
from cluster.tools.eval.modes import Target, find_target
from cluster.tools.eval.needle import NeedleOptions, NeedleRun
from cluster.tools.eval.results import ResultFile, read_result
from cluster.tools.eval.tables import depth_scores
from protos.errors import UserError
from tests.support.data.eval_reports import generation

DEMO = Target(configs_dir() / "demo.yaml")
TOKENIZER = TextTokenizer.open(needle_dir())
Event = tuple[str, str]


class Oracle:
    """A runtime that knows the documents: it answers what `reply` makes of the truth, or raises what it raises."""

    def __init__(self, deployment: Deployment, log: list[Event], reply: Callable[[str, int], str]) -> None:
        self.name = f"{deployment.spec.rope.kind} {deployment.max_model_len}"
        self._log, self._reply, self._asked = log, reply, 0

    def start(self) -> None:
        self._log.append(("start", self.name))

    def restart(self) -> None:
        self._log.append(("restart", self.name))

    def close(self) -> None:
        self._log.append(("close", self.name))

    def generate(self, prompts: list[list[int]], *_: object, **__: object) -> list[Generation]:
        self._asked += 1
        self._log.append(("ask", f"{len(prompts)} x {max(map(len, prompts))}"))
        found = []
        for index, prompt in enumerate(prompts):
            text = TOKENIZER.decode(prompt)
            wanted = text.rpartition("secret code of ")[2].partition("?")[0].removesuffix(" is ")
            truth = next(line for line in text.splitlines() if line.startswith(f"The secret code of {wanted} is"))
            begun = text.endswith(" is ")
            told = self._reply(truth.rpartition(" ")[2] if begun else truth, self._asked)
            found.append(generation(told, len(prompt), 0 if index == 0 else len(prompt) - 20))
        return found


def oracles(monkeypatch: pytest.MonkeyPatch, log: list[Event], reply: Callable[[str, int], str]) -> None:
    monkeypatch.setattr(grid, "ClusterRuntime", lambda deployment, _: Oracle(deployment, log, reply))


def evaluate(
    options: NeedleOptions, reply: Callable[[str, int], str], target: Target = DEMO
) -> tuple[dict[str, Any], list[Event], list[int]]:
    log: list[Event] = []
    display = Display(Console(quiet=True), quiet=True)
    run = NeedleRun(target, options, display)
    sizes: list[int] = []
    with pytest.MonkeyPatch.context() as monkeypatch:
        oracles(monkeypatch, log, reply)
        report = run.run(lambda report: sizes.append(len(report["cells"])))
    return report, log, sizes


@pytest.mark.parametrize("form", ["answer", "prompt"])
@pytest.mark.parametrize("shared", [False, True])
def test_a_cluster_a_mode_and_a_document_a_cell(form: str, shared: bool) -> None:
    options = NeedleOptions((1024, 2048), 4, ("plain", "yarn"), form=form, shared_words=shared, trials=2)
    report, log, sizes = evaluate(options, lambda truth, _: f" {truth}\n")
    assert [kind for kind, _ in log] == ["start", *["ask"] * 4, "close"] * 2
    assert sizes == [1, 2, 3, 4, 5, 6, 7, 8, 8]  # after every cell, and at the end
    assert report["complete"]
    places = [(cell["mode"], cell["length"], cell["trial"]) for cell in report["cells"]]
    assert places == [(m, n, t) for m in ("plain", "yarn") for n in (1024, 2048) for t in (0, 1)]
    for cell in report["cells"]:
        assert cell["right"] == cell["total"] == len(cell["outcomes"]) == 4
        assert cell["prompt_tokens"] <= cell["length"] - 24
        depths = [outcome["depth"] for outcome in cell["outcomes"]]
        assert depths == pytest.approx([0.125, 0.375, 0.625, 0.875], abs=0.07)
        assert cell["prefill_tokens_per_s"] == pytest.approx(cell["prompt_tokens"] / 2, rel=0.02)
    assert depth_scores(report, "yarn", 2048) == [1.0] * 4


def test_trials_hide_other_facts_at_other_places() -> None:
    report, _, _ = evaluate(NeedleOptions((1024,), 4, ("plain",), trials=3), lambda truth, _: truth)
    codes = [tuple(outcome["truth"] for outcome in cell["outcomes"]) for cell in report["cells"]]
    assert len(set(codes)) == 3
    again, _, _ = evaluate(NeedleOptions((1024,), 4, ("plain",), seed=2), lambda truth, _: truth)
    assert tuple(outcome["truth"] for outcome in again["cells"][0]["outcomes"]) == codes[2]


def test_wrong_answers_count_by_depth() -> None:
    calls = iter(range(100))
    options = NeedleOptions((1024,), 4, ("plain",), trials=2)
    report, _, _ = evaluate(options, lambda truth, _: truth if next(calls) % 4 else "?")
    assert depth_scores(report, "plain", 1024) == [0.0, 1.0, 1.0, 1.0]
    assert [cell["right"] for cell in report["cells"]] == [3, 3]


def test_other_checkpoints_may_say_it_in_other_words(tmp_path: Path) -> None:
    model = tmp_path / "other"
    model.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (model / name).write_bytes((needle_dir() / name).read_bytes())
    target = find_target(None, model)
    options = NeedleOptions((1024,), 2, ("plain",))
    report, _, _ = evaluate(options, lambda truth, _: f"Well: {truth[-6:]} It is.", target)
    assert report["model"] == "other"
    assert report["scoring"].startswith("first five-digit number")
    assert report["cells"][0]["right"] == 2
    with pytest.raises(UserError, match=r"--modes: dca: .* has neither config_1m.json nor"):
        NeedleRun(target, NeedleOptions((1024,), 2, ("dca",)), Display(Console(quiet=True), quiet=True))


@pytest.mark.parametrize("problem", [EngineError("stage 0 is gone"), PromptError("prompt: too long")])
def test_a_failing_cell_leaves_the_others(problem: Exception) -> None:
    def reply(truth: str, asked: int) -> str:
        if asked == 2:
            raise problem
        return truth

    report, log, _ = evaluate(NeedleOptions((1024, 1536, 2048), 2, ("plain", "yarn")), reply)
    assert ["error" in cell for cell in report["cells"]] == [False, True, False] * 2
    assert report["cells"][1]["error"] == str(problem)
    restarts = [name for kind, name in log if kind == "restart"]
    assert len(restarts) == (2 if isinstance(problem, EngineError) else 0)
    assert depth_scores(report, "plain", 1536) == [None, None]


def test_a_cluster_that_does_not_start_fails_its_mode_only(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(self: Oracle) -> None:
        if self.name.startswith("default"):
            raise EngineError("no room")

    monkeypatch.setattr(Oracle, "start", start)
    report, _, _ = evaluate(NeedleOptions((1024, 2048), 2, ("plain", "yarn")), lambda truth, _: truth)
    assert [cell.get("error") for cell in report["cells"]] == ["the cluster did not start: no room"] * 2 + [None] * 2


def test_an_interrupt_closes_the_cluster_and_keeps_what_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = ResultFile(tmp_path / "new", "eval")
    log: list[Event] = []

    def reply(truth: str, asked: int) -> str:
        if asked == 2:
            raise KeyboardInterrupt
        return truth

    display = Display(Console(quiet=True), quiet=True)
    options = NeedleOptions((1024, 2048), 2, ("plain",))
    oracles(monkeypatch, log, reply)
    run = NeedleRun(DEMO, options, display)
    with pytest.raises(KeyboardInterrupt):
        run.run(result.write)
    assert log[-1][0] == "close"
    kept = read_result(result.path)
    assert [cell["length"] for cell in kept["cells"]] == [1024]
    assert not kept["complete"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lengths": ()}, "--lengths"),
        ({"lengths": (1024, 1024)}, "--lengths"),
        ({"modes": ("plain", "plain")}, "--modes"),
        ({"modes": ("alibi",)}, "--modes: alibi: must be among plain, yarn, dca, sparse"),
        ({"lengths": (200,), "needles": 8}, "total_tokens"),
        ({"needles": 110}, "num_needles"),
        ({"document": Path("/nowhere.txt")}, "nowhere"),
        ({"more": {"sparse.cel": 1}}, "sparse.cel"),
    ],
)
def test_impossible_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        NeedleRun(DEMO, NeedleOptions(**options), Display(Console(quiet=True), quiet=True))
