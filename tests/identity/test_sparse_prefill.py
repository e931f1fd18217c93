"""Sparse prefill of whole models: equal to its definition in every layout and for every way of cutting the prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from itertools import pairwise

import pytest
import torch

from cluster.engine.outputs import Generation
from protos.model.config_json import load_model_spec
from protos.model.spec import DualChunkSpec, HeadBudget, ModelSpec, SparseSpec
from protos.stage.messages import CellReport
from tests.identity.conftest import Checkpoints
from tests.support.fakes.pipeline import Pipeline
from tests.support.oracles.checks import check_same, run
from tests.support.oracles.dual_chunk import DualChunkOracle
from tests.support.oracles.sparse_prefill import SparseOracle
from tests.support.oracles.transformers import TOLERANCE, relative_error
from workers.attention import compiled

FAMILY = "qwen3_moe"
DUAL = DualChunkSpec(208, 64, original_max_position_embeddings=128)  # chunks begin every 144 tokens
PATTERNS = (  # a mistaken layer or head shows
    (HeadBudget(36, 108), HeadBudget(130, 1), None, HeadBudget(1, 160)),
    (HeadBudget(50, 110), HeadBudget(40, 120), HeadBudget(36, 108), HeadBudget(36, 108)),
    (None, HeadBudget(31, 101), HeadBudget(90, 100), HeadBudget(64, 128)),
    (HeadBudget(36, 108), HeadBudget(36, 150), HeadBudget(200, 100), HeadBudget(500, 500)),
)
SPARSE = SparseSpec(threshold=300, last_q=32, cell=64, patterns=PATTERNS)
UNIFORM = replace(SPARSE, patterns=None, uniform=HeadBudget(36, 108))
LENGTH = 499
NEW_TOKENS = 8


@pytest.fixture(scope="module")
def oracles(checkpoint: Checkpoints) -> Callable[[DualChunkSpec | None], SparseOracle]:
    return cache(lambda dual: SparseOracle(checkpoint(FAMILY), dual, SPARSE))


@pytest.fixture(params=["compiled", "PyTorch"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways of computing attention; without a compiler they are the same."""
    if request.param == "PyTorch":
        monkeypatch.setattr(compiled, "supports", lambda q, kv: False)


@pytest.fixture(scope="module")
def spec(checkpoint: Checkpoints) -> ModelSpec:
    return replace(load_model_spec(checkpoint(FAMILY)), dual_chunk=DUAL, sparse=SPARSE)


def generate(
    checkpoint: Checkpoints, spec: ModelSpec, prompt: Sequence[int], stages: int = 1, ranks: int = 1, chunk: int = 64
) -> tuple[Pipeline, Generation, list[CellReport]]:
    with Pipeline(checkpoint(FAMILY), stages, ranks, chunk=chunk, pages=64, spec=spec).keep_logits() as pipeline:
        (result,) = run(pipeline, [prompt], NEW_TOKENS)
    return pipeline, result, [cell for shard in pipeline.shards for cell in shard.cells]


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(("stages", "ranks", "chunk"), [(1, 1, 64), (1, 1, 1000), (1, 2, 200), (3, 1, 130), (4, 4, 64)])
@pytest.mark.parametrize("dual", [None, DUAL], ids=["plain", "dual chunk"])
def test_equals_its_definition(
    dual: DualChunkSpec | None, stages: int, ranks: int, chunk: int, checkpoint: Checkpoints, spec: ModelSpec,
    oracles: Callable[..., SparseOracle],
) -> None:  # fmt: skip
    oracle = oracles(dual)
    prompt = oracle.prompt(LENGTH, NEW_TOKENS)
    made, result, cells = generate(checkpoint, replace(spec, dual_chunk=dual), prompt, stages, ranks, chunk)
    check_same(made, result, oracle.greedy(prompt, NEW_TOKENS))
    assert min(min(cell.density) for cell in cells) < 0.8, "some heads leave keys out"


def test_reports_cover_every_cell_layer_and_head(checkpoint: Checkpoints, spec: ModelSpec) -> None:
    prompt = list(range(1, 256)) + list(range(1, 245))
    _, _, cells = generate(checkpoint, spec, prompt, 2, 2, 300)
    cuts = sorted({*range(0, LENGTH, 64), 144, 288, 432, LENGTH})
    expected = {
        (layer, head, start, stop - start) for layer in range(4) for head in range(4) for start, stop in pairwise(cuts)
    }
    found = [(c.layer, c.first_head + head, c.start, c.length) for c in cells for head in range(len(c.density))]
    assert len(found) == len(expected)
    assert set(found) == expected
    for cell in cells:
        for shares in (cell.density, cell.estimated_recall, cell.held_out_recall):
            assert len(shares) == len(cell.dense) == 2
            assert all(0 < share <= 1 + 1e-6 for share in shares)
        assert not any(cell.dense)


@pytest.mark.parametrize("change", [
    {"uniform": HeadBudget(10_000, 10_000)},
    {"recall_floor": 1.0, "max_dense_share": 1.0},
    {"uniform": None, "patterns": ((None,) * 4,) * 4},
    {"threshold": LENGTH},
], ids=["large budgets", "every head turns dense", "no patterns", "a short prompt"])  # fmt: skip
def test_all_keys_are_dense_attention(change: dict[str, object], checkpoint: Checkpoints, spec: ModelSpec) -> None:
    oracle = DualChunkOracle(checkpoint(FAMILY), DUAL)
    prompt = oracle.prompt(LENGTH, NEW_TOKENS)
    wide = replace(spec, sparse=replace(UNIFORM, **change))  # type: ignore[arg-type]
    made, result, _ = generate(checkpoint, wide, prompt, 1, 2, 150)
    check_same(made, result, oracle.greedy(prompt, NEW_TOKENS))


def test_selecting_is_seen(checkpoint: Checkpoints, spec: ModelSpec, oracles: Callable[..., SparseOracle]) -> None:
    prompt = oracles(DUAL).prompt(LENGTH, NEW_TOKENS)
    made, result, _ = generate(checkpoint, replace(spec, sparse=None), prompt)
    wanted = oracles(DUAL).greedy(prompt, NEW_TOKENS).logits[:1]
    assert float(relative_error(made.logits(result)[:1], wanted)) > 10 * TOLERANCE


def test_adaptive_budgets_depend_on_the_prompt_only(checkpoint: Checkpoints, spec: ModelSpec) -> None:
    adaptive = replace(spec, sparse=replace(SPARSE, patterns=None, target_recall=0.7, recall_floor=0.5))
    prompt = torch.randint(256, (LENGTH,), generator=torch.Generator().manual_seed(2)).tolist()
    wanted: torch.Tensor | None = None
    for stages, ranks, chunk in ((1, 1, 64), (1, 1, 500), (2, 2, 200)):
        made, result, cells = generate(checkpoint, adaptive, prompt, stages, ranks, chunk)
        logits = made.logits(result)[:1]
        wanted = logits if wanted is None else wanted
        assert float(relative_error(logits, wanted)) <= TOLERANCE
        assert min(min(cell.density) for cell in cells) < 0.9
        assert all(share >= 0.7 - 1e-4 for cell in cells for share in cell.estimated_recall)
