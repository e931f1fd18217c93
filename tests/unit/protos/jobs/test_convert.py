"""Messages as plain values, field by field."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest

from protos.jobs import jobs_pb2 as pb
from protos.jobs.convert import read_message, to_dict


@dataclass(frozen=True)
class Part:
    total: int
    eta_ms: int | None


@dataclass(frozen=True)
class Whole:
    finish_reason: str
    progress: Part
    token_ids: tuple[int, ...]
    reasoning: str | None
    attention: Mapping[str, Any]


@dataclass(frozen=True)
class Several:
    state: str
    answers: tuple[Whole, ...]
    labels: Mapping[str, str]
    started: float | None


@dataclass(frozen=True)
class Likely:
    part: str
    top: tuple[tuple[int, float], ...]


def test_fields_by_name() -> None:
    answer = pb.Answer(finish_reason="stop", token_ids=[3, 4], reasoning="", progress=pb.Progress(total=7, eta_ms=0))
    answer.attention.CopyFrom(pb.AttentionSummary(mode="dense"))
    whole = read_message(Whole, answer)
    assert (whole.finish_reason, whole.progress, whole.token_ids, whole.reasoning) == ("stop", Part(7, 0), (3, 4), "")
    assert whole.attention["mode"] == "dense"
    job = pb.Job(state=pb.FAILED, answers=[answer, pb.Answer()], labels={"a": "b"}, started=0.0)
    assert read_message(Several, job) == Several("failed", (whole, read_message(Whole, pb.Answer())), {"a": "b"}, 0.0)
    top = [pb.TokenLogprob(token_id=1, logprob=-0.5)]
    assert read_message(Likely, pb.Token(part=pb.ANSWER, top=top)) == Likely("answer", ((1, -0.5),))


def test_what_is_absent() -> None:
    assert read_message(Whole, pb.Answer()) == Whole("", Part(0, None), (), None, {})
    assert read_message(Several, pb.Job()) == Several("", (), {}, None)
    assert read_message(Likely, pb.Token()) == Likely("", ())


def test_an_enum_of_a_later_version_has_no_name() -> None:
    assert read_message(Several, pb.Job.FromString(b"\x10\x63")).state == ""  # state: 99


def test_a_field_that_no_message_has_is_our_mistake() -> None:
    with pytest.raises(KeyError, match="total"):
        read_message(Part, pb.Job())


def test_dictionaries_have_every_field() -> None:
    message = pb.Reproducibility(model="m", seed=1 << 63, versions={"ray": "2"})
    values = to_dict(message)
    assert list(values) == [item.name for item in pb.Reproducibility.DESCRIPTOR.fields]
    assert (values["model"], values["seed"], values["versions"], values["dtype"]) == ("m", 1 << 63, {"ray": "2"}, "")
    layer = pb.LayerAttention(layer=3, density=[0.1, 0.30001], fallbacks=[2])
    attention = to_dict(pb.AttentionSummary(density=0.123456789, layers=[layer]))
    assert attention["density"] == 0.123456789
    assert attention["layers"][0]["density"] == [0.1, 0.3]  # floats of single precision
    assert (attention["layers"][0]["layer"], attention["layers"][0]["fallbacks"]) == (3, [2])
