"""A YAML file as plain values, the line of every key, and the one-line errors made from them.

Deliberately less than YAML: no tags, no aliases or merge keys (a few hundred bytes of them expand to gigabytes), no
base-60 or octal integers (`1:30`, `010`) and no dates; such scalars stay the text they were written as.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ruamel.yaml import YAML
from ruamel.yaml.composer import Composer, ComposerError
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import AliasEvent
from ruamel.yaml.nodes import MappingNode, ScalarNode, SequenceNode
from ruamel.yaml.reader import ReaderError
from ruamel.yaml.resolver import VersionedResolver
from ruamel.yaml.tag import Tag

from cluster.common.text_format import escape_unprintable, shorten, show_value
from protos.errors import UserError

KeyPath = tuple[str | int, ...]

MAX_BYTES = 1 << 20
_UNREADABLE: Mapping[type[Exception], str] = {
    FileNotFoundError: "no such file", IsADirectoryError: "is a directory; name the YAML file inside it",
}  # fmt: skip
MAX_DEPTH = 16  # a configuration nests three levels
MAX_NODES = 4096  # keys and values; a configuration has some 200

_TAG = "tag:yaml.org,2002:"
_SCALARS = ("str", "int", "float", "bool", "null", "timestamp", "value")
_BOOLS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}  # as in YAML 1.1
_EXPONENT = r"([eE][-+][0-9]{1,5})?"
_PLAIN = {  # what a scalar without quotes is unless text
    "null": re.compile(r"|~|null|Null|NULL"),
    "bool": re.compile("|".join(spelt for word in _BOOLS for spelt in (word, word.capitalize(), word.upper()))),
    "int": re.compile(r"[-+]?(0|[1-9][0-9_]{0,29})"),
    "float": re.compile(
        rf"[-+]?([0-9][0-9_]*\.[0-9_]*{_EXPONENT}|\.(inf|Inf|INF))|\.[0-9][0-9_]*{_EXPONENT}|\.(nan|NaN|NAN)"
    ),
    "merge": re.compile(r"<<"),
}


class Problem(NamedTuple):
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
        """Return the error of the first problem by line (overrides come before the file) with the number of others."""
        ordered = sorted(problems, key=lambda problem: problem.line or 0)
        first = ordered[0]
        where = "<override>" if first.line is None else f"{file}:{first.line}"
        more = f" (and {len(ordered) - 1} more)" if len(ordered) > 1 else ""
        return cls(f"{where}: {first.key}: {first.value}: {first.rule}{more}")


class ConfigSource:
    """A YAML mapping of at most 1 MiB with overrides applied to it, and where each of its values comes from.

    `name` is the file as it was given, `data` has plain values, `problems` says what is wrong with single keys of the
    file, such as duplicates and tags.
    """

    def __init__(self, path: str | os.PathLike[str], overrides: Mapping[str, object]) -> None:
        """Read `path` and apply `overrides` with dotted keys, each of which replaces a value or adds one.

        Raises ConfigError: there is no mapping to speak of (no file, not UTF-8, syntax, aliases), or an override is
        below a key that is no mapping.
        """
        self.name = os.fspath(path)
        tree = _Tree()
        self.data = tree.mapping(_read_root(self.name), ())
        self.problems = tree.problems
        self._lines = tree.lines  # None: an override
        for key, value in overrides.items():
            self._override(tuple(key.split(".")), value)

    def problem(self, path: KeyPath, rule: str) -> Problem:
        """Return the problem that the value at `path` breaks `rule`, located at the nearest key that is there."""
        value: Any = self.data
        try:
            for part in path:
                value = value[part]
            shown = show_value(value)
        except (LookupError, TypeError):  # a key that is not there, or below a value that is no mapping
            shown = "(missing)"
        known = next((path[:end] for end in range(len(path), 0, -1) if path[:end] in self._lines), ())
        return Problem(self._lines.get(known, 1), dotted(path), shown, rule)

    def error(self, path: KeyPath, rule: str) -> ConfigError:
        """Return the error of one key whose value is fine by itself but not with the rest."""
        return ConfigError.from_problems(self.name, [self.problem(path, rule)])

    def _override(self, path: tuple[str, ...], value: object) -> None:
        parent = self.data
        for depth, part in enumerate(path[:-1], start=1):
            child = parent.get(part)
            if child is None:
                child = parent[part] = {}
                self._lines.setdefault(path[:depth], None)
            elif not isinstance(child, dict):
                rule = f"cannot be overridden: {dotted(path[:depth])} is {show_value(child)}, not a mapping"
                raise ConfigError.from_problems(self.name, [Problem(None, dotted(path), show_value(value), rule)])
            parent = child
        parent[path[-1]] = _plain(value)
        self._lines = {key: line for key, line in self._lines.items() if key[: len(path)] != path} | {path: None}


def dotted(path: Iterable[str | int]) -> str:
    """Return a key path as people write it, `model.rope_scaling.factor`; a long key is cut."""
    return ".".join(shorten(str(part)) for part in path)


def read_value(text: str) -> object:
    """Return the plain value that `text` is in YAML. Raises ValueError when it is none."""
    tree = _Tree()
    try:
        root = _compose(text)
        value = None if root is None else tree.value(root, ())
    except YAMLError as error:
        raise ValueError("not YAML") from error
    if tree.problems:
        raise ValueError(tree.problems[0].rule)
    return value


def _plain(value: object) -> object:
    """Return an override as YAML would have given it: mutable mappings, paths as text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    return os.fspath(value) if isinstance(value, os.PathLike) else value


@dataclass(slots=True)
class _Tree:
    """Converts nodes to plain values; collects the line of every key and the problems of some."""

    lines: dict[KeyPath, int | None] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def mapping(self, node: MappingNode, path: KeyPath) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, ScalarNode):
                self._report(line, (*path, "?"), "(a collection)", "a key must be plain text")
                continue
            here = (*path, key_node.value)
            if key_node.tag == _TAG + "merge":
                self._report(line, here, "(a merge key)", "merge keys are not supported; write the values out")
            elif key_node.value in values:
                shown = show_value(_Tree().value(value_node, here))  # what is wrong inside does not matter
                self._report(line, here, shown, f"given twice; the first is on line {self.lines[here]}")
            else:
                self.lines[here] = line
                values[key_node.value] = self.value(value_node, here)
        return values

    def value(self, node: Any, path: KeyPath) -> object:
        kind, line = node.tag.removeprefix(_TAG), node.start_mark.line + 1
        if isinstance(node, MappingNode) and kind == "map":
            return self.mapping(node, path)
        if isinstance(node, SequenceNode) and kind == "seq":
            return [self.value(item, (*path, index)) for index, item in enumerate(node.value)]
        if not isinstance(node, ScalarNode) or kind not in _SCALARS:
            self._report(line, path, node.tag, "tags are not supported; write a plain value")
            return None
        if any("\ud800" <= c <= "\udfff" for c in node.value):
            self._report(line, path, show_value(node.value), "must not contain half of a surrogate pair")
        return _scalar(kind, node.value)

    def _report(self, line: int, path: KeyPath, value: str, rule: str) -> None:
        self.problems.append(Problem(line, dotted(path), value, rule))


def _scalar(kind: str, text: str) -> object:
    """Return the value of a scalar; what is not written as its kind asks stays text."""
    if kind == "null":
        return None
    if kind not in _PLAIN or not _PLAIN[kind].fullmatch(text):
        return text
    plain = text.lower().replace("_", "")
    if kind == "float":
        return float(plain.replace(".inf", "inf").replace(".nan", "nan"))
    return _BOOLS[plain] if kind == "bool" else int(plain)


def _read_root(name: str) -> MappingNode:
    """Return the mapping at the root of a file. Raises ConfigError."""
    text = _read_text(name)
    try:
        root = _compose(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        reason = re.sub(r"\(('.*'),\)", r"\1", error.problem or error.context)  # some tokens are shown as a tuple
        raise ConfigError(f"{name}:{mark.line + 1 if mark else 1}: not valid YAML: {reason}") from None
    except ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ConfigError(f"{name}:{line}: not valid YAML: character #x{error.character:04x} is not allowed") from None
    if root is None:
        raise ConfigError(f"{name}:1: empty file: must be a mapping with at least model.path")
    if not isinstance(root, MappingNode):
        shown = "a list" if isinstance(root, SequenceNode) else show_value(root.value)
        line = root.start_mark.line + 1
        raise ConfigError(f"{name}:{line}: {shown}: the file must be a mapping with at least model.path")
    return root


def _read_text(name: str) -> str:
    try:
        with Path(name).open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = _UNREADABLE.get(type(error), f"cannot be read: {getattr(error, 'strerror', error)}")
        raise ConfigError(f"{name}: {reason}") from None
    if len(raw) > MAX_BYTES:
        raise ConfigError(f"{name}: larger than {MAX_BYTES} bytes: this is not a configuration file")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{name}:{line}: not UTF-8 text (byte 0x{raw[error.start]:02x})") from None


def _compose(text: str) -> Any:
    """Return the node tree of one YAML document, None for an empty one. Raises MarkedYAMLError or ReaderError."""
    yaml = YAML(typ="safe", pure=True)
    yaml.Composer, yaml.Resolver = _Composer, _Resolver
    yaml.version = (1, 1)
    return yaml.compose(text)


class _Composer(Composer):
    """Refuses aliases, deep nesting and any number of values before they cost anything."""

    _num_nodes = 0

    def get_single_node(self) -> Any:
        try:
            return super().get_single_node()
        except (AssertionError, ValueError, OverflowError) as error:  # %YAML 1.3, an escape beyond Unicode
            raise ComposerError(problem=str(error), problem_mark=self.loader.reader.get_mark()) from None

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.parser.peek_event()
        if isinstance(event, AliasEvent):
            problem = f"*{event.anchor}: anchors and aliases are not supported; write the value out"
            raise ComposerError(problem=problem, problem_mark=event.start_mark)
        if self.depth >= MAX_DEPTH:
            raise ComposerError(problem=f"nested deeper than {MAX_DEPTH} levels", problem_mark=event.start_mark)
        self._num_nodes += 1
        if self._num_nodes > MAX_NODES:
            raise ComposerError(problem=f"more than {MAX_NODES} keys and values", problem_mark=event.start_mark)
        self.anchors.clear()  # nothing refers to them, so they need not be unique
        return super().compose_node(parent, index)


class _Resolver(VersionedResolver):
    """Resolves the types of plain scalars by `_PLAIN`."""

    def resolve(self, kind: Any, value: Any, implicit: Any) -> Any:
        if kind is not ScalarNode or not implicit[0]:
            return super().resolve(kind, value, implicit)
        return Tag(suffix=_TAG + next((name for name, form in _PLAIN.items() if form.fullmatch(value)), "str"))
