"""Two hundred JSON schemas of draft 2020-12, over all keywords that are supported, alone and together."""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]


def obj(required: list[str] | None = None, closed: bool = True, **properties: Any) -> Schema:
    """Return the schema of an object; every property is required unless `required` says which."""
    schema: Schema = {"type": "object", "properties": properties}
    schema["required"] = list(properties) if required is None else required
    return schema | ({"additionalProperties": False} if closed else {})


def array(items: Any, low: int = 0, high: int = 3) -> Schema:
    return {"type": "array", "items": items, "minItems": low, "maxItems": high}


def text(high: int = 12, low: int = 0, **more: Any) -> Schema:
    return {"type": "string", "minLength": low, "maxLength": high, **more}


BOOL: Schema = {"type": "boolean"}
NULL: Schema = {"type": "null"}
SMALL: Schema = {"type": "integer", "minimum": 0, "maximum": 9}
WORD: Schema = {"type": "string", "pattern": "^[a-z]{1,8}$"}

TYPES: list[Schema] = [
    BOOL, NULL, {"type": ["boolean", "null"]}, {"type": ["integer", "null"], "minimum": 0, "maximum": 99}, text(),
    text(0), text(1, 1), text(40, 30), {"type": ["string", "boolean"], "maxLength": 5}, text(5) | {"title": "a name"},
    text(5) | {"description": "d", "default": "x", "examples": ["y"], "$comment": "c", "deprecated": True},
    {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": "https://example.org/s", **BOOL},
    text(5) | {"x-unknown": {"not": 1}}, text(5) | {"contentMediaType": "text/plain", "readOnly": True},
]  # fmt: skip

ENUMS: list[Schema] = [
    {"enum": ["red", "green", "blue"]}, {"enum": [1, 2.5, -3]}, {"enum": [None, True, "x", 0]},
    {"enum": [{"a": 1}, [1, 2], []]}, {"enum": ["one"]}, {"enum": ["a\"b", "c\\d", "e\nf", "é", "日本", "\u2028"]},
    {"enum": [f"choice {i}" for i in range(100)]}, {"type": "string", "enum": ["a", "ab", "abc"]},
    {"enum": ["", " "]}, {"const": "fixed"}, {"const": 17}, {"const": None}, {"const": True}, {"const": -0.5},
    {"const": {"a": [1, {"b": "c"}], "d": None}}, {"const": []}, {"const": {}}, {"const": "quote \" and \\ and /"},
]  # fmt: skip

INTEGERS: list[Schema] = [
    {"type": "integer", **bounds}
    for bounds in (
        {"minimum": 0, "maximum": 0}, {"minimum": 1, "maximum": 6}, {"minimum": -5, "maximum": 5},
        {"minimum": 7, "maximum": 1234}, {"minimum": -1000, "maximum": -7}, {"minimum": 99, "maximum": 101},
        {"exclusiveMinimum": 3, "exclusiveMaximum": 5}, {"exclusiveMinimum": -1, "maximum": 12},
        {"minimum": 0, "exclusiveMaximum": 100}, {"minimum": 0, "maximum": 100, "multipleOf": 5},
        {"minimum": 0, "maximum": 50, "multipleOf": 7}, {"minimum": 1000000, "maximum": 2000000},
        {"minimum": 0, "maximum": 4294967295}, {"minimum": -9, "maximum": 9, "multipleOf": 2},
        {"minimum": 0.5, "maximum": 9.5},
    )
]  # fmt: skip

NUMBERS: list[Schema] = [
    {"type": "number", **bounds}
    for bounds in (
        {"minimum": 0, "maximum": 1}, {"minimum": -1.5, "maximum": 2.25}, {"minimum": 10, "maximum": 99.5},
        {"exclusiveMinimum": 0, "exclusiveMaximum": 1}, {"minimum": -100, "exclusiveMaximum": 0},
        {"minimum": 0, "maximum": 10, "multipleOf": 0.5}, {"minimum": 0, "maximum": 3, "multipleOf": 0.25},
        {"exclusiveMinimum": 1.5, "maximum": 1000},
    )
] + [{"type": ["number", "string"], "maximum": 5, "minimum": 0, "maxLength": 3}]  # fmt: skip

PATTERNS: list[Schema] = [
    {"type": "string", "pattern": pattern}
    for pattern in (
        "^[a-z]{3}$", "^[A-Z][a-z]{2,9}$", r"^\d{4}-\d{2}$", r"^\+?[0-9]{5,12}$", "^(yes|no)$", "^a{2,4}b?$",
        "^[^0-9]{1,5}$", r"^[\w.]{1,9}@[a-z]{2,5}\.(com|org)$", "^#[0-9a-f]{6}$", "^(ab|cd){1,3}$", r"^[A-Z]{2}-\d{3}$",
        r"^v\d{1,2}\.\d{1,2}\.\d{1,2}$", "^x$", r"^\$[0-9]{1,4}$", r"^[a-c]\s[a-c]$", "^[é-ü]{1,3}$", r"^\(.{2}\)$",
    )
] + [
    text(9, pattern="b"), text(9, 3, pattern="^[ab]*$"), text(12, pattern="[0-9]$"), text(6, 6, pattern="^[0-9]+$"),
]  # fmt: skip

FORMATS: list[Schema] = [
    {"type": "string", "format": name}
    for name in ("date", "time", "date-time", "ipv4", "uuid", "duration")
] + [
    {"type": "string", "format": "date", "description": "when"}, {"type": ["null", "string"], "format": "ipv4"},
]  # fmt: skip

ARRAYS: list[Schema] = [
    array(BOOL), array(BOOL, 2, 2), array(SMALL, 1, 5), array(text(4), 0, 2), array(array(BOOL, 1, 2), 1, 2),
    array(NULL, 0, 0), array({"enum": ["a", "b"]}, 3, 6), array(obj(a=BOOL), 1, 2), array(SMALL, 17, 17),
    {"type": "array", "prefixItems": [BOOL, SMALL], "items": False, "minItems": 2},
    {"type": "array", "prefixItems": [BOOL, SMALL], "items": False},
    {"type": "array", "prefixItems": [{"const": "a"}], "items": NULL, "maxItems": 4, "minItems": 1},
    {"type": "array", "prefixItems": [WORD, array(SMALL), obj(x=NULL)], "items": False, "minItems": 3},
    {"type": "array", "items": {"type": ["boolean", "null"]}, "maxItems": 3},
    {"type": "array", "items": {"anyOf": [BOOL, SMALL, WORD]}, "minItems": 2, "maxItems": 3},
    {"type": "array", "maxItems": 0},
    {"type": ["array", "null"], "items": BOOL, "maxItems": 2},
]  # fmt: skip

OBJECTS: list[Schema] = [
    obj(a=BOOL), obj(a=BOOL, b=SMALL), obj([], a=BOOL, b=SMALL), obj(["b"], a=BOOL, b=SMALL, c=NULL),
    obj(name=text(9), age={"type": "integer", "minimum": 0, "maximum": 150}), obj(a=obj(b=obj(c=obj(d=NULL)))),
    obj(**{"with space": BOOL, 'quo"te': BOOL, "é": BOOL, "back\\slash": NULL}), obj(**{"": BOOL}), obj(),
    obj(**{f"p{i}": SMALL for i in range(20)}), obj([], **{f"p{i}": BOOL for i in range(8)}),
    obj(tags=array(WORD, 1, 3), on=BOOL), obj(point=array({"type": "number", "minimum": 0, "maximum": 1}, 2, 2)),
    {"type": "object", "additionalProperties": BOOL, "maxProperties": 2},
    {"type": "object", "patternProperties": {"^[a-z]{1,9}$": SMALL}, "additionalProperties": False, "minProperties": 1,
     "maxProperties": 2},
    {"type": "object", "properties": {"a": BOOL}, "required": ["a"], "additionalProperties": NULL, "maxProperties": 1},
    {"type": "object", "patternProperties": {"^x[0-9]$": BOOL}, "additionalProperties": False, "maxProperties": 3},
    {"type": "object", "patternProperties": {"^[a-c]{1,2}$": SMALL, "^[x-z]$": NULL}, "additionalProperties": False,
     "minProperties": 1, "maxProperties": 2},
    {"type": "object", "properties": {"id": SMALL}, "patternProperties": {"^x_[a-z]{1,3}$": WORD}, "required": ["id"],
     "additionalProperties": False, "maxProperties": 3},
    {"type": "object", "required": ["a", "b"], "additionalProperties": BOOL, "maxProperties": 2},
    {"type": "object", "maxProperties": 0}, {"type": "object", "properties": {"a": False, "b": BOOL}, "required": ["b"],
     "additionalProperties": False},
    {"type": ["object", "null"], "properties": {"a": BOOL}, "additionalProperties": False},
    obj(first=WORD, last=WORD, born={"type": "string", "format": "date"}, email={"type": ["string", "null"],
        "pattern": "^[a-z]{1,5}@[a-z]{1,5}$"}),
]  # fmt: skip

COMBINED: list[Schema] = [
    {"anyOf": [NULL, SMALL]}, {"anyOf": [WORD, SMALL]}, {"allOf": [BOOL, {"enum": [True, 1]}]},
    {"anyOf": [{"type": "array", "maxItems": 0}, obj(), {"const": ""}]}, {"anyOf": [obj(a=BOOL), obj(b=SMALL)]},
    {"anyOf": [obj(kind={"const": "cat"}, lives=SMALL), obj(kind={"const": "dog"}, barks=BOOL)]},
    {"oneOf": [{"type": "string", "maxLength": 4}, SMALL]}, {"oneOf": [obj(a=NULL), array(BOOL, 0, 2)]},
    {"oneOf": [{"const": "a"}, {"const": "b"}, {"const": 3}]},
    {"oneOf": [obj(k={"const": 1}, a=BOOL), obj(k={"const": 2}, b=BOOL)]},
    {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 5}]},
    {"allOf": [text(8), {"pattern": "^[a-z]+$"}]},
    {"allOf": [{"type": "object", "properties": {"a": BOOL}, "required": ["a"]},
               {"properties": {"b": SMALL}, "required": ["b"], "maxProperties": 2}]},
    {"type": "integer", "anyOf": [{"minimum": 0, "maximum": 9}, {"minimum": 90, "maximum": 99}]},
    {"anyOf": [array(BOOL, 1, 2), array(NULL, 3, 3)]}, {"anyOf": [True, False], "type": "boolean"},
    {"anyOf": [{"enum": [1, 2]}, {"enum": ["x"]}], "description": "either"},
    obj(value={"anyOf": [WORD, NULL]}, more={"anyOf": [SMALL, NULL]}),
    {"type": "array", "items": {"oneOf": [obj(t={"const": "n"}, v=SMALL), obj(t={"const": "w"}, v=WORD)]},
     "minItems": 1, "maxItems": 3},
    {"allOf": [{"$ref": "#/$defs/a"}], "$defs": {"a": BOOL}},
]  # fmt: skip

REFERENCES: list[Schema] = [
    {"$ref": "#/$defs/a", "$defs": {"a": BOOL}}, {"$ref": "#/definitions/a", "definitions": {"a": SMALL}},
    obj(a={"$ref": "#/$defs/w"}, b={"$ref": "#/$defs/w"}) | {"$defs": {"w": WORD}},
    {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": array({"$ref": "#/$defs/c"}, 1, 2), "c": NULL}},
    obj(a=BOOL, b={"$ref": "#/properties/a"}), {"$ref": "#/$defs/a~1b", "$defs": {"a/b": BOOL}},
    {"$ref": "#/$defs/node", "$defs": {"node": obj(["v"], v=SMALL, next={"anyOf": [NULL, {"$ref": "#/$defs/node"}]})}},
    {"$ref": "#/$defs/t", "$defs": {"t": {"anyOf": [BOOL, array({"$ref": "#/$defs/t"}, 0, 1)]}}},
    {"type": "array", "items": {"$ref": "#/$defs/p"}, "minItems": 2, "maxItems": 2,
     "$defs": {"p": {"type": "array", "prefixItems": [SMALL, SMALL], "items": False, "minItems": 2}}},
    obj(["a"], a=BOOL, b={"anyOf": [NULL, BOOL, {"$ref": "#"}]}),
]  # fmt: skip

RECORDS: list[Schema] = [
    obj(answer=text(30), confidence={"type": "number", "minimum": 0, "maximum": 1},
        sources=array(obj(page=SMALL, quote=text(10)), 0, 2)),
    obj(tool={"enum": ["search", "open"]}, arguments=obj(query=text(10), top_k=SMALL)),
    obj(steps=array(obj(thought=text(10), done=BOOL), 1, 3), final=WORD),
    obj(rows=array(array(SMALL, 3, 3), 2, 2), header=array(WORD, 3, 3)),
    obj(invoice=obj(number={"type": "string", "pattern": r"^INV-\d{4}$"}, total={"type": "number", "minimum": 0,
        "maximum": 999, "multipleOf": 0.5}, paid=BOOL, due={"type": "string", "format": "date"})),
    obj(sentiment={"enum": ["positive", "neutral", "negative"]},
        score={"type": "integer", "minimum": -5, "maximum": 5}),
    obj(people=array(obj(["name"], name=text(8, 1), role={"enum": ["author", "editor"]}), 1, 2)),
    obj(host={"type": "string", "format": "ipv4"}, port={"type": "integer", "minimum": 1, "maximum": 65535}),
    obj(id={"type": "string", "format": "uuid"}, at={"type": "string", "format": "date-time"}),
    obj(code=text(20), language={"enum": ["python", "c++"]}, tests=array(text(8), 0, 2)),
]  # fmt: skip

NESTED = [
    one
    for inner in (
        BOOL,
        SMALL,
        WORD,
        {"type": "integer", "exclusiveMinimum": 9, "exclusiveMaximum": 21},
        {"enum": ["é", 1]},
        array(NULL, 1, 1),
        obj([], a=BOOL),
    )
    for one in (obj(x=inner), array(inner, 1, 2), {"anyOf": [inner, NULL]}, obj(x=array(inner, 0, 1)), obj([], x=inner))
]

SCHEMAS: list[Schema] = [
    *TYPES, *ENUMS, *INTEGERS, *NUMBERS, *PATTERNS, *FORMATS, *ARRAYS, *OBJECTS, *COMBINED, *REFERENCES, *RECORDS,
    *NESTED,
]  # fmt: skip
