"""The driver host of a simulated agent: what the real one does about a driver that hangs, loses
GPUs, is taken away, replaced or let go of; on virtual time, and without a process.

It tells its agent what it found as the real daemon tells the state: with the real events.
"""

from collections.abc import Callable
from dataclasses import dataclass

from stoker.agent import events as e
from stoker.agent.model import DriverState, DriverStatus
from stoker.agent.readings import GpuFault, GpuIdentity, GpuReading, Inventory
from stoker.testing.machine import Machine
from stoker.testing.process import Process

READING_SECONDS = (0.001, 0.02)
OPENING_SECONDS = (0.05, 0.5)
KILLING_SECONDS = (0.0, 0.3)
# A call that has not returned for so long hangs.
CALL_SECONDS_MAX = 1.0
RETRY_SECONDS = (0.5, 2.0)  # of a driver that is not there
RETRIAL_SECONDS_MIN = 4.0  # of a GPU that hung; doubled with each time that it hangs again
RETRIAL_SECONDS_MAX = 30.0


@dataclass(frozen=True, slots=True)
class Suspicion:
    """A GPU that is left alone, and until when."""

    retry_at: float
    hangs: int
    is_named: bool  # its UUID was read before it hung
    found: str


class DriverHost:
    """One per life of an agent; `tell` is told what happens."""

    def __init__(
        self, machine: Machine, agent: Process, tell: Callable[[e.Event], None], reason: str = ""
    ) -> None:
        self.found: tuple[GpuIdentity, ...] = ()  # by the last inventory
        self.missing: tuple[GpuFault, ...] = ()
        self.is_open = False
        self._machine = machine
        self._cards = machine.cards
        self._agent = agent
        self._tell = tell
        self._version = machine.cards.version  # of the library that the host has loaded
        self._status = DriverStatus(DriverState.STARTING)
        self._is_wanted = True
        self._release_reason = reason
        self._opening = 0  # rises with every attempt: what an earlier one began is void
        self._suspicions: dict[str, Suspicion] = {}
        self._stays_until = 0.0  # a killed host that is not reaped, in virtual seconds
        self._cards.unanswered_since = self._now

    @property
    def state(self) -> DriverState:
        """Its state, as it was told last."""
        return self._status.state

    # --- what the agent asks

    def begin(self) -> None:
        """Start it for the first time."""
        self._open_later(OPENING_SECONDS)

    def release(self, reason: str) -> None:
        """Let go of the driver."""
        self._is_wanted, self._release_reason = False, reason
        self._close()
        self._agent.after(self._agent.around.rng.uniform(*KILLING_SECONDS), self._let_go)

    def resume(self) -> None:
        """Take the driver again."""
        if not self._is_wanted:
            self._is_wanted = True
            self._open_later(OPENING_SECONDS)

    def sample(self) -> None:
        """Read every GPU that was found, once."""
        if not self.is_open:
            self._tell(e.SamplingFailed(self._wall, "host_unavailable", "no driver host answers"))
        elif not self._blocks_on(self.found, "nvmlDeviceGetPowerUsage"):
            seconds = self._agent.around.rng.uniform(*READING_SECONDS)
            opening = self._opening
            self._agent.after(seconds, lambda: self._read(opening))

    def look_again(self) -> None:
        """Find the GPUs anew; also those that were left alone for long enough."""
        if self.is_open:
            self._find()

    def processes(self, finish: Callable[[frozenset[str] | None], None], seconds: float) -> None:
        """Have `finish` told which GPUs' processes could be read in so many seconds, or None."""
        before, opening = frozenset(gpu.uuid for gpu in self.found), self._opening
        if not self.is_open or self._blocks_on(self.found, "nvmlDeviceGetComputeRunningProcesses"):
            self._agent.after(CALL_SECONDS_MAX, lambda: finish(None))
            return

        def answer() -> None:
            if opening != self._opening or not self._cards.is_loaded(self._now):
                finish(None)
            else:
                gone = self._cards.lost.keys() | self._cards.pulled.keys()
                finish(before.intersection(gpu.uuid for gpu in self.found) - gone)

        self._agent.after(seconds, answer)

    # --- a life of it

    def _open_later(self, seconds: tuple[float, float]) -> None:
        self._opening += 1
        opening = self._opening
        self._cards.unanswered_since = self._cards.unanswered_since or self._now
        if self._status.state is DriverState.RELEASED:
            self._become(DriverState.STARTING)

        def open_() -> None:
            if opening == self._opening and self._is_wanted:
                self._open()

        wait = max(self._stays_until - self._now, 0.0)
        self._agent.after(wait + self._agent.around.rng.uniform(*seconds), open_)

    def _open(self) -> None:
        self._version = self._cards.version
        if not self._cards.is_loaded(self._now):
            self._fail("the NVIDIA driver is not loaded")
            return
        self.is_open = True
        self._find()

    def _find(self) -> None:
        due = {uuid for uuid, each in self._suspicions.items() if each.retry_at <= self._now}
        left_alone = self._suspicions.keys() - due
        counted = self._cards.counted()
        asked = [gpu for gpu in counted if gpu.uuid not in left_alone]
        if self._is_unusable() or self._blocks_on(asked, "nvmlDeviceGetHandleByIndex_v2"):
            return
        for uuid in due:
            del self._suspicions[uuid]
        self.found = tuple(gpu for gpu in asked if gpu.uuid not in self._cards.lost)
        self.missing = tuple(
            self._fault(gpu) for gpu in counted if gpu.uuid not in {g.uuid for g in self.found}
        )
        self._cards.unanswered_since = None
        self._cards.found([gpu.uuid for gpu in self.found], self._now)
        self._tell(
            e.InventoryRead(
                self._wall,
                Inventory(
                    at=self._wall,
                    driver_version=f"{self._version}.86",
                    nvml_version=f"12.{self._version}",
                    cuda_driver_version="12.8",
                    simulated=True,
                    gpus=self.found,
                    missing=self.missing,
                ),
            )
        )
        self._become(DriverState.READING)

    def _fault(self, gpu: GpuIdentity) -> GpuFault:
        suspicion = self._suspicions.get(gpu.uuid)
        if suspicion is None:
            return GpuFault(gpu.index, gpu.uuid, "gpu_lost", "it fell off the bus")
        uuid = gpu.uuid if suspicion.is_named else None
        return GpuFault(gpu.index, uuid, "driver_timeout", suspicion.found)

    def _read(self, opening: int) -> None:
        if opening != self._opening or self._is_unusable():
            return
        if self._blocks_on(self.found, "nvmlDeviceGetPowerUsage"):
            return
        lost = self._cards.lost
        now = {gpu.uuid: gpu for gpu in self._cards.counted()}
        if any(now.get(gpu.uuid) != gpu for gpu in self.found):
            self._tell(e.SamplingFailed(self._wall, "inventory_changed", "GPUs or their modes"))
            self._find()
            return
        readings = [self._machine.reading(gpu, self._now) for gpu in self.found]
        readings += [
            GpuReading(each.uuid, self._wall) for each in self.missing if each.uuid is not None
        ]
        self._tell(e.SampleTaken(self._wall, tuple(readings)))
        if any(gpu.uuid in lost for gpu in self.found):
            self._find()

    # --- what goes wrong

    def _is_unusable(self) -> bool:
        if not self._cards.is_loaded(self._now):
            self._fail("the NVIDIA driver is not loaded")
        elif self._version != self._cards.version:
            self._fail("the driver was replaced: library and kernel module differ")
        else:
            return False
        return True

    def _fail(self, reason: str) -> None:
        """End the host, and try another one later."""
        self._close()
        self._tell(e.SamplingFailed(self._wall, "driver_unavailable", reason))
        self._become(DriverState.FAILED, reason)
        self._open_later(RETRY_SECONDS)

    def _blocks_on(self, gpus: "list[GpuIdentity] | tuple[GpuIdentity, ...]", call: str) -> bool:
        """Whether a call does not return; when it has not for too long, the host is killed."""
        culprit = next((gpu for gpu in gpus if self._cards.is_hung(gpu.uuid, self._now)), None)
        if culprit is None:
            return False
        is_named = any(gpu.uuid == culprit.uuid for gpu in self.found)
        self._close()
        opening = self._opening
        found = f"{call} has not returned within {CALL_SECONDS_MAX:g} s"

        def give_up() -> None:
            if opening == self._opening:
                self._kill(culprit, found, is_named=is_named)

        self._agent.after(CALL_SECONDS_MAX, give_up)
        return True

    def _kill(self, culprit: GpuIdentity, found: str, *, is_named: bool) -> None:
        self._agent.tell(f"its driver hangs on GPU {culprit.index}")
        before = self._suspicions.get(culprit.uuid)
        hangs = before.hangs + 1 if before else 1
        pause = min(RETRIAL_SECONDS_MAX, RETRIAL_SECONDS_MIN * 2 ** (hangs - 1))
        named = is_named or (before is not None and before.is_named)
        self._suspicions[culprit.uuid] = Suspicion(self._now + pause, hangs, named, found)
        self._stays_until = self._cards.killed_host_stays_until(self._now)
        self._tell(e.SamplingFailed(self._wall, "driver_timeout", found))
        self._become(DriverState.BLOCKED, f"GPU {culprit.index}: {found}")
        self._open_later(KILLING_SECONDS)

    def _close(self) -> None:
        """Ask nothing more; what was asked is not answered."""
        self.is_open = False
        self._opening += 1
        self._cards.unanswered_since = self._cards.unanswered_since or self._now

    def _let_go(self) -> None:
        if self._is_wanted:
            return
        if self._stays_until > self._now:  # the kernel does not let go of the host that was killed
            self._agent.after(self._stays_until - self._now, self._let_go)
            return
        self._become(DriverState.RELEASED, self._release_reason)

    def _become(self, state: DriverState, reason: str = "") -> None:
        is_new_host = state is DriverState.READING and self._status.state is not state
        status = DriverStatus(state, reason, self._status.restarts + is_new_host)
        if status != self._status:
            self._status = status
            self._tell(e.DriverChanged(self._wall, status))

    @property
    def _now(self) -> float:
        return self._agent.now

    @property
    def _wall(self) -> float:
        return self._machine.wall(self._now)
