"""Engines take turns; medians, ratios and errors of the comparison."""

from __future__ import annotations

import sys

import pytest

from protos.errors import UserError
from protos.node.peers import Engine, Run, compare, run_peer


def engine(calls: list[str], name: str, first: list[float], decode: list[float]) -> Engine:
    def run(length: int, seed: int) -> Run:
        calls.append(f"{name} {length} {seed}")
        return {"first_token_s": first[seed - 1], "decode_s": decode[seed - 1], "version": f"{name} {seed}"}

    return run


def test_two_engines_in_turns() -> None:
    calls: list[str] = []
    entry = compare(
        {
            "ours": engine(calls, "ours", [2.0, 1.0, 4.0], [0.01, 0.03, 0.02]),
            "theirs": engine(calls, "theirs", [4.0, 4.0, 4.0], [0.04, 0.04, 0.04]),
        },
        1000,
        3,
    )
    assert calls == [f"{name} 1000 {seed}" for seed in (1, 2, 3) for name in ("ours", "theirs")]
    assert entry == {
        "length": 1000,
        "ours": {
            "prefill_tokens_per_s": 500.0, "decode_ms": 20.0, "first_token_s": [2.0, 1.0, 4.0],
            "decode_ms_runs": [10.0, 30.0, 20.0], "version": "ours 3",
        },
        "theirs": {
            "prefill_tokens_per_s": 250.0, "decode_ms": 40.0, "first_token_s": [4.0] * 3,
            "decode_ms_runs": [40.0] * 3, "version": "theirs 3",
        },
        "ratio_prefill_tokens_per_s": 2.0,
        "ratio_decode_ms": 0.5,
    }  # fmt: skip


def test_one_engine_has_no_ratio(capsys: pytest.CaptureFixture[str]) -> None:
    entry = compare({"ours": engine([], "ours", [2.0], [0.01])}, 100, 1)
    assert set(entry) == {"length", "ours"}
    assert capsys.readouterr().err == "100: ours: 50 tokens/s\n"


def test_output_and_failure_of_a_process() -> None:
    assert run_peer("x", [sys.executable, "-c", "print(input()); print(2)"], "1\n") == ["1", "2"]
    with pytest.raises(UserError, match=r"^peers: x: exit 3: it broke$"):
        run_peer("x", [sys.executable, "-c", "import sys; print('it broke', file=sys.stderr); sys.exit(3)"])
