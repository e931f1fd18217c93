"""A YAML file as plain values plus the line of every key, and the one-line errors made from them.

Deliberately less than YAML: no tags, no anchors or merge keys (a few hundred bytes of them expand to gigabytes), no
base-60 or octal integers (`1:30`, `010`) and no dates; such scalars stay the text they were written as.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from cluster.common.text_format import escape_unprintable, shorten, show_value
from protos.errors import UserError

KeyPath = tuple[str | int, ...]

MAX_BYTES = 1 << 20
MAX_DEPTH = 16  # a configuration nests three levels

_DECIMAL = re.compile(r"[-+]?(0|[1-9][0-9_]{0,29})", re.ASCII)
_FLOAT = re.compile(r"[-+]?(\.(inf|nan)|[0-9][0-9_]*\.[0-9_]*(e[-+][0-9]{1,5})?|\.[0-9_]+(e[-+][0-9]{1,5})?)", re.I)
_TAG = "tag:yaml.org,2002:"


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong with one key. `line` is 1-based; None for a value given as an override."""

    line: int | None
    key: str
    value: str
    rule: str


class ConfigError(UserError):
    """A configuration that cannot be used. The message is always one line, `FILE:LINE: KEY: VALUE: what is allowed`."""

    def __init__(self, message: str) -> None:
        super().__init__(escape_unprintable(message))

    @classmethod
    def from_problems(cls, file: str, problems: Iterable[Problem]) -> ConfigError:
        """The first problem by line (overrides come before the file), and how many more there are."""
        ordered = sorted(problems, key=lambda problem: problem.line or 0)
        first = ordered[0]
        where = "<override>" if first.line is None else f"{file}:{first.line}"
        more = f" (and {len(ordered) - 1} more)" if len(ordered) > 1 else ""
        return cls(f"{where}: {first.key}: {first.value}: {first.rule}{more}")


@dataclass(frozen=True, slots=True)
class YamlSource:
    """What a file says: `data` as plain values, `lines` from key path to 1-based line, `problems` found on the way."""

    name: str
    data: dict[str, object]
    lines: Mapping[KeyPath, int]
    problems: tuple[Problem, ...]

    def line(self, path: KeyPath) -> int:
        """The line of `path`, or of the nearest enclosing key that is in the file."""
        while path and path not in self.lines:
            path = path[:-1]
        return self.lines.get(path, 1)


def read_yaml(path: str | os.PathLike[str]) -> YamlSource:
    """Read a YAML mapping of at most 1 MiB.

    Raises ConfigError when there is no tree to speak of (no file, not UTF-8, syntax, aliases, root not a mapping);
    problems of single keys (duplicates, tags) are listed in the result instead.
    """
    name = os.fspath(path)
    text = _read_text(name)
    try:
        loader = _Composer(text)
        try:
            root = loader.get_single_node()
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        raise ConfigError(f"{name}:{line}: not valid YAML: {error.problem or error.context}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        character = error.character if isinstance(error.character, int) else ord(error.character)
        raise ConfigError(f"{name}:{line}: not valid YAML: character #x{character:04x} is not allowed") from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # e.g. an escape beyond Unicode: "\UFFFFFFFF"
        raise ConfigError(f"{name}:{loader.line + 1}: not valid YAML: {error}") from None
    if root is None:
        raise ConfigError(f"{name}:1: empty file: must be a mapping with at least model.path")
    if not isinstance(root, yaml.MappingNode):
        line = root.start_mark.line + 1
        found = "a list" if isinstance(root, yaml.SequenceNode) else show_value(root.value)
        raise ConfigError(f"{name}:{line}: {found}: the file must be a mapping with at least model.path")
    builder = _Builder()
    data = builder.mapping(root, ())
    return YamlSource(name, data, builder.lines, tuple(builder.problems))


def _read_text(name: str) -> str:
    try:
        with Path(name).open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise ConfigError(f"{name}: no such file") from None
    except IsADirectoryError:
        raise ConfigError(f"{name}: is a directory; name the YAML file inside it") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError(f"{name}: cannot be read: {reason}") from None
    if len(raw) > MAX_BYTES:
        raise ConfigError(f"{name}: larger than {MAX_BYTES} bytes: this is not a configuration file")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{name}:{line}: not UTF-8 text (byte 0x{raw[error.start]:02x})") from None


class _Composer(yaml.SafeLoader):
    """SafeLoader up to its node tree, refusing aliases and deep nesting before they cost anything."""

    depth = 0

    def refusal(self, problem: str) -> yaml.MarkedYAMLError:
        return yaml.MarkedYAMLError(problem=problem, problem_mark=self.peek_event().start_mark)

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            raise self.refusal(f"*{event.anchor}: anchors and aliases are not supported; write the value out")
        if self.depth >= MAX_DEPTH:
            raise self.refusal(f"nested deeper than {MAX_DEPTH} levels")
        self.depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1


@dataclass(slots=True)
class _Builder:
    lines: dict[KeyPath, int] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, object]:
        values: dict[str, object] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                self.problem(line, (*path, "?"), "(a collection)", "a key must be plain text")
                continue
            key = key_node.value
            here = (*path, key)
            if key_node.tag == _TAG + "merge":
                self.problem(line, here, "(a merge key)", "merge keys are not supported; write the values out")
            elif key in values:
                rule = f"given twice; the first is on line {self.lines[here]}"
                self.problem(line, here, show_value(self.value(value_node, here, False)), rule)
            else:
                self.lines[here] = line
                values[key] = self.value(value_node, here)
        return values

    def value(self, node: yaml.Node, path: KeyPath, record: bool = True) -> object:
        if not record:  # a duplicate: only shown, so what is inside must not be reported
            return _Builder().value(node, path)
        kind = node.tag.removeprefix(_TAG)
        line = node.start_mark.line + 1
        if isinstance(node, yaml.MappingNode) and kind == "map":
            return self.mapping(node, path)
        if isinstance(node, yaml.SequenceNode) and kind == "seq":
            return [self.value(item, (*path, index)) for index, item in enumerate(node.value)]
        if not isinstance(node, yaml.ScalarNode) or kind not in _SCALARS:
            self.problem(line, path, node.tag, "tags are not supported; write a plain value")
            return None
        if any("\ud800" <= c <= "\udfff" for c in node.value):
            self.problem(line, path, show_value(node.value), "must not contain half of a surrogate pair")
        return _scalar(kind, node.value)

    def problem(self, line: int, path: KeyPath, value: str, rule: str) -> None:
        self.problems.append(Problem(line, dotted(path), value, rule))


_SCALARS = ("str", "int", "float", "bool", "null", "timestamp", "value")


def dotted(path: Iterable[str | int]) -> str:
    """A key path as people write it: `model.rope_scaling.factor`; a long key is cut."""
    return ".".join(shorten(str(key)) for key in path)


def _scalar(kind: str, text: str) -> object:
    if kind == "null":
        return None
    if kind == "bool" and text.lower() in yaml.SafeLoader.bool_values:
        return yaml.SafeLoader.bool_values[text.lower()]
    if kind == "int" and _DECIMAL.fullmatch(text):
        return int(text.replace("_", ""))
    if kind == "float" and _FLOAT.fullmatch(text):
        plain = text.lower().replace("_", "")
        return float(plain.replace(".", "", 1) if plain.endswith(("inf", "nan")) else plain)
    return text
