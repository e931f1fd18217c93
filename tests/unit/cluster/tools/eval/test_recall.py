"""Sparse and int8 against dense: the comparison itself, and what must be equal is equal."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from cluster.config.configs_dir import configs_dir
from cluster.tools.assets import needle_dir
from cluster.tools.display import Display
from cluster.tools.eval.modes import Target, find_target
from cluster.tools.eval.recall import RecallOptions, run_recall
from protos.errors import UserError
from protos.model.config_json import load_model_spec
from protos.model.spec import DualChunkSpec, HeadBudget, ModelSpec, SparseSpec
from protos.stage.messages import CellReport
from tests.support.data.checkpoints import make_checkpoint
from workers.eval.__main__ import main
from workers.eval.recall import Reader, Setup, Variant, compare, evaluate, head_figures

EVERYTHING = SparseSpec(threshold=0, last_q=16, cell=64, uniform=HeadBudget(1 << 16, 1 << 16))
PROMPT = [(7 * i * i + 3 * i) % 251 for i in range(200)]  # 200: three cells and a piece
DEMO = Target(configs_dir() / "demo.yaml")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("eval") / "tiny", "qwen3_moe")


def setup(checkpoint: Path, **changes: Any) -> Setup:
    spec = replace(load_model_spec(checkpoint), sparse=EVERYTHING, **changes)
    return Setup(checkpoint, spec, torch.float32, torch.device("cpu"), chunk=96, page_size=16)


def silent(phase: str, done: int, total: int) -> None:
    assert 0 < done <= total, phase


@pytest.mark.parametrize("dual", [None, DualChunkSpec(80, 32, 64)])
@pytest.mark.slow
def test_sparse_with_everything_kept_is_dense(checkpoint: Path, dual: DualChunkSpec | None) -> None:
    result = evaluate(setup(checkpoint, dual_chunk=dual), PROMPT, 5, [Variant("sparse", sparse=True)], silent)
    (variant,) = result["variants"]
    assert variant["same_top1"] == 5
    assert variant["logit_error_max"] == 0.0
    assert variant["kl_mean"] == 0.0
    assert variant["cells"] == (4 if dual is None else 7)  # 64 tokens, cut every 48 with dual chunks
    for name in ("density", "estimated_recall", "held_out_recall", "held_out_recall_min"):
        assert torch.allclose(torch.tensor(variant["heads"][name]), torch.ones(4, 4), atol=1e-5), name
    assert variant["heads"]["dense_share"] == [[0.0] * 4] * 4


def test_variants_follow_the_reference(checkpoint: Path) -> None:
    few = replace(EVERYTHING, uniform=HeadBudget(32, 104))
    prepared = setup(checkpoint)
    variants = [Variant("sparse", True), Variant("int8 KV", False, torch.int8), Variant("both", True, torch.int8)]
    result = evaluate(replace(prepared, spec=replace(prepared.spec, sparse=few)), PROMPT, 7, variants, silent)
    assert len(result["reference"]["token_ids"]) == 7
    assert [entry["kv"] for entry in result["variants"]] == ["float32", "int8", "int8"]
    for entry in result["variants"]:
        assert 0.0 < entry["logit_error_max"] < 2.0  # random weights forgive nothing
        assert entry["logit_error_mean"] <= entry["logit_error_max"]
        assert len(entry["positions"]["kl"]) == 7
        assert len(entry["positions"]["other_top1"]) == 7 - entry["same_top1"]
        assert ("heads" in entry) is entry["sparse"]
    json.dumps(result)


def test_the_reference_is_what_a_runner_without_sparse_settings_gives(checkpoint: Path) -> None:
    reader = Reader(setup(checkpoint))
    dense = reader.read(Variant("dense"), PROMPT, 4, silent)
    plain = Reader(replace(setup(checkpoint), spec=load_model_spec(checkpoint), chunk=17))
    again = plain.read(Variant("dense"), PROMPT, 4, silent)
    assert dense.tokens == again.tokens
    assert torch.allclose(dense.logits, again.logits, atol=1e-4)
    assert not dense.cells
    forced = reader.read(Variant("dense"), PROMPT, 4, silent, [1, 2, 3, 4])
    assert torch.equal(forced.logits[0], dense.logits[0])  # the first row follows the prompt
    assert not torch.equal(forced.logits[1], dense.logits[1])


def test_compare() -> None:
    exact = torch.tensor([[4.0, 0.0, -1.0], [0.0, 2.0, 1.0]])
    same = compare(exact, exact.clone())
    assert (same["same_top1"], same["logit_error_max"], same["kl_mean"], same["kl_max"]) == (2, 0.0, 0.0, 0.0)
    assert compare(exact, exact + 3.0)["kl_max"] == pytest.approx(0.0, abs=1e-12)  # a shift changes no probability
    other = exact.clone()
    other[1] = torch.tensor([0.0, 1.0, 2.0])
    found = compare(exact, other)
    assert found["same_top1"] == 1
    assert found["positions"]["other_top1"] == [1]
    assert found["logit_error_max"] == pytest.approx(0.5)
    assert found["logit_error_mean"] == pytest.approx(0.25)
    p, q = exact[1].double().softmax(0), other[1].double().softmax(0)
    assert found["kl_max"] == pytest.approx(float((p * (p / q).log()).sum()))


def test_heads_are_weighted_by_their_cells(checkpoint: Path) -> None:
    spec: ModelSpec = load_model_spec(checkpoint)

    def report(start: int, length: int, density: float, recall: float, dense: bool, first_head: int = 0) -> CellReport:
        pair = [density, 1.0], [recall, 1.0], [dense, False]
        return CellReport(0, 1, first_head, start, length, pair[0], pair[1], pair[1], pair[2])

    cells = [report(0, 2, 1.0, 0.9, True), report(2, 1, 0.5, 0.6, False), report(0, 2, 0.25, 0.5, False, 2)]
    found = head_figures(cells, spec)
    assert found["density"][1] == [pytest.approx((3 * 1.0 + 3 * 0.5) / 6), 1.0, 0.25, 1.0]  # 3 causal pairs in each
    assert found["held_out_recall"][1] == [pytest.approx((2 * 0.9 + 0.6) / 3), 1.0, 0.5, 1.0]
    assert found["held_out_recall_min"][1][:3] == [0.6, 1.0, 0.5]
    assert found["dense_share"][1][0] == pytest.approx(2 / 3, rel=1e-5)
    assert found["density"][0] == [1.0] * 4  # no report: nothing was left out


def request(checkpoint: Path, **changes: Any) -> dict[str, Any]:
    spec = json.loads(setup(checkpoint).spec.to_json())
    return {
        "model": str(checkpoint), "spec": spec, "dtype": "float32", "device": "cpu", "threads": 1, "chunk": 96,
        "page_size": 16, "dummy": False, "prompt": PROMPT, "next": 3, "pinned": [], "others": [],
        "variants": [{"name": "sparse", "sparse": True, "kv": "auto"}], **changes,
    }  # fmt: skip


def test_the_process_writes_a_result_and_lines_of_progress(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked, out = tmp_path / "request.json", tmp_path / "result.json"
    asked.write_text(json.dumps(request(checkpoint)))
    assert main([str(asked), "--out", str(out)]) == 0
    assert json.loads(out.read_text())["variants"][0]["same_top1"] == 3
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {"phase": "sparse: reading", "done": 200, "total": 200} in lines
    asked.write_text(json.dumps(request(checkpoint, model=str(tmp_path))))
    assert main([str(asked), "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1


@pytest.mark.slow
def test_recall_from_yaml_to_report() -> None:
    options = RecallOptions(tokens=300, num_next=3, more={"sparse.cell": 128}, kv="int8")
    display = Display(Console(quiet=True), quiet=True)
    report = run_recall(DEMO, options, display)
    assert (report["tokens"], report["next"], report["positions"], report["dtype"]) == (300, 3, "dca", "bfloat16")
    assert report["sparse"]["cell"] == 128
    assert [variant["name"] for variant in report["variants"]] == ["sparse", "int8 KV", "sparse, int8 KV"]
    assert len(report["variants"][0]["heads"]["density"]) == 4
    assert isinstance(report["reference"]["text"], str)


def test_positions_follow_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tmp_path / "plain"
    model.mkdir()
    for path in needle_dir().iterdir():
        if path.name != "config_1m.json":
            (model / path.name).symlink_to(path)
    seen: list[dict[str, Any]] = []

    def compute(_: str, request: dict[str, Any], __: Any) -> dict[str, Any]:
        seen.append(request)
        return {"reference": {"token_ids": []}, "variants": []}

    monkeypatch.setattr("cluster.tools.eval.recall.run_torch", compute)
    display = Display(Console(quiet=True), quiet=True)
    for tokens, positions in ((4032, "plain"), (4033, "yarn")):
        report = run_recall(find_target(None, model), RecallOptions(tokens, more={"sparse.cell": 1024}), display)
        assert report["positions"] == positions
    assert seen[1]["spec"]["rope"]["factor"] == 2.0
    assert all(request["spec"]["sparse"]["threshold"] == 0 for request in seen)
    assert len(seen[0]["prompt"]) == 4032
    with pytest.raises(UserError, match="--sparse"):
        run_recall(DEMO, RecallOptions(500, more={"sparse.enabled": False}), display)


def test_pinned_lengths_in_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []

    def compute(_: str, request: dict[str, Any], __: Any) -> dict[str, Any]:
        seen.append(request)
        return {"reference": {"token_ids": []}, "variants": [], "pinned": []}

    monkeypatch.setattr("cluster.tools.eval.recall.run_torch", compute)
    options = RecallOptions(5000, sparse=False, pinned=("max", "1.25x", "1.2501x", "10K", "6251"))
    report = run_recall(DEMO, options, Display(Console(quiet=True), quiet=True))
    assert seen[0]["pinned"] == [6250, 6251, 10240, 140_000]
    assert report["pinned"] == []


def test_another_checkpoint_is_compared(checkpoint: Path) -> None:
    """The same weights give the same logits; others do not."""
    prepared = setup(checkpoint)
    others = {"copy": prepared, "other": replace(prepared, spec=replace(prepared.spec, rms_norm_eps=0.5))}
    result = evaluate(prepared, PROMPT, 5, [], silent, others=others)
    copy, different = result["variants"]
    assert (copy["name"], copy["same_top1"], copy["kl_max"]) == ("copy", 5, 0.0)
    assert different["kl_mean"] > 0.0


def test_checkpoints_with_other_tokens_are_refused(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for path in needle_dir().iterdir():
        if "config" not in path.name:
            (other / path.name).symlink_to(path)
    for name in ("config.json", "config_1m.json"):
        config = json.loads((needle_dir() / name).read_text()) | {"vocab_size": 5000}
        (other / name).write_text(json.dumps(config))
    display = Display(Console(quiet=True), quiet=True)
    with pytest.raises(UserError, match=r"--against: .*other: 5000 tokens in its vocabulary, the model has 4096"):
        run_recall(DEMO, RecallOptions(500, sparse=False, against=(other,)), display)
