"""A tiny model, documents and settings of a training run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

from workers.training import needle
from workers.training.data import Corpus, Document, DocumentMaker, collate
from workers.training.init import initialise
from workers.training.loop import Settings
from workers.training.model import NeedleModel, shape_of

ASSETS = needle.ASSETS

TINY = {
    "hidden_size": 128,
    "head_dim": 32,
    "num_hidden_layers": 2,
    "num_experts": 4,
    "moe_intermediate_size": 32,
}


def maker(corpus: Corpus, seed: int = 0) -> DocumentMaker:
    return DocumentMaker(corpus, np.random.default_rng(seed))


def tiny_model(assets: Path, seed: int = 0) -> NeedleModel:
    model = NeedleModel(shape_of(json.loads((assets / "config.json").read_text())))
    initialise(model, seed)
    return model


def settings(assets: Path, out: Path, steps: int, **other: object) -> Settings:
    return Settings(out=out, assets=assets, steps=steps, max_length=128, batch_tokens=(1024, 1024), **other)  # type: ignore[arg-type]


def first_digits(model: NeedleModel, documents: list[Document], among: tuple[int, ...]) -> float:
    """Share of first digits that score highest among the tokens `among`."""
    batch, candidates = collate(documents), torch.tensor(among)
    with torch.no_grad():
        hidden, _ = model(batch.tokens)
        logits = model.logits(hidden.flatten(0, 1)[batch.rows[batch.first]])
    guesses = candidates[logits[:, candidates].argmax(-1)]
    return float((guesses == batch.targets[batch.first]).float().mean())
