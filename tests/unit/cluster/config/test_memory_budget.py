"""KV is sized with what a step needs beside it, and a refusal names the length that would fit."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cluster.common.errors import PreflightError
from cluster.config.deployment import Deployment, load_deployment
from cluster.config.memory_budget import kv_budget, kv_token_bytes, rehearsed_context, scratch_bytes, weight_bytes
from cluster.config.topology import kv_bytes_per_token, product_params
from cluster.stages.preflight import count_pages
from protos.model.grid import largest_cell
from protos.model.quant.scheme import QuantScheme
from protos.stage.messages import LoadProgress
from tests.support.paths import CONFIGS

CONFIG = CONFIGS / "single.yaml"
MIB = 1 << 20


def deployment(**overrides: object) -> Deployment:
    given = {key.replace("__", "."): value for key, value in overrides.items()}
    return load_deployment(CONFIG, {"model.dtype": "float32", **given})


def loaded(available: int, total: int = 0, anonymous: int = 0) -> list[LoadProgress]:
    return [LoadProgress(total, total, True, anonymous, available)]


def scratch(given: Deployment) -> int:
    prefill = given.config.prefill
    tokens = prefill.max_num_batched_tokens + largest_cell(given.spec)
    return scratch_bytes(given.spec, given.shards[0], tokens, prefill.max_num_seqs, 4, given.max_model_len)


@pytest.mark.parametrize("tokens", [1, 2, 1023, 1024, 1025, 2039])
def test_scratch_grows_with_the_tokens_of_a_step(tokens: int):
    spec, shard = deployment().spec, deployment().shards[0]
    one, more = (scratch_bytes(spec, shard, n, 1, 4) for n in (tokens, tokens + 1))
    assert more > one >= tokens * spec.hidden_size * 4
    assert scratch_bytes(spec, shard, tokens, 1, 2) < one
    inner = replace(shard, stage=1, num_stages=3)
    assert scratch_bytes(spec, inner, 4096, 1, 4) > scratch_bytes(spec, shard, 4096, 1, 4), "links hold steps"


def test_a_fraction_is_of_what_a_step_leaves():
    given = deployment(kv_cache__bytes=None, kv_cache__fraction=0.5)
    free = 64 * MIB
    room = scratch(given) + free
    assert kv_budget(given, loaded(room), 1) == free // 2
    assert kv_budget(given, loaded(room + 10 * MIB, total=12 * MIB, anonymous=2 * MIB), 1) == free // 2
    assert kv_budget(given, loaded(2 * room), 2) == free // 2
    with pytest.raises(PreflightError, match=r"kv_cache.fraction: no room: .* 0B an actor are left: 0 tokens"):
        kv_budget(given, loaded(scratch(given)), 1)


def test_a_rehearsed_context_is_at_least_as_long_as_what_kv_holds():
    asked = deployment(model__max_model_len=3000)
    assert rehearsed_context(asked) == (3000, 0)
    for fraction, size in ((None, None), (0.1, None), (0.9, None), (1.0, None), (None, "1MiB"), (None, "64GiB")):
        given = deployment(kv_cache__bytes=size, kv_cache__fraction=fraction, model__max_model_len=None)
        for free in (2, 20, 200, 20_000):
            room = scratch(given) + free * MIB
            try:
                allowed = count_pages(given, loaded(room), 1) * given.config.kv_cache.page_size
            except PreflightError:
                continue
            context, token_bytes = rehearsed_context(given)
            assert min(context, room // token_bytes) >= min(allowed, given.max_model_len), (fraction, size, free)
    tokens = MIB // kv_token_bytes(given)
    small = deployment(kv_cache__bytes="1MiB", model__max_model_len=None)
    assert rehearsed_context(small) == (tokens, kv_token_bytes(small))


def test_what_is_left_out_is_as_much_as_one_context_needs():
    given = deployment(kv_cache__bytes=None)
    context = 4096 * kv_bytes_per_token(given.spec, given.shards[0], 4)
    for free, wanted in ((4 * context, 2 * context), (1.5 * context, context), (context, 0.8 * context)):
        assert kv_budget(given, loaded(scratch(given) + int(free)), 1) == pytest.approx(wanted, abs=1)


def test_contexts_that_nobody_has_asked_for_are_limited_to_the_memory(caplog: pytest.LogCaptureFixture):
    """A long recipe on a small machine; a length that is given is refused."""
    recipe = {"kv_cache__bytes": None, "model__config_file": "config_1m.json"}
    given = deployment(**recipe)
    assert (given.max_model_len, given.config.prefill.max_num_batched_tokens) == (1 << 20, 3584)
    room = scratch(given) + 64 * MIB
    pages = count_pages(given, loaded(room), 1)
    tokens = pages * 64
    assert 0.7 * 64 * MIB < tokens * kv_bytes_per_token(given.spec, given.shards[0], 4) <= 0.8 * 64 * MIB
    assert f"contexts are limited to {tokens} tokens, which the KV cache holds, of 1048576" in caplog.text
    asked = deployment(**recipe, model__max_model_len="1M")
    with pytest.raises(PreflightError, match=r"model.max_model_len is 1048576: give kv_cache.bytes at least 4GiB"):
        count_pages(asked, loaded(room), 1)
    small = deployment(**recipe | {"kv_cache__bytes": "8MiB"})
    assert 0 < count_pages(small, loaded(room), 1) * 64 < tokens
    with pytest.raises(PreflightError, match="room for 0 tokens"):
        count_pages(deployment(**recipe | {"kv_cache__bytes": "1kB"}), loaded(room), 1)


@pytest.mark.parametrize(("missing", "fits"), [(0, True), (1, False), (5 * MIB, False)])
def test_a_size_that_does_not_fit_beside_a_step_is_refused_with_the_length(missing: int, fits: bool):
    given = deployment(kv_cache__bytes="32MiB")
    available = scratch(given) + 32 * MIB - missing
    if fits:
        assert kv_budget(given, loaded(available), 1) == 32 * MIB
        return
    per_token = kv_bytes_per_token(given.spec, given.shards[0], 4)
    page_size = given.config.kv_cache.page_size
    tokens = (32 * MIB - missing) // (per_token * page_size) * page_size
    with pytest.raises(PreflightError, match=f"bytes: 32MiB: after the weights .* {tokens} tokens would fit: lower"):
        kv_budget(given, loaded(available), 1)
    with pytest.raises(PreflightError, match=f"{tokens} tokens would fit"):
        count_pages(given, loaded(available), 1)


@pytest.mark.parametrize(
    ("scheme", "bytes_per_weight"),
    [
        (QuantScheme("gptq", 4, group=128), 0.5 + 2 / 128),
        (QuantScheme("awq", 4, group=64, has_zeros=True), 0.5 + 3 / 64),
        (QuantScheme("fp8", 8, is_float=True, group=128, block_rows=128), 1 + 4 / 128),
        (QuantScheme("int-quantized", 8), 1.0),
    ],
)
def test_quantised_weights_count_as_they_are_stored(scheme: QuantScheme, bytes_per_weight: float):
    plain = deployment(model__dtype="bfloat16")
    stored = replace(plain, spec=replace(plain.spec, quant=scheme))
    (shard,) = plain.shards
    saved = weight_bytes(plain, shard) - weight_bytes(stored, shard)
    assert saved == round(product_params(plain.spec, shard) * (2 - bytes_per_weight))
    assert scheme.bytes_per_weight == bytes_per_weight


def test_a_quantised_output_matrix_counts_as_it_is_stored():
    plain = deployment(model__dtype="bfloat16")
    scheme = QuantScheme("gptq", 4, group=128)
    spec = replace(plain.spec, quant=scheme, tie_word_embeddings=False)
    without = replace(plain, spec=spec)
    stored = replace(plain, spec=replace(spec, quant=replace(scheme, head=True)))
    (shard,) = plain.shards
    saved = weight_bytes(without, shard) - weight_bytes(stored, shard)
    assert saved == round(spec.vocab_size * spec.hidden_size * (2 - 0.5 - 2 / 128))
