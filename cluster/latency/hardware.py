"""The hardware table, `configs/hardware.yaml`: what a device holds and how fast it computes."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from cluster.common.text_format import show_value
from cluster.common.units import BYTES_RULE
from cluster.config.configs_dir import configs_dir
from cluster.config.section import Bytes, Section, broken_rule, rule_of
from cluster.config.yaml_source import ConfigError, ConfigSource
from protos.errors import UserError

_MICRO, _TERA = 1e-6, 1e12
_SHARE = "must be a share of the rate, above 0 and at most 1"


class Device(Section):
    """One row: a GPU, or one core of a processor. `docs/planning.md` explains the keys."""

    name: str = Field(min_length=1, max_length=100, description="must be a name")
    kind: Literal["gpu", "cpu"]
    memory: Bytes = Field(default=0, description=BYTES_RULE)
    reserved: Bytes = Field(default=0, description=BYTES_RULE)
    tflops: float = Field(gt=0, le=1e6)
    bandwidth: Bytes = Field(ge=1, description=BYTES_RULE)
    link: Bytes = Field(ge=1, description=BYTES_RULE)
    linear: float = Field(gt=0, le=1, description=_SHARE)
    attention: float = Field(gt=0, le=1, description=_SHARE)
    estimate: float = Field(gt=0, le=1, description=_SHARE)
    memory_share: float = Field(gt=0, le=1, description=_SHARE)
    layer_us: float = Field(gt=0, le=1e6)
    flags: list[str] | None = Field(default=None, description="must be a list of features such as [avx512f]")
    measured: bool

    @model_validator(mode="after")
    def _has_memory(self) -> Device:
        if self.kind == "gpu" and self.memory <= self.reserved:
            raise broken_rule("memory", "required for a gpu, and above reserved")
        if (self.kind == "cpu") != (self.flags is not None):
            raise broken_rule("flags", "required for a cpu, and for it alone")
        return self

    @property
    def usable(self) -> int:
        """Bytes for weights, KV and scratch."""
        return self.memory - self.reserved

    def costs(self, cores: float = 1.0, sharers: int = 1) -> tuple[float, ...]:
        """Return the seconds of each unit of `step_work.UNITS`.

        Args:
            cores: of a processor, that one shard computes on.
            sharers: shards that share one memory, and so its bandwidth.
        """
        rate = self.tflops * _TERA * (cores if self.kind == "cpu" else 1.0)
        a_byte = sharers / (self.bandwidth * self.memory_share)
        return (
            self.layer_us * _MICRO, a_byte, 1 / (rate * self.linear), a_byte, 1 / (rate * self.attention),
            1 / (rate * self.estimate), 1 / self.link,
        )  # fmt: skip


class _Table(Section):
    devices: dict[str, Device]


def load_hardware(extra: str | os.PathLike[str] | None = None) -> dict[str, Device]:
    """Return the rows of the shipped table by their keys, those of `extra` before them. Raises ConfigError."""
    shipped = _load(configs_dir() / "hardware.yaml")
    return shipped if extra is None else {**(own := _load(extra)), **{k: v for k, v in shipped.items() if k not in own}}


def find_device(table: Mapping[str, Device], key: str, kind: str = "gpu") -> Device:
    """Return the row of a key, in any case. Raises UserError naming the keys of that kind."""
    device = table.get(key.strip().lower())
    if device is None or device.kind != kind:
        known = ", ".join(name for name, row in table.items() if row.kind == kind)
        raise UserError(f"{kind}: {show_value(key)}: must be one of {known}, or a row of your own (--hardware FILE)")
    return device


def processor(table: Mapping[str, Device], flags: Iterable[str]) -> Device:
    """Return the first cpu row whose flags a processor has. Raises UserError without one."""
    has = set(flags)
    for device in table.values():
        if device.flags is not None and set(device.flags) <= has:
            return device
    raise UserError("hardware: no cpu row fits this processor: add one with flags: []")


def _load(path: str | os.PathLike[str]) -> dict[str, Device]:
    source = ConfigSource(path, {})
    if source.problems:
        raise ConfigError.from_problems(source.name, source.problems)
    try:
        return _Table.model_validate(
            source.data, context={"base_dir": Path(os.path.abspath(source.name)).parent}
        ).devices
    except ValidationError as error:
        problems = []
        for detail in error.errors(include_url=False):
            path_of, context = detail["loc"], detail.get("ctx", {})
            key = str(path_of[-1]) if path_of else "devices"
            field: Any = Device.model_fields.get(key)
            rule = context.get("rule") or (rule_of(key, field) if field is not None else "must be a mapping of devices")
            if detail["type"] == "extra_forbidden":
                rule = f"unknown key; valid keys: {', '.join(Device.model_fields)}"
            elif detail["type"] == "missing":
                rule = f"required; {rule}"
            at = (*path_of, context["key"]) if "rule" in context else path_of
            problems.append(source.problem(at, rule))
        raise ConfigError.from_problems(source.name, problems) from error
