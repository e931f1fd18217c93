"""Constraints compiled for one model: which token may come next, by llguidance, without torch."""

from __future__ import annotations

import importlib.util
import json
import threading
from collections import OrderedDict
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from cluster.constraints import json_schema
from cluster.constraints.trial import limits, try_grammar
from cluster.text.tokenizer import TextTokenizer, TokenizerError
from protos.errors import InvalidRequest, UserError
from protos.jobs.constraint import Constraint

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

_KEPT = 64  # compiled constraints


class ConstraintError(Exception):
    """An answer that cannot go on under its constraint; it is about this answer alone."""


class Matcher:
    """How far one answer has come under its constraint.

    Raises:
        ConstraintError: a step takes more than llguidance's limits allow, or a token is none of the mask.
    """

    def __init__(self, matcher: LLMatcher, tokenizer: LLTokenizer, vocab_size: int) -> None:
        self._matcher = matcher
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size

    def accept(self, token_id: int) -> None:
        """Go on with a token of the answer."""
        self._matcher.consume_token(token_id)
        self._check()

    def accept_text(self, text: str) -> None:
        """Go on with text whose tokens are not at hand."""
        self._matcher.consume_tokens(self._tokenizer.tokenize_str(text))
        self._check()

    def mask(self, end_ids: Collection[int]) -> bytearray:
        """Return a bit for each id of the vocabulary that may come next, the lowest bit of a byte first.

        Of `end_ids` where the answer may end here; no bit is set, or those of `end_ids` alone, when it must.
        """
        size = (self._vocab_size + 7) // 8
        if self._matcher.is_stopped():
            self._check()
            return bytearray(size)
        mask = bytearray(self._matcher.compute_bitmask()[:size])
        self._check()
        for token in self._tokenizer.eos_tokens:
            _clear(mask, token)
        for token in range(self._vocab_size, 8 * size):
            _clear(mask, token)
        if is_empty(mask):
            if self._matcher.is_accepting():
                return mask
            raise ConstraintError("no token of the model continues the answer as its constraint asks")
        if self._matcher.is_accepting():
            for token in end_ids:
                if token < self._vocab_size:
                    mask[token // 8] |= 1 << token % 8
        return mask

    def _check(self) -> None:
        if self._matcher.is_error():
            raise ConstraintError(" ".join(self._matcher.get_error().split())[:300])


class ConstraintCompiler:
    """Compiles constraints for the tokenizer of one model; any thread may use it.

    The tokenizer is taken in with the first constraint, which needs about a second for 150,000 tokens. A compiled
    constraint is kept for the next answers under it.
    """

    def __init__(self, tokenizer: TextTokenizer | None, vocab_size: int, end_ids: Collection[int]) -> None:
        """Args: `vocab_size` is that of the model, which may have ids beyond the tokenizer's."""
        self._text_tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._end_ids = sorted(token for token in end_ids if token < vocab_size)
        self._lock = threading.Lock()
        self._tokenizer: LLTokenizer | None = None
        self._special: list[str] = []
        self._compiled: OrderedDict[Constraint, LLMatcher] = OrderedDict()

    def check(self, constraint: Constraint) -> None:
        """Refuse a constraint that cannot be compiled. Raises as `begin`."""
        self._prototype(constraint)

    def begin(self, constraint: Constraint) -> Matcher:
        """Return the state of an answer that has no token yet.

        Raises:
            InvalidRequest: the constraint cannot be compiled. CompilerBusy: others take long.
            UserError: structured output needs something that is missing here.
        """
        matcher = self._prototype(constraint).deep_copy()
        assert self._tokenizer is not None
        return Matcher(matcher, self._tokenizer, self._vocab_size)

    def _prototype(self, constraint: Constraint) -> LLMatcher:
        with self._lock:
            if constraint in self._compiled:
                self._compiled.move_to_end(constraint)
                return self._compiled[constraint]
        tokenizer = self._open()
        from llguidance import LLMatcher

        grammar = grammar_of(constraint)
        try_grammar(grammar, self._special)
        matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=limits())
        if matcher.is_error():
            raise InvalidRequest(f"structured_outputs: {' '.join(matcher.get_error().split())[:300]}")
        with self._lock:
            self._compiled[constraint] = matcher
            while len(self._compiled) > _KEPT:
                self._compiled.popitem(last=False)
        return matcher

    def _open(self) -> LLTokenizer:
        """Return the tokenizer as llguidance has it."""
        if importlib.util.find_spec("llguidance") is None:
            raise UserError("structured_outputs: needs llguidance: pip install 'longreach[structured]' on the head")
        if self._text_tokenizer is None:
            raise UserError("structured_outputs: needs the model's tokenizer.json, which is not there")
        from llguidance import LLTokenizer

        with self._lock:
            if self._tokenizer is None:
                vocabulary = _Vocabulary(self._text_tokenizer, self._vocab_size, self._end_ids)
                self._special = [vocabulary.tokens[i].decode(errors="replace") for i in vocabulary.special_token_ids]
                self._tokenizer = LLTokenizer(vocabulary, eos_token=self._end_ids or None)  # type: ignore[arg-type]
            return self._tokenizer


class _Vocabulary:
    """A tokenizer as llguidance takes it: the bytes of every id, and how text behind other text is tokenised.

    Special for it, so that a grammar has them by name (`<tool_call>`) and no text does, are special tokens and all
    added ones that look like tags.
    """

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokenizer: TextTokenizer, vocab_size: int, end_ids: Sequence[int]) -> None:
        try:
            tokens = tokenizer.vocabulary()
        except TokenizerError as error:
            raise UserError(f"structured_outputs: this model's tokenizer cannot be used: {error}") from error
        self.tokens = tokens + [b""] * (vocab_size - len(tokens))
        tags = {tokenizer.added_id(text) for text in tokenizer.added_texts if text[0] == "<" and text[-1] == ">"}
        self.special_token_ids = [i for i in range(len(tokens)) if i in tags or tokenizer.is_special(i)]
        if not end_ids:  # it wants one: an id that no model has
            self.tokens.append(b"<end>")
            self.special_token_ids.append(len(self.tokens) - 1)
        self.eos_token_id = end_ids[0] if end_ids else len(self.tokens) - 1
        self._tokenizer = tokenizer

    def __call__(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, literal=True, continues=True)


def grammar_of(constraint: Constraint) -> str:
    """Return what llguidance compiles. Raises InvalidRequest: a schema that is not supported."""
    try:
        return _grammar(constraint)
    except InvalidRequest:
        raise
    except ValueError as error:  # lone surrogates, which JSON can carry, or no JSON as Rust reads it
        raise InvalidRequest(f"structured_outputs: {' '.join(str(error).split())[:200]}") from error


def _grammar(constraint: Constraint) -> str:
    from llguidance import LLMatcher

    match constraint.kind:
        case "json_schema" | "json_object":
            return LLMatcher.grammar_from_json_schema(json_schema.to_compile(constraint.schema()))
        case "regex":
            return LLMatcher.grammar_from_regex(constraint.text)
        case "choice":
            return LLMatcher.grammar_from_lark("start: " + " | ".join(map(json.dumps, constraint.choices())))
    return LLMatcher.grammar_from_lark(json_schema.bound_white_space(constraint.text))


def is_empty(mask: bytes | bytearray) -> bool:
    """Return whether no bit of a mask is set."""
    return mask.count(0) == len(mask)


def _clear(mask: bytearray, token: int) -> None:
    if token // 8 < len(mask):
        mask[token // 8] &= ~(1 << token % 8) & 0xFF
