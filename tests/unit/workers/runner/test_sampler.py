"""Sampling: reproducible noise, the right distribution, filters against NumPy and against transformers."""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from protos.stage.messages import SampledToken, SampleSpec, SamplingParams
from workers.runner import sampler as sampler_module
from workers.runner.sampler import Sampler, filter_logits, gumbel_noise, penalise

VOCAB = 257
FILTERS = [
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=0.6, top_k=1),
    SamplingParams(temperature=1.7, top_k=40),
    SamplingParams(temperature=1.0, top_k=VOCAB),
    SamplingParams(temperature=1.0, top_k=VOCAB + 1),
    SamplingParams(temperature=1.0, top_p=0.9),
    SamplingParams(temperature=1.0, top_p=1e-9),
    SamplingParams(temperature=0.8, min_p=0.05),
    SamplingParams(temperature=1.0, min_p=1.0),
    SamplingParams(temperature=0.7, top_k=20, top_p=0.8, min_p=0.1),
]


def logits(seed: int = 0, size: int = VOCAB) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * 3


def spec(index: int = 0, history: Sequence[int] = (), **params: float) -> SampleSpec:
    return SampleSpec(SamplingParams(**params), index, history)


# --- noise -----------------------------------------------------------------------------------------------------------


def test_noise_depends_on_seed_and_index_only():
    first = gumbel_noise(7, 3, 100)
    assert torch.equal(first, gumbel_noise(7, 3, 100))
    assert torch.equal(first, gumbel_noise(7, 3, 1000)[:100]), "the size of the vocabulary does not matter"
    for seed, index in ((7, 4), (8, 3), (3, 7), ((1 << 63) - 1, 3), (7, (1 << 32) - 1)):
        assert not torch.equal(first, gumbel_noise(seed, index, 100))


def test_noise_of_neighbouring_indexes_is_independent():
    rows = torch.stack([gumbel_noise(1, index, 2000) for index in range(50)])
    assert abs(float(torch.corrcoef(rows)[~torch.eye(50, dtype=torch.bool)].abs().max())) < 0.12
    assert abs(float(rows.mean()) - np.euler_gamma) < 0.02
    assert abs(float(rows.var()) - math.pi**2 / 6) < 0.05


@pytest.mark.parametrize("bits", [0, 2**64 - 1])
def test_noise_is_finite_for_the_extreme_bits(bits: int, monkeypatch: pytest.MonkeyPatch):
    class Extreme:
        def __init__(self, **_: object) -> None: ...

        def random_raw(self, size: int) -> np.ndarray:
            return np.full(size, bits, np.uint64)

    monkeypatch.setattr(sampler_module.np.random, "Philox", Extreme)
    assert gumbel_noise(0, 0, 3).isfinite().all()


# --- distribution ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=1.0, seed=11),
        SamplingParams(temperature=0.5, seed=12),
        SamplingParams(temperature=2.0, top_k=5, seed=13),
        SamplingParams(temperature=1.0, top_p=0.8, seed=14),
    ],
)
def test_tokens_follow_the_filtered_softmax(params: SamplingParams):
    scores = torch.tensor([1.0, 0.2, -0.3, 2.0, 0.0, -1.5, 0.7, 1.1])
    draws = 4000
    sampler = Sampler(8)
    counts = np.zeros(8)
    for index in range(draws):
        counts[sampler.sample(1, scores, SampleSpec(params, index)).token_id] += 1
    expected = torch.softmax(filter_logits(scores, params), -1).numpy() * draws
    assert not counts[expected == 0].any()
    kept = expected > 0
    chi_square = float(((counts[kept] - expected[kept]) ** 2 / expected[kept]).sum())
    assert chi_square < 29.9, "8 classes: above this in one of 10 000 fair samplers"


@pytest.mark.parametrize("temperature", [1e-320, 1e-30, 1e-3])
def test_the_smallest_temperatures_are_greedy(temperature: float):
    for seed in range(20):
        scores = logits(seed)
        token = Sampler(VOCAB).sample(1, scores, spec(temperature=temperature, seed=seed)).token_id
        assert token == int(scores.argmax())


def test_greedy_takes_the_largest():
    assert Sampler(VOCAB).sample(1, logits(4), spec()).token_id == int(logits(4).argmax())


def test_rows_are_sampled_together_only_where_all_are_greedy(monkeypatch: pytest.MonkeyPatch):
    """A device chooses; any spec that asks for more than the greatest logit is left to `sample`."""
    rows = torch.stack([logits(seed) for seed in range(3)])
    best = rows.argmax(-1).tolist()
    greedy = [(sequence, spec(index=sequence)) for sequence in (4, 5, 6)]
    assert [token.token_id for token in Sampler(VOCAB).sample_rows(rows, greedy)] == best
    calls: list[torch.Tensor] = []

    def choose(given: torch.Tensor) -> torch.Tensor:
        calls.append(given)
        return torch.stack([given.argmax(-1), given.isfinite().all(-1).long()])

    monkeypatch.setattr(sampler_module.calls, "supports", lambda device: True)
    monkeypatch.setattr(sampler_module.calls, "choose_greedily", choose)
    assert Sampler(VOCAB).sample_rows(rows, greedy) == tuple(
        SampledToken(sequence, token) for (sequence, _), token in zip(greedy, best, strict=True)
    )
    assert len(calls) == 1
    chosen = torch.tensor([[7, 8, 9], [1, 1, 1]])  # by a graph
    assert [token.token_id for token in Sampler(VOCAB).sample_rows(rows, greedy, chosen)] == [7, 8, 9]
    mask = bytes([0xFF] * 33)
    for other in (
        spec(temperature=0.5), spec(logprobs=2), spec(repetition_penalty=1.1, history=(1,)), replace(spec(), mask=mask),
        replace(spec(), banned=(3,)), replace(spec(), forced=7),
    ):  # fmt: skip
        assert len(Sampler(VOCAB).sample_rows(rows, [*greedy[:2], (6, other)])) == 3
    assert len(calls) == 1
    rows[1, 9] = math.inf
    with pytest.raises(RuntimeError, match="sequence 5: logits of token 5 are not finite"):
        Sampler(VOCAB).sample_rows(rows, greedy)


# --- filters ---------------------------------------------------------------------------------------------------------


def filter_numpy(values: np.ndarray, params: SamplingParams) -> set[int]:
    """Ids that stay, from the definitions, one token at a time."""
    scaled = values.astype(np.float64) / params.temperature
    alive = set(range(len(values)))
    if 0 < params.top_k < len(values):
        cut = sorted(scaled, reverse=True)[params.top_k - 1]
        alive = {i for i in alive if scaled[i] >= cut}

    def mass() -> dict[int, float]:
        top = max(scaled[i] for i in alive)
        raw = {i: math.exp(scaled[i] - top) for i in alive}
        return {i: value / sum(raw.values()) for i, value in raw.items()}

    if params.top_p < 1:
        share, before = mass(), 0.0
        kept = set()
        for i in sorted(alive, key=lambda i: (-scaled[i], i)):
            if before < params.top_p:
                kept.add(i)
            before += share[i]
        alive = kept
    if params.min_p > 0:
        share = mass()
        best = max(share.values())
        alive = {i for i in alive if share[i] >= params.min_p * best}
    return alive


@pytest.mark.parametrize("params", FILTERS, ids=str)
def test_filters_against_their_definitions(params: SamplingParams):
    for seed in range(10):
        got = filter_logits(logits(seed), params)
        assert set(got.isfinite().nonzero().flatten().tolist()) == filter_numpy(logits(seed).numpy(), params)


@pytest.mark.parametrize("params", FILTERS, ids=str)
def test_filters_against_transformers(params: SamplingParams):
    warpers = [TemperatureLogitsWarper(params.temperature)]
    if params.top_k:
        warpers.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        warpers.append(TopPLogitsWarper(params.top_p))
    if params.min_p:
        warpers.append(MinPLogitsWarper(params.min_p))
    for seed in range(10):
        scores = logits(seed).double()[None]
        for warper in warpers:
            scores = warper(torch.zeros(1, 1, dtype=torch.int64), scores)
        ours = torch.softmax(filter_logits(logits(seed), params), -1)
        torch.testing.assert_close(ours, torch.softmax(scores[0], -1), atol=1e-12, rtol=1e-9)


def test_ties_at_the_top_k_border_all_stay():
    kept = filter_logits(torch.tensor([1.0, 2.0, 2.0, 2.0, 0.0]), SamplingParams(temperature=1.0, top_k=2))
    assert kept.isfinite().tolist() == [False, True, True, True, False]


# --- repetition penalty and history ----------------------------------------------------------------------------------


@pytest.mark.parametrize("penalty", [0.5, 1.1, 2.0])
def test_penalty_against_transformers(penalty: float):
    ids = torch.tensor([[3, 3, 200, 0, VOCAB - 1]])
    seen = torch.zeros(VOCAB, dtype=torch.bool)
    seen[ids[0]] = True
    wanted = RepetitionPenaltyLogitsProcessor(penalty)(ids, logits()[None])[0]
    torch.testing.assert_close(penalise(logits(), seen, penalty), wanted, atol=0, rtol=1e-6)


def test_history_is_sent_once_and_grows_with_the_output():
    sampler = Sampler(4)
    scores = torch.tensor([1.0, 0.9, 0.8, 0.1])
    tokens = [
        sampler.sample(1, scores, spec(index, [3] if index == 0 else [], repetition_penalty=20.0)).token_id
        for index in range(4)
    ]
    assert tokens == [0, 1, 2, 0], "3 is penalised from the beginning, and once all are, the best comes again"


def test_a_penalised_sequence_without_history_is_refused():
    sampler = Sampler(VOCAB)
    with pytest.raises(RuntimeError, match=r"sequence 9: .* brings no history"):
        sampler.sample(9, logits(), spec(1, repetition_penalty=1.5))
    sampler.sample(9, logits(), spec(0, [5], repetition_penalty=1.5))
    sampler.sample(9, logits(), spec(1, repetition_penalty=1.5))
    sampler.forget(9)
    with pytest.raises(RuntimeError, match="brings no history"):
        sampler.sample(9, logits(), spec(2, repetition_penalty=1.5))
    sampler.sample(9, logits(), spec(0, [1], repetition_penalty=1.5))
    sampler.clear()
    with pytest.raises(RuntimeError, match="brings no history"):
        sampler.sample(9, logits(), spec(1, repetition_penalty=1.5))


def test_sequences_do_not_share_history():
    sampler = Sampler(2)
    scores = torch.tensor([1.0, 0.9])
    assert sampler.sample(1, scores, spec(0, [0], repetition_penalty=2.0)).token_id == 1
    assert sampler.sample(2, scores, spec(0, [1], repetition_penalty=2.0)).token_id == 0


# --- log-probabilities and errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 5, 100])
def test_logprobs_are_those_of_the_unmodified_distribution(count: int):
    params = SamplingParams(temperature=1.5, top_k=3, repetition_penalty=2.0, seed=3, logprobs=count)
    sample = Sampler(VOCAB).sample(1, logits(), SampleSpec(params, 0, [5]))
    wanted = torch.log_softmax(logits(), -1)
    assert sample.logprob == pytest.approx(float(wanted[sample.token_id]), abs=1e-6)
    best = wanted.topk(count)
    assert [item.token_id for item in sample.top] == best.indices.tolist()
    assert [item.logprob for item in sample.top] == pytest.approx(best.values.tolist(), abs=1e-6)


def test_logprobs_of_a_vocabulary_smaller_than_asked():
    sample = Sampler(3).sample(1, logits(0, 3), spec(logprobs=100))
    assert sorted(item.token_id for item in sample.top) == [0, 1, 2]
    assert sum(math.exp(item.logprob) for item in sample.top) == pytest.approx(1.0)


def test_no_logprobs_unless_asked():
    sample = Sampler(VOCAB).sample(1, logits(), spec())
    assert sample.logprob is None
    assert sample.top == ()


@pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value encountered")  # NumPy's sum
@pytest.mark.parametrize("size", [1, 3, 67, 49_153])
def test_the_first_of_the_highest_is_taken(size: int):
    """Many equal values, zeros of both signs, the largest numbers, and every kind of value that is none."""
    generator = np.random.default_rng(size)
    for scale in (0.0, 1.0, 1e-40, 3e38):
        values = (generator.integers(-3, 3, size) / 3 * scale).astype(np.float32)
        values[generator.random(size) < 0.2] *= -1.0
        for row in (values, -abs(values)):
            token = Sampler(size).sample(1, torch.from_numpy(row), spec()).token_id
            assert token == int(np.flatnonzero(row == row.max())[0])
        for bad in (math.nan, -math.nan, math.inf, -math.inf):
            spoiled = torch.from_numpy(values.copy())
            spoiled[int(generator.integers(size))] = bad
            with pytest.raises(RuntimeError, match="are not finite"):
                Sampler(size).sample(1, spoiled, spec())


@pytest.mark.parametrize("x", [logits().double(), logits(size=2 * VOCAB)[::2]])
def test_logits_of_any_type_and_layout(x: torch.Tensor):
    assert Sampler(VOCAB).sample(1, x, spec()).token_id == int(x.double().argmax())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_logits_are_refused(bad: float):
    scores = logits()
    scores[100] = bad
    with pytest.raises(RuntimeError, match="sequence 4: logits of token 6 are not finite"):
        Sampler(VOCAB).sample(4, scores, spec(6))


# --- masks -----------------------------------------------------------------------------------------------------------


def packed(allowed: Sequence[int], size: int = VOCAB) -> bytes:
    bits = np.zeros(size, np.uint8)
    bits[list(allowed)] = 1
    return np.packbits(bits, bitorder="little").tobytes()


@pytest.mark.parametrize("size", [17, 67, 193, 256, VOCAB])
@pytest.mark.parametrize("seed", range(3))
def test_mask_against_a_loop(size: int, seed: int):
    values, draw = logits(seed, size), np.random.default_rng(seed)
    allowed = sorted(draw.choice(size, 1 + seed * 5, replace=False).tolist())
    masked = sampler_module.apply_mask(values, packed(allowed, size))
    for token in range(size):
        assert masked[token] == (values[token] if token in allowed else -math.inf)
    assert torch.equal(sampler_module.apply_mask(values, packed(allowed, size) + b"\xff\xff"), masked), "padding"


@pytest.mark.parametrize(
    "params", [SamplingParams(), *FILTERS, SamplingParams(temperature=1.0, repetition_penalty=3.0)]
)
def test_masked_samples_are_of_the_mask(params: SamplingParams):
    sampler, values = Sampler(VOCAB), logits()
    worst = values.argsort()[:5].tolist()
    for index in range(20):
        history = (1, 2) if not index else ()
        one = sampler.sample(1, values, SampleSpec(params, index, history, packed(worst)))
        assert one.token_id in worst


def test_mask_of_one_token_is_that_token():
    for params in (SamplingParams(), SamplingParams(temperature=1.0, top_k=3, top_p=0.1, min_p=1.0)):
        assert Sampler(VOCAB).sample(1, logits(), SampleSpec(params, 0, mask=packed([137]))).token_id == 137


def test_mask_of_everything_changes_nothing():
    for params in (SamplingParams(), *FILTERS):
        plain, masked = (
            Sampler(VOCAB).sample(1, logits(), SampleSpec(params, 3, mask=mask)) for mask in (b"", b"\xff" * 33)
        )
        assert plain == masked


def test_masked_distribution():
    params, values, allowed = SamplingParams(temperature=1.0, seed=5), logits(), [3, 50, 256]
    drawn = [
        Sampler(VOCAB).sample(1, values, SampleSpec(params, i, mask=packed(allowed))).token_id for i in range(4000)
    ]
    expected = torch.softmax(values[allowed].double(), dim=-1)
    for token, share in zip(allowed, expected.tolist(), strict=True):
        assert abs(drawn.count(token) / len(drawn) - share) < 4 * math.sqrt(share * (1 - share) / len(drawn)) + 1e-3


def test_logprobs_are_those_without_the_mask():
    values = logits()
    one = Sampler(VOCAB).sample(1, values, SampleSpec(SamplingParams(logprobs=3), 0, mask=packed([137])))
    wide = torch.log_softmax(values.double(), dim=-1)
    assert one.logprob == float(wide[137])
    assert [item.token_id for item in one.top] == wide.topk(3).indices.tolist()


@pytest.mark.parametrize("mask", [b"\xff" * 32, bytes(33), bytes(32) + b"\xfe"])
def test_bad_masks(mask: bytes):
    with pytest.raises(RuntimeError, match="a mask "):
        Sampler(VOCAB).sample(1, logits(), SampleSpec(SamplingParams(), 0, mask=mask))
