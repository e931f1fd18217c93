"""Dual chunk attention of whole models: chunks, stages, shards, cached prefixes and decoding across chunk borders."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from protos.model.config_json import load_model_spec
from protos.model.spec import DualChunkSpec
from tests.identity.conftest import Checkpoints
from tests.support.fakes.pipeline import Pipeline
from tests.support.oracles.checks import check_same, run
from tests.support.oracles.dual_chunk import DualChunkOracle
from tests.support.oracles.transformers import TOLERANCE, random_prompt, relative_error
from workers.attention import compiled

PAGE = 16
SMALL = DualChunkSpec(96, 32, original_max_position_embeddings=48)  # chunks begin every 64 tokens
UNSCALED = DualChunkSpec(96, 32)
LOCAL = DualChunkSpec(80, 64)  # 16 tokens apart, so that 2 L - 1 is the constant of early keys
NEW_TOKENS = 24
LENGTHS = (52, 64, 119, 193)  # decoding crosses from chunk 0 to 1, and from 1 to 2

Make = Callable[..., Pipeline]


@pytest.fixture(scope="module")
def oracles(checkpoint: Checkpoints) -> Callable[[str, DualChunkSpec], DualChunkOracle]:
    return cache(lambda family, dual: DualChunkOracle(checkpoint(family), dual))


@pytest.fixture
def pipeline(checkpoint: Checkpoints) -> Iterator[Make]:
    opened: list[Pipeline] = []

    def make(family: str, dual: DualChunkSpec | None, stages: int = 1, ranks: int = 1, chunk: int = 64) -> Pipeline:
        folder: Path = checkpoint(family)
        spec = replace(load_model_spec(folder), dual_chunk=dual)
        opened.append(Pipeline(folder, stages, ranks, chunk=chunk, pages=128, page_size=PAGE, spec=spec).keep_logits())
        return opened[-1].__enter__()

    yield make
    for one in opened:
        one.__exit__(None, None, None)


def check(made: Pipeline, oracle: DualChunkOracle) -> None:
    asked = [oracle.prompt(length, NEW_TOKENS) for length in LENGTHS]
    for prompt, result in zip(asked, run(made, asked, NEW_TOKENS), strict=True):
        assert len(result.token_ids) == NEW_TOKENS
        check_same(made, result, oracle.greedy(prompt, NEW_TOKENS))


@pytest.mark.parametrize("chunk", [17, 64, 256])
def test_the_fallback_of_the_compiled_kernel(
    chunk: int, pipeline: Make, oracles: Callable[..., DualChunkOracle], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "supports", lambda q, kv: False)
    check(pipeline("qwen3_moe", SMALL, chunk=chunk), oracles("qwen3_moe", SMALL))


@pytest.mark.parametrize("chunk", [1, 7, 16, 63, 64, 65, 128, 256])
def test_every_chunk_size(chunk: int, pipeline: Make, oracles: Callable[..., DualChunkOracle]) -> None:
    check(pipeline("qwen3_moe", SMALL, chunk=chunk), oracles("qwen3_moe", SMALL))


@pytest.mark.parametrize(("stages", "ranks"), [(1, 2), (1, 4), (2, 1), (2, 2), (3, 1), (4, 1)])
def test_every_layout(stages: int, ranks: int, pipeline: Make, oracles: Callable[..., DualChunkOracle]) -> None:
    check(pipeline("qwen3_moe", SMALL, stages, ranks, 50), oracles("qwen3_moe", SMALL))


@pytest.mark.parametrize("dual", [UNSCALED, LOCAL], ids=["no length scale", "small distance"])
@pytest.mark.parametrize("family", ["qwen3_moe_yarn", "qwen2", "llama_linear"])
def test_other_models_and_sizes(
    family: str, dual: DualChunkSpec, pipeline: Make, oracles: Callable[..., DualChunkOracle]
) -> None:
    check(pipeline(family, dual), oracles(family, dual))


def test_yarn_with_a_length_scale(pipeline: Make, oracles: Callable[..., DualChunkOracle]) -> None:
    check(pipeline("qwen3_moe_yarn", SMALL, 2), oracles("qwen3_moe_yarn", SMALL))


@pytest.mark.parametrize(("stages", "ranks", "chunk"), [(1, 1, 256), (2, 2, 40)])
def test_a_cached_prefix_at_every_page(
    stages: int, ranks: int, chunk: int, pipeline: Make, oracles: Callable[..., DualChunkOracle]
) -> None:
    """Prompts of one length: the length scale of cached pages is theirs."""
    total = 9 * PAGE + 5
    first = random_prompt(total, 256, seed=1)
    made, oracle = pipeline("qwen3_moe", SMALL, stages, ranks, chunk), oracles("qwen3_moe", SMALL)
    run(made, [first], 1)
    for pages in range(10):
        other = (first[pages * PAGE] + 1) % 256
        prompt = oracle.prompt(total, 8, [*first[: pages * PAGE], other])
        (result,) = run(made, [prompt], 8)
        assert result.cached_tokens == pages * PAGE
        check_same(made, result, oracle.greedy(prompt, 8))


@pytest.mark.parametrize("wrong", [
    None, DualChunkSpec(96, 16, 48), DualChunkSpec(112, 48, 48), DualChunkSpec(96, 32, 40), DualChunkSpec(96, 32),
])  # fmt: skip
def test_a_wrong_setting_would_be_seen(
    wrong: DualChunkSpec | None, pipeline: Make, oracles: Callable[..., DualChunkOracle]
) -> None:
    made, oracle = pipeline("qwen3_moe", wrong), oracles("qwen3_moe", SMALL)
    prompt = oracle.prompt(LENGTHS[-1], NEW_TOKENS)
    (result,) = run(made, [prompt], 1)
    reference = oracle.greedy(prompt, NEW_TOKENS)
    assert float(relative_error(made.logits(result), reference.logits[:1])) > 10 * TOLERANCE
