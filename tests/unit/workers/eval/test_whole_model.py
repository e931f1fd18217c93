"""One sequence through a whole model: the same tokens in any steps, pages that were skipped, random weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from protos.model.config_json import load_model_spec
from protos.model.spec import ModelSpec
from tests.support.data.checkpoints import make_checkpoint
from workers.bench.model import benchmark_spec
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


def test_dummy_routers_spread_tokens_over_all_experts() -> None:
    spec = replace(
        benchmark_spec(8), hidden_size=256, num_attention_heads=4, head_dim=64, vocab_size=997, intermediate_size=64,
        moe_intermediate_size=64, num_experts=16, num_experts_per_tok=2,
    )  # fmt: skip
    runner = WholeModel(None, spec, torch.float32, CPU).runner(spec, 600, 64)
    loads: dict[int, torch.Tensor] = {}
    runner.decoder.on_experts = lambda layer, ids: loads.update({layer: torch.bincount(ids.flatten(), minlength=16)})
    ids = torch.randint(5, 997, (600,), generator=torch.Generator().manual_seed(1)).tolist()
    SequenceFeed(runner, 64, len(ids)).take(ids)
    assert len(loads) == 8
    for load in loads.values():
        assert load.max() < 3 * load.float().mean()  # 8 times, the most there is, with embeddings like other weights
