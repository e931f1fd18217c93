"""Output text, stop strings and the JSON of a result."""

import json

import pytest

from cluster.engine.outputs import Generation, GenerationSpec, OutputText, Timings
from cluster.scheduler.request import FinishReason
from cluster.text.tokenizer import TextTokenizer
from protos.stage.messages import SampledToken, SamplingParams, TokenLogprob
from tests.support.paths import NEEDLE

TOKENIZER = TextTokenizer.open(NEEDLE)


def feed(text: str, stop: tuple[str, ...] = ()) -> tuple[str, bool, OutputText]:
    output = OutputText(TOKENIZER, stop)
    joined = ""
    for token in TOKENIZER.encode(text):
        piece, stopped = output.push(token)
        joined += piece
        if stopped:
            return joined, True, output
    return joined + output.flush(), False, output


@pytest.mark.parametrize("text", ["", "a", "the river ran", "naïve 漢字 🙂 end", "line\nline", "  spaces  "])
def test_pieces_join_to_the_text(text: str):
    joined, stopped, output = feed(text)
    assert (joined, stopped) == (text, False)
    assert output.split(False) == (None, text)


@pytest.mark.parametrize(
    ("stop", "text"), [(("漢",), "naïve "), (("字 🙂",), "naïve 漢"), (("n",), ""), (("🙂 end", "ve"), "naï")]
)
def test_stop_strings_cut_inside_tokens(stop: tuple[str, ...], text: str):
    joined, stopped, output = feed("naïve 漢字 🙂 end", stop)
    assert (joined, stopped) == (text, True)
    assert output.flush() == ""
    assert output.split(False) == (None, text)


def test_a_withheld_beginning_of_a_stop_string_comes_with_the_flush():
    joined, stopped, _ = feed("the river ra", ("ran by",))
    assert (joined, stopped) == ("the river ra", False)


def test_without_a_tokenizer_there_is_no_text():
    output = OutputText(None, ("x",))
    assert output.push(5) == ("", False)
    assert output.flush() == ""
    assert output.split(False) == (None, "")


@pytest.mark.parametrize(
    ("text", "opened", "expected"),
    [
        ("<think>why</think>because", False, ("why", "because")),
        ("why</think>because", True, ("why", "because")),
        ("because", False, (None, "because")),
    ],
)
def test_reasoning_is_split_off(text: str, opened: bool, expected: tuple[str | None, str]):
    _, _, output = feed(text)
    reasoning, answer = output.split(opened)
    assert (reasoning.strip() if reasoning else reasoning, answer.strip()) == expected


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
    spec = GenerationSpec([1], 1)
    assert spec.sampling == SamplingParams()
    assert (spec.stop, spec.stop_token_ids, spec.ignore_eos) == ((), (), False)
