"""The declared options: ranges, defaults, and who takes their names from them."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from cluster.cli.main import main
from protos.errors import InvalidRequest, UserError
from protos.jobs import jobs_pb2 as pb
from protos.jobs.constraint import Constraint
from protos.jobs.sampling import OPTIONS, AnswerOptions, Sampling, SamplingParams
from protos.stage import messages, stage_pb2


@pytest.mark.parametrize(
    ("name", "inside", "outside", "allowed"),
    [
        ("temperature", (0, 100), (-0.1, 100.1, math.nan), "between 0 and 100"),
        ("top_k", (0, 1 << 30), (-1, (1 << 30) + 1), "between 0 and 1.07374e+09"),
        ("top_p", (1e-9, 1), (-0.1, 1.1, math.nan), "between 0 and 1"),
        ("min_p", (0, 1), (-0.1, 1.1), "between 0 and 1"),
        ("repetition_penalty", (0.01, 100), (0.0, 101.0), "between 0.01 and 100"),
        ("presence_penalty", (-2, 0, 2), (-2.1, 2.1, math.nan), "between -2 and 2"),
        ("frequency_penalty", (-2, 0, 2), (-2.1, 2.1, math.nan), "between -2 and 2"),
        ("seed", (0, (1 << 63) - 1), (-1, 1 << 63), "between 0 and 9.22337e+18"),
        ("logprobs", (0, 100, None), (-1, 101), "between 0 and 100"),
    ],
)
def test_ranges_of_sampling(name: str, inside: tuple[float, ...], outside: tuple[float, ...], allowed: str) -> None:
    for kind in (Sampling, SamplingParams):
        for value in inside:
            assert getattr(kind(**{name: value}), name) == value  # type: ignore[arg-type]
        for value in outside:
            with pytest.raises(UserError) as caught:
                kind(**{name: value})  # type: ignore[arg-type]
            assert str(caught.value) == f"{name}: {value}: must be {allowed}"


def test_a_probability_mass_of_zero_keeps_no_token() -> None:
    with pytest.raises(UserError, match=r"^top_p: 0: must be above 0 and at most 1$"):
        SamplingParams(top_p=0.0)


def test_ranges_of_answers() -> None:
    assert AnswerOptions(max_tokens=1 << 40).max_tokens == 1 << 40
    with pytest.raises(UserError, match=r"^max_tokens: 0: must be at least 1$"):
        AnswerOptions(max_tokens=0)
    with pytest.raises(UserError, match=r'^stop: "": a stop string must have at least one character$'):
        AnswerOptions(stop=("a", ""))


def test_fewest_tokens_and_budgets_of_answers() -> None:
    options = AnswerOptions(max_tokens=5, min_tokens=5, thinking_budget=0)
    assert (options.min_tokens, options.thinking_budget) == (5, 0)
    with pytest.raises(UserError, match=r"^min_tokens: 6: must be at most max_tokens, 5$"):
        AnswerOptions(max_tokens=5, min_tokens=6)
    for name in ("min_tokens", "thinking_budget"):
        with pytest.raises(UserError, match=rf"^{name}: -1: must be at least 0$"):
            AnswerOptions(**{name: -1})
    assert options.shortened(3) == AnswerOptions(max_tokens=3, min_tokens=3, thinking_budget=0)
    assert options.shortened(9) == options


def test_options_by_name_go_where_they_belong() -> None:
    options = AnswerOptions.from_values({"max_tokens": 3, "top_k": 5, "seed": 7, "stop": ("x",), "ignore_eos": True})
    assert options == AnswerOptions(3, Sampling(top_k=5, seed=7), ("x",), ignore_eos=True)
    assert AnswerOptions.from_values({}) == AnswerOptions()
    assert AnswerOptions.from_values({name: option.default for name, option in OPTIONS.items()}) == AnswerOptions()


def test_what_is_not_said_comes_from_the_defaults() -> None:
    defaults = SamplingParams(0.6, 20, 0.95, 0.1, 1.2, seed=5)
    resolved = AnswerOptions(sampling=Sampling(top_k=0, temperature=0.0)).resolve(defaults).sampling_params
    assert replace(resolved, seed=5) == replace(defaults, top_k=0, temperature=0.0)
    assert AnswerOptions().resolve(defaults).sampling_params.to_json().keys() == set(OPTIONS) & {
        "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed",
            "presence_penalty", "frequency_penalty",
    }  # fmt: skip
    said = SamplingParams(0.1, 2, 0.3, 0.4, 1.5, 6, 7)
    assert AnswerOptions(sampling=said).resolve(defaults).sampling_params == said
    assert AnswerOptions(sampling=said).resolve(defaults) == AnswerOptions(sampling=said)


def test_a_seed_that_is_not_said_is_a_fresh_one() -> None:
    seeds = {AnswerOptions().resolve(SamplingParams()).sampling_params.seed for _ in range(5)}
    assert len(seeds) == 5
    assert all(0 <= seed < 1 << 63 for seed in seeds)


def test_options_must_be_resolved_before_use() -> None:
    with pytest.raises(AssertionError, match="resolve them first"):
        assert AnswerOptions(sampling=Sampling(temperature=1.0)).sampling_params


def test_declarations_say_type_and_meaning() -> None:
    kinds = {name: (option.kind, option.is_list) for name, option in OPTIONS.items()}
    assert kinds["temperature"] == (float, False)
    assert kinds["logprobs"] == kinds["max_tokens"] == (int, False)
    assert kinds["stop"] == (str, True)
    assert kinds["stop_token_ids"] == (int, True)
    assert kinds["enable_thinking"] == kinds["ignore_eos"] == (bool, False)
    assert all(option.meaning.endswith(".") for option in OPTIONS.values())


def test_messages_and_command_line_have_the_declared_names() -> None:
    assert {item.name for item in pb.Sampling.DESCRIPTOR.fields} == set(OPTIONS)
    sampling = {item.name for item in stage_pb2.SamplingParams.DESCRIPTOR.fields}
    assert sampling == set(SamplingParams.__dataclass_fields__)
    assert messages.SamplingParams is SamplingParams
    for verb in ("run", "submit"):
        options = {parameter.name: parameter for parameter in main.commands[verb].params}
        for name, option in OPTIONS.items():
            assert options[name].multiple == option.is_list  # type: ignore[attr-defined]
            assert options[name].help.startswith(option.meaning)  # type: ignore[attr-defined]


def test_constraints_in_the_form_of_vllm() -> None:
    options = AnswerOptions(structured_outputs={"regex": "a+"})  # type: ignore[arg-type]
    assert options.structured_outputs == Constraint("regex", "a+")
    with pytest.raises(InvalidRequest, match="structured_outputs: 0 keys"):
        AnswerOptions(structured_outputs="a+")  # type: ignore[arg-type]
