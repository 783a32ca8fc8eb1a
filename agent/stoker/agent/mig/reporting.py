"""What is asked about partitions, understood; and what is told where there is little to tell.

MigRefusal     it is not done, or cannot be told, and why
UnknownGpu     no GPU here is called so
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace

import msgspec

from stoker.agent.mig.declared import ALL, Declaration, wanted_by
from stoker.agent.mig.operations import Declared
from stoker.agent.model import NumberedInventory
from stoker.agent.partitions import GpuMigStatus, GpuPartitions
from stoker.core.errors import BadInput, ExitCode, StokerError, shown
from stoker.core.mig.files import wanted_of
from stoker.core.mig.geometry import MigState, Wanted
from stoker.core.mig.reports import GpuMigFacts, MigAsk

_UNDER_WAY = frozenset(
    {MigState.PENDING, MigState.DRAINING, MigState.APPLYING, MigState.ROLLING_BACK}
)


class MigRefusal(StokerError):
    """It is not done, or cannot be told; the text says why, and what to do about it."""

    exit_code = ExitCode.REFUSED


class UnknownGpu(StokerError):
    """No GPU here is called so."""

    exit_code = ExitCode.NOT_FOUND


def find_gpus(names: Sequence[str], known: Mapping[str, int]) -> tuple[str, ...]:
    """Return the UUIDs of the GPUs that are named by UUID or index; raises UnknownGpu.

    `known`: the index of each GPU of the node, by UUID.
    """
    found: list[str] = []
    for name in names:
        uuids = [uuid for uuid, index in known.items() if name in (uuid, str(index))]
        if not uuids:
            there = ", ".join(f"{index} ({uuid})" for uuid, index in known.items()) or "none"
            raise UnknownGpu(f"no GPU is called {shown(name)} here; there are {there}")
        found += [uuid for uuid in uuids if uuid not in found]
    return tuple(found)


def wanted_by_ask(
    ask: MigAsk, declaration: Declaration, gpus: Sequence[GpuPartitions]
) -> Mapping[str, Declared]:
    """Return what is asked of which of the GPUs, by UUID; raises BadInput or UnknownGpu.

    An ask without a configuration is about the agent's own.
    """
    named = find_gpus(ask.gpus, {each.uuid: each.index for each in gpus})
    wanted: Mapping[str, Wanted]
    if ask.entries:
        wanted, name = wanted_of(ask.entries, gpus), ask.config
    elif declaration.is_empty:
        raise BadInput("no configuration is given, and the agent's own (mig) declares nothing")
    else:
        wanted, name = wanted_by(declaration, gpus), declaration.config
    found = {
        uuid: Declared(each, name) for uuid, each in wanted.items() if not named or uuid in named
    }
    if not found:
        meant = ", ".join(f"{each.index} ({each.model})" for each in gpus) or "none with MIG"
        raise BadInput(f"configuration {shown(name)} is about no GPU that is meant; here {meant}")
    return found


def still_withheld(
    statuses: Iterable[GpuMigStatus], outdated: Collection[str], waits: str
) -> tuple[GpuMigStatus, ...]:
    """Return what is told, with those GPUs withheld whose MIG devices the node knows no more.

    `outdated`: they were changed, and the inventory not read since; `waits`: what holds up all.
    """
    return tuple(
        replace(
            each,
            is_withheld=each.is_withheld or each.gpu_uuid in outdated,
            reason=_held_up(each.state, each.reason, waits),
        )
        for each in statuses
    )


def statuses_unread(
    inventory: NumberedInventory | None,
    known: Collection[str],
    declaration: Declaration,
    reason: str,
) -> tuple[GpuMigStatus, ...]:
    """Return what is told of GPUs with MIG whose partitions could never be read.

    Whether what is declared for one is in place is not known then, so it takes nothing new.
    """
    if inventory is None:
        return ()
    found: list[GpuMigStatus] = []
    for gpu in (each.identity for each in inventory.gpus):
        if gpu.mig_enabled is None or gpu.uuid in known:
            continue
        is_declared = _is_declared(declaration, gpu.uuid, gpu.index)
        found.append(
            GpuMigStatus(
                gpu.uuid,
                state=MigState.PENDING if is_declared else None,
                reason=reason,
                config=declaration.config if is_declared else "",
                is_withheld=is_declared,
            )
        )
    return tuple(found)


def all_facts(
    facts: Iterable[GpuMigFacts],
    inventory: NumberedInventory | None,
    statuses: Iterable[GpuMigStatus],
) -> tuple[GpuMigFacts, ...]:
    """Return the facts by index, those GPUs included of which only the inventory tells.

    `statuses`: what is told to the aggregator, which may know what holds a GPU up.
    """
    told = {each.gpu_uuid: each for each in statuses}
    found = {each.uuid: _as_told(each, told.get(each.uuid)) for each in facts}
    for gpu in () if inventory is None else (each.identity for each in inventory.gpus):
        if gpu.uuid not in found:
            status = told.get(gpu.uuid, GpuMigStatus(gpu.uuid))
            found[gpu.uuid] = GpuMigFacts(
                uuid=gpu.uuid,
                index=gpu.index,
                model=gpu.model,
                pci_device_id="",
                mode=gpu.mig_enabled,
                mode_pending=None,
                instances=(),
                state=status.state or "",
                reason=status.reason,
                config=status.config,
                is_withheld=status.is_withheld,
                unread=status.reason if gpu.mig_enabled is not None else "",
            )
    return tuple(sorted(found.values(), key=lambda each: each.index))


def _as_told(facts: GpuMigFacts, status: GpuMigStatus | None) -> GpuMigFacts:
    if status is None:
        return facts
    return msgspec.structs.replace(facts, reason=status.reason, is_withheld=status.is_withheld)


def _held_up(state: MigState | None, reason: str, waits: str) -> str:
    return f"waits: {waits}" if waits and state in _UNDER_WAY else reason


def _is_declared(declaration: Declaration, uuid: str, index: int) -> bool:
    """Whether something is declared for a GPU; for its board, perhaps, which is not known."""
    if any(name in {uuid, str(index), ALL} for name, _ in declaration.gpus):
        return True
    return any(each.devices is None or index in each.devices for each in declaration.entries)
