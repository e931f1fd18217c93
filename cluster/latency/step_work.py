"""The work of a step: counts that follow from its plan, and the units of work that these are on one shard.

Legend: `T` tokens of the step, `D` head dim, `E` experts, `k` of them a token uses, `R` shards of a stage.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from cluster.config.topology import kv_bytes_per_token, layer_params
from protos.model.spec import ModelSpec
from protos.stage.messages import ShardSpec

Floats = NDArray[np.float64]
Number = TypeVar("Number", float, Floats)

# the units of `ShardWork`, in their order
UNITS = ("layers", "weight_bytes", "flops", "kv_bytes", "attention_flops", "estimate_flops", "reduced_bytes")


class StepCounts(NamedTuple):
    """What a plan asks for; each is a number, or an array with one number a step."""

    tokens: float | Floats  # rows that are computed
    samples: float | Floats  # rows of which the output head is computed
    contexts: float | Floats  # tokens of KV that are read: contexts of all slices, of sparse ones what a row visits
    pairs: float | Floats  # query-key pairs that are visited
    cells: float | Floats  # contexts of sparse slices: their keys are selected


class Work(ABC):
    """What turns counts into `UNITS`."""

    layers = 1

    @abstractmethod
    def units(self, counts: StepCounts) -> tuple[float | Floats, ...]:
        """Return the units of a step, or of many."""

    def seconds(self, counts: StepCounts, costs: Sequence[float]) -> float | Floats:
        """Return the time of a step, or of many, where each unit costs so many seconds."""
        total: float | Floats = 0.0
        for units, cost in zip(self.units(counts), costs, strict=True):
            total = total + units * cost
        return total


class PlainWork(Work):
    """Work of a model whose shape is unknown: steps, tokens, contexts, pairs and cells as they are."""

    def units(self, counts: StepCounts) -> tuple[float | Floats, ...]:
        tokens = counts.tokens
        return (tokens * 0.0 + 1.0, tokens * 0.0, tokens, counts.contexts, counts.pairs, counts.cells, tokens * 0.0)


class ShardWork(Work):
    """Computes the work of a step on one shard: `UNITS`, in this order.

    - layers: of the shard, each with a fixed cost a step;
    - weight_bytes: read at least once; of the experts those that `T` rows choose, `E (1 - (1 - k/E)^T)`, as if they
      chose evenly;
    - flops: of products with weights, two a parameter and row, the output head only for rows that are sampled;
    - kv_bytes: of the tokens that are read; attention_flops: `4 D` a pair and query head;
    - estimate_flops: of sparse cells, two passes of `last_q` rows over the context, whose keys are read for that;
    - reduced_bytes: two all-reduces a layer, each of which moves `2 (R - 1) / R` of the hidden states.
    """

    def __init__(
        self, spec: ModelSpec, shard: ShardSpec, width: int, kv_width: float,
        weight_widths: tuple[float, float] | None = None,
    ) -> None:  # fmt: skip
        """Take the widths of numbers in bytes.

        Args:
            width: of an activation.
            kv_width: of a number of KV with its share of a scale.
            weight_widths: of a weight in the products of layers, and in the output head; None: as of an activation.
        """
        self.layers = shard.layers.size
        self._widths = weight_widths or (width, width)
        experts, chosen = shard.experts.size, spec.num_experts_per_tok
        expert = 3 * spec.hidden_size * spec.moe_intermediate_size
        moe_layers = sum(spec.is_moe_layer(layer) for layer in range(*shard.layers))
        params = sum(layer_params(spec, shard, layer) for layer in range(*shard.layers))
        self._always = params - moe_layers * experts * expert  # parameters that every row meets
        self._experts = moe_layers * experts * expert
        self._miss = 1.0 - chosen / spec.num_experts if spec.num_experts else 0.0  # a row does not choose an expert
        self._row = self._always + self._experts * (1.0 - self._miss)
        self._head = spec.hidden_size * shard.vocab.size if shard.is_last else 0
        self._kv = kv_bytes_per_token(spec, shard, 1) * kv_width
        heads = shard.heads.size * spec.head_dim * self.layers
        self._pair = 4 * heads
        self._cell = 2 * 4 * heads * spec.sparse.last_q if spec.sparse is not None else 0
        ranks = shard.num_ranks
        self._reduced = 2 * self.layers * spec.hidden_size * width * 2 * (ranks - 1) / ranks

    def units(self, counts: StepCounts) -> tuple[float | Floats, ...]:
        tokens, samples = counts.tokens, counts.samples
        has_head = np.minimum(samples, 1.0)
        touched = self._always + self._experts * (1.0 - self._miss**tokens)
        product_width, head_width = self._widths
        return (
            tokens * 0.0 + self.layers,
            touched * product_width + has_head * self._head * head_width,
            2.0 * (self._row * tokens + self._head * samples),
            self._kv * counts.contexts,
            self._pair * counts.pairs,
            self._cell * counts.cells,
            self._reduced * tokens,
        )


def causal_pairs(start: Number, length: Number) -> Number:
    """Return the number of query-key pairs that plain causal attention of these rows visits."""
    return length * start + length * (length + 1) / 2
