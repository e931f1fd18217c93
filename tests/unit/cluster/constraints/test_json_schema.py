"""Which schemas are refused, by keyword and place; schemas in grammars."""

import json
import time

import pytest

from cluster.constraints.json_schema import _FORMATS, _REFUSED, bound_white_space, check, to_compile
from protos.errors import InvalidRequest


@pytest.mark.parametrize("keyword", _REFUSED)
@pytest.mark.parametrize(
    ("around", "place"),
    [
        (lambda inner: inner, "#"),
        (lambda inner: {"properties": {"a": {"items": inner}}}, "#/properties/a/items"),
        (lambda inner: {"anyOf": [True, inner]}, "#/anyOf/1"),
        (lambda inner: {"$defs": {"x": inner}}, "#/$defs/x"),
        (lambda inner: {"prefixItems": [inner]}, "#/prefixItems/0"),
        (lambda inner: {"additionalProperties": inner}, "#/additionalProperties"),
    ],
)
def test_refused_by_name_and_place(keyword, around, place) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check(around({keyword: True}))
    assert str(caught.value).startswith(f"structured_outputs.json: {keyword} at {place}: is not supported: ")


@pytest.mark.parametrize(
    ("schema", "problem"),
    [
        ({"$ref": "http://x/y"}, r"\$ref 'http://x/y' at #: must begin with #/"),
        ({"$ref": "#name"}, r"\$ref '#name' at #"),
        ({"$ref": 5}, r"\$ref '5' at #"),
        ({"format": "iri"}, "format 'iri' at #: must be one of date, .*; else use pattern"),
        ({"items": [{}]}, "items at #: is a list: use prefixItems"),
        ({"anyOf": [5]}, "int at #/anyOf/0: must be a schema"),
        ({"properties": {"a": {"$id": "x"}}}, r"\$id at #/properties/a"),
        (False, "false at #: nothing can match it"),
    ],
)
def test_other_problems(schema, problem: str) -> None:
    with pytest.raises(InvalidRequest, match=problem):
        to_compile(schema)


def test_depth_is_bounded() -> None:
    schema: dict = {}
    for _ in range(65):
        schema = {"items": schema}
    with pytest.raises(InvalidRequest, match="at most 64 levels deep"):
        check(schema)
    check(schema["items"])


@pytest.mark.parametrize(
    "schema",
    [
        True,
        {"$id": "https://x", "$schema": "y", "title": "not", "x-nullable": 1},
        {"properties": {"not": {"type": "string"}, "if": True}, "required": ["not"]},
        {"enum": [{"not": 1}], "const": {"uniqueItems": True}, "default": {"if": 1}},
    ],
)
def test_taken(schema) -> None:
    assert "x-guidance" in to_compile(schema)


def test_settings_of_the_caller_do_not_count() -> None:
    assert to_compile({"x-guidance": {"lenient": True}})["x-guidance"]["lenient"] is False


def test_schemas_in_grammars() -> None:
    plain = 'start: "%json {" /%json {a/ x // %json {"not": 1}\nx: "a" # %json {\n'
    assert bound_white_space(plain) == plain
    grammar = bound_white_space('start: "a" %json {"type": "null"} b\nb: %json{"const": "}"}')
    first, second = grammar.split("\n")
    assert first.startswith('start: "a" %json {"type": "null", "x-guidance": ')
    assert first.endswith("}} b")
    assert json.loads(second[len("b: %json") :])["const"] == "}"
    spelled = {"not": {}, "x-guidance": {"lenient": True, "whitespace_flexible": False}}
    assert json.loads(bound_white_space(f"%json {json.dumps(spelled)}")[6:]) == spelled, "it says how itself"
    with pytest.raises(InvalidRequest, match="not at %json#/items"):
        bound_white_space('start: %json {"items": {"not": {}}}')
    with pytest.raises(InvalidRequest, match="%json: is no JSON"):
        bound_white_space('start: %json {"items": ')


def test_every_format_compiles() -> None:
    llguidance = pytest.importorskip("llguidance", reason="llguidance comes with the extra structured")
    for name in _FORMATS:
        grammar = llguidance.LLMatcher.grammar_from_json_schema(to_compile({"type": "string", "format": name}))
        assert llguidance.LLMatcher.validate_grammar(grammar) == ""


@pytest.mark.parametrize(
    "text", ['"' + '\\"' * 100_000, "/" + "\\/" * 100_000, "%json " * 40_000, "%json" + " " * 200_000]
)
def test_what_has_no_end_in_a_grammar_is_read_once(text: str) -> None:
    """All other requests would wait for as long."""
    began = time.process_time()
    assert bound_white_space(f"start: {text}") == f"start: {text}"
    assert time.process_time() - began < 2.0
