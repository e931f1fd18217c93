"""Dataclasses to protobuf: every message has the name and the fields of its dataclass in `messages`.

`protos.jobs.convert.read_message` is the way back; what arrives passes the checks of the dataclasses' constructors.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from google.protobuf.descriptor import FieldDescriptor

from protos.stage import stage_pb2 as pb
from protos.stage.messages import StepPlan

_Encode = Callable[[Any], Any]


def encode(value: object) -> Any:
    """Return the message of a dataclass."""
    return _encoder(type(value).__name__)(value)


def plans_to_pb(plans: Iterable[StepPlan], with_tokens: bool = True, with_masks: bool = True) -> pb.StepPlans:
    """Encode plans, or leave out what a stage does not read.

    Args:
        with_tokens: have the token ids, which only the first stage reads.
        with_masks: have the masks of samples, and targets, which only the last stage reads.
    """
    if not with_tokens:
        plans = map(_without_tokens, plans)
    if not with_masks:
        plans = map(_without_masks, plans)
    return pb.StepPlans(plans=map(encode, plans))


def _without_tokens(plan: StepPlan) -> StepPlan:
    return replace(plan, slices=tuple(replace(part, token_ids=()) for part in plan.slices))


def _without_masks(plan: StepPlan) -> StepPlan:
    if not any(part.targets or (part.sample is not None and part.sample.mask) for part in plan.slices):
        return plan
    parts = (
        replace(part, targets=(), sample=None if part.sample is None else replace(part.sample, mask=b""))
        for part in plan.slices
    )
    return replace(plan, slices=tuple(parts))


@functools.cache
def _encoder(name: str) -> _Encode:
    """Return the function that turns a dataclass of this name into its message; None values are left out."""
    message = getattr(pb, name)
    fields = [(field.name, _field_encoder(field)) for field in message.DESCRIPTOR.fields]

    def fill(value: Any) -> Any:
        items = ((key, convert, getattr(value, key)) for key, convert in fields)
        return message(**{key: convert(item) for key, convert, item in items if item is not None})

    return fill


def _field_encoder(field: FieldDescriptor) -> _Encode:
    if field.message_type is None:
        return lambda value: value
    convert = _encoder(field.message_type.name)
    return (lambda items: map(convert, items)) if field.is_repeated else convert
