"""One sequence through a whole model: the same tokens in any steps, pages that were skipped, random weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from protos.model.config_json import load_model_spec
from protos.model.spec import ModelSpec
from tests.support.data.checkpoints import make_checkpoint
from workers.eval.whole_model import SequenceFeed, WholeModel

CPU = torch.device("cpu")
IDS = [(7 * i) % 251 for i in range(50)]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("whole") / "tiny", "qwen3_moe")


@pytest.fixture(scope="module")
def spec(path: Path) -> ModelSpec:
    return load_model_spec(path)


@pytest.fixture(scope="module")
def model(path: Path, spec: ModelSpec) -> WholeModel:
    return WholeModel(path, spec, torch.float32, CPU)


def test_steps_of_any_length_give_the_same_token(model: WholeModel, spec: ModelSpec) -> None:
    runner = model.runner(spec, 60, 16)
    ends = []
    for chunk in (50, 17, 1):
        feed = SequenceFeed(runner, 16, len(IDS), keep_logits=True)  # the pages of the one before are free again
        for start in range(0, len(IDS), chunk):
            feed.take(IDS[start : start + chunk], sample=start + chunk >= len(IDS))
        feed.take([feed.tokens[-1]])
        assert len(feed.tokens) == len(feed.logits) == 2
        assert torch.cat(feed.logits).argmax(1).tolist() == feed.tokens
        ends.append(feed.tokens)
    assert ends[0] == ends[1] == ends[2]


def test_skipped_rows_have_pages_and_no_tokens(model: WholeModel, spec: ModelSpec) -> None:
    runner = model.runner(spec, 60, 16)
    computed = SequenceFeed(runner, 16, len(IDS))
    computed.take(IDS)
    computed.take(IDS[-1:])
    feed = SequenceFeed(runner, 16, len(IDS))
    feed.skip(IDS)
    assert feed.tokens == []
    feed.take(IDS[-1:])
    assert feed.tokens == computed.tokens[1:]
    assert feed.logits == []


def test_random_weights_and_int8_kv(spec: ModelSpec) -> None:
    random = WholeModel(None, spec, torch.float32, CPU)
    feed = SequenceFeed(random.runner(spec, 60, 16, torch.int8), 16, len(IDS))
    feed.take(IDS)
    assert len(feed.tokens) == 1
    assert feed.cells == []
