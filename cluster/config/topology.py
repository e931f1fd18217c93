"""Split of a model over stages and shards: arithmetic over a ModelSpec.

Legend: `H` query heads, `K` KV heads, `D` head dim, `M` hidden size, `E` experts, `I` intermediate, `R` ranks (shards)
of a stage. Sizes are parameters unless a name says bytes.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate, pairwise

from cluster.common.text_format import show_value
from protos.errors import UserError
from protos.model.spec import ModelSpec
from protos.stage.messages import ShardSpec, Span


class LayoutError(UserError):
    """A split that the model does not allow: `key`, and `rule` with every size that would do."""

    def __init__(self, key: str, value: object, rule: str) -> None:
        super().__init__(f"{key}: {show_value(value)}: {rule}")
        self.key = key
        self.rule = rule


def plan_shards(
    spec: ModelSpec, pipeline_parallel_size: int, expert_parallel_size: int, stage_layers: Sequence[int] | None = None
) -> tuple[ShardSpec, ...]:
    """Return the shards of every stage, ordered by stage, then rank; a stage is a contiguous span of layers.

    Args: `stage_layers` are the layers of each stage; None: so that all have about as much work by weights
        (`layer_cost`), from which a launch goes on to balance costs (`cluster.latency.balance`).

    Raises LayoutError: the model has too few layers, or its heads, experts or MLP columns do not divide.
    """
    stages, ranks, layers = pipeline_parallel_size, expert_parallel_size, spec.num_hidden_layers
    if not 1 <= stages <= layers:
        rule = f"must be between 1 and {layers} (the model has {layers} layers)"
        raise LayoutError("pipeline_parallel_size", stages, rule)
    if not _divides(spec, ranks):
        allowed = [size for size in range(1, spec.num_attention_heads + 1) if _divides(spec, size)]
        sizes = ", ".join(f"{size} {name}" for name, size in _sizes(spec).items())
        rule = f"must be one of {', '.join(map(str, allowed))} (the model has {sizes})"
        raise LayoutError("expert_parallel_size", ranks, rule)
    spans = balance([layer_cost(spec, layer) for layer in range(layers)], stages)
    if stage_layers is not None:
        spans = _spans(stage_layers, stages, layers)
    return tuple(
        ShardSpec(
            stage=stage,
            num_stages=stages,
            rank=rank,
            num_ranks=ranks,
            layers=span,
            heads=_part(spec.num_attention_heads, rank, ranks),
            kv_heads=_kv_heads(spec, rank, ranks),
            experts=_part(spec.num_experts, rank, ranks),
            intermediate=_part(_sizes(spec).get("MLP columns", 0), rank, ranks),
            vocab=_part(spec.vocab_size, rank, ranks),
        )
        for stage, span in enumerate(spans)
        for rank in range(ranks)
    )


def _spans(stage_layers: Sequence[int], stages: int, layers: int) -> list[Span]:
    if len(stage_layers) != stages or sum(stage_layers) != layers or min(stage_layers) < 1:
        rule = f"must be {stages} numbers from 1 on (pipeline_parallel_size) that make {layers}, the model's layers"
        raise LayoutError("stage_layers", list(stage_layers), rule)
    return [Span(*pair) for pair in pairwise(accumulate(stage_layers, initial=0))]


def layer_cost(spec: ModelSpec, layer: int) -> int:
    """Return the work of one layer per token: its attention weights and the MLP weights active for a token.

    The output head is left out: in prefill it runs for one row of a prompt, only in decode for every token. So is
    attention over the context, which is the same for every layer.
    """
    if spec.is_moe_layer(layer):
        width = 3 * spec.num_experts_per_tok * spec.moe_intermediate_size + spec.num_experts
    else:
        width = 3 * spec.intermediate_size
    return _attention(spec, spec.num_attention_heads, spec.num_key_value_heads) + spec.hidden_size * width


def pair_cost(spec: ModelSpec) -> int:
    """Return the work of one query-key pair of a layer, in the unit of `layer_cost`."""
    return 2 * spec.num_attention_heads * spec.head_dim


def balance(costs: Sequence[int], parts: int) -> list[Span]:
    """Return `costs` cut into `parts` contiguous, non-empty spans with the smallest possible largest sum.

    Among those the most even one (least sum of squares), and among equals the one whose last parts are smaller: the
    last stage has the output head as well. Needs `1 <= parts <= len(costs)`; time is about len(costs) ** 2.
    """
    assert 1 <= parts <= len(costs), (parts, len(costs))
    sums = list(accumulate(costs, initial=0))
    largest, enough = max(costs), sums[-1]  # the smallest limit that `parts` spans keep lies between them
    while largest < enough:
        middle = (largest + enough) // 2
        largest, enough = (largest, middle) if _fits(costs, parts, middle) else (middle + 1, enough)
    weights = {0: 0}  # least sum of squares of the spans so far, by their end
    origins: list[dict[int, int]] = []  # of each span: its start by its end
    for part in range(parts):
        previous, weights, origin = weights, {}, {}
        for stop in range(part + 1, len(costs) - (parts - part) + 2):
            first = max(part, bisect_left(sums, sums[stop] - largest))
            # from the shortest span on, so that ties keep it
            starts = [start for start in range(stop - 1, first - 1, -1) if start in previous]
            if starts:
                sizes = {start: previous[start] + (sums[stop] - sums[start]) ** 2 for start in starts}
                origin[stop] = min(starts, key=sizes.__getitem__)
                weights[stop] = sizes[origin[stop]]
        origins.append(origin)
    cuts = [len(costs)]
    for origin in reversed(origins):
        cuts.append(origin[cuts[-1]])
    return [Span(start, stop) for start, stop in pairwise(reversed(cuts))]


def _fits(costs: Sequence[int], parts: int, limit: int) -> bool:
    """Return whether at most `parts` spans with sums up to `limit` cover all costs."""
    count, filled = 1, 0
    for cost in costs:
        filled += cost
        if filled > limit:
            count, filled = count + 1, cost
    return count <= parts


def shard_weight_bytes(spec: ModelSpec, shard: ShardSpec, bytes_per_param: int) -> int:
    """Return the bytes of the weights of one shard; every rank holds norms, routers and output biases."""
    total = sum(layer_params(spec, shard, layer) for layer in range(*shard.layers))
    return (total + table_params(spec, shard) + shard.is_last * spec.hidden_size) * bytes_per_param


def table_params(spec: ModelSpec, shard: ShardSpec) -> int:
    """Return the parameters of the embedding and the output head on one shard; a tied one is there once."""
    tables = shard.is_first + shard.is_last
    if spec.tie_word_embeddings and tables == 2:
        tables = 1
    return tables * shard.vocab.size * spec.hidden_size


def layer_params(spec: ModelSpec, shard: ShardSpec, layer: int) -> int:
    """Return the parameters of one layer on one shard; every rank holds norms, routers and output biases."""
    heads, kv_heads = shard.heads.size, shard.kv_heads.size
    total = _attention(spec, heads, kv_heads) + 2 * spec.hidden_size
    total += spec.qk_norm * 2 * spec.head_dim
    total += spec.qkv_bias * (heads + 2 * kv_heads) * spec.head_dim + spec.o_bias * spec.hidden_size
    if spec.is_moe_layer(layer):
        expert = 3 * spec.hidden_size * spec.moe_intermediate_size
        return total + spec.hidden_size * spec.num_experts + shard.experts.size * expert
    columns = shard.intermediate.size
    return total + 3 * spec.hidden_size * columns + spec.mlp_bias * (2 * columns + spec.hidden_size)


def product_params(spec: ModelSpec, shard: ShardSpec) -> int:
    """Return the parameters of matrix products without routers and head: what quantised files convert."""
    hidden, heads, kv_heads = spec.hidden_size, shard.heads.size, shard.kv_heads.size
    layers = range(*shard.layers)
    moe = sum(spec.is_moe_layer(layer) for layer in layers)
    attention = 2 * hidden * spec.head_dim * (heads + kv_heads)
    experts = 3 * hidden * spec.moe_intermediate_size * shard.experts.size
    return len(layers) * attention + moe * experts + (len(layers) - moe) * 3 * hidden * shard.intermediate.size


def kv_bytes_per_token(spec: ModelSpec, shard: ShardSpec, bytes_per_value: int, scale_bytes: int = 0) -> int:
    """Return the bytes of keys and values of one token on one shard; each head's key and value may have a scale."""
    return 2 * shard.layers.size * shard.kv_heads.size * (spec.head_dim * bytes_per_value + scale_bytes)


def _divides(spec: ModelSpec, ranks: int) -> bool:
    sizes = _sizes(spec)
    heads, kv_heads = sizes["query heads"], sizes.pop("KV heads")  # these may be fewer than the ranks
    return (
        1 <= ranks <= heads
        and heads % kv_heads == 0
        and (kv_heads % ranks == 0 or ranks % kv_heads == 0)
        and all(size % ranks == 0 for size in sizes.values())
    )


def _sizes(spec: ModelSpec) -> dict[str, int]:
    """Return the sizes of a model that are split over ranks."""
    has_dense_mlp = not all(spec.is_moe_layer(layer) for layer in range(spec.num_hidden_layers))
    sizes = {"query heads": spec.num_attention_heads, "KV heads": spec.num_key_value_heads}
    sizes |= {"experts": spec.num_experts} if spec.num_experts else {}
    return sizes | ({"MLP columns": spec.intermediate_size} if has_dense_mlp else {})


def _part(size: int, rank: int, ranks: int) -> Span:
    return Span(size * rank // ranks, size * (rank + 1) // ranks) if size else Span(0, 0)


def _kv_heads(spec: ModelSpec, rank: int, ranks: int) -> Span:
    """Return the KV heads that the query heads of `rank` read: query head h reads h // (H // K)."""
    group = spec.num_attention_heads // spec.num_key_value_heads
    heads = _part(spec.num_attention_heads, rank, ranks)
    span = Span(heads.start // group, (heads.stop - 1) // group + 1)
    # equally many query heads of the rank read each KV head, as the kernels index them
    assert heads.size % span.size == 0, (heads, span)
    return span


def _attention(spec: ModelSpec, heads: int, kv_heads: int) -> int:
    return spec.hidden_size * spec.head_dim * 2 * (heads + kv_heads)
