"""What older stokers stored, in the form of today: ledgers outlive versions."""

from collections.abc import Callable
from typing import Any, cast

import msgspec

# A request named one model, and an allocation had one node, before there were gangs. What is stored
# today has this field in every request; inside a text its quotes would be escaped, and a label of
# that name has a text, not a list.
_TODAY = '"models":['

_EVENTS = ("AllocationRequested", "AllocationGranted", "AllocationAdopted")


def event_of_today(kind: str, payload: str) -> str:
    """Return the payload as `KINDS` has it now; raises msgspec.MsgspecError for what is none."""
    if kind not in _EVENTS or _TODAY in payload:
        return payload
    return _changed(payload, _upgrade)


def snapshot_of_today(part: str) -> str:
    """Return a part of a snapshot as it is now; raises msgspec.MsgspecError for what is none."""
    if _TODAY in part:
        return part
    return _changed(part, _upgrade_snapshot)


def _changed(text: str, upgrade: Callable[[dict[str, Any]], None]) -> str:
    found = msgspec.json.decode(text, type=dict[str, Any])
    upgrade(found)
    return msgspec.json.encode(found).decode()


def _upgrade_snapshot(snapshot: dict[str, Any]) -> None:
    for allocation in snapshot.get("allocations", ()):
        _upgrade(allocation)


def _upgrade(stored: dict[str, Any]) -> None:
    """Change an allocation, or an event about one, in place."""
    request = stored.get("request")
    if isinstance(request, dict):
        fields = cast("dict[str, Any]", request)
        model = fields.pop("model", None)
        fields["models"] = [model] if model else []
    node, devices = stored.pop("node", None), stored.pop("devices", None)
    if devices is not None:
        stored["placements"] = [{"node": node, "devices": devices}] if node else []
