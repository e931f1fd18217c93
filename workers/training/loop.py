"""The training loop: draw, predict, learn, record, and save now and then."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from workers.training.checkpoint import read_state, write_directory, write_state
from workers.training.data import Batch, Corpus, Curriculum, DocumentMaker, collate, load_corpus
from workers.training.init import initialise
from workers.training.model import NeedleModel, shape_of
from workers.training.muon import build_optimisers, set_rate

NEXT_TOKEN_WEIGHT = 0.1
BALANCE_WEIGHT = 0.01
WARM_UP_STEPS = 50
DECAY_FROM = 0.6  # of the time; the rate then falls linearly to FINAL_RATE of its peak
FINAL_RATE = 0.02
SHORTEST = 64  # tokens; a needle with its question and answer takes 46


@dataclass(frozen=True)
class Settings:
    """One run: of exactly `steps` steps if set, else of `minutes` of training, resumed time included."""

    out: Path
    assets: Path
    minutes: float = 40.0
    steps: int | None = None
    seed: int = 0
    max_length: int = 4096
    rate: float = 1e-3
    bfloat16: bool = False
    batch_tokens: tuple[int, int] = (4096, 8192)  # tokens of a step at the shortest length, at the longer ones
    save_seconds: float = 180.0
    save_steps: int = 0  # also after so many steps; 0: by time alone
    resume: Path | None = None

    def __post_init__(self) -> None:
        checks = {
            f"--minutes={self.minutes}: must be above 0": self.minutes > 0,
            f"--steps={self.steps}: must be at least 1": self.steps is None or self.steps >= 1,
            f"--max-length={self.max_length}: must be {SHORTEST} to {Curriculum.LENGTHS[-1]}": SHORTEST
            <= self.max_length
            <= Curriculum.LENGTHS[-1],
        }
        for message, fine in checks.items():
            if not fine:
                raise ValueError(message)


@dataclass(frozen=True)
class StepReport:
    """The result of one step: `right` of `asked` first digits; `accuracy` is the curriculum's, over 30 steps."""

    step: int
    length: int
    current_length: int
    loss: float
    answer_loss: float
    right: int
    asked: int
    accuracy: float
    rate: float
    tokens_per_second: float
    elapsed: float
    tasks: dict[str, float] = field(default_factory=dict)

    def line(self) -> str:
        """Return one line of text."""
        return (
            f"step {self.step:5d}  length {self.length:4d} (up to {self.current_length})  loss {self.loss:6.3f}"
            f"  first digits {self.accuracy:6.1%}  rate {self.rate:.1e}  {self.tokens_per_second:6.0f} tok/s"
            f"  {self.elapsed / 60:5.1f} min" + "".join(f"  {name} {share:.0%}" for name, share in self.tasks.items())
        )

    def json(self) -> str:
        """Return one JSON object."""
        return json.dumps({name: getattr(self, name) for name in self.__dataclass_fields__})


def bfloat16_is_faster() -> bool:
    """Measure whether this CPU multiplies matrices of the model's size faster in bfloat16 (AMX, AVX-512 BF16)."""

    def seconds(dtype: torch.dtype) -> float:
        a, b = torch.randn(1024, 256).to(dtype), torch.randn(256, 256).to(dtype)
        times = []
        for _ in range(12):
            start = time.perf_counter()
            a @ b
            times.append(time.perf_counter() - start)
        return min(times)

    return seconds(torch.bfloat16) < 0.8 * seconds(torch.float32)


def rate_at(step: int, fraction: float, peak: float) -> float:
    """Return the learning rate of the 0-based `step`, when `fraction` (0 to 1) of the run is over."""
    late = max(0.0, fraction - DECAY_FROM) / (1 - DECAY_FROM)
    return peak * min(1.0, (step + 1) / WARM_UP_STEPS) * (1 - (1 - FINAL_RATE) * min(1.0, late))


def losses(model: NeedleModel, batch: Batch, rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Return (total loss, answer loss, tokens predicted in answer rows); 1/8 of all positions: next-token loss."""
    hidden, balance = model(batch.tokens)
    hidden, flat = hidden.flatten(0, 1), batch.tokens.flatten()
    length = batch.tokens.shape[1]
    positions = torch.from_numpy(rng.integers(flat.numel(), size=max(1, flat.numel() // 8)))
    positions = positions[positions % length != length - 1]  # the last token of a document has no successor
    logits = model.logits(hidden[torch.cat((batch.rows, positions))])
    answered, running = logits.split((len(batch.rows), len(positions)))
    each = F.cross_entropy(answered, batch.targets, reduction="none")
    answer = (each * batch.weights).sum() / batch.weights.sum()
    next_token = F.cross_entropy(running, flat[positions + 1])
    predicted = answered.argmax(-1)
    return answer + NEXT_TOKEN_WEIGHT * next_token + BALANCE_WEIGHT * balance, answer, predicted


class Trainer:
    """One run: owns model, optimisers, curriculum and clock.

    Subclasses train on other documents: they replace `read_config`, `initialise`, `make_curriculum`, `draw`,
    `count` and `write`.
    A run is reproducible from its seed and settings as far as arithmetic is (documents depend on seed and step alone).
    `save` is atomic; a killed run loses at most `save_seconds` of work.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.model = NeedleModel(shape_of(self.read_config()))
        self.optimisers = build_optimisers(
            self.model, settings.rate, torch.bfloat16 if settings.bfloat16 else torch.float32
        )
        self.curriculum = self.make_curriculum()
        self.step, self.elapsed, self.seed = 0, 0.0, settings.seed
        self.stopping = False
        if settings.resume is None:
            self.initialise()
        else:
            self._restore(read_state(settings.resume))

    def read_config(self) -> dict[str, Any]:
        """Read what documents are made of, and return the `config.json` of the model."""
        self.corpus: Corpus = load_corpus(self.settings.assets)
        config: dict[str, Any] = json.loads((self.settings.assets / "config.json").read_text())
        return config

    def initialise(self) -> None:
        """Set the starting weights."""
        initialise(self.model, self.settings.seed)

    def write(self) -> None:
        """Write the checkpoint directory."""
        write_directory(self.model, self.settings.assets, self.settings.out)

    def make_curriculum(self) -> Curriculum:
        """Return what chooses the length of a step."""
        return Curriculum(self.settings.max_length)

    def count(self, batch: Batch, predicted: Tensor) -> dict[str, float]:
        """Return the recent accuracy of every kind of document, from the tokens predicted in a step's answer rows."""
        return {}

    def run(self, report: Callable[[StepReport], None]) -> None:
        """Train to the end or until `stop`, calling `report` after every step; saves now and then, and last."""
        saved = time.monotonic()
        while self.fraction() < 1 and not self.stopping:
            report(self.train_step())
            every = self.settings.save_steps
            if time.monotonic() - saved > self.settings.save_seconds or (every and self.step % every == 0):
                self.save()
                saved = time.monotonic()
        self.save()

    def stop(self) -> None:
        """Make `run` save and return after the step it is in."""
        self.stopping = True

    def fraction(self) -> float:
        """Return the part of the run that is over, 0 to 1 and beyond."""
        if self.settings.steps is not None:
            return self.step / self.settings.steps
        return self.elapsed / (60 * self.settings.minutes)

    def draw(self, rng: np.random.Generator) -> Batch:
        """Draw the documents of one step."""
        length = self.curriculum.pick(rng)
        shortest = length == self.curriculum.lengths[0]
        tokens = self.settings.batch_tokens[0 if shortest else 1]
        maker = DocumentMaker(self.corpus, rng)
        return collate([maker.draw(length, shortest) for _ in range(max(1, tokens // length))])

    def train_step(self) -> StepReport:
        """Do one step of both optimisers."""
        start = time.monotonic()
        rng = np.random.default_rng((self.seed, self.step))
        batch = self.draw(rng)
        rate = rate_at(self.step, self.fraction(), self.settings.rate)
        set_rate(self.optimisers, rate)
        self.model.zero_grad(set_to_none=True)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.settings.bfloat16):
            total, answer, predicted = losses(self.model, batch, rng)
        total.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        loss = float(total.detach())
        if not math.isfinite(loss):
            raise FloatingPointError(f"loss is {loss} at step {self.step}; try another --seed")
        for optimiser in self.optimisers:
            optimiser.step()
        length, asked = batch.tokens.shape[1], int(batch.first.sum())
        num_right = int((predicted == batch.targets)[batch.first].sum())
        current = self.curriculum.lengths[self.curriculum.stage]
        self.curriculum.record(length, num_right, asked)
        took = time.monotonic() - start
        self.step += 1
        self.elapsed += took
        return StepReport(
            step=self.step,
            length=length,
            current_length=current,
            loss=loss,
            answer_loss=float(answer.detach()),
            right=num_right,
            asked=asked,
            accuracy=self.curriculum.accuracy,
            rate=rate,
            tokens_per_second=batch.tokens.numel() / took,
            elapsed=self.elapsed,
            tasks=self.count(batch, predicted),
        )

    def save(self) -> None:
        """Write the state to resume from and the checkpoint directory."""
        state: dict[str, Any] = {
            "step": self.step,
            "elapsed": self.elapsed,
            "seed": self.seed,
            "model": self.model.state_dict(),
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
            "curriculum": self.curriculum.state(),
        }
        write_state(state, self.settings.out)
        self.write()

    def _restore(self, state: dict[str, Any]) -> None:
        theirs = {name: tuple(value.shape) for name, value in state["model"].items()}
        if theirs != {name: tuple(value.shape) for name, value in self.model.state_dict().items()}:
            raise ValueError("--resume: the state has other sizes than config.json of --assets; use its own")
        self.model.load_state_dict(state["model"])
        for optimiser, values in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(values)
        self.step, self.elapsed, self.seed = state["step"], state["elapsed"], state["seed"]
        self.curriculum.restore(state["curriculum"])
