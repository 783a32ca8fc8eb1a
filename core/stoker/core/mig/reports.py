"""What an agent tells of its GPUs' partitions, and what would be done to them: values for people.

The same over the local socket, through the aggregator, and as `stoker mig ... --json`.
"""

from typing import Literal

import msgspec

Verb = Literal["plan", "apply", "undo", "status"]


class MigEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An entry of a configuration, as mig-parted writes it."""

    mig_enabled: bool
    device_filter: tuple[str, ...] = ()  # "0x233010DE"; empty: every GPU
    devices: tuple[int, ...] | None = None  # by index; None: all
    mig_devices: dict[str, int] = {}  # how many of each, by name


class MigAsk(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is asked of an agent. An operation that it knows is not begun again."""

    verb: Verb
    operation_id: str = ""  # of apply and undo: chosen by the caller, unique per wish
    config: str = ""  # its name, for people
    entries: tuple[MigEntry, ...] = ()
    gpus: tuple[str, ...] = ()  # by UUID or index; empty: every one that an entry is about
    drain_seconds: float = 0.0  # how long users may take to leave; 0: they are in the way at once
    evict: bool = False  # who is not gone by then is made to go


class InTheWay(msgspec.Struct, frozen=True):
    """Who uses what would have to go."""

    kind: Literal["allocation", "process", "pod", "job", "holder"]
    name: str  # "allocation 3f2a (alice, 2 processes)", "process 4711 (python, bob)"
    uuids: tuple[str, ...]  # the MIG devices, or the GPU, that it uses
    pid: int | None = None
    allocation_id: str = ""


class InstanceChange(msgspec.Struct, frozen=True):
    """A GPU instance, and what becomes of it."""

    action: Literal["keep", "destroy", "create", "repair"]  # repair: its compute instances only
    profile: str
    start: int  # its first memory slice
    size: int  # in memory slices
    compute: tuple[int, ...] = ()  # compute slices of each compute instance; empty: one, all of it
    uuids: tuple[str, ...] = ()  # of the MIG devices it has now; they end with it
    is_busy: bool = False


class GpuPlan(msgspec.Struct, frozen=True):
    """What would be done to one GPU."""

    uuid: str
    index: int
    model: str
    mode: bool  # MIG mode in force
    mode_wanted: bool
    # "reset": it takes effect with a reset of the GPU or a reboot.
    mode_change: Literal["none", "at_once", "reset"]
    changes: tuple[InstanceChange, ...]  # by place; what is destroyed before what is created there
    steps: tuple[str, ...]  # one phrase each, in order
    in_the_way: tuple[InTheWay, ...]
    uuids_lost: tuple[str, ...]  # of MIG devices that end
    refusal: str = ""  # why it cannot be done at all; empty: it can
    notes: tuple[str, ...] = ()  # "the agent lets go of the driver meanwhile"


class InstanceFacts(msgspec.Struct, frozen=True):
    """A GPU instance that is there."""

    profile: str
    start: int
    size: int
    compute: tuple[int, ...]  # compute slices of each compute instance; empty: it has none
    uuids: tuple[str, ...]  # of its MIG devices


class GpuMigFacts(msgspec.Struct, frozen=True):
    """How a GPU is partitioned, and how far it is on the way to what was declared."""

    uuid: str
    index: int
    model: str
    pci_device_id: str  # "0x233010DE"
    mode: bool | None  # None: a card without MIG
    mode_pending: bool | None
    instances: tuple[InstanceFacts, ...]
    state: str = ""  # of MigState; empty: nothing was ever declared
    reason: str = ""
    config: str = ""
    operation_id: str = ""
    is_withheld: bool = False
    leave_by: float | None = None
    changed_at: float | None = None
    steps_done: int = 0
    steps_total: int = 0
    undo: str = ""  # the layout that undo would restore, as words; empty: there is none
    unread: str = ""  # why its instances cannot be told


class MigReport(msgspec.Struct, frozen=True):
    """The answer to a MigAsk."""

    node: str
    verb: Verb
    config: str
    operation_id: str
    plans: tuple[GpuPlan, ...]  # of plan, apply and undo
    gpus: tuple[GpuMigFacts, ...]  # the GPUs asked about, by index
