"""Figures of an evaluation, and readings of a small model in different ways."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from protos.model.spec import DualChunkSpec, HeadBudget, ModelSpec, SparseSpec
from protos.stage.messages import CellReport
from workers.bench.model import benchmark_spec
from workers.eval.recall import Reader, Setup, Variant, compare, evaluate, head_figures, logit_factor

SPEC = replace(
    benchmark_spec(layers=2), vocab_size=320, hidden_size=96, num_attention_heads=4, num_key_value_heads=2,
    head_dim=32, num_experts=16, num_experts_per_tok=3, moe_intermediate_size=64,
)  # fmt: skip


def test_equal_logits_differ_by_nothing() -> None:
    logits = torch.randn(17, 193)
    figures = compare(logits, logits.clone())
    assert figures["same_top1"] == 17
    assert figures["logit_error_max"] == figures["kl_max"] == 0.0
    assert figures["positions"]["other_top1"] == []


def test_differences_by_hand() -> None:
    figures = compare(torch.tensor([[0.0, 2.0], [4.0, 0.0]]), torch.tensor([[0.0, 2.0], [0.0, 4.0]]))
    assert figures["same_top1"] == 1
    assert figures["positions"]["other_top1"] == [1]
    assert figures["positions"]["logit_error"] == [0.0, 1.0]
    share = 1 / (1 + math.exp(-4))
    assert figures["kl_max"] == pytest.approx(4 * (2 * share - 1))
    assert figures["kl_mean"] == pytest.approx(figures["kl_max"] / 2)


def test_densities_are_weighted_by_pairs_and_recalls_by_tokens() -> None:
    reports = [
        CellReport(0, 1, 2, 0, 1, [1.0], [0.5], [0.25], [True]),
        CellReport(0, 1, 2, 1, 3, [0.5], [0.9], [0.75], [False]),
    ]
    figures = head_figures(reports, SPEC)
    assert figures["density"][1][2] == pytest.approx((1 * 1.0 + 9 * 0.5) / 10)
    assert figures["estimated_recall"][1][2] == pytest.approx((0.5 + 3 * 0.9) / 4)
    assert figures["dense_share"][1][2] == pytest.approx(0.25)
    assert figures["held_out_recall_min"][1][2] == 0.25
    assert figures["density"][0] == [1.0] * 4, "heads without a cell kept everything"
    assert figures["dense_share"][0] == [0.0] * 4


def test_a_variant_like_the_reference_differs_by_nothing_and_int8_by_little() -> None:
    setup = Setup(Path(), SPEC, torch.float32, torch.device("cpu"), chunk=67, page_size=16, dummy=True)
    prompt = torch.randint(5, 320, (193,), generator=torch.Generator().manual_seed(0)).tolist()
    seen: list[tuple[str, int, int]] = []
    variants = [Variant("same"), Variant("int8", kv=torch.int8)]
    result = evaluate(setup, prompt, 3, variants, lambda *progress: seen.append(progress))
    same, int8 = result["variants"]
    assert len(result["reference"]["token_ids"]) == 3
    assert (same["same_top1"], same["logit_error_max"]) == (3, 0.0)
    assert 0.0 < int8["logit_error_max"] < 0.1
    assert [done for phase, done, _ in seen if phase == "int8: reading"] == [67, 134, 193]


DUAL = DualChunkSpec(chunk_size=96, local_size=32, original_max_position_embeddings=64)
KEEP_ALL = SparseSpec(threshold=0, last_q=16, cell=64, uniform=HeadBudget(1 << 16, 1 << 16))
PROMPT = torch.randint(5, 320, (193,), generator=torch.Generator().manual_seed(1)).tolist()


def small(spec: ModelSpec) -> Setup:
    return Setup(Path(), spec, torch.float32, torch.device("cpu"), chunk=64, page_size=16, dummy=True)


def silent(phase: str, done: int, total: int) -> None:
    pass


def plain_scale(length: int) -> float:
    return max(1.0, 0.1 * math.log(length / 64) + 1.0)


@pytest.mark.parametrize("length", [193, 203, 242, 386, 4096])
def test_the_factor_of_a_pinned_length_is_the_plain_formula(length: int) -> None:
    assert logit_factor(SPEC, 193, length) == 1.0, "no length scale"
    factor = logit_factor(replace(SPEC, dual_chunk=DUAL), 193, length)
    assert factor == pytest.approx((plain_scale(length) / plain_scale(193)) ** 2, rel=1e-12)
    assert logit_factor(replace(SPEC, dual_chunk=DUAL), 17, 64) == 1.0


@pytest.mark.parametrize("length", [203, 386])
def test_a_pinned_scale_multiplies_the_logits_of_every_row(length: int) -> None:
    """A window shorter by the same ratio gives prompts of their own length the factor that is pinned."""
    setup = small(replace(SPEC, dual_chunk=DUAL))
    pinned = Reader(setup).read(Variant("pinned", scale_len=length), PROMPT, 1, silent)
    # s(193) with this window is s(length) with that of 64. Rows after the prompt are left out: under the shorter window
    # their own position would scale them further.
    window = 193 / length * 64
    other = replace(DUAL, original_max_position_embeddings=window)  # type: ignore[arg-type]
    own = Reader(small(replace(SPEC, dual_chunk=other))).read(Variant("own"), PROMPT, 1, silent)
    assert torch.allclose(pinned.logits[:1], own.logits, atol=1e-5 * float(own.logits.abs().max()))
    plain = Reader(setup).read(Variant("plain"), PROMPT, 1, silent)
    assert not torch.allclose(pinned.logits[:1], plain.logits, atol=1e-5 * float(own.logits.abs().max()))


def test_pinned_readings_are_compared_with_the_same_way_under_their_own_length() -> None:
    setup = small(replace(SPEC, dual_chunk=DUAL, sparse=KEEP_ALL))
    variants = [Variant("sparse", True), Variant("both", True, torch.int8)]
    pinned = evaluate(setup, PROMPT, 3, variants, silent, [193, 203, 386])["pinned"]
    assert [(entry["scale_len"], entry["sparse"]) for entry in pinned] == [
        (length, sparse) for length in (193, 203, 386) for sparse in (False, True)
    ]
    first = pinned[:2]  # the length of the prompt itself; decoded rows after it keep the scale of their own position
    assert [entry["logit_error_max"] for entry in first] == [0.0, 0.0]
    errors = [entry["logit_error_mean"] for entry in pinned if not entry["sparse"]]
    assert 0.0 == errors[0] < errors[1] < errors[2]
    assert [e["logit_factor"] for e in pinned[::2]] == sorted(e["logit_factor"] for e in pinned[::2])
    assert "pinned" not in evaluate(setup, PROMPT, 1, [], silent)
