"""Memory of a shard besides its weights: KV pages, and what a step of the largest size needs while it runs.

Legend: `T` tokens of the largest step, `M` hidden size, `H` and `K` query and KV heads of the shard, `D` head dim,
`k` experts a token uses, `I` their intermediate size.
"""

from __future__ import annotations

from collections.abc import Sequence

from cluster.config import Deployment
from cluster.topology import kv_bytes_per_token
from cluster.units import format_bytes
from protos.messages import LoadProgress, ShardSpec
from protos.model_spec import ModelSpec

_LINK_STEPS = 4  # steps a link to or from a neighbour holds
_SLACK = 1.25  # what the allocator cannot give back
_FIXED = 64 << 20  # compiled kernels and their own buffers, stacks


class NoRoom(RuntimeError):
    """The configured sizes do not fit into the memory of this machine."""


def scratch_bytes(spec: ModelSpec, shard: ShardSpec, tokens: int, sequences: int, width: int) -> int:
    """Most bytes one step of `tokens` rows needs on a shard beside weights and KV; an upper estimate.

    Args:
        sequences: most rows of the step that are sampled.
        width: bytes of an activation.
    """
    hidden, dim = spec.hidden_size, spec.head_dim
    heads, kv_heads = shard.heads.size, shard.kv_heads.size
    row = 6 * hidden * width  # the stream, its norm, outputs of attention and MLP, their sums
    row += 2 * (heads + 2 * kv_heads) * dim * width
    row += heads * dim * (width + 2 * 4)  # attention's output and two partial ones in float32
    links = (not shard.is_first) + (not shard.is_last)
    row += links * _LINK_STEPS * hidden * width
    widest = 0
    if spec.num_experts:
        chosen = spec.num_experts_per_tok
        gathered = hidden + 3 * spec.moe_intermediate_size  # rows of one expert: at worst it is everybody's
        widest = (chosen * hidden + gathered) * width + 2 * 4 * spec.num_experts + 4 * 8 * chosen
    widest = max(widest, 3 * shard.intermediate.size * width)
    head = min(tokens, sequences) * spec.vocab_size * (width + 4 + 2 * 8) if shard.is_last else 0
    return _FIXED + int(_SLACK * (tokens * (row + widest) + head))


def kv_budget(deployment: Deployment, loaded: Sequence[LoadProgress], sharers: int, width: int) -> int:
    """Bytes of KV one shard may allocate.

    Args:
        loaded: what every shard reported after loading.
        sharers: shards that share one memory.

    Raises:
        NoRoom: with the numbers, and the context that would fit.
    """
    config, spec = deployment.config, deployment.spec
    prefill, kv = config.prefill, config.kv_cache
    scratch = max(
        scratch_bytes(spec, shard, prefill.max_num_batched_tokens, prefill.max_num_seqs, width)
        for shard in deployment.shards
    )
    # Weights that are mapped from the file count as available, but dropping them would mean reading them at each step.
    mapped = 0
    if config.cluster.device == "cpu":
        mapped = sharers * max(max(0, p.total_bytes - p.anonymous_growth_bytes) for p in loaded)
    free = (min(progress.available_bytes for progress in loaded) - mapped) // sharers - scratch
    block = kv.page_size * max(kv_bytes_per_token(spec, shard, width) for shard in deployment.shards)
    if kv.bytes is None:
        assert kv.fraction is not None
        wanted = max(0, int(free * kv.fraction))
    else:  # no more is allocated than all sequences can use
        wanted = min(kv.bytes, -(-deployment.max_model_len // kv.page_size) * prefill.max_num_seqs * block)
    if 0 < wanted <= free:
        return wanted
    fits = max(0, free) // block * kv.page_size
    key = f"kv_cache.bytes: {format_bytes(wanted)}" if kv.bytes is not None else "kv_cache.fraction: no room"
    raise NoRoom(
        f"{key}: after the weights and {format_bytes(scratch)} for a step of {prefill.max_num_batched_tokens} tokens, "
        f"{format_bytes(max(0, free))} an actor are left: {fits} tokens would fit: lower kv_cache.bytes, "
        "prefill.max_num_batched_tokens or model.max_model_len"
    )
