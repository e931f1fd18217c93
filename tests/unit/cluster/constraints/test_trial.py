"""Grammars that would end or hold up the process that compiles them are refused by what a child process does."""

import json

import pytest

from cluster.constraints import trial
from cluster.constraints.compiler import ConstraintCompiler, is_empty
from cluster.constraints.trial import try_grammar
from cluster.text.tokenizer import TextTokenizer
from cluster.text.tools.formats import ToolFormat
from cluster.text.tools.grammar import tag_tokens, tool_grammar
from protos.errors import InvalidRequest
from protos.jobs.chat import Tool, ToolChoice
from protos.jobs.constraint import Constraint
from tests.support.data.tokenizers import NEEDLE
from tests.support.tools.models import QWEN3, with_tool_tokens

llguidance = pytest.importorskip("llguidance", reason="llguidance comes with the extra structured")


def chain(rules: int) -> str:
    return "start: r0\n" + "\n".join(f"r{i}: r{i + 1}" for i in range(rules)) + f'\nr{rules}: "a"'


def references(count: int) -> str:
    inner = {f"a{i}": {"type": "array", "items": {"$ref": f"#/$defs/a{i + 1}"}} for i in range(count)}
    return json.dumps({"$ref": "#/$defs/a0", "$defs": {**inner, f"a{count}": {"type": "null"}}})


def test_what_works_passes() -> None:
    try_grammar(llguidance.LLMatcher.grammar_from_json_schema(references(20)))
    try_grammar(chain(100))
    try_grammar('start: "a" <call> "b"', ["<call>", "<é>"])


@pytest.mark.parametrize(
    ("grammar", "problem"),
    [
        (chain(20_000), "is too deep, or needs too much memory: make it smaller"),
        (llguidance.LLMatcher.grammar_from_json_schema(references(20_000)), "is too deep"),
        ("start: x", 'unknown name: "x"'),
        ("start: <call>", "unknown special token"),
        ('start: "a" &', "structured_outputs: "),
        ('start: ""', "no text, or none but the empty one"),
        (llguidance.LLMatcher.grammar_from_regex("(" * 10_000), "invalid regex"),
        ("start: T0\n" + "\n".join(f"T{i}: T{i + 1} T{i + 1}" for i in range(30)) + '\nT30: "a"', "too big"),
    ],
)
def test_refused(grammar: str, problem: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        try_grammar(grammar)
    assert str(caught.value).startswith("structured_outputs: ")
    assert problem in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_slow_one_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "_WALL_SECONDS", 0.05)
    with pytest.raises(InvalidRequest, match="takes too long to be compiled: make it smaller"):
        try_grammar('start: e\ne: e e | "a" | ' + " | ".join(['"a" e'] * 3000))


def test_others_take_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "_WALL_SECONDS", 0.01)
    for _ in range(2):
        trial._at_once.acquire()
    try:
        with pytest.raises(trial.CompilerBusy, match="try again"):
            try_grammar(chain(1))
    finally:
        trial._at_once.release(2)


@pytest.mark.parametrize("mode", ["required", "named", "auto"])
@pytest.mark.parametrize("form", [ToolFormat.QWEN3_JSON, ToolFormat.QWEN3_XML])
@pytest.mark.parametrize("tokenizer", [with_tool_tokens(QWEN3), NEEDLE], ids=["tokens", "text"])
def test_grammars_of_tools_are_compiled(tokenizer: TextTokenizer, form: ToolFormat, mode: str) -> None:
    tools = [Tool("f", "", '{"type": "object", "properties": {"a": {"type": "integer"}}}', strict=True), Tool("now")]
    choice = ToolChoice(mode, "f" if mode == "named" else "")
    grammar = tool_grammar(form, tools, choice, tag_tokens(tokenizer))
    assert grammar is not None
    compiler = ConstraintCompiler(tokenizer, tokenizer.vocab_size, [0])
    matcher = compiler.begin(Constraint("grammar", grammar))
    tag = tokenizer.added_id("<tool_call>")
    mask = matcher.mask([0])
    if tag is not None:
        assert mask[tag // 8] >> tag % 8 & 1
    for token in tokenizer.encode(
        '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>' if form is ToolFormat.QWEN3_JSON else
        "<tool_call>\n<function=f>\n<parameter=a>\n1\n</parameter>\n</function>\n</tool_call>"
    ):  # fmt: skip
        matcher.accept(token)
    mask = matcher.mask([0])
    assert is_empty(mask) if mode == "named" else mask[0] & 1  # the answer ends here, or may
