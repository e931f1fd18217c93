"""Where the chat template of a model folder comes from: as in transformers, by name where there are several."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cluster.text.templates.files import read_chat_template
from cluster.text.tokenizer import TextTokenizer, TokenizerError
from protos.errors import UserError
from tests.support import paths

NAMED = [{"name": "rag", "template": "R"}, {"name": "tool_use", "template": "T"}]


def folder_of(path: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_text(text)
    return path


@pytest.mark.parametrize(
    ("files", "config", "name", "expected"),
    [
        ({}, None, None, None),
        ({}, "C", None, "C"),
        ({}, "C", "default", "C"),
        ({}, [*NAMED, {"name": "default", "template": "D"}], None, "D"),
        ({}, [*NAMED, {"name": "default", "template": "D"}], "rag", "R"),
        ({}, NAMED, "tool_use", "T"),
        ({}, {"rag": "R", "default": "D"}, None, "D"),
        ({}, {"rag": "R"}, "rag", "R"),
        ({"chat_template.json": '{"chat_template": "J"}'}, "C", None, "J"),
        ({"chat_template.json": json.dumps({"chat_template": NAMED})}, "C", "rag", "R"),
        ({"chat_template.jinja": "F"}, "C", None, "F"),
        ({"chat_template.jinja": "F", "chat_template.json": '{"chat_template": "J"}'}, NAMED, None, "F"),
        ({"chat_template.jinja": "F", "additional_chat_templates/rag.jinja": "A"}, NAMED, None, "F"),
        ({"chat_template.jinja": "F", "additional_chat_templates/rag.jinja": "A"}, NAMED, "rag", "A"),
        ({"additional_chat_templates/rag.jinja": "A"}, "C", "rag", "A"),
        ({"chat_template.jinja": "F", "mine.jinja": "M"}, "C", "mine.jinja", "M"),
    ],
)
def test_templates_by_name(tmp_path: Path, files: dict[str, str], config: Any, name: str | None, expected: Any) -> None:
    assert read_chat_template(folder_of(tmp_path, files), {"chat_template": config}, name) == expected


@pytest.mark.parametrize(
    ("files", "config", "name", "reason"),
    [
        ({}, NAMED, None, "chat templates rag, tool_use, none is the default: choose one with model.chat_template: N"),
        ({}, {"rag": "R"}, None, "chat templates rag, none is the default"),
        ({"additional_chat_templates/rag.jinja": "A"}, "C", None, "chat templates rag, none is the default"),
        ({}, NAMED, "default", r"^model.chat_template: default: .* has rag, tool_use: name one of them"),
        ({}, None, "rag", r"^model.chat_template: rag: .* has no template: name one of them, or a .jinja file in it$"),
        ({}, "C", "mine.jinja", r"mine\.jinja: not readable"),
        ({}, 5, None, "chat_template is a int: must be text or a list of named templates"),
        ({}, [5], None, "must be text or a list of named templates"),
        ({}, [{"name": "default"}], None, "must be text or a list of named templates"),
        ({}, {"default": None}, None, "must be text or a list of named templates"),
        ({"chat_template.json": "["}, None, None, "not readable as JSON"),
        ({"chat_template.json": "[]"}, None, None, "must be a JSON object"),
        ({"chat_template.jinja": "x" * (1 << 23)}, None, None, "more than 4 MiB"),
    ],
)
def test_what_cannot_be_chosen_is_one_line(
    tmp_path: Path, files: dict[str, str], config: Any, name: str | None, reason: str
) -> None:
    folder = folder_of(tmp_path, files)
    with pytest.raises(UserError, match=reason) as caught:
        read_chat_template(folder, {"chat_template": config}, name)
    assert "\n" not in str(caught.value)


def test_the_tokenizer_of_a_folder_has_the_chosen_template(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((paths.NEEDLE / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": NAMED}))
    assert TextTokenizer.open(tmp_path, "rag").chat_template == "R"
    with pytest.raises(TokenizerError, match="rag, tool_use"):
        TextTokenizer.open(tmp_path)


def test_transformers_chooses_the_same(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = (paths.NEEDLE / "tokenizer.json").read_text()
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": [*NAMED, {"name": "default", "template": "D"}],
    }
    cases = [{}, {"chat_template.jinja": "F"}, {"chat_template.jinja": "F", "additional_chat_templates/rag.jinja": "A"}]
    for index, files in enumerate(cases):
        folder = tmp_path / str(index)
        folder.mkdir()
        folder_of(folder, {"tokenizer.json": tokenizer, "tokenizer_config.json": json.dumps(config), **files})
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
        for name in (None, "rag"):
            try:
                expected = theirs.get_chat_template(name)
            except ValueError:
                continue
            if expected != name:  # a name it does not know is the template itself
                assert read_chat_template(folder, config, name) == expected
