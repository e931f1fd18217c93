"""The real thing: a local Ray, four stage processes, the shipped checkpoint."""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from cluster.config.deployment import load_deployment
from cluster.engine.runtime import ClusterRuntime
from cluster.text.tokenizer import TextTokenizer
from cluster.tools.eval.haystack import build_haystack, is_right
from protos.jobs.sampling import AnswerOptions
from tests.integration.conftest import ROOT, CommandLine
from tests.support.data.specs import generation_spec
from tests.support.fakes.pipeline import Pipeline
from tests.support.oracles.integrity import check_engine
from tests.support.rigs.head import free_port

NEEDLE = ROOT / "configs" / "needle"


def test_demo_answers_everything(longreach: CommandLine) -> None:
    done = longreach("demo", "--tokens", "8k", "--json")
    assert done.code == 0, done.err
    report = json.loads(done.out)
    assert report["right"] == report["total"] == 8
    assert {row["truth"] for row in report["questions"]} == {row["answer"] for row in report["questions"]}
    assert 7000 < report["tokens"] <= 8000
    assert 0 < report["ready_s"] < report["total_s"]
    assert report["ttft_s"] > 0
    assert report["prefill_tokens_per_s"] > 0
    assert report["cached_tokens"] > 7 * 7000  # seven of eight questions found the document computed
    assert report["http"]["is_same"]
    assert report["http"]["cached_tokens"] > 7000
    longreach.assert_nothing_left()


def test_demo_fails_beyond_the_trained_window_with_plain_positions(longreach: CommandLine) -> None:
    done = longreach("demo", "--tokens", "10k", "--positions", "plain", "--json")
    assert done.code == 1
    report = json.loads(done.out)
    assert report["right"] < report["total"]
    longreach.assert_nothing_left()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_while_running_stops_everything(longreach: CommandLine, number: signal.Signals) -> None:
    process = longreach.start("demo", "--tokens", "32k")
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("reading"):
            break
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == 130
    longreach.assert_nothing_left()


def bare_model(tmp_path: Path) -> tuple[Path, list[int]]:
    """Return a model folder without tokenizer.json and a prompt."""
    model = tmp_path / "model"
    model.mkdir()
    for name in ("config.json", "model.safetensors"):
        (model / name).symlink_to(NEEDLE / name)
    return model, TextTokenizer.open(NEEDLE).encode("The secret code of dark river is 48213. " * 3)


def test_token_ids_need_no_tokenizer(longreach: CommandLine, write_config: Callable[..., Path], tmp_path: Path) -> None:
    """The same ids with and without tokenizer.json; without it every text is null, or the ids stand in its place."""
    model, ids = bare_model(tmp_path)
    (tmp_path / "ids.json").write_text(json.dumps(ids))
    arguments = ("--token-ids", tmp_path / "ids.json", "--max-tokens", "6", "--logprobs", "2")
    config = write_config(model_path=model)

    done = longreach("run", config, *arguments, "--json")
    assert done.code == 0, done.err
    (bare,) = json.loads(done.out)["results"]
    assert bare["text"] is bare["reasoning"] is bare["question"] is None
    assert [entry["token"] for entry in bare["logprobs"]] == [None] * 6
    assert {token["token"] for entry in bare["logprobs"] for token in entry["top"]} == {None}
    assert bare["usage"]["prompt_tokens"] == len(ids)

    done = longreach("run", config, *arguments)
    assert done.code == 0, done.err
    assert json.loads(done.out) == bare["token_ids"]
    done = longreach("run", config, *arguments, "--stop", "x")
    assert (done.code, done.out) == (2, "")
    assert f"stop: 'x': needs {model / 'tokenizer.json'}: use stop_token_ids" in done.err
    done = longreach("run", config, "--prompt-file", tmp_path / "ids.json")
    assert done.code == 2
    assert "tokenizer.json: does not exist: text needs it" in done.err

    (model / "tokenizer.json").symlink_to(NEEDLE / "tokenizer.json")
    done = longreach("run", config, *arguments, "--json")
    assert done.code == 0, done.err
    (full,) = json.loads(done.out)["results"]
    assert full["token_ids"] == bare["token_ids"]
    assert full["text"]
    assert all(isinstance(entry["token"], str) for entry in full["logprobs"])
    longreach.assert_nothing_left()


def test_sampling_is_as_the_model_says_and_can_be_repeated(
    longreach: CommandLine, write_config: Callable[..., Path], tmp_path: Path
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for path in NEEDLE.iterdir():
        if path.name != "generation_config.json":
            (model / path.name).symlink_to(path)
    defaults = {"temperature": 1.5, "top_k": 200, "top_p": 0.95}
    (model / "generation_config.json").write_text(json.dumps({"do_sample": True, **defaults}))
    (tmp_path / "prompt.txt").write_text("In the beginning")
    config = write_config(model_path=model)
    prompt = ("--prompt-file", tmp_path / "prompt.txt")
    arguments = ("run", config, *prompt, "--max-tokens", "12", "--ignore-eos", "--json")

    done = longreach(*arguments)
    assert done.code == 0, done.err
    (first,) = json.loads(done.out)["results"]
    sampling = first["sampling"]
    assert {name: sampling[name] for name in defaults} == defaults

    done = longreach(*arguments, "--seed", str(sampling["seed"]))
    (again,) = json.loads(done.out)["results"]
    assert (again["token_ids"], again["sampling"]) == (first["token_ids"], sampling)

    done = longreach(*arguments, "--temperature", "0", "--top-k", "0")
    (greedy,) = json.loads(done.out)["results"]
    assert {name: greedy["sampling"][name] for name in defaults} == defaults | {"temperature": 0.0, "top_k": 0}
    assert greedy["token_ids"] != first["token_ids"]

    (model / "generation_config.json").write_text('{"temperature": -1}')
    done = longreach(*arguments)
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert "generation_config.json: temperature: -1: must be a number from 0 to 100" in done.err


def test_a_head_without_tokenizer_takes_token_ids(
    longreach: CommandLine, write_config: Callable[..., Path], tmp_path: Path
) -> None:
    model, ids = bare_model(tmp_path)
    (tmp_path / "ids.json").write_text(json.dumps(ids))
    config = write_config(model_path=model, rest=f"server:\n  port: {free_port()}")
    done = longreach("up", config)
    assert done.code == 0, done.err
    try:
        where = ("--data-dir", tmp_path / "data")
        arguments = ("--token-ids", tmp_path / "ids.json", "--max-tokens", "6")
        done = longreach("submit", *where, *arguments, "--wait", "--json")
        assert done.code == 0, done.err
        (answer,) = json.loads(done.out)["answers"]
        assert (answer["text"], answer["reasoning"], len(answer["token_ids"])) == (None, None, 6)
        done = longreach("submit", *where, *arguments, "--wait")
        assert json.loads(done.out) == answer["token_ids"]
        done = longreach("submit", *where, *arguments, "--stream")
        assert list(map(int, done.out.split())) == answer["token_ids"]
        for refused in (("--prompt-file", config), ("--document", config, "--question", "Why?")):
            done = longreach("submit", *where, *refused)
            assert done.code != 0
            assert "tokenizer.json: does not exist: text needs it; token ids go without" in done.err
            assert len(done.err.splitlines()) == 1
    finally:
        assert longreach("down", config).code == 0
    longreach.assert_nothing_left()


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClusterRuntime]:
    overrides = {
        "model.dtype": "float32",
        "data_dir": str(tmp_path_factory.mktemp("data")),
    }
    running = ClusterRuntime(load_deployment(ROOT / "configs" / "demo.yaml", overrides))
    running.start()
    try:
        yield running
    finally:
        running.close()
        running.close()  # twice is fine
    assert not [c for c in psutil.Process().children(recursive=True) if "raylet" in " ".join(c.cmdline())]


def test_answers_equal_one_process(runtime: ClusterRuntime) -> None:
    """2 x 2 over Ray and gRPC in float32: the same tokens as one shard in this process."""
    haystack = build_haystack(runtime.tokenizer, 3000, 4, 3, NEEDLE)
    prompts = runtime.document_prompts(
        haystack.document, [n.question for n in haystack.needles], AnswerOptions(max_tokens=16)
    )
    answers = runtime.generate(prompts, AnswerOptions(max_tokens=16))
    assert all(is_right(a.text, n) for a, n in zip(answers, haystack.needles, strict=True))

    with Pipeline(NEEDLE, 1, 1, chunk=512, pages=128, page_size=64, spec=runtime.deployment.spec, eos=(0,)) as single:
        expected = single.generate(*[generation_spec(prompt, 16) for prompt in prompts])
    assert [a.token_ids for a in answers] == [e.token_ids for e in expected]
    check_engine(runtime.engine)


def test_head_has_no_torch(longreach: CommandLine, tmp_path: Path) -> None:
    """A fresh head process, running a cluster, has never imported torch (this test process has)."""
    code = (
        "import sys; from cluster import LocalCluster\n"
        "with LocalCluster('configs/single.yaml', {'data_dir': sys.argv[1]}) as client:\n"
        "    answer = client.ask('The code of dark river is 12345. ' * 3, 'What is the code of dark river?')\n"
        "print(len(answer.token_ids) > 0, 'torch' in sys.modules)"
    )
    import subprocess

    out = subprocess.check_output([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, text=True, timeout=120)
    assert out.split() == ["True", "False"]


def test_idle_cluster_is_quiet(runtime: ClusterRuntime) -> None:
    """Head and stage processes together below 5 % of a core while nothing is asked."""
    assert runtime.launched is not None
    ours = [psutil.Process(pid) for pid in runtime.launched.pids] + [psutil.Process()]
    shares = [1.0]
    while min(shares) >= 0.05 and len(shares) <= 4:  # one quiet window will do: other work on the machine only adds
        before = sum(sum(p.cpu_times()[:2]) for p in ours)
        time.sleep(4.0)
        shares.append((sum(sum(p.cpu_times()[:2]) for p in ours) - before) / 4.0)
    assert min(shares) < 0.05, f"{min(shares):.1%} of a core"
