"""Find the chat template of a model folder, in the files in which transformers looks for it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from protos.errors import UserError

_DEFAULT = "default"
_MAX_BYTES = 4 << 20
_SHOWN = 10  # names in an error


def read_chat_template(folder: Path, config: Mapping[str, Any], name: str | None = None) -> str | None:
    """Return a chat template of a model folder, None where there is none.

    Files (`chat_template.jinja`, `additional_chat_templates/NAME.jinja`) win over `chat_template.json`, and that over
    `config`, the content of `tokenizer_config.json`.

    Args:
        name: one of several named templates, or a file `*.jinja` of the folder; None is the only one, or `default`.

    Raises:
        UserError: a file is too large or unusable, there is none of this name, or several without `default`.
    """
    if name is not None and name.endswith(".jinja"):
        return _read(folder / name)
    templates = _files(folder) or _entries(folder, _json_template(folder) or config.get("chat_template"))
    chosen = name or _DEFAULT
    if chosen in templates:
        template = templates[chosen]
        return _read(template) if isinstance(template, Path) else template
    if name is None and not templates:
        return None
    shown = ", ".join(sorted(templates)[:_SHOWN]) or "no template"
    if name is not None:
        raise UserError(f"model.chat_template: {name}: {folder} has {shown}: name one of them, or a .jinja file in it")
    raise UserError(f"{folder}: chat templates {shown}, none is the default: choose one with model.chat_template: NAME")


def _files(folder: Path) -> dict[str, Path | str]:
    """Return the template files by the names of the templates; none is read yet."""
    files: dict[str, Path | str] = {
        path.stem: path for path in folder.joinpath("additional_chat_templates").glob("*.jinja")
    }
    if (path := folder / "chat_template.jinja").exists():
        files[_DEFAULT] = path
    return files


def _entries(folder: Path, value: object) -> dict[str, Path | str]:
    """Return the templates of a JSON file by name; a single one is the default."""
    if value is None:
        return {}
    if isinstance(value, str):
        return {_DEFAULT: value}
    if isinstance(value, list):
        entries = [entry if isinstance(entry, dict) else {} for entry in value]
        value = {entry.get("name"): entry.get("template") for entry in entries}
    if isinstance(value, dict) and all(isinstance(name, str) and isinstance(text, str) for name, text in value.items()):
        return dict(value)
    kind = type(value).__name__
    raise UserError(f"{folder}: chat_template is a {kind}: must be text or a list of named templates")


def _json_template(folder: Path) -> object:
    path = folder / "chat_template.json"
    if not path.exists():
        return None
    try:
        value = json.loads(_read(path))
    except ValueError as error:
        raise UserError(f"{path}: not readable as JSON ({error}): download the file again") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds a {type(value).__name__}: must be a JSON object")
    return value.get("chat_template")


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
        if len(data) > _MAX_BYTES:
            raise UserError(f"{path}: more than {_MAX_BYTES >> 20} MiB: no chat template is so large")
        return data.decode()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not readable as UTF-8 text ({error}): name another file, or download it") from error
