"""What every section of the configuration is made of: strict frozen models, and values as people write them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationInfo
from pydantic_core import PydanticCustomError

from cluster.common.units import parse_bytes, parse_count

POSITIVE = "must be a whole number of at least 1"
FLAG = "must be true or false"


def broken_rule(key: str, rule: str) -> PydanticCustomError:
    """An error between several keys, reported at `key` (relative to the model that raises it)."""
    return PydanticCustomError("longreach_rule", "{rule}", {"key": key, "rule": rule})


def _resolve(value: object, info: ValidationInfo) -> Path:
    """An absolute path: `~` expanded, relative to the directory of the YAML file (context `base_dir`)."""
    if not isinstance(value, (str, os.PathLike)) or not os.fspath(value) or "\0" in str(value):
        raise ValueError("not a path")
    expanded = os.path.expanduser(os.fspath(value))
    if expanded.startswith("~"):
        raise ValueError("no such user")
    base = (info.context or {}).get("base_dir", Path.cwd())
    return Path(os.path.abspath(os.path.join(base, expanded)))


PathValue = Annotated[Path, BeforeValidator(_resolve)]
Count = Annotated[int, BeforeValidator(parse_count)]
Bytes = Annotated[int, BeforeValidator(parse_bytes)]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
