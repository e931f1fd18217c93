"""The JSON of a result, and the defaults of a request."""

import json

from cluster.engine.outputs import Generation, Timings
from cluster.scheduler.request import FinishReason
from cluster.text.tokenizer import TextTokenizer
from protos.stage.messages import SampledToken, SamplingParams, TokenLogprob
from tests.support.data.specs import generation_spec
from tests.support.paths import NEEDLE

TOKENIZER = TextTokenizer.open(NEEDLE)


def generation(samples: tuple[SampledToken, ...] = (), prefill_s: float = 2.0, error: str = "") -> Generation:
    return Generation(
        token_ids=tuple(sample.token_id for sample in samples), text="t", reasoning=None,
        finish_reason=FinishReason.ERROR if error else FinishReason.LENGTH, samples=samples, prompt_tokens=100,
        cached_tokens=60, timings=Timings(0.5, prefill_s, 2.5, 1.0, 3.5), error=error,
    )  # fmt: skip


def test_a_result_as_json():
    first, second = TOKENIZER.encode("the river")[:2]
    samples = (
        SampledToken(1, first, -0.25, (TokenLogprob(first, -0.25), TokenLogprob(second, -2.0))),
        SampledToken(1, second, -1.0),
    )
    data = json.loads(json.dumps(generation(samples).to_json(TOKENIZER)))
    assert data["usage"] == {
        "prompt_tokens": 100, "completion_tokens": 2, "total_tokens": 102, "cached_tokens": 60,
    }  # fmt: skip
    assert data["prefill"] == {"total": 100, "cached": 60, "processed": 100, "tokens_per_s": 20.0}
    assert data["finish_reason"] == "length"
    assert data["timings"]["ttft_s"] == 2.5
    assert [entry["token_id"] for entry in data["logprobs"]] == [first, second]
    assert data["logprobs"][0]["token"] == TOKENIZER.decode([first], skip_special=False)
    assert [top["logprob"] for top in data["logprobs"][0]["top"]] == [-0.25, -2.0]
    assert "error" not in data


def test_json_without_logprobs_tokens_or_time():
    data = generation(prefill_s=0.0, error="stage 0 is gone").to_json()
    assert data["logprobs"] is None
    assert data["prefill"]["tokens_per_s"] is None
    assert data["prefill"]["processed"] is None
    assert data["error"] == "stage 0 is gone"
    sampled = generation((SampledToken(1, 5, -0.5),)).to_json()
    assert sampled["logprobs"] == [{"token_id": 5, "token": None, "logprob": -0.5, "top": []}]


def test_defaults_of_a_spec_are_greedy_and_unrestricted():
    spec = generation_spec([1], 1)
    assert spec.options.sampling_params == SamplingParams()
    assert (spec.options.stop, spec.options.stop_token_ids, spec.options.ignore_eos) == ((), (), False)
