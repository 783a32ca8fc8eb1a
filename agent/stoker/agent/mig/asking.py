"""Takes in what is asked of a node's partitions: noted, or refused before anything is touched."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from stoker.agent.mig.choosing import Refusal, choose
from stoker.agent.mig.comparing import is_as_wanted, target_of, wanted_of_target
from stoker.agent.mig.events import ApplyAsked, UndoAsked
from stoker.agent.mig.in_the_way import NOBODY_THERE
from stoker.agent.mig.operations import Book, Declared, GpuRecord, Operation, Origin
from stoker.agent.mig.steps import obstacle
from stoker.agent.partitions import GpuPartitions
from stoker.core.mig.geometry import MigState

_STEPPING = frozenset({MigState.APPLYING, MigState.ROLLING_BACK})


@dataclass(frozen=True, slots=True)
class Noted:
    """What is to be remembered of the GPUs that are asked about; those that knew it are not."""

    records: Mapping[str, GpuRecord]


def ask_to_apply(
    event: ApplyAsked, book: Book, gpus: Mapping[str, GpuPartitions], now: float
) -> Noted | str:
    """Return what is to be noted, or why it is refused, naming the GPU."""
    if not event.wanted:
        return "no GPU of this node is meant by it"
    records: dict[str, GpuRecord] = {}
    for uuid, declared in event.wanted.items():
        record = book.of(uuid)
        if record.knows(event.operation_id):
            continue
        if refusal := _obstacle(uuid, record, gpus):
            return refusal
        match choose(gpus[uuid], declared.wanted, NOBODY_THERE):
            case Refusal(reason):
                return reason
            case _:
                pass
        operation = Operation(
            id=event.operation_id,
            origin=Origin.ASKED,
            config=declared.config,
            wanted=declared.wanted,
            state=MigState.PENDING,
            asked_at=now,
            declares=declared,
            declared_before=record.declared,
            leave_by=_leave_by(event, now),
            evict=event.evict,
        )
        records[uuid] = record.asked(operation)
    return Noted(records)


def ask_to_undo(
    event: UndoAsked, book: Book, gpus: Mapping[str, GpuPartitions], now: float
) -> Noted | str:
    """Return what is to be noted, or why it is refused, naming the GPU."""
    if not event.gpu_uuids and any(
        record.knows(event.operation_id) for record in book.gpus.values()
    ):
        return Noted({})
    about = event.gpu_uuids or tuple(
        uuid for uuid, gpu in gpus.items() if book.of(uuid).before(target_of(gpu)) is not None
    )
    if not about:
        return "there is nothing to undo: the partitions of no GPU of this node were changed"
    records: dict[str, GpuRecord] = {}
    for uuid in about:
        record = book.of(uuid)
        if record.knows(event.operation_id):
            continue
        if refusal := _obstacle(uuid, record, gpus):
            return refusal
        now_there = target_of(gpus[uuid])
        past = record.before(now_there)
        if past is None:
            return f"{uuid}: there is nothing to undo: its partitions were not changed"
        if reason := obstacle(gpus[uuid], past.target):
            return f"{uuid}: the layout before cannot be: {reason}"
        wanted = wanted_of_target(past.target)
        # What was declared before counts again, if it was in place then, or is all there was.
        is_kept = (
            past.declared is None or past.target == now_there or past.declared.wanted == wanted
        )
        config = past.declared.config if past.declared else ""
        operation = Operation(
            id=event.operation_id,
            origin=Origin.UNDO,
            config=config or "as before",
            wanted=wanted,
            state=MigState.PENDING,
            asked_at=now,
            declares=past.declared if is_kept else Declared(wanted, "as before"),
            declared_before=record.declared,
            leave_by=_leave_by(event, now),
            evict=event.evict,
            target=past.target,
        )
        records[uuid] = record.asked(operation)
    return Noted(records)


def configure(book: Book, configured: Mapping[str, Declared]) -> Book:
    """Return the book with what the agent's configuration declares, where it says something new."""
    for uuid in {*book.gpus, *configured}:
        record, new = book.of(uuid), configured.get(uuid)
        if new == record.configured:
            continue
        # What is no longer configured stays as it is, and is nobody's wish any more.
        is_last_said = record.declared == record.configured
        declared = new if new is not None else None if is_last_said else record.declared
        book = book.noting(uuid, replace(record, configured=new, declared=declared))
    return book


def restore_declared(
    record: GpuRecord, gpu: GpuPartitions, operation_id: str, now: float
) -> GpuRecord | None:
    """Return it with the operation that brings what is declared; None: it is in place."""
    declared = record.declared
    if declared is None or is_as_wanted(gpu, declared.wanted):
        return None
    operation = Operation(
        id=operation_id,
        origin=Origin.DECLARED,
        config=declared.config,
        wanted=declared.wanted,
        state=MigState.PENDING,
        asked_at=now,
        declares=declared,
        declared_before=declared,
    )
    return record.asked(operation)


def _obstacle(uuid: str, record: GpuRecord, gpus: Mapping[str, GpuPartitions]) -> str:
    if uuid not in gpus:
        known: Iterable[str] = sorted(gpus)
        return f"{uuid} has no partitions here; the GPUs that do: {', '.join(known) or 'none'}"
    operation = record.operation
    if operation is not None and operation.state in _STEPPING:
        return f"{uuid}: operation {operation.id} ({operation.config}) is {operation.state}"
    return ""


def _leave_by(event: ApplyAsked | UndoAsked, now: float) -> float | None:
    asks = event.drain_seconds > 0 or event.evict
    return now + max(0.0, event.drain_seconds) if asks else None
