"""Penalties of what an answer has, biases, banned and forced tokens, against a loop over the vocabulary."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from protos.stage.messages import SampleSpec, SamplingParams, TokenBias
from tests.unit.workers.runner.test_sampler import VOCAB, logits, packed
from workers.runner.sampler import Sampler


def reference(
    values: np.ndarray, one: SampleSpec, prompt: Sequence[int], output: Sequence[int], bias: dict[int, float]
) -> int:
    """The greedy token from the definitions, one token at a time."""
    params, scores = one.params, [float(np.float32(value)) for value in values]
    for token in range(len(scores)):
        score = np.float32(scores[token]) + np.float32(bias.get(token, 0.0))
        if token in prompt or token in output:
            score = score / np.float32(params.repetition_penalty) if score > 0 else score * params.repetition_penalty
        score -= params.frequency_penalty * output.count(token)
        score -= params.presence_penalty * (token in output)
        scores[token] = float(score)
    left = [token for token in range(len(scores)) if token not in one.banned]
    return one.forced if one.forced is not None else max(left, key=lambda token: (scores[token], -token))


@pytest.mark.parametrize("size", [17, 67, 193])
@pytest.mark.parametrize("seed", range(8))
def test_everything_that_bends_the_choice_against_a_loop(size: int, seed: int):
    """A sequence from its first token, and others that go on after some of them, on samplers of their own."""
    draw = np.random.default_rng(1000 * seed + size)
    bias = {int(token): float(draw.uniform(-4, 4)) for token in draw.choice(size, seed % 4, replace=False)}
    params = SamplingParams(
        repetition_penalty=1.0 if seed % 2 else 1.3, presence_penalty=float(draw.choice([0.0, -1.5, 2.0])),
        frequency_penalty=float(draw.choice([0.0, -0.3, 1.25])),
    )  # fmt: skip
    prompt, output, samplers = draw.integers(0, size, 5).tolist(), [], {0: Sampler(size)}
    for index in range(40):
        if index % 9 == 4:
            samplers[index] = Sampler(size)
        values = draw.normal(size=size).astype(np.float32) * 2
        banned = draw.choice(size, 3, replace=False).tolist() if index < 9 else ()
        forced = int(draw.integers(size)) if draw.random() < 0.1 else None
        found = set()
        for begin, sampler in samplers.items():
            is_first = begin == index
            one = SampleSpec(
                params, index, sorted({*prompt, *output}) if is_first and params.repetition_penalty != 1.0 else (),
                outputs=tuple(output) if is_first else (), is_biased=bool(bias), banned=banned, forced=forced,
                bias=tuple(TokenBias(*pair) for pair in bias.items()) if is_first else (),
            )  # fmt: skip
            found.add(sampler.sample(1, torch.from_numpy(values), one).token_id)
        assert found == {reference(values, one, prompt, output, bias)}
        output += found


def test_bias_decides():
    favourite = SampleSpec(SamplingParams(), 0, bias=(TokenBias(5, 100.0),), is_biased=True)
    assert Sampler(VOCAB).sample(1, logits(), favourite).token_id == 5
    best = int(logits().argmax())
    out = SampleSpec(SamplingParams(1.0, seed=1), 0, bias=(TokenBias(best, -100.0),), is_biased=True)
    sampler = Sampler(VOCAB)
    later = SampleSpec(SamplingParams(1.0, seed=1), 1, is_biased=True)
    assert best not in {sampler.sample(1, logits(), one).token_id for one in (out, *[later] * 50)}


def test_what_should_have_come_with_the_first_sample_is_missed():
    for one, problem in (
        (SampleSpec(SamplingParams(presence_penalty=1.0), 3), "what the answer has but does not bring it"),
        (SampleSpec(SamplingParams(), 3, is_biased=True), "has a bias but does not bring it"),
    ):
        sampler = Sampler(VOCAB)
        with pytest.raises(RuntimeError, match=f"sequence 9: .* {problem}"):
            sampler.sample(9, logits(), one)


def test_banned_tokens_come_only_where_nothing_else_may():
    params = SamplingParams(temperature=1.0, seed=4)
    worst = logits().argsort()[:2].tolist()
    for index in range(20):
        one = SampleSpec(params, index, mask=packed(worst), banned=worst[:1])
        assert Sampler(VOCAB).sample(1, logits(), one).token_id == worst[1]
    only = SampleSpec(params, 0, mask=packed(worst[:1]), banned=[*worst, VOCAB + 5])
    assert Sampler(VOCAB).sample(1, logits(), only).token_id == worst[0]
    none = SampleSpec(params, 0, mask=packed(worst[:1]), banned=[VOCAB + 5])
    assert Sampler(VOCAB).sample(1, logits(), none).token_id == worst[0], "the vocabulary has none of the banned ids"


def test_a_forced_token_has_its_own_logprob():
    one = Sampler(VOCAB).sample(1, logits(), SampleSpec(SamplingParams(1.0, logprobs=1), 0, mask=packed([3]), forced=7))
    assert (one.token_id, one.logprob) == (7, float(torch.log_softmax(logits().double(), -1)[7]))
