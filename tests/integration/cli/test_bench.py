"""`longreach bench` through real heads on tiny prompts; the model has no tokenizer, as random weights have none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.integration.conftest import CommandLine
from tests.support.data.checkpoints import make_checkpoint
from tests.support.fakes.llama_server import make_program
from tests.support.gguf_files import convert
from tests.support.paths import ROOT

NEEDLE = ROOT / "configs" / "needle"
QUICK = ("--repeats", 1, "--set", "retries=0", "--set", "warm_up=0", "--set", "tokens=4")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "bare"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).symlink_to(NEEDLE / name)
    return folder


def measured(longreach: CommandLine, out: Path, *arguments: object) -> dict[str, Any]:
    done = longreach("bench", *map(str, arguments), "--json", "--out", out, timeout_s=500)
    assert done.code == 0, done.err
    longreach.assert_nothing_left()
    report = json.loads(done.out)
    (path,) = out.glob(f"bench-{arguments[0]}-bare-*.json")
    assert json.loads(path.read_text()) == report
    assert report["complete"]
    assert report["environment"]["commit"]
    assert report["machine"]["cores"] >= 1
    assert report["seed"] == 1
    return report


def test_a_pipeline_of_shards_says_when_it_worked_on_what(longreach: CommandLine, model: Path, tmp_path: Path) -> None:
    chunk = "settings.prefill.max_num_batched_tokens=256"
    report = measured(
        longreach, tmp_path / "out", "scaling", "--model", model, "--lengths", 700, "--set", "layouts=[[2, 2]]",
        "--set", "scaling=[strong]", "--set", chunk, "--set", "settings.prefill.dynamic_chunks=false", *QUICK,
    )  # fmt: skip
    (row,) = report["rows"]
    assert (row["kind"], row["stages"], row["shards"], row["length"]) == ("strong", 2, 2, 700)
    (run,) = row["runs"]
    assert row["figures"]["first_token_s"]["median"] == pytest.approx(run["first_token_s"], abs=1e-6)
    assert 0.0 <= run["others"] <= 1.0
    chunks = row["timeline"]
    assert [(one["stage"], one["rank"], one["start"], one["length"]) for one in chunks] == [
        (stage, rank, start, length) for stage in range(2) for rank in range(2)
        for start, length in ((0, 256), (256, 256), (512, 188))
    ]  # fmt: skip
    for one in chunks:
        assert 0.0 <= one["began_s"] <= one["input_s"] <= one["ended_s"] <= one["sent_s"]
        assert one["reduce_bytes"] > 0
        before = next(
            two for two in chunks if (two["stage"], two["rank"], two["start"]) == (0, one["rank"], one["start"])
        )
        assert one["stage"] == 0 or one["input_s"] >= before["ended_s"]
    assert max(one["ended_s"] for one in chunks) <= run["first_token_s"]
    assert 0.0 <= row["bubbles"]["share"] < 1.0
    assert row["traffic"]["link"]["mib"] > 0
    assert row["traffic"]["all_reduce"]["least_ms"] <= row["traffic"]["all_reduce"]["ms"]
    experts = row["experts"]
    model_config = json.loads((NEEDLE / "config.json").read_text())
    assert experts["layers"] == list(range(model_config["num_hidden_layers"]))
    assert all(sum(layer) == 700 * model_config["num_experts_per_tok"] for layer in experts["tokens"])
    done = longreach("bench", "report", *(tmp_path / "out").glob("*.json"), "--out", tmp_path / "report")
    assert done.code == 0, done.err
    assert {path.name for path in (tmp_path / "report").iterdir()} == {"report.md", "experts.png", "gantt-2x2-700.png"}


def test_transformers_gets_the_same_prompts(longreach: CommandLine, model: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    report = measured(longreach, tmp_path / "out", "compare", "--model", model, "--lengths", 300, *QUICK)
    ours, theirs = report["rows"]
    assert (ours["engine"], theirs["engine"]) == ("longreach", "transformers")
    for row in (ours, theirs):
        assert row["figures"]["first_token_s"]["median"] > 0
        assert row["figures"]["decode_ms"]["median"] > 0
    assert theirs["version"]
    assert theirs["ratio_first_token"] > 0


def test_llama_cpp_serves_the_same_gguf_file(longreach: CommandLine, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "hf", "qwen2_tied")
    gguf = convert(folder, tmp_path / "bare.gguf")
    program = make_program(tmp_path)
    report = measured(
        longreach, tmp_path / "out", "compare", "--model", gguf, "--lengths", 60, "--set", "peers={}",
        "--llama-server", program, "--set", "peers.llama_cpp.arguments=[-fa, 'on']", *QUICK,
    )  # fmt: skip
    ours, theirs = report["rows"]
    assert (ours["engine"], theirs["engine"], theirs["version"]) == ("longreach", "llama_cpp", "0.0.1 (fake)")
    assert theirs["ratio_first_token"] > 0
    started, *asked = [json.loads(line) for line in (tmp_path / "asked.jsonl").read_text().splitlines()]
    assert (started["m"], started["c"], started["fa"]) == (str(gguf), "65", "on")
    assert asked[-1] == {"prompt": 60, "max_tokens": 5}
    assert str(tmp_path) not in json.dumps(report)


def test_lengths_and_contexts_are_measured(longreach: CommandLine, model: Path, tmp_path: Path) -> None:
    modes = "modes={dense: {sparse.enabled: false}}"
    prefill = measured(
        longreach, tmp_path / "out", "prefill", "--model", model, "--lengths", "100,300", "--set", modes, *QUICK
    )
    assert [(row["mode"], row["length"]) for row in prefill["rows"]] == [("dense", 100), ("dense", 300)]
    for row in prefill["rows"]:
        assert sum(chunk["length"] for chunk in row["chunks"]) == row["length"]
        assert all(chunk["measured_s"] > 0 and chunk["fitted_s"] >= 0 for chunk in row["chunks"])
        assert min(row["memory"]["peak_bytes"], row["memory"]["planned_bytes"]) > 100 << 20  # a process with libraries
    decode = measured(longreach, tmp_path / "out", "decode", "--model", model, "--lengths", 300, "--set", modes, *QUICK)
    (row,) = decode["rows"]
    assert row["runs"][0]["cached_tokens"] > 0
    assert row["figures"]["decode_ms"]["median"] > 0
    assert row["memory"]["peak_bytes"] > 100 << 20
