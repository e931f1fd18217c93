"""Figures of an evaluation, and readings of a small model in different ways."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from protos.stage.messages import CellReport
from workers.bench.model import benchmark_spec
from workers.eval.recall import Setup, Variant, compare, evaluate, head_figures

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
