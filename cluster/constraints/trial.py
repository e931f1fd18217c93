"""A trial of a grammar in a child process: some end the process that compiles them, others take for ever.

llguidance has limits of its own, which the head sets too; a chain of a few thousand rules, though, overflows the stack,
and thousands of properties take minutes. What the child has survived within its limits, the head compiles itself.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cluster.common.child_limits import limit_resources
from protos.errors import InvalidRequest, UserError

CPU_SECONDS = 4  # of the child, its start included
MEMORY_BYTES = 1 << 30  # its address space
_WALL_SECONDS = 30.0  # on a busy machine
_STACK_BYTES = 1 << 20  # an eighth of what threads of the head have
_STEPS = 32  # of an answer that are tried
_PROGRAM = "import sys; sys.path += sys.argv[1:]\nfrom cluster.constraints.trial import main\nmain()"
_at_once = threading.BoundedSemaphore(2)


class CompilerBusy(UserError):
    """Other constraints are being compiled; try again in a moment."""


def limits() -> Any:
    """Return the limits of llguidance, the same ones in the child and in the head."""
    from llguidance import LLParserLimits

    return LLParserLimits(max_grammar_size=100_000, max_lexer_states=50_000, verbose_errors=False)


def try_grammar(grammar: str, special: Sequence[str] = ()) -> None:
    """Compile a grammar in a child process and take the first steps of an answer.

    Args:
        special: the special tokens of the model, which a grammar may name.

    Raises:
        InvalidRequest: it cannot be compiled, matches nothing, or takes too much. CompilerBusy: others do.
    """
    if not _at_once.acquire(timeout=_WALL_SECONDS):
        raise CompilerBusy("structured_outputs: other constraints take long to be compiled: try again")
    try:
        code, problem = _run(json.dumps([grammar, *special]))
    finally:
        _at_once.release()
    if code == 0 and not problem:
        return
    if code:
        is_slow = code in (-signal.SIGXCPU, -signal.SIGKILL)
        reason = "takes too long to be compiled" if is_slow else "is too deep, or needs too much memory"
        problem = f"{reason}: make it smaller"
    raise InvalidRequest(f"structured_outputs: {problem}")


def _run(task: str) -> tuple[int, str]:
    """Return the exit code of a child, -SIGKILL when it took too long, and what is wrong with the grammar."""
    found = importlib.util.find_spec("llguidance")
    assert found is not None
    assert found.origin is not None
    paths = [Path(__file__).parents[2], Path(found.origin).parents[1]]
    environment = {key: os.environ[key] for key in ("LD_LIBRARY_PATH",) if key in os.environ}
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _PROGRAM, *map(str, paths)], input=task.encode(),
            capture_output=True, timeout=_WALL_SECONDS, cwd="/", env=environment,
            start_new_session=True, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return -signal.SIGKILL, ""
    return done.returncode, done.stdout.decode(errors="replace")


def main() -> None:
    """Try the grammar of standard input, behind it special tokens; writes what is wrong with it, if anything is."""
    grammar, *special = json.loads(sys.stdin.buffer.read())
    limit_resources(MEMORY_BYTES, open_files=16, cpu_seconds=CPU_SECONDS)
    threading.stack_size(_STACK_BYTES)
    problems: list[str] = []
    thread = threading.Thread(target=lambda: problems.append(_problem(grammar, special)))
    thread.start()
    thread.join()
    sys.stdout.write(problems[0] if problems else "cannot be compiled")


class _Bytes:
    """A tokenizer whose tokens are the 256 bytes, with ids from 1, special ones behind them, and an end token, 0."""

    eos_token_id, bos_token_id = 0, None
    is_tokenizer_wrapper = True

    def __init__(self, special: Sequence[str]) -> None:
        self.tokens = [b"<end>", *(bytes([byte]) for byte in range(256)), *(text.encode() for text in special)]
        self.special_token_ids = [0, *range(257, len(self.tokens))]

    def __call__(self, text: str) -> list[int]:
        return [byte + 1 for byte in text.encode()]


def _problem(grammar: str, special: Sequence[str]) -> str:
    """Return what is wrong with a grammar, or "": it cannot be compiled, or its answers cannot begin."""
    import llguidance

    vocabulary = _Bytes(special)
    tokenizer = llguidance.LLTokenizer(vocabulary, slices=[])  # type: ignore[arg-type]
    matcher = llguidance.LLMatcher(tokenizer, grammar, log_level=0, limits=limits())
    for step in range(_STEPS):
        mask = b"" if matcher.is_stopped() else matcher.compute_bitmask()
        if matcher.is_error():
            return " ".join(matcher.get_error().split())[:300]
        ids = [token for token in range(1, len(vocabulary.tokens)) if mask and mask[token // 8] >> token % 8 & 1]
        if not ids:
            return "" if step and matcher.is_accepting() else "no text, or none but the empty one, can match it"
        matcher.consume_token(ids[len(ids) // 2])
    return ""
