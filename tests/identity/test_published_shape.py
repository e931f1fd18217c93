"""The published Qwen3-30B-A3B, old spelling, one layer of dummy weights: it loads, and a prompt runs through it."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from cluster.config.topology import plan_shards
from protos.model.config_json import load_model_spec
from protos.stage.messages import SampleSpec, SamplingParams, SequenceSlice, StepPlan
from tests.unit.protos.model.test_config_json import QWEN3_30B
from workers.kv.paged import PagedKV
from workers.model.weights import dummy_shard
from workers.runner.model_runner import ModelRunner
from workers.transport.collectives import Collectives


def test_loads_and_runs(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_30B | {"num_hidden_layers": 1}))
    spec = load_model_spec(tmp_path)
    assert (spec.num_experts, spec.num_experts_per_tok, spec.head_dim) == (128, 8, 128)
    (shard,) = plan_shards(spec, 1, 1)
    weights = dummy_shard(spec, shard, torch.bfloat16, torch.device("cpu"))
    kv = PagedKV(1, spec.num_key_value_heads, spec.head_dim, 2, 64, torch.bfloat16)
    runner = ModelRunner(spec, shard, weights, kv, Collectives())
    ids = [1, 17, 67, 193, 151935]
    part = SequenceSlice(1, 0, len(ids), len(ids), ids, [0], 1, SampleSpec(SamplingParams(), 0))
    out = runner.execute(StepPlan(1, (part,)), keep_logits=True)
    assert out.logits is not None
    assert out.logits.shape == (1, 151936)
    assert torch.isfinite(out.logits).all()
    assert out.samples[0].token_id == int(out.logits[0].argmax())
