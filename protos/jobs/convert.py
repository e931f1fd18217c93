"""From protobuf messages to plain values, by the names of their fields."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import is_dataclass
from types import NoneType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message

T = TypeVar("T")
Reader = Callable[[Any], Any]  # the value of one field of a message


def read_message(kind: type[T], message: Message) -> T:
    """Return a dataclass or NamedTuple whose fields have the values of the message's fields of the same names.

    By the type that it declares: nested messages become dataclasses, NamedTuples, mappings (empty when absent) or
    tuples, repeated fields tuples, absent optional fields None. An enum becomes its name in lower case, "" when it is
    unspecified or of a later version.
    """
    record: Any = kind
    return kind(*[read(message) for read in _readers(record, message.DESCRIPTOR)])


def to_dict(message: Message) -> dict[str, Any]:
    """Return all fields by name, also those that are not set; floats of single precision rounded to 4 digits.

    A message in it that is not there is an empty mapping.
    """
    return {
        item.name: _plain(item, getattr(message, item.name)) if _is_there(message, item) else {}
        for item in message.DESCRIPTOR.fields
    }


def _is_there(message: Message, item: Any) -> bool:
    return item.message_type is None or item.is_repeated or message.HasField(item.name)


def _plain(item: Any, value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Message):
        return to_dict(value)
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return [_plain(item, one) for one in value]
    return round(value, 4) if item.type == FieldDescriptor.TYPE_FLOAT else value


@functools.cache
def _readers(kind: type[Any], descriptor: Descriptor) -> list[Reader]:
    return [_reader(hint, descriptor.fields_by_name[name]) for name, hint in get_type_hints(kind).items()]


def _reader(hint: Any, item: FieldDescriptor) -> Reader:
    name, origin, inner = item.name, get_origin(hint), get_args(hint)
    read = operator.attrgetter(name)
    if _is_record(hint):
        return lambda message: read_message(hint, read(message))
    if NoneType in inner:
        present = _reader(inner[0], item)
        return lambda message: present(message) if message.HasField(name) else None
    if origin is Mapping and not item.is_repeated:  # a map is a repeated field
        return lambda message: to_dict(read(message)) if message.HasField(name) else {}
    if origin is Mapping:
        return lambda message: dict(read(message))
    if item.is_repeated and _is_record(inner[0]):
        return lambda message: tuple([read_message(inner[0], one) for one in read(message)])
    if item.is_repeated and item.message_type is not None:
        values = operator.attrgetter(*(part.name for part in item.message_type.fields))
        return lambda message: tuple(map(values, read(message)))
    if item.is_repeated:
        return lambda message: tuple(read(message))
    if item.enum_type is not None:
        names = {value.number: value.name.lower() for value in item.enum_type.values if value.number}
        return lambda message: names.get(read(message), "")
    return read


def _is_record(hint: Any) -> bool:
    """Whether a type is a dataclass or a NamedTuple."""
    return isinstance(hint, type) and (is_dataclass(hint) or hasattr(hint, "_fields"))
