"""The simulated hosts: their GPUs, the processes on them, and clocks that disagree."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from random import Random

from stoker.agent.events import ProcessesTaken
from stoker.agent.facts import Fact, Rate
from stoker.agent.model import ProcessSeen
from stoker.agent.owners import AssignedBy, Assignment
from stoker.agent.readings import WHOLE_GPU, GpuIdentity, GpuReading, ReadFailure, XidSeen
from stoker.core.mig.boards import Board
from stoker.testing.cards import Cards

# Virtual second 0 on a wall clock that is right.
EPOCH = 1_700_000_000.0
GIB = 1 << 30
RESERVED_BYTES = GIB // 2
# By which a card tells that it is not well.
WEAR = (Fact.REMAPPED_ROWS_PENDING, Fact.REMAPPED_ROWS_FAILED, Fact.RECOVERY_ACTION)
# How far one clock may run ahead of another, each second.
DRIFT_RATIO_MAX = 1e-4


@dataclass(frozen=True, slots=True)
class Running:
    """A process with a context on GPUs of one machine."""

    pid: int
    gpu_uuids: tuple[str, ...]
    memory_used_bytes: int  # on each of them
    began: float  # virtual seconds
    allocation_id: str  # whose it truly is; empty: nobody's
    is_claim_visible: bool  # whether the agent can read its environment
    user: str
    command: str
    mig_device_uuid: str = ""  # empty: it uses the GPUs themselves
    gpu_instance_id: int | None = None  # that the device is in


@dataclass(slots=True)
class Machine:
    """One host. Times it tells are its own; `now` is always the true time, in virtual seconds."""

    name: str
    cards: Cards
    boot_id: str
    wall_offset: float  # seconds that its wall clock is ahead of the truth
    drift_ratio: float  # how much faster than the truth its monotonic clock runs
    booted_at: float = 0.0  # virtual seconds; monotonic time counts from here
    processes: dict[int, Running] = field(default_factory=dict[int, Running])
    unreadable: set[str] = field(default_factory=set[str])  # GPUs whose processes cannot be read
    handed_out: dict[str, str] = field(default_factory=dict[str, str])  # by a kubelet; GPU -> pod
    is_kubelet_silent: bool = False
    former_boots: dict[str, float] = field(default_factory=dict[str, float])  # when they began
    next_pid: int = 1000

    @property
    def gpus(self) -> tuple[GpuIdentity, ...]:
        """The GPUs in its slots."""
        return self.cards.gpus

    def wall(self, now: float) -> float:
        """Return Unix seconds as this machine's clock shows them."""
        return EPOCH + now + self.wall_offset

    def monotonic(self, now: float) -> float:
        """Return seconds since this machine booted, as it counts them."""
        return 100.0 + (now - self.booted_at) * (1 + self.drift_ratio)

    def true_time(self, boot_id: str, monotonic: float) -> float:
        """Return the virtual time at which the monotonic clock of that boot showed that."""
        booted_at = self.booted_at if boot_id == self.boot_id else self.former_boots[boot_id]
        return booted_at + (monotonic - 100.0) / (1 + self.drift_ratio)

    def reboot(self, now: float, boot_id: str) -> None:
        """Begin anew: no processes, another boot, a driver that answers, every GPU on the bus."""
        self.processes.clear()
        self.former_boots[self.boot_id] = self.booted_at
        self.boot_id = boot_id
        self.booted_at = now
        self.cards.hung.clear()
        self.cards.lost.clear()
        self.cards.unloaded = self.cards.killed_hosts_stay = None
        self._lose_partitions()

    def lose_driver(self) -> None:
        """Take in that the kernel module is gone, if only for a moment."""
        self._lose_partitions()

    def _lose_partitions(self) -> None:
        """Have MIG devices gone, and who used them."""
        if self.cards.partitions is not None:
            gone = [pid for pid, each in self.processes.items() if each.mig_device_uuid]
            for pid in gone:
                self.end(pid)
            self.cards.partitions.unload()

    # --- processes

    def run(
        self,
        now: float,
        gpu_uuids: Iterable[str],
        memory_used_bytes: int,
        allocation_id: str,
        is_claim_visible: bool,
        mig_device_uuid: str = "",
    ) -> int:
        """Start a process and return its PID; without its MIG device it ends at once."""
        pid = self.next_pid
        self.next_pid += 1
        gpu_uuids = tuple(gpu_uuids)
        cards, instance = self.cards.partitions, None
        if cards is not None:
            if mig_device_uuid:
                instance = cards.instance_of(gpu_uuids[0], mig_device_uuid)
            if any(cards.is_enabled(uuid) for uuid in gpu_uuids) and instance is None:
                return pid
        self.processes[pid] = Running(
            pid=pid,
            gpu_uuids=gpu_uuids,
            memory_used_bytes=memory_used_bytes,
            began=now,
            allocation_id=allocation_id,
            is_claim_visible=is_claim_visible,
            user="tenant" if allocation_id else "somebody",
            command="train.py" if allocation_id else "notebook",
            mig_device_uuid=mig_device_uuid,
            gpu_instance_id=instance,
        )
        return pid

    def end(self, pid: int) -> None:
        """End a process, if it still runs."""
        self.processes.pop(pid, None)

    def is_used(self, uuid: str, gpu_instance_id: int | None = None) -> bool:
        """Whether a process runs on a GPU, or in that GPU instance of it."""
        return any(
            uuid in each.gpu_uuids and gpu_instance_id in (None, each.gpu_instance_id)
            for each in self.processes.values()
        )

    def foreign(self) -> list[Running]:
        """Return the processes that belong to nobody of ours."""
        return [each for each in self.processes.values() if not each.allocation_id]

    # --- readings

    def reading(self, gpu: GpuIdentity, now: float) -> GpuReading:
        """Return what a GPU tells. The energy counter is the true time, by which the world knows
        its age.
        """
        if gpu.uuid in self.cards.lost:
            failure = ReadFailure(WHOLE_GPU, "gpu_lost", "it fell off the bus")
            return GpuReading(gpu.uuid, self.wall(now), failures=(failure,))
        running = [each for each in self.processes.values() if gpu.uuid in each.gpu_uuids]
        facts = {
            Fact.MEMORY_TOTAL_BYTES: float(gpu.memory_total_bytes),
            Fact.MEMORY_USED_BYTES: float(sum(each.memory_used_bytes for each in running)),
            Fact.MEMORY_RESERVED_BYTES: float(RESERVED_BYTES),
            Fact.UTILIZATION_RATIO: 0.5,
            Fact.TEMPERATURE_CELSIUS: 40.0,
            Fact.ENERGY_JOULES: now,
            **dict.fromkeys(WEAR, 0.0),
        }
        silent = self.cards.silent.get(gpu.uuid, {})
        told = {fact: value for fact, value in facts.items() if fact not in silent}
        told |= self.cards.worn.get(gpu.uuid, {})
        xids = tuple(XidSeen(self.wall(now), xid) for xid in self.cards.xids.pop(gpu.uuid, ()))
        return GpuReading(gpu.uuid, self.wall(now), tuple(Rate), told, xids=xids)

    def processes_taken(
        self, started_wall: float, now: float, read: frozenset[str], counted: frozenset[str | None]
    ) -> ProcessesTaken:
        """Return a reading that was begun when the clock showed that, and sees what runs `now` on
        the GPUs that were `read`; of those that the driver `counted` beside them nothing is known.
        """
        seeing = read - self.unreadable
        seen = tuple(
            ProcessSeen(
                gpu_uuid=uuid,
                pid=each.pid,
                user=each.user,
                command=each.command,
                memory_used_bytes=each.memory_used_bytes,
                started_at=self.wall(each.began),
                claimed_allocation_id=(each.allocation_id or None)
                if each.is_claim_visible
                else None,
                gpu_instance_id=each.gpu_instance_id,
            )
            for each in self.processes.values()
            for uuid in each.gpu_uuids
            if uuid in seeing
        )
        blind = sorted(uuid for uuid in counted - seeing if uuid is not None)
        unknown = "the kubelet does not answer" if self.is_kubelet_silent else ""
        pods = () if unknown else sorted(self.handed_out.items())
        return ProcessesTaken(
            self.wall(now),
            started_wall,
            seen,
            tuple(blind),
            has_unnamed_unread=None in counted,
            assignments=tuple(Assignment(uuid, AssignedBy.KUBELET, pod) for uuid, pod in pods),
            assignments_unknown=unknown,
        )


def build_machine(number: int, gpus: int, rng: Random, board: Board | None = None) -> Machine:
    """Return a machine with `gpus` GPUs of 24 or 80 GiB, or of a board that can be partitioned."""
    model, gib = rng.choice((("NVIDIA H100 80GB HBM3", 80), ("NVIDIA L4", 24)))
    if board is not None:
        whole = max(board.geometry.profiles, key=lambda each: each.memory_mib)
        model, gib = board.driver_name, 1 + (whole.memory_mib >> 10)
    return Machine(
        name=f"node-{number}",
        cards=Cards(
            tuple(
                GpuIdentity(
                    index=index,
                    uuid=f"GPU-{number:08x}-0000-0000-0000-{index:012x}",
                    model=model,
                    memory_total_bytes=gib * GIB,
                    pci_bus_id=f"00000000:{index + 1:02X}:00.0",
                )
                for index in range(gpus)
            )
        ),
        boot_id=f"boot-{number}-{rng.randrange(1 << 32):08x}",
        wall_offset=rng.uniform(-30.0, 30.0),
        drift_ratio=rng.uniform(-DRIFT_RATIO_MAX, DRIFT_RATIO_MAX),
    )
