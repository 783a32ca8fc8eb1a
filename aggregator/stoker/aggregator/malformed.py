"""Which field of a message that protobuf refused to parse is at fault, and why."""

from typing import Any

from google.protobuf import empty_pb2
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError
from google.protobuf.unknown_fields import UnknownFieldSet

from stoker.aggregator.limits import Malformed

_LENGTH_DELIMITED = 2  # the wire type of texts and messages


def find_fault(descriptor: Any, data: bytes) -> Malformed:
    """Return what is wrong with `data`, which is no message of type `descriptor`."""
    return _fault_in(descriptor, data, "") or Malformed(
        descriptor.name, f"{len(data)} bytes that are not a message of this type"
    )


def _fault_in(descriptor: Any, data: bytes, path: str) -> Malformed | None:
    try:
        # An empty message knows no field, so it takes whatever is well-formed and keeps it raw.
        fields = UnknownFieldSet(empty_pb2.Empty.FromString(data))
    except DecodeError:
        return Malformed(path or descriptor.name, f"{len(data)} bytes that are cut off or garbled")
    for place in range(len(fields)):
        unknown = fields[place]
        field = descriptor.fields_by_number.get(unknown.field_number)
        if field is not None and unknown.wire_type == _LENGTH_DELIMITED:
            name = f"{path}.{field.name}" if path else field.name
            fault = _fault_of(field, unknown.data, name)
            if fault is not None:
                return fault
    return None


def _fault_of(field: FieldDescriptor, data: bytes, path: str) -> Malformed | None:
    if field.type == FieldDescriptor.TYPE_STRING:
        try:
            data.decode()
        except UnicodeDecodeError as error:
            return Malformed(path, f"not UTF-8 at byte {error.start} of {len(data)}")
    if field.message_type is not None:
        return _fault_in(field.message_type, data, path)
    return None
