"""Output text, stop strings and the JSON of a result."""

import json

import pytest

from cluster.engine.outputs import Generation, GenerationSpec, OutputText, Timings
from cluster.scheduler.request import FinishReason
from cluster.text.tokenizer import TextTokenizer
from protos.stage.messages import SampledToken, SamplingParams, TokenLogprob
from tests.support.paths import NEEDLE

TOKENIZER = TextTokenizer.open(NEEDLE)


def feed(text: str, stop: tuple[str, ...] = (), opened: bool = False) -> tuple[str, OutputText]:
    output = OutputText(TOKENIZER, stop, opened)
    joined = ""
    ids = TOKENIZER.encode(text)
    for index, token in enumerate(ids):
        joined += output.push(token, is_last=index == len(ids) - 1)[0]
        if output.stopped:
            break
    return joined, output


@pytest.mark.parametrize("text", ["", "a", "the river ran", "naïve 漢字 🙂 end", "line\nline", "  spaces  "])
def test_pieces_join_to_the_text(text: str):
    joined, output = feed(text)
    assert (joined, output.stopped) == (text, False)
    assert output.result() == (None, text)


@pytest.mark.parametrize(
    ("stop", "text"), [(("漢",), "naïve "), (("字 🙂",), "naïve 漢"), (("n",), ""), (("🙂 end", "ve"), "naï")]
)
def test_stop_strings_cut_inside_tokens(stop: tuple[str, ...], text: str):
    joined, output = feed("naïve 漢字 🙂 end", stop)
    assert (joined, output.stopped) == (text, True)
    output.flush()
    assert output.result() == (None, text)


def test_a_withheld_beginning_of_a_stop_string_comes_with_the_last_token():
    joined, output = feed("the river ra", ("ran by",))
    assert (joined, output.stopped) == ("the river ra", False)


def test_a_withheld_beginning_of_a_stop_string_comes_with_the_flush():
    output = OutputText(TOKENIZER, ("ran by",))
    for token in TOKENIZER.encode("the river ra"):
        output.push(token)
    assert output.result() == (None, "the river ")
    output.flush()
    assert output.result() == (None, "the river ra")


def test_without_a_tokenizer_there_is_no_text():
    output = OutputText(None, ("x",))
    assert output.push(5) == output.push(6, is_last=True) == ("", "", "")
    output.flush()
    assert (output.stopped, output.part, output.result()) == (False, "answer", (None, ""))


@pytest.mark.parametrize(
    ("text", "opened", "expected"),
    [
        ("<think>why</think>because", False, ("why", "because")),
        ("why</think>because", True, ("why", "because")),
        ("because", False, (None, "because")),
    ],
)
def test_reasoning_is_split_off(text: str, opened: bool, expected: tuple[str | None, str]):
    _, output = feed(text, opened=opened)
    assert output.result() == expected


def test_each_token_says_what_it_adds_to_reasoning_and_answer():
    output = OutputText(TOKENIZER, ("!",))
    pieces = []
    for token in TOKENIZER.encode("<think>why not</think>\n\nso it is!"):
        text, reasoning, answer = output.push(token)
        pieces.append((text, reasoning, answer, output.part))
    assert "".join(text for text, *_ in pieces) == "<think>why not</think>\n\nso it is"
    assert "".join(reasoning for _, reasoning, *_ in pieces) == "why not"
    assert "".join(answer for _, _, answer, _ in pieces) == "so it is"
    parts = [part for *_, part in pieces]
    begin, end = parts.index("reasoning"), len(parts) - parts[::-1].index("reasoning")
    assert parts == ["answer"] * begin + ["reasoning"] * (end - begin) + ["answer"] * (len(parts) - end)
    assert "".join(text for text, *_ in pieces[: begin + 1]).startswith("<think>")
    assert "".join(text for text, *_ in pieces[: end + 1]).endswith("</think>")


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
