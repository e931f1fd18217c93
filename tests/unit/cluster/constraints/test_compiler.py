"""Masks against a slow reference, every id one by one: does the text so far with that token still begin a match?"""

import json
import random

import jsonschema
import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.constraints import compiler as compiler_module
from cluster.constraints.compiler import ConstraintCompiler, ConstraintError, Matcher
from cluster.constraints.json_schema import WHITE_SPACE
from cluster.text.detokenizer import IncrementalDecoder
from cluster.text.token_bytes import token_bytes
from cluster.text.tokenizer import TextTokenizer
from protos.errors import InvalidRequest, UserError
from protos.jobs.constraint import Constraint
from tests.support.data.tokenizer_families import FAMILIES, byte_level, word_piece
from tests.support.data.tokenizers import wrap
from tests.support.paths import NEEDLE

pytest.importorskip("llguidance", reason="llguidance comes with the extra structured")
VOCAB = 4099  # three ids beyond the tokenizer's
ENDS = (0, 2)
TOKENIZER = TextTokenizer.open(NEEDLE)
COMPILER = ConstraintCompiler(TOKENIZER, VOCAB, ENDS)
BYTES = [
    b"" if TOKENIZER.is_special(i) else token_bytes(TOKENIZER.id_to_token(i) or "") for i in range(TOKENIZER.vocab_size)
]
WS = f"(?:{WHITE_SPACE})?"
BOOL = "(?:true|false)"


@pytest.fixture(autouse=True)
def no_child(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler_module, "try_grammar", lambda *_: None)


def ids_of(mask: bytes) -> set[int]:
    return {token for token in range(8 * len(mask)) if mask[token // 8] >> token % 8 & 1}


def reference(pattern: str, text: bytes) -> set[int]:
    """The ids that may follow `text`, those of the end included where it may end."""
    compiled = regex.compile(pattern.encode())
    fits = {
        i
        for i, piece in enumerate(BYTES)
        if piece and compiled.fullmatch(text + piece, partial=True, concurrent=False) is not None
    }
    return fits | (set(ENDS) if compiled.fullmatch(text) else set())


def check_walk(constraint: Constraint, pattern: str, seed: int, steps: int = 12) -> None:
    """Take random steps under a constraint; before each, every id is compared with the reference."""
    matcher, text, draw = COMPILER.begin(constraint), b"", random.Random(seed)
    for _ in range(steps):
        allowed = ids_of(matcher.mask(ENDS))
        expected = reference(pattern, text)
        if (allowed or set(ENDS)) != expected:  # of text that is forced, the usual token alone is let through
            assert len(allowed) == 1, (pattern, text, allowed ^ expected)
            assert allowed < expected
            assert len({BYTES[token][:1] for token in expected}) == 1
        going_on = sorted(allowed - set(ENDS))
        if not going_on:
            return
        token = draw.choice(going_on)
        matcher.accept(token)
        text += BYTES[token]


EXPRESSIONS = [
    "[0-9]{4}-[0-9]{2}", "(yes|no|maybe)", "a*", "(ab|a)(bc|c)?", "[a-z]{1,5}( [a-z]{1,3}){0,2}", "the .{3}[.!]",
    '"[^"\\\\]{0,4}"', "(a|b)*c", "x{17}",
]  # fmt: skip


@pytest.mark.parametrize("pattern", EXPRESSIONS)
@pytest.mark.parametrize("seed", range(3))
def test_expressions(pattern: str, seed: int) -> None:
    ascii_only = pattern.replace(".{3}", "[ -~]{3}").replace('[^"\\\\]', "[ !#-\\[\\]-~]")
    check_walk(Constraint("regex", ascii_only), ascii_only, seed)


small = st.recursive(
    st.sampled_from(["a", "b", "the", "0", "[0-9]", "[a-e]", " "]),
    lambda inner: st.one_of(
        st.lists(inner, min_size=2, max_size=3).map("".join),
        st.lists(inner, min_size=2, max_size=3).map(lambda parts: f"(?:{'|'.join(parts)})"),
        st.tuples(inner, st.sampled_from(["?", "*", "+", "{2}", "{0,3}"])).map(lambda pair: f"(?:{pair[0]}){pair[1]}"),
    ),
    max_leaves=6,
)


@settings(max_examples=25, deadline=None)
@given(small, st.integers(0, 1000))
def test_random_expressions(pattern: str, seed: int) -> None:
    check_walk(Constraint("regex", pattern), pattern, seed, steps=4)


SCHEMAS: list[tuple[dict, str]] = [
    ({"type": "boolean"}, BOOL),
    ({"enum": ["the", "a\"b", 17, None, {"a": 1}]}, rf'"the"|"a\\"b"|17|null|\{{{WS}"a"{WS}:{WS}1{WS}\}}'),
    ({"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
     rf"\[{WS}(?:{BOOL}{WS}(?:,{WS}{BOOL}{WS})?)?\]"),
    ({"type": "object", "properties": {"a": {"type": "boolean"}, "b": {"const": 5}}, "required": ["a"],
      "additionalProperties": False},
     rf'\{{{WS}"a"{WS}:{WS}{BOOL}{WS}(?:,{WS}"b"{WS}:{WS}5{WS})?\}}'),
    ({"type": "integer", "minimum": 3, "maximum": 12}, "[3-9]|1[0-2]"),
    ({"anyOf": [{"const": "x"}, {"type": "null"}]}, '"x"|null'),
    ({"$ref": "#/$defs/a", "$defs": {"a": {"prefixItems": [{"const": 1}, {"const": 2}], "items": False,
      "type": "array", "minItems": 2}}}, rf"\[{WS}1{WS},{WS}2{WS}\]"),
]  # fmt: skip


@pytest.mark.parametrize(("schema", "pattern"), SCHEMAS)
@pytest.mark.parametrize("seed", range(2))
def test_schemas(schema: dict, pattern: str, seed: int) -> None:
    check_walk(Constraint("json_schema", json.dumps(schema)), pattern, seed, steps=16)


WORD = st.sampled_from(["a", "the", "b c", "é"])
plain_schemas = st.one_of(
    st.sampled_from([{"type": "boolean"}, {"type": "null"}, {"type": "string", "pattern": "^[a-c]{1,3}$"}]),
    st.tuples(st.integers(-20, 20), st.integers(0, 30)).map(
        lambda pair: {"type": "integer", "minimum": pair[0], "maximum": sum(pair)}
    ),
    st.integers(0, 4).map(lambda size: {"type": "string", "maxLength": size}),
    st.lists(WORD, min_size=1, max_size=3, unique=True).map(lambda words: {"enum": words}),
)
random_schemas = st.recursive(
    plain_schemas,
    lambda inner: st.one_of(
        st.tuples(inner, st.integers(0, 2)).map(
            lambda pair: {"type": "array", "items": pair[0], "minItems": pair[1], "maxItems": 2}
        ),
        st.lists(inner, min_size=1, max_size=3).map(
            lambda parts: {"type": "array", "prefixItems": parts, "items": False, "minItems": len(parts)}
        ),
        st.lists(inner, min_size=1, max_size=3).map(lambda parts: {"anyOf": parts}),
        st.tuples(st.dictionaries(WORD, inner, max_size=3), st.booleans()).map(
            lambda pair: {"type": "object", "properties": pair[0], "required": list(pair[0])[: 2 * pair[1]],
                          "additionalProperties": False}
        ),
    ),
    max_leaves=6,
)  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(random_schemas, st.integers(0, 1000))
def test_random_schemas(schema: dict, seed: int) -> None:
    """Random answers to their end, as text: they are JSON and validate."""
    matcher, text, draw = COMPILER.begin(Constraint("json_schema", json.dumps(schema))), b"", random.Random(seed)
    while allowed := ids_of(matcher.mask(ENDS)) - set(ENDS):
        token = draw.choice(sorted(allowed))
        matcher.accept(token)
        text += BYTES[token]
    jsonschema.validate(json.loads(text), schema)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.text("abthe01 ", min_size=1, max_size=6), min_size=1, max_size=4, unique=True), st.integers(0, 99))
def test_choices(choices: list[str], seed: int) -> None:
    check_walk(Constraint("choice", json.dumps(choices)), "|".join(map(regex.escape, choices)), seed)


def texts_of(matcher: Matcher, text: str) -> bool:
    try:
        for token in TOKENIZER.encode(text, literal=True):
            matcher.accept(token)
    except ConstraintError:
        return False
    return bool(matcher.mask(ENDS)) and (not ids_of(matcher.mask(ENDS)) or ENDS[0] in ids_of(matcher.mask(ENDS)))


@pytest.mark.parametrize(
    ("value", "right", "wrong"),
    [
        ({"json_object": True}, ['{"a": [1, {"b": null}]}', "{}", '{\n  "a": "é"\n}'], ["[]", '{"a":', "{}{}"]),
        ({"grammar": 'start: "<a>" %json {"type": "integer"} "</a>"'}, ["<a>5</a>"], ["<a>x</a>", "<a>5"]),
        ({"choice": ["é\n", '"', "😀"]}, ["é\n", '"', "😀"], ["e", "\u2028"]),
        ({"json": '{"const": "\\ud83d\\ude00"}'}, ['"😀"'], ['"x"']),
        ({"json": {"type": "string", "pattern": "^(?:ab)+$"}}, ['"abab"'], ['"aba"', '"abc"']),
        ({"json": {"type": "string", "format": "date"}}, ['"2024-02-29"'], ['"2024-2-29"', '"x"']),
    ],
)
def test_kinds(value: dict, right: list[str], wrong: list[str]) -> None:
    for text in right:
        assert texts_of(COMPILER.begin(Constraint.from_value(value)), text), text
    for text in wrong:
        assert not texts_of(COMPILER.begin(Constraint.from_value(value)), text), text


def test_white_space_is_bounded_also_where_a_grammar_has_a_schema() -> None:
    schema = {"type": "object", "patternProperties": {"^a": {"type": "integer"}}, "additionalProperties": False}
    for constraint in (
        Constraint("json_schema", json.dumps(schema)),
        Constraint("grammar", f"start: %json {json.dumps(schema)}"),
        Constraint("json_object"),
    ):
        matcher = COMPILER.begin(constraint)
        matcher.accept_text("{\n" + 16 * " ")
        white = {i for i, piece in enumerate(BYTES) if piece and not piece.strip()}
        assert not ids_of(matcher.mask(ENDS)) & white


def test_end_ids_are_let_through_where_the_answer_may_end_only() -> None:
    matcher = COMPILER.begin(Constraint("regex", "ab*"))
    assert not ids_of(matcher.mask((7,))) & {0, 2, 7}
    matcher.accept_text("a")
    assert ids_of(matcher.mask((0, 7, 5000))) >= {0, 7}
    assert not ids_of(matcher.mask(())) & {0, 2}, "the end token is ignored"
    assert len(matcher.mask(())) == (VOCAB + 7) // 8


def test_states_of_answers_are_apart() -> None:
    first, second = (COMPILER.begin(Constraint("regex", "ab")) for _ in range(2))
    first.accept_text("a")
    before = second.mask(ENDS)
    first.accept_text("b")
    assert not any(first.mask(ENDS))
    assert second.mask(ENDS) == before


def test_wrong_token() -> None:
    matcher = COMPILER.begin(Constraint("regex", "ab"))
    with pytest.raises(ConstraintError):
        matcher.accept(TOKENIZER.encode("z")[0])


def test_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidRequest, match="look-around"):
        COMPILER.check(Constraint("regex", "a(?=b)"))
    for value in ({"json": '{"const": "\\ud800"}'}, {"choice": '["\\ud800"]'}, {"json": '{"maximum": NaN}'}):
        with pytest.raises(InvalidRequest):
            COMPILER.check(Constraint.from_value(value))
    with pytest.raises(UserError, match=r"needs the model's tokenizer\.json"):
        ConstraintCompiler(None, 10, ()).check(Constraint("regex", "a"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'longreach\[structured\]'"):
        ConstraintCompiler(TOKENIZER, 4096, ()).check(Constraint("regex", "a"))


def test_compiled_constraints_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []
    monkeypatch.setattr(compiler_module, "try_grammar", lambda grammar, special: tried.append(grammar))
    compiler = ConstraintCompiler(TOKENIZER, 4096, ENDS)
    for index in (0, 0, *range(1, compiler_module._KEPT + 1), 0):
        compiler.begin(Constraint("regex", f"a{index}"))
    assert len(tried) == compiler_module._KEPT + 2, "the first was dropped in the end"


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_families_of_tokenizers(family: str) -> None:
    """What is decoded of random tokens under the masks of other tokenizers matches; special tokens never come."""
    tokenizer = wrap(FAMILIES[family]())
    compiler = ConstraintCompiler(tokenizer, tokenizer.vocab_size + 5, [])
    for seed in range(20):
        matcher, text, draw = (
            compiler.begin(Constraint("regex", "x[a-z<>]{2,5}( [a-z]{1,3}){1,2}é?")),
            "",
            random.Random(seed),
        )
        decoder = IncrementalDecoder(tokenizer)
        while allowed := sorted(ids_of(matcher.mask(()))):
            token = draw.choice(allowed)
            assert not tokenizer.is_special(token)
            assert token < tokenizer.vocab_size
            matcher.accept(token)
            text += decoder.push(token)
        assert regex.fullmatch("x[a-z<>]{2,5}( [a-z]{1,3}){1,2}é?", text + decoder.flush())


def test_special_tokens_come_by_name_only() -> None:
    start = TOKENIZER.added_id("<|im_start|>")
    assert start is not None
    matcher = COMPILER.begin(Constraint("grammar", 'start: "a" <|im_start|> "b"'))
    matcher.accept_text("a")
    assert ids_of(matcher.mask(ENDS)) == {start}
    matcher = COMPILER.begin(Constraint("choice", '["<|im_start|>"]'))
    assert start not in ids_of(matcher.mask(ENDS))


def test_tags_that_are_added_tokens_come_by_name_only() -> None:
    tokenizer = wrap(byte_level(), added_tokens_decoder={"269": {"content": "<tool_call>", "special": False}})
    call = tokenizer.added_id("<tool_call>")
    assert call is not None
    assert not tokenizer.is_special(call)
    compiler = ConstraintCompiler(tokenizer, tokenizer.vocab_size, [])
    assert ids_of(compiler.begin(Constraint("grammar", "start: <tool_call> /a/")).mask(())) == {call}
    spelled = compiler.begin(Constraint("choice", '["<tool_call>"]'))
    assert call not in ids_of(spelled.mask(()))
    spelled.accept_text("<tool_call>")
    assert not any(spelled.mask(()))


def test_model_without_end_token() -> None:
    compiler = ConstraintCompiler(TOKENIZER, TOKENIZER.vocab_size, [])
    matcher = compiler.begin(Constraint("regex", "(the)+"))
    matcher.accept_text("the")
    assert ids_of(matcher.mask(())) == {i for i, piece in enumerate(BYTES) if piece and b"thethethe".startswith(piece)}


def test_tokenizer_that_cannot_be_used() -> None:
    tokenizer = wrap(word_piece())
    with pytest.raises(UserError, match="this model's tokenizer cannot be used"):
        ConstraintCompiler(tokenizer, tokenizer.vocab_size, []).check(Constraint("regex", "a"))
