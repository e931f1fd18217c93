"""Files of a training run: the Hugging Face directory that is its result, and the state it resumes from.

Every file is written beside its place and renamed over it: a reader sees the old one or the new one, never a part.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from workers.training.model import NeedleModel, shape_of

STATE_FILE = "training_state.pt"
STATE_FORMAT = 1
COPIED = ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "words.json")
STACKED = ("gate_proj", "up_proj", "down_proj")


def published_weights(model: NeedleModel) -> dict[str, Tensor]:
    """Return the weights under their Hugging Face names, one tensor per expert and projection, float32."""
    weights: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        prefix, _, last = name.rpartition(".")
        if last in STACKED:
            for expert, matrix in enumerate(value):
                weights[f"model.{prefix}.experts.{expert}.{last}.weight"] = matrix.contiguous()
        else:
            weights[f"model.{name}"] = value
    return weights


def load_weights(directory: Path) -> NeedleModel:
    """Return a model with the config.json and model.safetensors of `directory`, in float32."""
    model = NeedleModel(shape_of(json.loads((directory / "config.json").read_text())))
    stored = load_file(directory / "model.safetensors")
    with torch.no_grad():
        for name, target in published_weights(model).items():
            target.copy_(stored[name])  # the targets are views of the model's parameters
    return model


def write_directory(model: NeedleModel, assets: Path, out: Path) -> None:
    """Write a Hugging Face directory: bfloat16 weights, and the config and tokenizer of `assets`."""
    out.mkdir(parents=True, exist_ok=True)
    for name in COPIED:
        if not (out / name).exists() or not (out / name).samefile(assets / name):
            shutil.copyfile(assets / name, out / name)
    write_weights(model, out)


def write_weights(model: NeedleModel, out: Path) -> None:
    """Write `model.safetensors` in bfloat16 into a directory, atomically."""
    weights = {name: value.to(torch.bfloat16).contiguous() for name, value in published_weights(model).items()}
    part = out / "model.safetensors.part"
    part.write_bytes(save(weights, metadata={"format": "pt"}))
    os.replace(part, out / "model.safetensors")


def write_state(state: dict[str, Any], out: Path) -> Path:
    """Write the training state atomically into the directory `out`; returns its path."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / STATE_FILE
    part = path.with_suffix(".part")
    torch.save({"format": STATE_FORMAT, **state}, part)
    os.replace(part, path)
    return path


def read_state(path: Path) -> dict[str, Any]:
    """Read a state file, or the one in a directory. ValueError if it is not a state of this format."""
    if path.is_dir():
        path = path / STATE_FILE
    if not path.is_file():
        raise ValueError(f"--resume: {path} does not exist; give the {STATE_FILE} of an earlier run's --out directory")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"--resume: {path} is not a training state; give the {STATE_FILE} of a run") from error
    if not isinstance(state, dict) or state.get("format") != STATE_FORMAT:
        raise ValueError(f"--resume: {path} is not a training state of format {STATE_FORMAT}; start a new run")
    return state
