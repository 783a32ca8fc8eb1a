"""What the keeper of partitions knows and remembers, shared between it and the turn of a GPU."""

from dataclasses import dataclass, field, replace

from stoker.agent.mig.actions import MigAction, Save
from stoker.agent.mig.in_the_way import NOBODY_THERE, GpuUsers
from stoker.agent.mig.operations import Book, GpuRecord, Operation
from stoker.agent.partitions import GpuPartitions
from stoker.core.mig.reports import InTheWay


@dataclass(slots=True)
class Waiting:
    """A GPU that waits for somebody to leave."""

    in_the_way: tuple[InTheWay, ...]
    look_at: float  # when to look again whether they have (Unix seconds)
    unended: tuple[str, ...] = ()  # about processes that would not end, a sentence each


@dataclass(slots=True)
class Notes:
    """All of it, by GPU UUID; `actions` are what is still to be handed out."""

    book: Book = field(default_factory=Book)
    gpus: dict[str, GpuPartitions] = field(default_factory=dict[str, GpuPartitions])
    unread: dict[str, str] = field(default_factory=dict[str, str])  # why that may be outdated
    users: dict[str, GpuUsers] = field(default_factory=dict[str, GpuUsers])
    waiting: dict[str, Waiting] = field(default_factory=dict[str, Waiting])
    actions: list[MigAction] = field(default_factory=list[MigAction])
    tickets: int = 0
    newest_save: int = 0  # its ticket

    def operation(self, gpu_uuid: str) -> Operation:
        """Return the newest operation on a GPU that has one."""
        operation = self.book.of(gpu_uuid).operation
        assert operation is not None, f"{gpu_uuid} has its turn, and nothing is to be done"
        return operation

    def users_of(self, gpu_uuid: str) -> GpuUsers:
        """Return who was seen on a GPU last."""
        return self.users.get(gpu_uuid, NOBODY_THERE)

    def note(self, gpu_uuid: str, operation: Operation) -> Operation:
        """Note how far an operation is; return it."""
        self.note_record(gpu_uuid, replace(self.book.of(gpu_uuid), operation=operation))
        return operation

    def note_record(self, gpu_uuid: str, record: GpuRecord) -> None:
        """Note all that is remembered of a GPU."""
        self.book = self.book.noting(gpu_uuid, record)

    def save(self) -> int:
        """Have the book written down; return the ticket under which that is answered."""
        self.newest_save = self.next_ticket()
        self.actions.append(Save(self.newest_save, self.book))
        return self.newest_save

    def next_ticket(self) -> int:
        """Return a ticket that nothing else has."""
        self.tickets += 1
        return self.tickets
