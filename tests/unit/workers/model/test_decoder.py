"""The parts of the decoder that a stage cuts by rows of the vocabulary: embedding and output head."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from protos.stage.messages import SequenceSlice, Span, StepPlan
from workers.bench.model import benchmark_spec
from workers.kv.paged import PagedKV
from workers.model.batch import PageTables
from workers.model.decoder import Decoder
from workers.model.weights import dummy_shard, whole_model
from workers.transport.collectives import Collectives

CPU = torch.device("cpu")
SPEC = replace(
    benchmark_spec(layers=1), vocab_size=193, hidden_size=96, num_attention_heads=4, num_key_value_heads=2,
    head_dim=32, num_experts=16, num_experts_per_tok=3, moe_intermediate_size=64,
)  # fmt: skip


class Parts(Collectives):
    """One rank of several: its part is kept, the others' come from `others`."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self.own: torch.Tensor | None = None
        self.others: list[torch.Tensor] = []

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        self.own = tensor
        return tensor

    def all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        self.own = tensor
        return self.others or [tensor] * self.size


def shards(size: int) -> list[tuple[Decoder, Parts]]:
    made = []
    for rank in range(size):
        vocab = Span(193 * rank // size, 193 * (rank + 1) // size)
        shard = replace(whole_model(SPEC), rank=rank, num_ranks=size, vocab=vocab)
        parts = Parts(rank, size)
        made.append((Decoder(SPEC, shard, dummy_shard(SPEC, shard, torch.float32, CPU), parts, CPU), parts))
    return made


def whole() -> Decoder:
    shard = whole_model(SPEC)
    return Decoder(SPEC, shard, dummy_shard(SPEC, shard, torch.float32, CPU), Collectives(), CPU)


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("tokens", [1, 17, 67])
def test_embeddings_of_shards_add_up(tokens: int, size: int) -> None:
    ids = torch.randint(0, 193, (tokens,), generator=torch.Generator().manual_seed(tokens))
    assert torch.equal(sum(decoder.embed(ids) for decoder, _ in shards(size)), whole().embed(ids))


@pytest.mark.parametrize("size", [2, 3, 4])
def test_logits_of_shards_stand_in_order(size: int) -> None:
    x = torch.randn(17, 96, generator=torch.Generator().manual_seed(size))
    ranks = shards(size)
    padded = []
    for decoder, parts in ranks:
        decoder.logits(x)
        assert parts.own is not None
        padded.append(parts.own)
    decoder, parts = ranks[0]
    parts.others = padded
    got = decoder.logits(x)
    assert got.shape == (17, 193)
    torch.testing.assert_close(got, whole().logits(x), rtol=1e-5, atol=1e-5)


def test_who_counts_experts_gets_those_of_every_layer_and_row() -> None:
    spec = replace(SPEC, num_hidden_layers=2)
    shard = whole_model(spec)
    decoder = Decoder(spec, shard, dummy_shard(spec, shard, torch.float32, CPU), Collectives(), CPU)
    seen: list[tuple[int, list[int]]] = []
    decoder.on_experts = lambda layer, experts: seen.append((layer, list(experts.shape)))
    tables = PageTables(64)
    part = SequenceSlice(1, 0, 67, 67, list(range(67)), [0, 1], 2)
    plan = StepPlan(0, (part,))
    tables.apply(plan)
    kv = PagedKV(2, 2, 32, 2, 64, torch.float32, CPU)
    ready = decoder.prepare(tables.batch(plan, spec, CPU), kv)
    decoder.layers(decoder.embed(torch.arange(67)), ready)
    assert seen == [(0, [67, 3]), (1, [67, 3])]
