"""Who has the GPUs, for the agent's own page: processes, and assignments by others than stoker.

Info series are told of so many processes and assignments at most; how many go without one is told.
Of a GPU whose processes could not be read none is told, of the node none when the reading is old.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from stoker.agent.metrics.exposition import Family, labels, pairs
from stoker.agent.metrics.families import in_braces, written
from stoker.agent.metrics.gpu_rows import ASSIGNMENTS_MAX, PROCESSES_MAX
from stoker.agent.metrics.row import ASSIGNMENT_INFO_LABELS, OWNER_LABELS, PROCESS_LABELS
from stoker.agent.metrics.snapshot import Snapshot
from stoker.agent.model import AttributedProcess, ProcessTable
from stoker.agent.owners import Assignment

_ID_CHARACTERS = 12  # of a container without a name, as its own tools show it


def holder_families(snapshot: Snapshot, base: Mapping[str, str]) -> Iterator[Family]:
    """Yield the families of processes and assignments; `base`: labels of the GPUs by UUID."""
    table = snapshot.processes
    if table is None:
        return
    yield from _counts(table, base)
    node = snapshot.view.identity.node
    processes = _merged(table)
    assignments = sorted({_assignment_values(node, each) for each in table.assignments})
    yield from _process_series(node, _most_first(processes)[:PROCESSES_MAX])
    given = sorted({(each.gpu_uuid, each.by) for each in table.assignments})
    yield written(
        "stoker_gpu_assigned",
        ((in_braces(base[uuid], "by", by), 1) for uuid, by in given if uuid in base),
    )
    yield written(
        "stoker_gpu_assignment_info",
        ((labels(ASSIGNMENT_INFO_LABELS, each), 1) for each in assignments[:ASSIGNMENTS_MAX]),
    )
    yield written("stoker_agent_assignments_known", [("", not table.assignments_unknown)])
    left_out = {
        "assignments": max(0, len(assignments) - ASSIGNMENTS_MAX),
        "processes": max(0, len(processes) - PROCESSES_MAX),
    }
    yield written(
        "stoker_agent_series_left_out",
        ((labels(("what",), (what,)), number) for what, number in left_out.items()),
    )


def _counts(table: ProcessTable, base: Mapping[str, str]) -> Iterator[Family]:
    every = Counter(each.process.gpu_uuid for each in table.processes)
    ours = Counter(each.process.gpu_uuid for each in table.processes if each.allocation_id)
    known = [uuid for uuid in base if uuid not in table.unread_gpu_uuids]
    yield written("stoker_gpu_processes", ((in_braces(base[uuid]), every[uuid]) for uuid in known))
    yield written(
        "stoker_gpu_foreign_processes",
        ((in_braces(base[uuid]), every[uuid] - ours[uuid]) for uuid in known),
    )


@dataclass(frozen=True, slots=True)
class _Shown:
    """A process on a GPU, however many MIG devices of it the process is on."""

    first: AttributedProcess
    memory_bytes: int | None  # None: of one of them at least it is not told


def _merged(table: ProcessTable) -> list[_Shown]:
    shown: dict[tuple[str, int], _Shown] = {}
    for each in table.processes:
        process = each.process
        if process.gpu_uuid in table.unread_gpu_uuids:
            continue
        key = (process.gpu_uuid, process.pid)
        before = shown.get(key)
        if before is None:
            shown[key] = _Shown(each, process.memory_used_bytes)
        else:
            parts = (before.memory_bytes, process.memory_used_bytes)
            known = [part for part in parts if part is not None]
            total = sum(known) if len(known) == len(parts) else None
            shown[key] = _Shown(before.first, total)
    return list(shown.values())


def _most_first(processes: Iterable[_Shown]) -> list[_Shown]:
    """Return them by memory, so that what is left out is least; in an order that stays."""

    def rank(each: _Shown) -> tuple[int, str, int]:
        process = each.first.process
        return (-(each.memory_bytes or 0), process.gpu_uuid, process.pid)

    return sorted(processes, key=rank)


def _process_series(node: str, processes: Iterable[_Shown]) -> Iterator[Family]:
    by_key = {(each.first.process.gpu_uuid, each.first.process.pid): each for each in processes}
    rows = [
        (pairs(PROCESS_LABELS, (node, uuid, str(pid))), by_key[uuid, pid])
        for uuid, pid in sorted(by_key)
    ]
    yield written(
        "stoker_gpu_process_memory_used_bytes",
        (
            (in_braces(text), each.memory_bytes)
            for text, each in rows
            if each.memory_bytes is not None
        ),
    )
    yield written(
        "stoker_gpu_process_info",
        (
            (f"{{{text},{pairs(OWNER_LABELS, _owner_values(each.first))}}}", 1)
            for text, each in rows
        ),
    )


def _owner_values(each: AttributedProcess) -> tuple[str, ...]:
    process, owner = each.process, each.process.owner
    return (
        *(process.user, program(process.command), owner.unit),
        *(owner.pod_name, owner.pod_uid, owner.pod_namespace),
        *(owner.container_name or owner.container_id[:_ID_CHARACTERS], owner.slurm_job),
        each.allocation_id,
    )


def program(command: str) -> str:
    """Return a command without its folder and its arguments: those may hold secrets.

    What stands in parentheses or brackets is no command line: a remark, or a kernel thread.
    """
    if command.startswith(("(", "[")):
        return command
    return command.partition(" ")[0].rpartition("/")[2]


def _assignment_values(node: str, each: Assignment) -> tuple[str, ...]:
    return (node, each.gpu_uuid, each.mig_device_uuid, each.by, each.holder)
