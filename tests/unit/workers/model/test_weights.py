"""Every layout of a checkpoint, reassembled from its shards, is the checkpoint; loading takes its own memory only."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from protos.model.checkpoint import CheckpointError, expected_tensors
from protos.model.spec import ModelSpec, RopeSpec
from protos.stage.messages import ShardSpec, Span
from tests.support.data import packing
from tests.support.paths import ROOT
from workers.model import compiled
from workers.model.weights import ShardWeights, dummy_shard, load_shard, shard_bytes

Tensors = dict[str, torch.Tensor]
LLAMA = ModelSpec(
    model_type="llama", vocab_size=13, hidden_size=24, num_hidden_layers=3, num_attention_heads=8,
    num_key_value_heads=2, head_dim=6, intermediate_size=17, rms_norm_eps=1e-6, tie_word_embeddings=False,
    qkv_bias=True, o_bias=True, mlp_bias=True, qk_norm=False, rope=RopeSpec(1e4), max_position_embeddings=64,
    dtype="float32", eos_token_ids=(0,),
)  # fmt: skip
MOE = replace(
    LLAMA, model_type="qwen3_moe", qkv_bias=False, o_bias=False, mlp_bias=False, qk_norm=True, num_experts=5,
    num_experts_per_tok=2, moe_intermediate_size=7, mlp_only_layers=(1,),
)  # fmt: skip
LAYOUTS = [(1, 1), (2, 1), (1, 2), (2, 2), (1, 4), (3, 4)]  # stages, ranks; 4 ranks share 2 KV heads


def split(total: int, parts: int, index: int) -> Span:
    return Span(total * index // parts, total * (index + 1) // parts)


def shards(spec: ModelSpec, stages: int, ranks: int) -> list[list[ShardSpec]]:
    def one(stage: int, rank: int) -> ShardSpec:
        heads = split(spec.num_attention_heads, ranks, rank)
        group = spec.num_attention_heads // spec.num_key_value_heads
        return ShardSpec(
            stage, stages, rank, ranks, split(spec.num_hidden_layers, stages, stage), heads,
            Span(heads.start // group, -(-heads.stop // group)), split(spec.num_experts, ranks, rank),
            split(spec.intermediate_size, ranks, rank), split(spec.vocab_size, ranks, rank),
        )  # fmt: skip

    return [[one(stage, rank) for rank in range(ranks)] for stage in range(stages)]


def random_tensors(spec: ModelSpec, dtype: torch.dtype) -> Tensors:
    generator = torch.Generator().manual_seed(1)
    shapes = expected_tensors(spec)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def fuse(spec: ModelSpec, tensors: Tensors, transposed: bool) -> Tensors:
    kept = {name: tensor for name, tensor in tensors.items() if ".mlp.experts." not in name}
    for layer in filter(spec.is_moe_layer, range(spec.num_hidden_layers)):
        own = [f"model.layers.{layer}.mlp.experts.{expert}." for expert in range(spec.num_experts)]
        gate_up = torch.stack(
            [torch.cat([tensors[e + "gate_proj.weight"], tensors[e + "up_proj.weight"]]) for e in own]
        )
        down = torch.stack([tensors[e + "down_proj.weight"] for e in own])
        prefix = f"model.layers.{layer}.mlp.experts."
        kept[prefix + "gate_up_proj"] = gate_up.mT.contiguous() if transposed else gate_up
        kept[prefix + "down_proj"] = down.mT.contiguous() if transposed else down
    return kept


def write(folder: Path, tensors: Tensors, files: int = 1) -> Path:
    if files == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    weight_map: dict[str, str] = {}
    for number in range(files):
        part = {name: tensors[name] for name in list(tensors)[number::files]}
        save_file(part, folder / f"part-{number}.safetensors")
        weight_map |= dict.fromkeys(part, f"part-{number}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def reassemble(spec: ModelSpec, grid: list[list[ShardSpec]], loaded: list[list[ShardWeights]]) -> Tensors:
    """The canonical tensors from all shards, asserting that what ranks hold twice is equal."""
    out: Tensors = {}

    def put(name: str, parts: list[torch.Tensor | None], dim: int) -> None:
        out[name] = torch.cat([part for part in parts if part is not None], dim)

    def same(name: str, parts: list[torch.Tensor | None]) -> None:
        first = parts[0]
        assert first is not None
        assert all(part is not None and torch.equal(first, part) for part in parts)
        out[name] = first

    for stage, (row, held) in enumerate(zip(grid, loaded, strict=True)):
        if stage == 0:
            put("model.embed_tokens.weight", [w.embed for w in held], 0)
        if stage == len(grid) - 1:
            same("model.norm.weight", [w.norm for w in held])
            put("lm_head.weight", [w.lm_head for w in held], 0)
        for index, layer in enumerate(range(*row[0].layers)):
            prefix, own = f"model.layers.{layer}.", [w.layers[index] for w in held]
            same(prefix + "input_layernorm.weight", [w.input_norm for w in own])
            same(prefix + "post_attention_layernorm.weight", [w.post_norm for w in own])
            put(prefix + "self_attn.o_proj.weight", [w.o_weight for w in own], 1)
            for kind, values in (("weight", [w.qkv_weight for w in own]), ("bias", [w.qkv_bias for w in own])):
                if values[0] is None:
                    continue
                for shard, value in zip(row, values, strict=True):
                    assert value is not None
                    sizes = (shard.heads.size, shard.kv_heads.size, shard.kv_heads.size)
                    q, k, v = value.split([size * spec.head_dim for size in sizes])
                    for x, part, heads in (("q", q, shard.heads), ("k", k, shard.kv_heads), ("v", v, shard.kv_heads)):
                        rows = spec.num_attention_heads if x == "q" else spec.num_key_value_heads
                        name = f"{prefix}self_attn.{x}_proj.{kind}"
                        full = out.setdefault(name, torch.full((rows * spec.head_dim, *part.shape[1:]), torch.nan))
                        target = full[heads.start * spec.head_dim : heads.stop * spec.head_dim]
                        assert torch.equal(target, part) or target.isnan().all()
                        target.copy_(part)
            for name, field in (("self_attn.o_proj.bias", "o_bias"), ("mlp.down_proj.bias", "down_bias")):
                assert all(getattr(w, field) is None for w in own[1:])
                if getattr(own[0], field) is not None:
                    out[prefix + name] = getattr(own[0], field)
            for name in ("q_norm", "k_norm"):
                if getattr(own[0], name) is not None:
                    same(f"{prefix}self_attn.{name}.weight", [getattr(w, name) for w in own])
            if spec.is_moe_layer(layer):
                same(prefix + "mlp.gate.weight", [w.router for w in own])
                for shard, weights in zip(row, own, strict=True):
                    assert weights.experts_gate_up is not None
                    assert weights.experts_down is not None
                    for local, expert in enumerate(range(*shard.experts)):
                        gate, up = weights.experts_gate_up[local].chunk(2)
                        name = f"{prefix}mlp.experts.{expert}."
                        out[name + "gate_proj.weight"], out[name + "up_proj.weight"] = gate, up
                        out[name + "down_proj.weight"] = weights.experts_down[local]
            else:
                put(prefix + "mlp.down_proj.weight", [w.down for w in own], 1)
                for kind, values in (("weight", [w.gate_up for w in own]), ("bias", [w.gate_up_bias for w in own])):
                    if values[0] is not None:
                        halves = [value.chunk(2) for value in values if value is not None]
                        put(f"{prefix}mlp.gate_proj.{kind}", [half[0] for half in halves], 0)
                        put(f"{prefix}mlp.up_proj.{kind}", [half[1] for half in halves], 0)
    return out


def assert_equal(found: Tensors, wanted: Tensors, dtype: torch.dtype) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name].to(dtype), tensor.to(dtype)), name


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("spec", "stored", "compute", "files", "form"),
    [
        (LLAMA, torch.float32, torch.float32, 1, "each"),
        (LLAMA, torch.bfloat16, torch.float32, 3, "each"),
        (MOE, torch.float32, torch.bfloat16, 2, "each"),
        (MOE, torch.bfloat16, torch.bfloat16, 1, "stacked"),
        (MOE, torch.float16, torch.float32, 2, "transposed"),
    ],
)
def test_shards_reassemble(
    tmp_path: Path, spec: ModelSpec, stored: torch.dtype, compute: torch.dtype, files: int, form: str,
    layout: tuple[int, int],
) -> None:  # fmt: skip
    tensors = random_tensors(spec, stored)
    write(tmp_path, tensors if form == "each" else fuse(spec, tensors, form == "transposed"), files)
    grid = shards(spec, *layout)
    loaded = [[load_shard(tmp_path, spec, shard, compute, "cpu") for shard in row] for row in grid]
    assert_equal(reassemble(spec, grid, loaded), tensors, compute)
    for weights in (w for row in loaded for w in row):
        assert all(t.dtype == compute and t.is_contiguous() for t in every_tensor(weights))


def every_tensor(weights: ShardWeights) -> list[torch.Tensor]:
    values = [weights.embed, weights.norm, None if weights.lm_head is weights.embed else weights.lm_head]
    for layer in weights.layers:
        values += [getattr(layer, field.name) for field in fields(layer)]
    return [value for value in values if value is not None]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("ranks", [1, 2])
def test_packed_weights_hold_the_same_values(
    tmp_path: Path, ranks: int, transposed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if compiled.path() is None:
        pytest.skip("no compiled kernels here")
    spec = replace(MOE, vocab_size=4096, hidden_size=64, head_dim=32, intermediate_size=192, moe_intermediate_size=96)
    tensors = random_tensors(spec, torch.bfloat16)
    write(tmp_path, fuse(spec, tensors, True) if transposed else tensors)
    for shard in shards(spec, 1, ranks)[0]:
        packed = load_shard(tmp_path, spec, shard, torch.bfloat16, "cpu")
        with monkeypatch.context() as patch:
            patch.setattr(compiled, "path", lambda: None)
            plain = load_shard(tmp_path, spec, shard, torch.bfloat16, "cpu")
        pairs = list(zip(every_tensor(packed), every_tensor(plain), strict=True))
        assert sum(one.shape != other.shape for one, other in pairs) >= 4 * spec.num_hidden_layers
        for one, other in pairs:
            assert one.numel() == other.numel()
            assert torch.equal(packing.unpacked(one, is_mlp=other.dim() == 2), other)


@pytest.mark.parametrize("layout", [(1, 1), (2, 1), (2, 2)])
def test_tied_embeddings(tmp_path: Path, layout: tuple[int, int]) -> None:
    spec = replace(LLAMA, tie_word_embeddings=True)
    tensors = random_tensors(spec, torch.float32)
    write(tmp_path, tensors)
    grid = shards(spec, *layout)
    loaded = [[load_shard(tmp_path, spec, shard, torch.float32, "cpu") for shard in row] for row in grid]
    head = {"lm_head.weight": tensors["model.embed_tokens.weight"]}
    assert_equal(reassemble(spec, grid, loaded), tensors | head, torch.float32)
    assert all(w.lm_head is w.embed for w in loaded[-1])
    assert all((w.lm_head is None) == (len(loaded) > 1) for w in loaded[0])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("spec", [LLAMA, MOE, replace(MOE, tie_word_embeddings=True)])
def test_progress_ends_at_shard_bytes(tmp_path: Path, spec: ModelSpec, layout: tuple[int, int]) -> None:
    write(tmp_path, random_tensors(spec, torch.float32))
    for shard in (s for row in shards(spec, *layout) for s in row):
        seen: list[tuple[int, int]] = []
        weights = load_shard(tmp_path, spec, shard, torch.bfloat16, "cpu", lambda *now, s=seen: s.append(now))
        total = shard_bytes(spec, shard, torch.bfloat16)
        assert total == sum(t.numel() * 2 for t in every_tensor(weights))
        assert seen[-1] == (total, total)
        assert seen == sorted(seen)


@pytest.mark.parametrize("vocab", [1023, 1024, 1025, 2049])
def test_dummy_shards_are_slices_of_one_model(vocab: int) -> None:
    for base in (replace(LLAMA, vocab_size=vocab), replace(MOE, vocab_size=vocab)):
        whole: Tensors = {}
        for layout in LAYOUTS:
            grid = shards(base, *layout)
            made = [[dummy_shard(base, shard, torch.float32, "cpu", seed=3) for shard in row] for row in grid]
            found = reassemble(base, grid, made)
            whole = whole or found
            assert_equal(found, whole, torch.float32)
        assert torch.equal(whole["model.norm.weight"], torch.ones(24))
        assert abs(whole["lm_head.weight"].std().item() - 0.02) < 0.001
        assert not torch.equal(whole["lm_head.weight"], whole["model.embed_tokens.weight"])
        other = dummy_shard(base, shards(base, 1, 1)[0][0], torch.float32, "cpu", seed=4)
        assert other.lm_head is not None
        assert not torch.equal(other.lm_head, whole["lm_head.weight"])


def test_damage_is_reported(tmp_path: Path) -> None:
    tensors = random_tensors(LLAMA, torch.float32)
    del tensors["model.layers.2.mlp.up_proj.weight"]
    write(tmp_path, tensors)
    with pytest.raises(CheckpointError, match=r"layers\.2\.mlp\.up_proj\.weight: missing"):
        load_shard(tmp_path, LLAMA, shards(LLAMA, 1, 1)[0][0], torch.float32, "cpu")


MEASURE = """
import sys
from pathlib import Path
sys.path[:0] = [sys.argv[1]]
import torch
from tests.unit.workers.model.test_weights import BIG, load_shard, shard_bytes, shards

def anonymous():
    line = next(l for l in open("/proc/self/status") if l.startswith("RssAnon"))
    return int(line.split()[1]) * 1024

folder, ranks = Path(sys.argv[2]), int(sys.argv[3])
dtype = getattr(torch, sys.argv[4])
shard = shards(BIG, 1, ranks)[0][-1]
torch.ones(1000).to(torch.bfloat16)
before = peak = anonymous()

def sample(loaded, total):
    global peak
    peak = max(peak, anonymous())

weights = load_shard(folder, BIG, shard, dtype, "cpu", sample)
print(max(peak, anonymous()) - before, shard_bytes(BIG, shard, dtype))
"""
# 106M parameters: 212 MB in bfloat16; one dense layer and three with experts
BIG = replace(
    MOE, vocab_size=8192, hidden_size=1024, num_hidden_layers=4, num_attention_heads=16, num_key_value_heads=2,
    head_dim=64, intermediate_size=4096, num_experts=16, moe_intermediate_size=448,
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
@pytest.mark.parametrize(
    ("form", "cases"), [("each", [(1, "bfloat16"), (2, "bfloat16")]), ("transposed", [(2, "float32")])]
)
def test_memory_of_loading(tmp_path: Path, form: str, cases: list[tuple[int, str]]) -> None:
    tensors = {name: torch.ones(shape, dtype=torch.bfloat16) for name, shape in expected_tensors(BIG).items()}
    write(tmp_path, tensors if form == "each" else fuse(BIG, tensors, True), files=2)
    root = ROOT
    for ranks, dtype in cases:
        command = [sys.executable, "-c", MEASURE, str(root), str(tmp_path), str(ranks), dtype]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        growth, own = map(int, done.stdout.split())
        assert own > 90e6
        assert own * 0.95 < growth < own * 1.2, (ranks, dtype, growth / own)
        print(f"ranks {ranks} {dtype}: {growth / own:.3f} of {own / 1e6:.0f} MB")
