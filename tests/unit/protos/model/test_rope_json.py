"""Rotary settings: what a file may leave out, settings that say nothing, and those that would be another model."""

from __future__ import annotations

from typing import Any

import pytest

from protos.model.json_fields import Fields, ModelConfigError
from protos.model.rope_json import rope_spec
from protos.model.spec import RopeSpec

POSITIONS = 512
YARN = {"rope_type": "yarn", "original_max_position_embeddings": 128}


def spec(config: dict[str, Any], override: dict[str, Any] | None = None) -> RopeSpec:
    return rope_spec(Fields("config.json", config), POSITIONS, override)


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        ({}, RopeSpec(1e4)),
        ({"rope_theta": None}, RopeSpec(1e4)),
        ({"rope_theta": 5e5, "rope_scaling": None}, RopeSpec(5e5)),
        ({"rope_theta": 5e5, "rope_parameters": {"rope_theta": None}}, RopeSpec(5e5)),
        ({"rope_theta": 5e5, "rope_parameters": {"rope_theta": 7e5}}, RopeSpec(7e5)),
        ({"rope_scaling": YARN}, RopeSpec(1e4, "yarn", 4.0, 128)),
        ({"rope_scaling": YARN | {"factor": None}}, RopeSpec(1e4, "yarn", 4.0, 128)),
        ({"rope_scaling": YARN | {"factor": 2.0}}, RopeSpec(1e4, "yarn", 2.0, 128)),
        ({"rope_scaling": {"type": "yarn"}, "original_max_position_embeddings": 64}, RopeSpec(1e4, "yarn", 8.0, 64)),
        ({"rope_scaling": YARN | {"truncate": None}}, RopeSpec(1e4, "yarn", 4.0, 128, truncate=False)),
        ({"rope_scaling": {"rope_type": "default", "factor": 1}}, RopeSpec(1e4)),
        ({"rope_scaling": {"factor": 1.0, "beta_fast": 32, "mscale": 0.7}}, RopeSpec(1e4)),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}, RopeSpec(1e4)),
        ({"rope_scaling": {"rope_type": "mrope", "mrope_interleaved": True}}, RopeSpec(1e4)),
        ({"rope_scaling": YARN | {"mrope_section": [2, 3, 3]}}, RopeSpec(1e4, "yarn", 4.0, 128)),
        ({"rope_scaling": {"type": "linear", "factor": 2, "original_max_position_embeddings": 9}},
         RopeSpec(1e4, "linear", 2.0)),
    ],
)  # fmt: skip
def test_what_is_left_out(config: dict[str, Any], wanted: RopeSpec) -> None:
    assert spec(config) == wanted


def test_an_override_takes_the_same_rules() -> None:
    assert spec({"rope_theta": 3e4}, YARN) == RopeSpec(3e4, "yarn", 4.0, 128)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope_scaling: factor: missing: must be a number at least 1"),
        ({"rope_scaling": YARN | {"original_max_position_embeddings": 1024}}, "factor: None: must be given"),
        ({"rope_scaling": {"rope_type": "default", "factor": 2}}, "factor: 2: not a setting of rope_type default"),
        ({"rope_scaling": {"rope_type": "default", "attention_factor": 2}}, "attention_factor: 2: not a setting of"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2, "beta_fast": 32}}, "beta_fast: 32: not a setting of"),
        ({"rope_scaling": {"type": "mrope", "partial_rotary_factor": 0.5}}, "partial_rotary_factor: 0.5: only 1"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8}}, "low_freq_factor: missing"),
        ({"rope_theta": "1e4"}, "rope_theta: '1e4': must be a number above 1"),
    ],
)
def test_what_would_be_another_model(config: dict[str, Any], said: str) -> None:
    with pytest.raises(ModelConfigError) as caught:
        spec(config)
    assert said in str(caught.value)
