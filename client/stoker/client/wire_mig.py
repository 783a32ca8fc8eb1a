"""The call about partitions (MIG) as a value, and how its answer is read."""

import uuid
from collections.abc import Mapping

import msgspec

from stoker.client import errors
from stoker.client.retrying import Method
from stoker.client.wire import Call
from stoker.client.wire_requests import sendable
from stoker.core.errors import shown
from stoker.core.mig.reports import MigAsk, MigEntry, MigReport, Verb
from stoker.v1 import mig_pb2

# The aggregator waits so long for the node's agent.
RELAY_SECONDS = 30.0

_VERBS: Mapping[Verb, "mig_pb2.MigVerb.ValueType"] = {
    "plan": mig_pb2.MIG_VERB_PLAN,
    "apply": mig_pb2.MIG_VERB_APPLY,
    "undo": mig_pb2.MIG_VERB_UNDO,
    "status": mig_pb2.MIG_VERB_STATUS,
}
_CHANGING: frozenset[Verb] = frozenset({"apply", "undo"})
_report = msgspec.json.Decoder(MigReport)


def mig(node: str, ask: MigAsk) -> Call[MigReport]:
    message = mig_pb2.MigRequest(node=sendable(node, "node"), ask=_ask(ask))
    return Call(Method.MIG, message, _answer, about=node, wait_seconds=RELAY_SECONDS)


def _ask(ask: MigAsk) -> mig_pb2.MigAsk:
    operation_id = ask.operation_id
    if not operation_id and ask.verb in _CHANGING:
        operation_id = uuid.uuid4().hex  # a call that is sent again must be the same wish
    # An entry about an empty list of GPUs is about none; in a message that would mean all.
    entries = [each for each in ask.entries if each.devices != ()]
    if ask.entries and not entries:
        raise errors.InvalidRequest(f"entries: those of {shown(ask.config)} are about no GPU")
    try:
        return mig_pb2.MigAsk(
            verb=_VERBS[ask.verb],
            operation_id=sendable(operation_id, "operation_id"),
            config=sendable(ask.config, "config"),
            entries=[_entry(each) for each in entries],
            gpus=[sendable(each, "gpus") for each in ask.gpus],
            drain_seconds=ask.drain_seconds,
            evict=ask.evict,
        )
    except ValueError as error:  # a number that its field cannot carry
        raise errors.InvalidRequest(f"mig: {error}") from error


def _entry(entry: MigEntry) -> mig_pb2.MigEntry:
    return mig_pb2.MigEntry(
        device_filter=[sendable(each, "device_filter") for each in entry.device_filter],
        devices=entry.devices or (),
        mig_enabled=entry.mig_enabled,
        mig_devices={
            sendable(name, "mig_devices"): count for name, count in entry.mig_devices.items()
        },
    )


def _answer(answer: mig_pb2.MigResponse) -> MigReport:
    try:
        return _report.decode(answer.report_json)
    except (msgspec.DecodeError, RecursionError) as error:
        raise errors.AggregatorFailed(
            f"what the node's agent reports cannot be understood: {error}"
        ) from error
