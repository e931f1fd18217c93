"""The cost of constraints in the head: compiling them, and a mask for each token."""

from __future__ import annotations

import random
import statistics
import time
from pathlib import Path
from typing import Any

from cluster.constraints.answer import ConstrainedAnswer
from cluster.constraints.compiler import ConstraintCompiler, grammar_of, is_empty
from cluster.constraints.trial import try_grammar
from cluster.text.tokenizer import TextTokenizer
from protos.jobs.constraint import Constraint

RECORD: dict[str, Any] = {
    "type": "object",
    "properties": {
        "answer": {"type": "string"},
        "confidence": {"type": "number", "minimum": 0, "maximum": 1, "multipleOf": 0.01},
        "kind": {"enum": ["fact", "opinion", "none"]},
        "sources": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {"page": {"type": "integer", "minimum": 1}, "quote": {"type": "string"}},
                "required": ["page", "quote"],
                "additionalProperties": False,
            },
        },
    },
    "required": ["answer", "confidence", "kind", "sources"],
    "additionalProperties": False,
}
_CONSTRAINTS: dict[str, object] = {
    "json_object": {"json_object": True},
    "record": {"json": RECORD},
    "regex": {"regex": "[A-Z][a-z]{1,20}( [a-z]{1,20}){0,30}[.]"},
    "choice": {"choice": [f"choice number {index}" for index in range(100)]},
    "tool_call": {"grammar": 'start: "<tool_call>" %json ' + '{"type": "object"}' + ' "</tool_call>"'},
}


def measure_constraints(model: Path, tokens: int) -> dict[str, Any]:
    """Return milliseconds to take the tokenizer in and to compile, and microseconds of each token's mask."""
    tokenizer = TextTokenizer.open(model)
    ends = sorted(tokenizer.end_ids)
    compiler = ConstraintCompiler(tokenizer, tokenizer.vocab_size, ends)
    begun = time.perf_counter()
    compiler.check(Constraint("choice", '["a"]'))
    result: dict[str, Any] = {"vocabulary": tokenizer.vocab_size, "first_ms": _ms(begun)}
    for name, value in _CONSTRAINTS.items():
        constraint = Constraint.from_value(value)
        begun = time.perf_counter()
        try_grammar(grammar_of(constraint))
        trial_ms, begun = _ms(begun), time.perf_counter()
        compiler.check(constraint)
        compile_ms = _ms(begun) - trial_ms
        seconds = _walk(compiler, constraint, ends, tokens)
        result[name] = {
            "trial_ms": trial_ms,
            "compile_ms": round(max(0.0, compile_ms), 1),
            "mask_us": {
                "median": round(statistics.median(seconds) * 1e6),
                "p99": round(sorted(seconds)[int(len(seconds) * 0.99)] * 1e6),
                "max": round(max(seconds) * 1e6),
            },
        }
    return result


def _walk(compiler: ConstraintCompiler, constraint: Constraint, ends: list[int], tokens: int) -> list[float]:
    """Return the seconds of each step of random answers, a new one when one is complete."""
    draw = random.Random(0)
    seconds: list[float] = []
    answer: ConstrainedAnswer | None = None
    while len(seconds) < tokens:
        if answer is None:
            answer = ConstrainedAnswer(compiler.begin(constraint), ends, False, None)
        allowed = [
            i for at, byte in enumerate(answer.mask) if byte for i in range(8 * at, 8 * at + 8) if byte >> i % 8 & 1
        ]
        token = draw.choice(allowed)
        begun = time.perf_counter()
        answer.push(token, "answer", "")
        seconds.append(time.perf_counter() - begun)
        if token in ends or answer.is_complete or is_empty(answer.mask):
            answer = None
    return seconds


def _ms(begun: float) -> float:
    return round((time.perf_counter() - begun) * 1e3, 1)
