"""Durable events and snapshots as JSON text, the form in which the store keeps them."""

from collections.abc import Iterable, Iterator

import msgspec

from stoker.aggregator.events import KINDS, DurableEvent
from stoker.aggregator.fleet import Snapshot
from stoker.aggregator.older_forms import event_of_today, snapshot_of_today

# One part of a snapshot is written in one go between two commits, so it must be small.
OBJECTS_PER_PART = 500

# Those of a snapshot that are cut into parts.
_TABLES = ("nodes", "allocations", "conditions", "failures")

_DECODERS = {name: msgspec.json.Decoder(kind) for name, kind in KINDS.items()}
_SNAPSHOT = msgspec.json.Decoder(Snapshot)
_ENCODER = msgspec.json.Encoder()


class Undecodable(ValueError):
    """A stored text is not what it should be; the message says what it is instead."""


def encode_event(event: DurableEvent) -> tuple[str, str]:
    """Return the event's kind and its JSON."""
    return type(event).__name__, _ENCODER.encode(event).decode()


def decode_event(kind: str, payload: str) -> DurableEvent:
    """Return the event that `encode_event` gave; raises Undecodable."""
    decoder = _DECODERS.get(kind)
    if decoder is None:
        raise Undecodable(f"{kind!r} is no kind of event")
    try:
        return decoder.decode(event_of_today(kind, payload))
    except msgspec.MsgspecError as error:
        raise Undecodable(f"{kind}: {error}") from error


def encode_snapshot(snapshot: Snapshot) -> Iterator[str]:
    """Yield the snapshot in parts; there are `count_parts` of them."""
    is_empty = True
    for name in _TABLES:
        rows = getattr(snapshot, name)
        for start in range(0, len(rows), OBJECTS_PER_PART):
            part = {name: rows[start : start + OBJECTS_PER_PART]}
            yield _encoded(Snapshot(snapshot.version, **{"nodes": (), "allocations": (), **part}))
            is_empty = False
    if is_empty:
        yield _encoded(snapshot)


def count_parts(snapshot: Snapshot) -> int:
    """Return how many parts `encode_snapshot` yields."""
    parts = sum(-(-len(getattr(snapshot, name)) // OBJECTS_PER_PART) for name in _TABLES)
    return max(1, parts)


def decode_snapshot(version: int, parts: Iterable[str]) -> Snapshot:
    """Return the snapshot whose parts these are; raises Undecodable."""
    try:
        pieces = [_SNAPSHOT.decode(snapshot_of_today(part)) for part in parts]
    except msgspec.MsgspecError as error:
        raise Undecodable(f"snapshot: {error}") from error
    return Snapshot(
        version,
        tuple(node for piece in pieces for node in piece.nodes),
        tuple(allocation for piece in pieces for allocation in piece.allocations),
        tuple(condition for piece in pieces for condition in piece.conditions),
        tuple(failure for piece in pieces for failure in piece.failures),
    )


def _encoded(snapshot: Snapshot) -> str:
    return _ENCODER.encode(snapshot).decode()
