"""What generation_config.json says about sampling, who goes before it, and what it says in error."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest

from cluster.config.deployment import ConfigError, load_deployment
from cluster.config.sampling_defaults import sampling_defaults
from protos.jobs.sampling import AnswerOptions, Sampling, SamplingParams
from protos.model.json_fields import ModelConfigError
from tests.support.paths import NEEDLE

QWEN3 = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "eos_token_id": [151645, 151643]}


def read(folder: Path, values: object) -> SamplingParams:
    text = values if isinstance(values, str) else json.dumps(values)
    (folder / "generation_config.json").write_text(text)
    return sampling_defaults(folder)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (QWEN3, SamplingParams(0.6, 20, 0.95)),
        ({"temperature": 0.7, "top_p": 0.8}, SamplingParams(0.7, top_p=0.8)),  # do_sample is not asked for
        ({"do_sample": True}, SamplingParams(1.0)),
        ({"do_sample": True, "top_p": 0.9}, SamplingParams(1.0, top_p=0.9)),
        ({"do_sample": True, "temperature": 0}, SamplingParams()),
        ({"do_sample": False, "temperature": 0.6, "top_k": 50}, SamplingParams(0.0, 50)),
        ({"do_sample": False, "repetition_penalty": 1.05}, SamplingParams(repetition_penalty=1.05)),
        ({"do_sample": None, "temperature": None, "top_k": None}, SamplingParams()),
        ({"top_p": 0.5}, SamplingParams(top_p=0.5)),
        ({"temperature": 1, "top_k": 20.0, "min_p": 0.1}, SamplingParams(1.0, 20, min_p=0.1)),
        ({"temperature": 0.5, "top_k": 0}, SamplingParams(0.5)),  # off, as in transformers
        ({"temperature": 0.5, "top_k": -1}, SamplingParams(0.5)),  # off, as in vLLM
        ({"eos_token_id": 3, "max_new_tokens": 2048}, SamplingParams()),
        ({}, SamplingParams()),
    ],
)
def test_what_the_file_says(tmp_path: Path, values: dict[str, object], expected: SamplingParams) -> None:
    assert read(tmp_path, values) == expected


def test_without_the_file_greedy(tmp_path: Path) -> None:
    assert sampling_defaults(tmp_path) == SamplingParams()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -1}, "temperature: -1: must be a number from 0 to 100; correct it, or say "),
        ({"temperature": "0.6"}, "temperature: '0.6': must be a number"),
        ({"temperature": True}, "temperature: True: must be a number"),
        ({"top_p": 2}, "top_p: 2: must be a number above 0 to 1"),
        ({"top_p": 0.0}, "top_p: 0.0: must be a number above 0 to 1"),
        ({"top_k": -2}, "top_k: -2: must be a whole number from 0 to"),
        ({"top_k": 1.5}, "top_k: 1.5: must be a whole number"),
        ({"top_k": 1 << 64}, "top_k: 18446744073709551616: must be"),
        ('{"top_k": 1e999}', "top_k: inf: must be a whole number"),
        ('{"temperature": NaN}', "NaN is not a JSON number"),
        ({"min_p": [0.1]}, "min_p: [0.1]: must be a number"),
        ({"repetition_penalty": 0}, "repetition_penalty: 0: must be a number from 0.01"),
        ({"do_sample": "yes"}, "do_sample: 'yes': must be true or false"),
        ("[1]", "must be an object"),
        ("{", "not valid JSON"),
        (" " * ((1 << 20) + 1), "larger than 1048576 bytes"),
    ],
)
def test_what_cannot_be_is_one_line(tmp_path: Path, values: object, message: str) -> None:
    with pytest.raises(ModelConfigError) as caught:
        read(tmp_path, values)
    assert message in str(caught.value)
    assert "generation_config.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_not_supported_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        read(tmp_path, QWEN3 | {"typical_p": 1.0, "num_beams": 1, "no_repeat_ngram_size": 0, "bad_words_ids": None})
        assert not caplog.records
        read(tmp_path, QWEN3 | {"typical_p": 0.9, "no_repeat_ngram_size": 3, "suppress_tokens": list(range(9999))})
    (record,) = caplog.records
    message = record.getMessage()
    assert "not supported and ignored: typical_p 0.9, no_repeat_ngram_size 3, suppress_tokens [0, 1" in message
    assert len(message) < 400


def yaml(folder: Path, generation: object, **model: str) -> Path:
    checkpoint = folder / "model"
    checkpoint.mkdir()
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(NEEDLE / name, checkpoint)
    (checkpoint / "generation_config.json").write_text(json.dumps(generation))
    path = folder / "c.yaml"
    lines = "".join(f"  {key}: {value}\n" for key, value in model.items())
    path.write_text(f"model:\n  path: model\n{lines}")
    return path


def test_a_deployment_has_the_values_and_may_say_greedy(tmp_path: Path) -> None:
    path = yaml(tmp_path, {"temperature": 0.6, "top_p": 0.95})
    deployment = load_deployment(path)
    assert deployment.sampling == SamplingParams(0.6, top_p=0.95)
    asked = AnswerOptions(sampling=Sampling(temperature=0.0)).resolve(deployment.sampling)
    assert (asked.sampling_params.temperature, asked.sampling_params.top_p) == (0.0, 0.95)
    greedy = load_deployment(path, {"model.sampling_defaults": "greedy"})
    assert greedy.sampling == SamplingParams()


def test_a_value_out_of_range_stops_the_start_unless_nobody_reads_it(tmp_path: Path) -> None:
    path = yaml(tmp_path, {"temperature": -1})
    with pytest.raises(ConfigError) as caught:
        load_deployment(path)
    assert str(caught.value).startswith(f"{path}:1: model.sampling_defaults: (missing): ")
    assert "temperature: -1" in str(caught.value)
    assert load_deployment(path, {"model.sampling_defaults": "greedy"}).sampling == SamplingParams()
