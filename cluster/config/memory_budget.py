"""Memory of a shard beside its weights: KV pages, and scratch of a step of the largest size.

GPUs have an account of their own (`gpu_memory`), which a rehearsed step corrects where there was one.

Legend: `T` tokens of the largest step, `M` hidden size, `H` and `K` query and KV heads of the shard, `D` head dim,
`k` experts a token uses, `I` their intermediate size.
"""

from __future__ import annotations

from collections.abc import Sequence

from cluster.common.errors import PreflightError
from cluster.common.units import format_bytes
from cluster.config.deployment import Deployment
from cluster.config.gpu_memory import WIDTH, gpu_scratch_bytes, link_bytes, rehearsed_scratch_bytes
from cluster.config.topology import kv_bytes_per_token, product_params, shard_weight_bytes, table_params
from protos.model.grid import largest_cell
from protos.model.spec import ModelSpec
from protos.stage.messages import LoadProgress, ShardSpec

DTYPE_BYTES = {"bfloat16": 2, "float32": 4}
_KV_BYTES = {
    "bfloat16": (2, 0),
    "float32": (4, 0),
    "int8": (1, 4),
    "fp8": (1, 4),
}  # of a number; of the scale of one head
_LINK_STEPS = 4  # steps a link to or from a neighbour holds
_SLACK = 1.25  # what the allocator cannot give back
_SUM_BYTES = 16  # of a key and query head, while a sparse cell is estimated
_USUAL_FRACTION = 0.5  # of what is left, for KV; what other programs need is in the rest
_MOST_FRACTION = 0.8  # so that the longest context fits
_FIXED = 64 << 20  # compiled kernels and their own buffers, stacks


def compute_dtype(deployment: Deployment) -> str:
    """Return the type of weights and hidden states; `auto` is float32 for a float32 checkpoint, else bfloat16."""
    automatic = "float32" if deployment.spec.dtype == "float32" else "bfloat16"
    return automatic if deployment.config.model.dtype == "auto" else deployment.config.model.dtype


def kv_dtype(deployment: Deployment) -> str:
    """Return the type of keys and values: an 8-bit one where it is configured, else that of the weights."""
    configured = deployment.config.kv_cache.dtype
    return compute_dtype(deployment) if configured == "auto" else configured


def shard_kv_token_bytes(deployment: Deployment, shard: ShardSpec) -> int:
    """Return the bytes of one token of KV on one shard."""
    return kv_bytes_per_token(deployment.spec, shard, *_KV_BYTES[kv_dtype(deployment)])


def kv_token_bytes(deployment: Deployment) -> int:
    """Return the bytes of one token on the shard whose tokens are largest."""
    return max(shard_kv_token_bytes(deployment, shard) for shard in deployment.shards)


def weight_bytes(deployment: Deployment, shard: ShardSpec) -> int:
    """Return the bytes of the weights of one shard: quantised ones as they are, others in the type of computing."""
    spec, width = deployment.spec, DTYPE_BYTES[compute_dtype(deployment)]
    total = shard_weight_bytes(spec, shard, width)
    product_width, table_width = weight_widths(deployment)
    saved = product_params(spec, shard) * (width - product_width) + table_params(spec, shard) * (width - table_width)
    if spec.quant is not None and spec.quant.head and shard.is_last and not spec.tie_word_embeddings:
        saved += shard.vocab.size * spec.hidden_size * (table_width - product_width)
    return total - round(saved)


def weight_widths(deployment: Deployment) -> tuple[float, float]:
    """Return the bytes of a weight in the products of layers, and of one of the embedding and the output head.

    A GGUF file stays quantised in bfloat16 on processors; elsewhere it is unpacked.
    """
    width, quant = float(DTYPE_BYTES[compute_dtype(deployment)]), deployment.spec.quant
    on_cpu = deployment.config.cluster.device == "cpu" and compute_dtype(deployment) == "bfloat16"
    if quant is None or (quant.format == "gguf" and not on_cpu):
        return width, width
    return quant.bytes_per_weight, quant.table_bytes or width


def step_tokens(deployment: Deployment) -> int:
    """Return the tokens of the largest step.

    A sparse cell is never cut: a prompt that is alone takes at least one, and beside others one beyond the budget.
    """
    prefill, cell = deployment.config.prefill, largest_cell(deployment.spec)
    budget = prefill.max_num_batched_tokens
    return max(budget, cell) if prefill.max_num_seqs == 1 else budget + cell


def shard_scratch_bytes(deployment: Deployment, shard: ShardSpec) -> int:
    """Return an upper estimate of what one shard needs beside weights and KV in the largest step."""
    width, sequences = DTYPE_BYTES[compute_dtype(deployment)], deployment.config.prefill.max_num_seqs
    tokens = step_tokens(deployment)
    if deployment.config.cluster.device == "cuda" and width == WIDTH:
        return gpu_scratch_bytes(deployment.spec, shard, tokens, deployment.max_model_len, sequences)
    return scratch_bytes(deployment.spec, shard, tokens, sequences, width, deployment.max_model_len)


def scratch_bytes(
    spec: ModelSpec, shard: ShardSpec, tokens: int, sequences: int, width: int, context: int = 0
) -> int:  # fmt: skip
    """Return an upper estimate of the bytes that a step of `tokens` rows needs on a shard beside weights and KV.

    At most `sequences` rows are sampled, an activation has `width` bytes, and a sparse cell sums over the columns and
    diagonals of the longest `context` (tokens).
    """
    hidden, dim = spec.hidden_size, spec.head_dim
    heads, kv_heads = shard.heads.size, shard.kv_heads.size
    row = 6 * hidden * width  # the stream, its norm, outputs of attention and MLP, their sums
    row += 2 * (heads + 2 * kv_heads) * dim * width
    row += heads * dim * (width + 2 * 4)  # attention's output and two partial ones in float32
    if spec.dual_chunk is not None:
        row += 2 * heads * dim * width  # queries under two more rotations
    row += ((not shard.is_first) + (not shard.is_last)) * _LINK_STEPS * hidden * width
    widest = 0
    if spec.num_experts:
        chosen = spec.num_experts_per_tok
        gathered = hidden + 3 * spec.moe_intermediate_size  # rows of one expert: at worst it is everybody's
        widest = (chosen * hidden + gathered) * width + 2 * 4 * spec.num_experts + 4 * 8 * chosen
    widest = max(widest, 3 * shard.intermediate.size * width)
    head = min(tokens, sequences) * spec.vocab_size * (width + 4 + 2 * 8) if shard.is_last else 0
    sums = _SUM_BYTES * context * heads if spec.sparse is not None else 0
    return _FIXED + int(_SLACK * (tokens * (row + widest) + head)) + sums


def kv_budget(deployment: Deployment, loaded: Sequence[LoadProgress], sharers: int) -> int:
    """Return the bytes of KV that one shard may allocate, `loaded` being what every shard reported after loading.

    Where the YAML says neither bytes nor a fraction, that is half of what is left, or as much more as one context of
    max_model_len needs. `sharers` shards share one memory. Raises PreflightError with the numbers, and the context that
    would fit.
    """
    config = deployment.config
    prefill, kv = config.prefill, config.kv_cache
    scratch = _scratch_of_all(deployment, loaded)
    # Weights that are mapped from the file count as available, but dropping them would mean reading them at each step.
    mapped = 0
    if config.cluster.device == "cpu":
        mapped = sharers * max(max(0, p.total_bytes - p.anonymous_growth_bytes) for p in loaded)
    free = (min(p.available_bytes for p in loaded) - mapped) // sharers - scratch
    page = kv.page_size * kv_token_bytes(deployment)
    context = -(-deployment.max_model_len // kv.page_size) * page
    if kv.bytes is not None:
        wanted = min(kv.bytes, context * prefill.max_num_seqs)  # of all sequences together
    elif kv.fraction is not None:
        wanted = max(0, int(free * kv.fraction))
    else:
        wanted = max(0, int(free * _USUAL_FRACTION), min(int(free * _MOST_FRACTION), context))
    if 0 < wanted <= free:
        return wanted
    fits = max(0, free) // page * kv.page_size
    key = f"kv_cache.bytes: {format_bytes(wanted)}" if kv.bytes is not None else "kv_cache.fraction: no room"
    raise PreflightError(
        f"{key}: after the weights and {format_bytes(scratch)} for a step of {step_tokens(deployment)} tokens, "
        f"{format_bytes(max(0, free))} an actor are left: {fits} tokens would fit: lower kv_cache.bytes, "
        "prefill.max_num_batched_tokens or model.max_model_len"
    )


def rehearsed_context(deployment: Deployment) -> tuple[int, int]:
    """Return the longest context that the KV cache may hold, in tokens, and the bytes of memory for each of its tokens.

    What is free after loading over these bytes bounds it too, where nobody asked for a context; else they are 0.
    """
    kv, longest = deployment.config.kv_cache, deployment.max_model_len
    if not deployment.limits_context:
        return longest, 0
    token = kv_token_bytes(deployment)
    if kv.bytes is not None:
        return max(1, min(longest, kv.bytes // token)), token
    return longest, max(1, int(token / (_MOST_FRACTION if kv.fraction is None else kv.fraction)))


def _scratch_of_all(deployment: Deployment, loaded: Sequence[LoadProgress]) -> int:
    """Return the bytes that the largest step needs on any shard: as rehearsed if all shards did, else estimated."""
    rehearsed = [progress.rehearsed_bytes for progress in loaded]
    if all(rehearsed):
        tokens = step_tokens(deployment)
        links = max(link_bytes(deployment.spec, shard, tokens) for shard in deployment.shards)  # a rehearsal has none
        return rehearsed_scratch_bytes(max(rehearsed)) + links
    return max(shard_scratch_bytes(deployment, shard) for shard in deployment.shards)
