"""What every section of the configuration is made of: a strict frozen base model, and types of values as people write
them. A validator only refuses; the rule that an error shows is `rule_of` the field."""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, ValidationInfo
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

from cluster.common.units import parse_bytes, parse_count
from cluster.hub.models import as_named, local_model

POSITIVE = "must be a whole number of at least 1"
RULE_BETWEEN_KEYS = "longreach_rule"  # type of the errors that `broken_rule` makes


def broken_rule(key: str, rule: str) -> PydanticCustomError:
    """Return the error of a rule between several keys, reported at `key` (relative to the model that raises it)."""
    return PydanticCustomError(RULE_BETWEEN_KEYS, "{rule}", {"key": key, "rule": rule})


def rule_of(key: str, field: FieldInfo) -> str:
    """Return what the value of a field must be: the description of the field, else what its type and range say."""
    if field.description is not None:
        return field.description
    kinds = get_args(field.annotation) or (field.annotation,)
    if get_origin(field.annotation) is Literal:
        return f"must be one of {', '.join(str(kind).lower() for kind in kinds)}"
    if bool in kinds:
        return "must be true or false"
    if int not in kinds and float not in kinds:
        return "must be a mapping"
    number = "a whole number" if int in kinds else "a number of seconds" if key.endswith("_s") else "a number"
    names = ("gt", "ge", "le")
    limits = {name: getattr(bound, name) for bound in field.metadata for name in names if hasattr(bound, name)}
    if "gt" in limits:
        return f"must be {number} above {limits['gt']}" + (f" and at most {limits['le']}" if "le" in limits else "")
    return f"must be {number} " + ("from {ge} to {le}" if "le" in limits else "of at least {ge}").format(**limits)


def _resolve(value: object, info: ValidationInfo) -> Path:
    return absolute_path(value, (info.context or {}).get("base_dir", Path.cwd()))


def absolute_path(value: object, base: Path) -> Path:
    """Return a path as people write it, relative to a folder, as an absolute one. Raises ValueError: it is none."""
    if not isinstance(value, (str, os.PathLike)) or not os.fspath(value) or "\0" in str(value):
        raise ValueError("not a path")
    expanded = os.path.expanduser(os.fspath(value))
    if expanded.startswith("~"):
        raise ValueError("no such user")
    return Path(os.path.abspath(os.path.join(base, expanded)))


def _model(value: object, info: ValidationInfo) -> Path:
    return local_model(str(value), _resolve(value, info))


def _model_name(value: object, info: ValidationInfo) -> Path:
    return as_named(str(value), _resolve(value, info))


def accepts(test: Callable[[Any], object], kind: type[Any] = AfterValidator) -> Any:
    """Return a validator of a kind of pydantic that refuses the values for which `test` is false."""

    def check(value: Any) -> Any:
        if not test(value):
            raise ValueError("refused")
        return value

    return kind(check)


def _is_host(value: str) -> bool:
    try:
        ipaddress.ip_address(value)
    except ValueError:
        return re.fullmatch(r"(?=.{1,253}$)[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?", value) is not None
    return True


def _is_ray_address(value: str) -> bool:
    host, _, port = value.rpartition(":")
    host = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    has_port = re.fullmatch(r"[0-9]{1,5}", port) is not None and 1 <= int(port) <= 65535
    return value in ("local", "auto") or (has_port and _is_host(host))


# an absolute path: `~` expanded, relative to the directory of the YAML file (context `base_dir`)
PathValue = Annotated[Path, BeforeValidator(_resolve)]
ModelPath = Annotated[Path, BeforeValidator(_model)]  # of a folder or file, or as it is in the cache of a hub
ModelName = Annotated[Path, BeforeValidator(_model_name)]  # the same, or as it is named on a hub
Count = Annotated[int, BeforeValidator(parse_count)]  # 256K
Bytes = Annotated[int, BeforeValidator(parse_bytes)]  # 1.5GB
PowerOfTwo = Annotated[int, accepts(lambda value: value & (value - 1) == 0)]
Host = Annotated[str, accepts(_is_host)]  # a name or an IP address
RayAddress = Annotated[str, accepts(_is_ray_address)]  # local, auto or host:port
FileName = Annotated[str, accepts(re.compile(r"(?!\.{1,2}$)[A-Za-z0-9._-]{1,200}").fullmatch)]  # without folders


class Section(BaseModel):
    """Base of all sections: types are strict (`"64"` is not 64), unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    def as_mapping(self) -> Mapping[str, Any]:
        """Return the keys that are neither null nor `auto`."""
        return {key: value for key, value in self.model_dump(exclude_none=True).items() if value != "auto"}
