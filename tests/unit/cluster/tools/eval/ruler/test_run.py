"""The evaluation of tasks without a cluster: cells, scores, going on, export."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
from rich.console import Console

from cluster.common.errors import EngineError
from cluster.config.configs_dir import configs_dir
from cluster.config.deployment import Deployment
from cluster.engine.outputs import Generation
from cluster.text.tokenizer import TextTokenizer
from cluster.tools.assets import needle_dir
from cluster.tools.display import Display
from cluster.tools.eval import grid
from cluster.tools.eval.modes import Target
from cluster.tools.eval.ruler.run import RulerOptions, RulerRun, export
from protos.errors import UserError
from tests.support.data.eval_reports import generation

DEMO = Target(configs_dir() / "demo.yaml")
TOKENIZER = TextTokenizer.open(needle_dir())
Reply = Callable[[str], str]


def display() -> Display:
    return Display(Console(quiet=True), quiet=True)


class Oracle:
    """A runtime that answers what `reply` makes of a prompt."""

    asked: ClassVar[list[tuple[int, int]]] = []  # prompts and length scale of each call, of all runtimes

    def __init__(self, deployment: Deployment, reply: Reply) -> None:
        self.max_model_len, self._reply = deployment.max_model_len, reply

    def start(self) -> None: ...

    def restart(self) -> None: ...

    def close(self) -> None: ...

    def generate(self, prompts: list[list[int]], ask: Any, follow: object, pinned_len: int = 0) -> list[Generation]:
        self.asked.append((len(prompts), pinned_len))
        assert all(len(prompt) + ask.max_tokens <= self.max_model_len for prompt in prompts)
        return [generation(self._reply(TOKENIZER.decode(prompt)), len(prompt)) for prompt in prompts]


def answer(text: str) -> str:
    """Answer needle questions rightly."""
    key = text.rpartition(" for ")[2].partition(" mentioned")[0]
    return text.partition(f"for {key} is: ")[2].partition(".")[0]


def evaluate(
    options: RulerOptions, reply: Reply, monkeypatch: pytest.MonkeyPatch, earlier: dict[str, Any] | None = None
) -> dict[str, Any]:
    monkeypatch.setattr(grid, "ClusterRuntime", lambda deployment, _: Oracle(deployment, reply))
    return RulerRun(DEMO, options, display(), earlier).run(lambda report: None)


NEEDLES = ("niah_single_1", "niah_multikey_2")


def test_a_cell_a_task_length_and_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    options = RulerOptions((1024, 2048), NEEDLES, ("plain", "yarn"), samples=3)
    report = evaluate(options, answer, monkeypatch)
    assert [(cell["mode"], cell["length"], cell["task"]) for cell in report["cells"]] == [
        (mode, length, task) for mode in ("plain", "yarn") for length in (1024, 2048) for task in NEEDLES
    ]
    for cell in report["cells"]:
        assert (cell["score"], cell["samples"]) == (1.0, 3)
        assert cell["interval"] == pytest.approx([0.4385, 1.0], abs=1e-4)
        assert cell["length"] - 128 - 45 <= cell["prompt_tokens"] <= cell["length"] - 128
        assert all(outcome["outputs"] == [outcome["answer"]] for outcome in cell["outcomes"])
    plain, yarn = ([cell["outcomes"] for cell in report["cells"] if cell["mode"] == mode] for mode in ("plain", "yarn"))
    assert plain == yarn  # the same samples in every mode
    assert report["complete"]


def test_shares_of_outputs_are_averaged(monkeypatch: pytest.MonkeyPatch) -> None:
    options = RulerOptions((1024,), ("niah_multivalue",), ("plain",), samples=2)
    replies = iter(["all", ""])

    def reply(text: str) -> str:
        key = text.rpartition(" for ")[2].partition(" mentioned")[0]
        parts = text.split(f"for {key} is: ")[1:]
        assert len(parts) == 4
        return " ".join(part[:7] for part in parts[:3]) if next(replies) else ""

    (cell,) = evaluate(options, reply, monkeypatch)["cells"]
    assert [outcome["score"] for outcome in cell["outcomes"]] == [0.75, 0.0]
    assert cell["score"] == 0.375


def test_an_evaluation_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    options = RulerOptions((1024,), NEEDLES, ("plain", "sparse"), samples=2)
    asked = 0

    def fails_second(text: str) -> str:
        nonlocal asked
        asked += 1
        if asked == 3:
            raise EngineError("gone")
        return answer(text)

    report = evaluate(options, fails_second, monkeypatch)
    assert ["error" in cell for cell in report["cells"]] == [False, True, False, False]
    asked = 10
    again = evaluate(options, fails_second, monkeypatch, json.loads(json.dumps(report)))
    assert asked == 12  # two samples of one cell
    assert [cell.get("score") for cell in again["cells"]] == [1.0] * 4
    with pytest.raises(UserError, match=r"--resume: has another seed \(0, now 1\)"):
        evaluate(RulerOptions((1024,), NEEDLES, ("plain", "sparse"), samples=2, seed=1), answer, monkeypatch, report)


SHARED = ("niah_single_2", "niah_multikey_1", "niah_multikey_2")


def test_haystacks_are_cells_that_an_evaluation_goes_on_from(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks that share haystacks are asked at once, at one length scale; a cell that failed is asked again, alone."""
    options = RulerOptions((2048,), SHARED, ("dca",), samples=6, questions=3)
    asked = 0

    def fails_once(text: str) -> str:
        nonlocal asked
        asked += 1
        if asked == 7:
            raise EngineError("gone")
        return answer(text)

    Oracle.asked.clear()
    report = evaluate(options, fails_once, monkeypatch)
    assert [(cell["task"], cell["haystack"]) for cell in report["cells"]] == [
        (task, haystack) for haystack in (0, 1) for task in ("niah_single_2+niah_multikey_1", "niah_multikey_2")
    ]
    assert ["error" in cell for cell in report["cells"]] == [False, True, False, False]
    assert [prompts for prompts, _ in Oracle.asked] == [6, 3, 6, 3]
    assert Oracle.asked[0][1] == report["cells"][0]["prompt_tokens"] <= 2048 - 128
    assert (report["questions"], report["note"]) == (3, "questions: 3 a haystack; not RULER's own samples")
    first = report["cells"][0]
    assert [outcome["task"] for outcome in first["outcomes"]] == ["niah_single_2"] * 3 + ["niah_multikey_1"] * 3
    assert (first["score"], first["samples"]) == (1.0, 6)
    again = evaluate(options, fails_once, monkeypatch, json.loads(json.dumps(report)))
    assert [prompts for prompts, _ in Oracle.asked[4:]] == [3]
    assert [cell.get("score") for cell in again["cells"]] == [1.0] * 4
    with pytest.raises(UserError, match=r"--resume: has another questions \(3, now 1\)"):
        evaluate(RulerOptions((2048,), SHARED, ("dca",), samples=6), answer, monkeypatch, report)


def test_results_from_before_questions_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    options = RulerOptions((1024,), NEEDLES, ("plain",), samples=1)
    report = evaluate(options, answer, monkeypatch)
    del report["questions"]
    assert "note" not in report
    Oracle.asked.clear()
    assert len(evaluate(options, answer, monkeypatch, report)["cells"]) == 2
    assert Oracle.asked == []


def test_questions_have_room_beside_their_haystack() -> None:
    assert RulerOptions(tasks=SHARED).extra_tokens("sparse") == 0
    options = RulerOptions(tasks=SHARED, questions=2)
    assert (options.extra_tokens("dca"), options.extra_tokens("sparse")) == (4 * 1024, 4 * (1024 + 8192))
    assert RulerOptions(tasks=SHARED, questions=10).extra_tokens("dca") == 8 * 1024


def test_samples_of_shared_haystacks_are_exported_by_task(tmp_path: Path) -> None:
    assert export(DEMO, RulerOptions((2048,), SHARED, ("dca",), samples=4, questions=2), tmp_path, display()) == 12
    texts = {}
    for task in SHARED:
        lines = (tmp_path / "2048" / task / "validation.jsonl").read_text().splitlines()
        texts[task] = [json.loads(line)["input"].rpartition("\n")[0] for line in lines]
        assert [json.loads(line)["index"] for line in lines] == [0, 1, 2, 3]
    assert texts["niah_single_2"] == texts["niah_multikey_1"]
    assert [len(set(each)) for each in texts.values()] == [2, 2, 2]


def test_export_writes_what_would_be_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = RulerOptions((1024,), ("vt", "niah_single_1"), ("plain",), samples=2)
    assert export(DEMO, options, tmp_path, display()) == 4
    paths = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.jsonl"))
    assert paths == ["1024/niah_single_1/validation.jsonl", "1024/vt/validation.jsonl"]
    lines = [json.loads(line) for line in (tmp_path / paths[0]).read_text().splitlines()]
    report = evaluate(RulerOptions((1024,), ("niah_single_1",), ("plain",), samples=2), answer, monkeypatch)
    assert [line["outputs"] for line in lines] == [each["outputs"] for each in report["cells"][0]["outcomes"]]
    assert all(1024 - 45 <= line["length"] <= 1024 for line in lines)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lengths": ()}, "--lengths"),
        ({"modes": ("plain", "plain")}, "--modes"),
        ({"tasks": ("niah",)}, "--tasks: niah: must be"),
        ({"lengths": (128,), "tasks": ("vt",)}, "--lengths: 128: vt needs at least"),
        ({"samples": 20, "questions": 3}, "--questions: 3: must divide --samples, which is 20"),
        ({"questions": 2}, "--questions: 2: cwe, fwe: one question a text is all there is"),
        ({"modes": ("alibi",)}, "--modes: alibi: must be among plain, yarn, dca, sparse"),
        ({"document": Path("/nowhere.txt")}, "nowhere"),
    ],
)
def test_impossible_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        RulerRun(DEMO, RulerOptions(**options), display())
