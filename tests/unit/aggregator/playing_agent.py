"""An agent as a small model: a journal, a stream of two queues, and no room for two."""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from tests.unit.aggregator.builders import GIB, make_samples

from stoker.aggregator.model import (
    Command,
    Device,
    DriverState,
    Frame,
    HeldAllocation,
    HoldRefusal,
    NodeFacts,
)
from stoker.aggregator.processes import Process, ProcessTable

GPU_BYTES = 16 * GIB


@dataclass
class Agent:
    """A host as it is: what it holds on disk, who else runs there, and its stream."""

    number: int
    facts: NodeFacts
    journal: dict[str, HeldAllocation] = field(default_factory=dict[str, HeldAllocation])
    saved: dict[str, HeldAllocation] = field(default_factory=dict[str, HeldAllocation])
    ending: list[tuple[str, int]] = field(default_factory=list[tuple[str, int]])
    looked_for: set[str] = field(default_factory=set[str])
    others: dict[str, Process] = field(default_factory=dict[str, Process])
    session: int = 0
    told: deque[Command] = field(default_factory=deque[Command])
    reports: deque[Frame] = field(default_factory=deque[Frame])
    last_command: int = 0
    sequence: int = 0
    seen: dict[str, Process] = field(default_factory=dict[str, Process])  # as last delivered

    @property
    def name(self) -> str:
        return self.facts.name

    @property
    def done(self) -> int:
        """All commands up to this one are carried out."""
        return min((id_ for _, id_ in self.ending), default=self.last_command + 1) - 1

    def has_one_of(self, devices: Iterable[Device]) -> bool:
        """Whether one of these GPUs, or one that a part of is among these, is of this host."""
        uuids = {gpu.uuid for gpu in self.facts.gpus}
        return any(device.uuid in uuids for device in devices)

    def report(self, now: float, refusals: tuple[HoldRefusal, ...] = ()) -> None:
        self.sequence += 1
        gpus = self.facts.gpus
        self.reports.append(
            Frame(
                *(self.sequence, now, now),
                samples=make_samples(gpus),
                processes=ProcessTable(now, tuple(self.others.values())),
                driver=DriverState.READING,
                held=tuple(self.journal.values()),
                refusals=refusals,
                commands_done=self.done,
            )
        )

    def obey(self, now: float) -> None:
        command = self.told.popleft()
        self.last_command = command.id
        if command.hold is None:
            self.ending.append((command.allocation_id, command.id))
            return
        self.require_room(command.hold)
        self.journal[command.allocation_id] = command.hold
        self.report(now)

    def let_go(self, now: float) -> None:
        """Look at the processes, then say that the first of those that are dropped is gone."""
        id_, _ = self.ending.pop(0)
        self.looked_for.add(id_)
        self.journal.pop(id_, None)
        self.report(now)

    def refuse(self, now: float) -> None:
        command = self.told.popleft()
        self.last_command = command.id
        self.report(now, (HoldRefusal(command.allocation_id, "no such luck"),))

    def require_room(self, wanted: HeldAllocation) -> None:
        for uuid in wanted.gpu_uuids:
            others = [h for h in self.journal.values() if uuid in h.gpu_uuids and h.id != wanted.id]
            require_room(uuid, wanted.memory_bytes, [h.memory_bytes for h in others])

    def save_disk(self) -> None:
        self.saved = dict(self.journal)

    def hang_up(self) -> None:
        self.session = 0
        self.told.clear()
        self.reports.clear()
        self.ending.clear()
        self.last_command = 0


def require_room(uuid: str, wanted: int | None, others: list[int | None]) -> None:
    if wanted is None:
        assert not others, f"{uuid} exclusively beside {others}"
    else:
        assert None not in others, f"a share of {uuid}, which is held whole"
        taken = sum(other or 0 for other in others)
        assert wanted + taken <= GPU_BYTES, f"{uuid}: {wanted} beside {taken}"
