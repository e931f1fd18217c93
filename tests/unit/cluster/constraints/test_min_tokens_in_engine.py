"""The fewest tokens of an answer, biases and counts in the plans of an engine over fake stages."""

from __future__ import annotations

import pytest

from cluster.scheduler.request import FinishReason
from cluster.text.tokenizer import TextTokenizer
from protos.stage.messages import SampleSpec, SamplingParams, TokenBias
from tests.support.fakes.stage import Rig
from tests.support.paths import NEEDLE

TOKENIZER = TextTokenizer.open(NEEDLE)
THE = TOKENIZER.encode("the", literal=True, continues=True)[0]


def samples(rig: Rig) -> list[SampleSpec]:
    return [part.sample for plan in rig.last.plans for part in plan.slices if part.sample]


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_end_ids_are_banned_before(stages: int) -> None:
    with Rig(stages=stages, eos=(0, 9)) as rig:
        result, _ = rig.run([5] * 20, 30, min_tokens=17, stop_token_ids=(7,))
        assert len(result.token_ids) == 30
        banned = [list(one.banned) for one in sorted(samples(rig), key=lambda one: one.token_index)]
        assert banned == [[0, 7, 9]] * 17 + [[]] * 13
        assert any(not part.token_ids for plan in rig.last.plans for part in plan.slices), "nothing was run ahead"
        again, _ = rig.run([5] * 20, 30, min_tokens=17, resume=result.samples[:15], ignore_eos=True)
        assert not any(one.banned for one in samples(rig)[30:]), "nothing ends it"
        assert again.token_ids == result.token_ids


@pytest.mark.parametrize("resume", [0, 3, 9])
def test_stop_strings_do_not_count_before(resume: int) -> None:
    with Rig(lambda sequence, index: THE, text=True) as rig:
        whole, _ = rig.run([5] * 20, 20, min_tokens=8)
        result, _ = rig.run([5] * 20, 20, min_tokens=8, stop=("ethe",), resume=whole.samples[:resume])
        assert result.finish_reason is FinishReason.STOP
        assert len(result.token_ids) == 9
        assert result.text == "the" * 7 + "th"
        now, _ = rig.run([5] * 20, 20, stop=("ethe",))
        assert len(now.token_ids) == 2


def test_what_the_sampler_keeps_comes_with_the_first_sample_alone() -> None:
    params = SamplingParams(frequency_penalty=0.5, repetition_penalty=1.5)
    with Rig(stages=2) as rig:
        whole, _ = rig.run([5] * 20, 10, sampling=params, logit_bias={3: 1.0})
        first, *others = samples(rig)
        assert (first.history, first.outputs, first.bias) == ([5], (), (TokenBias(3, 1.0),))
        assert not any(one.history or one.outputs or one.bias for one in others)
        assert all(one.is_biased for one in (first, *others))
        rig.run([5] * 20, 10, sampling=params, logit_bias={3: 1.0}, resume=whole.samples[:4])
        first, *others = samples(rig)[10:]
        assert (first.outputs, first.bias) == (whole.token_ids[:4], (TokenBias(3, 1.0),))
        assert not any(one.outputs or one.bias for one in others)
