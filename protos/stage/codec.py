"""Dataclasses to protobuf and back: every message has the name and the fields of its dataclass in `messages`.

What arrives passes the checks of the dataclasses' constructors.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from google.protobuf.descriptor import FieldDescriptor

from protos.stage import messages
from protos.stage import stage_pb2 as pb
from protos.stage.messages import LoadProgress, ShardSpec, StepPlan, StepResult

_Conversion = Callable[[Any], Any]


def shard_to_pb(shard: ShardSpec) -> pb.ShardSpec:
    message: pb.ShardSpec = _encoder("ShardSpec")(shard)
    return message


def shard_from_pb(message: pb.ShardSpec) -> ShardSpec:
    shard: ShardSpec = _decoder("ShardSpec")(message)
    return shard


def progress_to_pb(progress: LoadProgress) -> pb.LoadProgress:
    message: pb.LoadProgress = _encoder("LoadProgress")(progress)
    return message


def progress_from_pb(message: pb.LoadProgress) -> LoadProgress:
    progress: LoadProgress = _decoder("LoadProgress")(message)
    return progress


def plans_to_pb(plans: Iterable[StepPlan], with_tokens: bool = True) -> pb.StepPlans:
    """Encode plans; `with_tokens=False` leaves out the token ids, which only the first stage reads."""
    return pb.StepPlans(plans=map(_encoder("StepPlan"), plans if with_tokens else map(_without_tokens, plans)))


def plans_from_pb(message: pb.StepPlans) -> list[StepPlan]:
    """Decode plans.

    Raises:
        ValueError: a sampling parameter is out of its range.
    """
    return list(map(_decoder("StepPlan"), message.plans))


def results_to_pb(results: Iterable[StepResult]) -> pb.StepResults:
    return pb.StepResults(results=map(_encoder("StepResult"), results))


def results_from_pb(message: pb.StepResults) -> list[StepResult]:
    return list(map(_decoder("StepResult"), message.results))


def _without_tokens(plan: StepPlan) -> StepPlan:
    return replace(plan, slices=tuple(replace(part, token_ids=()) for part in plan.slices))


@functools.cache
def _encoder(name: str) -> _Conversion:
    """Return the function that turns a dataclass of this name into its message; None values are left out."""
    message = getattr(pb, name)
    if name == "History":  # a message only because a repeated field cannot be absent
        return lambda token_ids: message(token_ids=token_ids)
    fields = [(field.name, _convert_with(_encoder, field)) for field in message.DESCRIPTOR.fields]

    def encode(value: Any) -> Any:
        items = ((key, convert, getattr(value, key)) for key, convert in fields)
        return message(**{key: convert(item) for key, convert, item in items if item is not None})

    return encode


@functools.cache
def _decoder(name: str) -> _Conversion:
    """Return the function that turns a message of this name into its dataclass; absent fields become None."""
    if name == "History":
        return lambda message: tuple(message.token_ids)
    plain = getattr(messages, name)
    fields = [
        (field.name, field.has_presence, _convert_with(_decoder, field))
        for field in getattr(pb, name).DESCRIPTOR.fields
    ]

    def decode(message: Any) -> Any:
        return plain(
            **{
                key: None if may_be_absent and not message.HasField(key) else convert(getattr(message, key))
                for key, may_be_absent, convert in fields
            }
        )

    return decode


def _convert_with(converter: Callable[[str], _Conversion], field: FieldDescriptor) -> _Conversion:
    """Return the conversion of a field, whose messages `converter` knows by their name."""
    if field.message_type is None:
        return tuple if field.is_repeated else _unchanged
    convert = converter(field.message_type.name)
    return (lambda items: tuple(map(convert, items))) if field.is_repeated else convert


def _unchanged(value: Any) -> Any:
    return value
