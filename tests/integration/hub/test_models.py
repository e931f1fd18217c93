"""The verbs with a model that is named as on a hub, which is a server of this machine."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.integration.conftest import CommandLine
from tests.support.hub.stand_in import COMMIT, Hub

NAME = "org/needle"
WEIGHTS = "model.safetensors"
YAML = """\
model:
  path: org/needle
  max_model_len: 2K
kv_cache:
  bytes: 16MiB
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "cluster.yaml"
    path.write_text(YAML + f"data_dir: {tmp_path / 'data'}\n")
    return path


def test_plan_downloads_settings_alone(hub: Hub, cache: Path, needle: dict[str, bytes], longreach: CommandLine):
    hub.add(NAME, needle)
    done = longreach("plan", NAME, "--cpu", "8GB", "--context", "1K", "--json")
    assert (done.code, json.loads(done.out)["fits"]) == (0, True), done.err
    assert sorted(hub.downloads()) == ["config.json", "config_1m.json"]
    hub.asked.clear()
    assert longreach("plan", NAME, "--cpu", "8GB", "--context", "1K").code == 0
    assert hub.asked == []
    absent = longreach("plan", "org/absent")
    assert absent.code == 2
    assert absent.err.startswith("longreach: error: CONFIG: org/absent: there is no such model on http://127.0.0.1:")


def test_a_question_after_a_download_and_then_offline(
    hub: Hub, cache: Path, needle: dict[str, bytes], config: Path, tmp_path: Path, longreach: CommandLine,
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    hub.add(NAME, needle)
    ids = tmp_path / "ids.json"
    ids.write_text(json.dumps([5, 6, 7, 8]))
    ask = ("run", config, "--token-ids", ids, "--max-tokens", "4", "--json")
    first = longreach(*ask)
    assert first.code == 0, first.err
    assert WEIGHTS in hub.downloads()
    assert json.loads(first.out)["model"] == "needle"
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    hub.asked.clear()
    again = longreach(*ask)
    assert again.code == 0, again.err
    assert hub.asked == []
    answers = [json.loads(done.out)["results"][0]["token_ids"] for done in (first, again)]
    assert answers[0] == answers[1]
    (cache / "models--org--needle" / "snapshots" / COMMIT / WEIGHTS).unlink()
    refused = longreach(*ask)
    assert refused.code == 2
    assert "cluster.yaml:2: model.path: org/needle: its copy in the cache" in refused.err
    assert "lacks model.safetensors" in refused.err
    longreach.assert_nothing_left()


def test_tokens_are_counted_without_weights(
    hub: Hub, needle: dict[str, bytes], config: Path, tmp_path: Path, longreach: CommandLine
):
    hub.add(NAME, needle)
    text = tmp_path / "text.txt"
    text.write_text("the river and the sea\n")
    done = longreach("tokens", text, "--config", config, "--json")
    assert done.code == 0, done.err
    assert WEIGHTS not in hub.downloads()
    assert "tokenizer.json" in hub.downloads()


def test_an_interrupted_start_keeps_no_half_file(
    hub: Hub, cache: Path, needle: dict[str, bytes], config: Path, longreach: CommandLine
):
    hub.add(NAME, needle)
    hub.stalled[WEIGHTS] = 11 << 20
    config.write_text(config.read_text() + "server: {port: 7777}\n")
    starting = longreach.start("serve", config)
    assert hub.reached.wait(120)
    starting.terminate()
    _, err = starting.communicate(timeout=120)
    assert "looking up org/needle" in err
    assert "longreach: interrupted; nothing is left running" in err
    longreach.assert_nothing_left()
    left = [path.name for path in cache.rglob("*.incomplete")]
    assert not any(re.search(r"\.[0-9a-f]{8}\.incomplete$", name) for name in left)  # nobody goes on with these


def test_a_copy_with_fewer_bits(hub: Hub, needle: dict[str, bytes], tmp_path: Path, longreach: CommandLine):
    hub.add(NAME, needle)
    done = longreach("quantize", NAME, tmp_path / "out", "--bits", "8", "--group", "32", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["model"] == "needle"
    refused = longreach("quantize", "org/absent", tmp_path / "other", "--bits", "8")
    assert refused.code == 2
    assert "error: IN: org/absent: there is no such model on " in refused.err
    for verb in (("eval", "needle"), ("bench", "prefill")):
        refused = longreach(*verb, "--model", "org/absent", "--out", tmp_path)
        assert refused.code == 2
        assert "org/absent: there is no such model on " in refused.err
