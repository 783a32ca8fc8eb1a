"""The simulated hosts: their GPUs, the processes on them, a driver that may hang, and clocks that
disagree.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from random import Random

from stoker.agent.events import ProcessesTaken
from stoker.agent.model import ProcessSeen
from stoker.agent.readings import GpuIdentity, GpuSample, Inventory

# Virtual second 0 on a wall clock that is right.
EPOCH = 1_700_000_000.0
GIB = 1 << 30
RESERVED_BYTES = GIB // 2
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


@dataclass(slots=True)
class Machine:
    """One host. Times it tells are its own; `now` is always the true time, in virtual seconds."""

    name: str
    gpus: tuple[GpuIdentity, ...]
    boot_id: str
    wall_offset: float  # seconds that its wall clock is ahead of the truth
    drift_ratio: float  # how much faster than the truth its monotonic clock runs
    booted_at: float = 0.0  # virtual seconds; monotonic time counts from here
    processes: dict[int, Running] = field(default_factory=dict[int, Running])
    hangs_until: float = 0.0  # virtual seconds; the driver does not answer before
    unreadable: set[str] = field(default_factory=set[str])  # GPUs whose processes cannot be read
    lost: set[str] = field(default_factory=set[str])  # GPUs that fell off the bus
    former_boots: dict[str, float] = field(default_factory=dict[str, float])  # when they began
    next_pid: int = 1000

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

    def hangs(self, now: float) -> bool:
        """Whether a driver call that is made now does not return."""
        return now < self.hangs_until

    def reboot(self, now: float, boot_id: str) -> None:
        """Begin anew: no processes, another boot, a driver that answers."""
        self.processes.clear()
        self.former_boots[self.boot_id] = self.booted_at
        self.boot_id = boot_id
        self.booted_at = now
        self.hangs_until = 0.0

    # --- processes

    def run(
        self,
        now: float,
        gpu_uuids: Iterable[str],
        memory_used_bytes: int,
        allocation_id: str,
        is_claim_visible: bool,
    ) -> int:
        """Start a process and return its PID."""
        pid = self.next_pid
        self.next_pid += 1
        self.processes[pid] = Running(
            pid=pid,
            gpu_uuids=tuple(gpu_uuids),
            memory_used_bytes=memory_used_bytes,
            began=now,
            allocation_id=allocation_id,
            is_claim_visible=is_claim_visible,
            user="tenant" if allocation_id else "somebody",
            command="train.py" if allocation_id else "notebook",
        )
        return pid

    def end(self, pid: int) -> None:
        """End a process, if it still runs."""
        self.processes.pop(pid, None)

    def foreign(self) -> list[Running]:
        """Return the processes that belong to nobody of ours."""
        return [each for each in self.processes.values() if not each.allocation_id]

    # --- readings

    def inventory(self, now: float) -> Inventory:
        """Return which GPUs the driver tells of."""
        gpus = tuple(gpu for gpu in self.gpus if gpu.uuid not in self.lost)
        return Inventory(self.wall(now), "570.86", "12.570", "12.8", True, gpus)

    def samples(self, now: float) -> tuple[GpuSample, ...]:
        """Return a sample per GPU. The energy counter is the true time, by which the world knows
        its age.
        """
        return tuple(
            GpuSample(
                uuid=gpu.uuid,
                at=self.wall(now),
                memory_total_bytes=gpu.memory_total_bytes,
                memory_used_bytes=sum(
                    each.memory_used_bytes
                    for each in self.processes.values()
                    if gpu.uuid in each.gpu_uuids
                ),
                memory_reserved_bytes=RESERVED_BYTES,
                utilization_ratio=0.5,
                energy_joules_total=now,
            )
            for gpu in self.gpus
            if gpu.uuid not in self.lost
        )

    def processes_taken(self, started_wall: float, now: float) -> ProcessesTaken:
        """Return a reading that was begun when the clock showed that, and sees what runs `now`."""
        blind = self.unreadable - self.lost
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
            )
            for each in self.processes.values()
            for uuid in each.gpu_uuids
            if uuid not in blind and uuid not in self.lost
        )
        return ProcessesTaken(self.wall(now), started_wall, seen, tuple(sorted(blind)))


def build_machine(number: int, gpus: int, rng: Random) -> Machine:
    """Return a machine with `gpus` GPUs of 24 or 80 GiB."""
    model, gib = rng.choice((("NVIDIA H100 80GB HBM3", 80), ("NVIDIA L4", 24)))
    return Machine(
        name=f"node-{number}",
        gpus=tuple(
            GpuIdentity(
                index=index,
                uuid=f"GPU-{number:08x}-0000-0000-0000-{index:012x}",
                model=model,
                memory_total_bytes=gib * GIB,
                pci_bus_id=f"00000000:{index + 1:02X}:00.0",
            )
            for index in range(gpus)
        ),
        boot_id=f"boot-{number}-{rng.randrange(1 << 32):08x}",
        wall_offset=rng.uniform(-30.0, 30.0),
        drift_ratio=rng.uniform(-DRIFT_RATIO_MAX, DRIFT_RATIO_MAX),
    )
