"""What a benchmark measures: one YAML file, over the YAML file of a deployment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, Field, ValidationError, field_validator
from pydantic_core import ErrorDetails

from cluster.common.units import COUNT_RULE
from cluster.config.section import RULE_BETWEEN_KEYS, Count, ModelName, PathValue, Section, broken_rule, rule_of
from cluster.config.yaml_source import ConfigError, ConfigSource, KeyPath

Kind = Literal["prefill", "decode", "scaling", "compare"]
Scaling = Literal["strong", "weak", "throughput"]
KINDS: tuple[Kind, ...] = get_args(Kind)
_KEYS = "must be a mapping of dotted keys of the deployment, such as {sparse.enabled: true}"
_LENGTHS = f"must be a list of token counts, each of which {COUNT_RULE.removeprefix('must be ')}"
_LAYOUTS = "must be a list of [stages, shards], such as [[1, 1], [2, 1]]"
_SIZES = "must be a list of whole numbers from 1 to 1024"

Size = Annotated[int, Field(ge=1, le=1024)]


class PeerSection(Section):
    """An engine that is compared: `url` for an OpenAI-compatible server, else a Python that has the package."""

    kind: Literal["transformers", "vllm", "openai", "llama.cpp"]
    python: PathValue | None = Field(default=None, description="must be the path of a Python that has the package")
    url: str | None = Field(
        default=None, pattern=r"^https?://", description="must be a URL such as http://host:8000/v1"
    )
    model: str | None = Field(default=None, description="must be the name that the server has for the model")
    server: PathValue | None = Field(default=None, description="must be the path of llama-server")
    gguf: PathValue | None = Field(default=None, description="must be the path of the same checkpoint as GGUF")
    arguments: list[str] = Field(
        default=[], description="must be a list of further arguments of llama-server, such as ['-fa', 'on']"
    )


class BenchSettings(Section):
    """A whole YAML file of a benchmark; relative paths are relative to it."""

    bench: Kind
    config: PathValue = Field(description="must be the path of a deployment's YAML file")
    model: ModelName | None = Field(default=None, description="must be the path of a checkpoint, or its name on a hub")
    settings: Mapping[str, Any] = Field(default={}, description=_KEYS)
    modes: Mapping[str, Mapping[str, Any]] = Field(
        default={"dense": {"sparse.enabled": False}}, min_length=1,
        description="must be a mapping of names to dotted keys, such as {dense: {sparse.enabled: false}}",
    )  # fmt: skip
    layouts: list[list[Size]] = Field(default=[[1, 1]], min_length=1, description=_LAYOUTS)
    lengths: list[Annotated[Count, Field(ge=2)]] = Field(default=[4096], min_length=1, description=_LENGTHS)
    tokens: int = Field(default=64, ge=2, le=1 << 16)
    scaling: list[Scaling] = Field(
        default=["strong"], min_length=1, description="must be a list of strong, weak, throughput"
    )
    weak_length: Annotated[Count, Field(ge=2)] = Field(default=8192, description=f"{COUNT_RULE}, at least 2")
    jobs: list[Size] = Field(default=[1, 2, 4], min_length=1, description=_SIZES)
    job_length: Annotated[Count, Field(ge=2)] = Field(default=4096, description=f"{COUNT_RULE}, at least 2")
    repeats: int = Field(default=3, ge=1, le=1000)
    retries: int = Field(default=2, ge=0, le=1000)
    rounds: int = Field(default=1, ge=1, le=1000)  # of scaling: each starts every layout anew and measures the repeats
    warm_up: Count = Field(default=4096, description=COUNT_RULE)
    max_others: float = Field(default=0.05, ge=0, le=1)
    seed: int = Field(default=1, ge=0, le=1 << 31)
    peers: Mapping[str, PeerSection] = Field(
        default={}, description="must be a mapping of names to peers, such as {transformers: {kind: transformers}}"
    )

    @field_validator("layouts")
    @classmethod
    def _are_pairs(cls, value: list[list[int]]) -> list[list[int]]:
        if any(len(layout) != 2 for layout in value):
            raise ValueError("not pairs")
        return value

    @field_validator("peers")
    @classmethod
    def _peers_have_what_they_need(cls, value: Mapping[str, PeerSection]) -> Mapping[str, PeerSection]:
        needed = {"openai": ("url",), "llama.cpp": ("server",)}
        for name, peer in value.items():
            for key in needed.get(peer.kind, ()):
                if getattr(peer, key) is None:
                    raise broken_rule(f"{name}.{key}", f"required for kind {peer.kind}")
            if name == "longreach":
                raise broken_rule(name, "is the name of our own engine; choose another one")
        return value


@dataclass(frozen=True, slots=True)
class Bench:
    """A benchmark to run: what its file says, and the file's name for messages and results."""

    file: str
    settings: BenchSettings

    @property
    def overrides(self) -> dict[str, object]:
        """The dotted keys that the benchmark puts over its deployment, beside those of modes and layouts."""
        model = self.settings.model
        named = {} if model is None else {"model.path": str(model), "model.served_model_name": None}
        return {**named, **flat(self.settings.settings)}

    def of_mode(self, mode: str) -> dict[str, object]:
        """Return `overrides` with the dotted keys of a mode over them."""
        return {**self.overrides, **flat(self.settings.modes[mode])}

    def as_json(self) -> dict[str, Any]:
        """Return the settings as plain data; of paths only the last part, as the others mean nothing elsewhere."""
        return {"file": Path(self.file).name, **_without_folders(self.settings.model_dump())}


def flat(keys: Mapping[str, Any]) -> dict[str, object]:
    """Return dotted keys for mappings in mappings; what comes later replaces what came before."""
    found: dict[str, object] = {}
    for key, value in keys.items():
        if isinstance(value, Mapping) and value:
            found |= {f"{key}.{name}": inner for name, inner in flat(value).items()}
        else:
            found[key] = value
    return found


def load_bench(path: str | os.PathLike[str], overrides: Mapping[str, object] | None = None) -> Bench:
    """Read the YAML file of a benchmark. Raises ConfigError: one line with file, line, key, value and rule.

    Args:
        overrides: values by key, applied over the file before any check; paths in them must be absolute.
    """
    source = ConfigSource(path, overrides or {})
    problems = list(source.problems)
    try:
        base = {"base_dir": Path(os.path.abspath(source.name)).parent}
        settings = BenchSettings.model_validate(source.data, context=base)
    except ValidationError as error:
        known = {problem.key for problem in problems}
        broken = [source.problem(_path(at), _rule(at)) for at in error.errors(include_url=False)]
        problems += [problem for problem in broken if problem.key not in known]
    if problems:
        raise ConfigError.from_problems(source.name, problems)
    return Bench(source.name, settings)


def _path(detail: ErrorDetails) -> KeyPath:
    named = str(detail["ctx"]["key"]).split(".") if detail["type"] == RULE_BETWEEN_KEYS else ()
    return (*detail["loc"], *named)


def _rule(detail: ErrorDetails) -> str:
    """Return what the value at fault must be: the description of the nearest field above it."""
    if detail["type"] == RULE_BETWEEN_KEYS:
        return str(detail["ctx"]["rule"])
    kind: Any = BenchSettings
    rule = str(detail["msg"])
    for part in detail["loc"]:
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            if part not in kind.model_fields:
                return f"unknown key; valid keys: {', '.join(kind.model_fields)}"
            field = kind.model_fields[str(part)]
            rule, kind = rule_of(str(part), field), field.annotation
        else:  # into the values of a mapping or list
            kind = next((one for one in get_args(kind) if isinstance(one, type) and issubclass(one, BaseModel)), None)
    return f"required; {rule}" if detail["type"] == "missing" else rule


def _without_folders(value: Any) -> Any:
    if isinstance(value, Path):
        return value.name
    if isinstance(value, Mapping):
        return {key: _without_folders(one) for key, one in value.items() if one is not None}
    return [_without_folders(one) for one in value] if isinstance(value, (list, tuple)) else value
