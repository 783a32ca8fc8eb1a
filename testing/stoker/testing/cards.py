"""What is wrong with the cards and the driver of a simulated host, and since when it truly is."""

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from math import inf

from stoker.agent.facts import Fact
from stoker.agent.readings import GpuIdentity
from stoker.testing.mig_cards import MigCards

DRIVER_VERSION = 570


@dataclass(frozen=True, slots=True)
class Span:
    """A time in which something is wrong, in virtual seconds."""

    since: float
    until: float = inf  # infinity: until somebody mends it

    def holds(self, now: float) -> bool:
        """Whether it is so now."""
        return self.since <= now < self.until


@dataclass(slots=True)
class Cards:
    """The GPUs and the driver of one host. All times are the true ones."""

    gpus: tuple[GpuIdentity, ...]
    hung: dict[str, Span] = field(default_factory=dict[str, Span])  # calls do not return
    lost: dict[str, float] = field(default_factory=dict[str, float])  # fell off the bus, since
    pulled: dict[str, float] = field(default_factory=dict[str, float])  # not counted, since
    # Facts that a GPU does not tell, and since when.
    silent: dict[str, dict[Fact, float]] = field(default_factory=dict[str, dict[Fact, float]])
    mig: set[str] = field(default_factory=set[str])  # in MIG mode, by somebody else's hand
    partitions: MigCards | None = None  # where GPUs can be partitioned
    # Facts by which a GPU tells that it is not well.
    worn: dict[str, dict[Fact, float]] = field(default_factory=dict[str, dict[Fact, float]])
    xids: dict[str, list[int]] = field(default_factory=dict[str, list[int]])  # not told yet
    unloaded: Span | None = None  # the kernel module
    version: int = DRIVER_VERSION  # of the kernel module; a library of another does not fit it
    killed_hosts_stay: Span | None = None  # what is killed meanwhile is not reaped before its end
    # Since when the driver host has not answered, or was told to let go; it keeps this itself.
    unanswered_since: float | None = None
    found_at: dict[str, float] = field(default_factory=dict[str, float])  # last time it came (back)

    def is_hung(self, uuid: str, now: float) -> bool:
        """Whether a call about this GPU that is made now does not return."""
        span = self.hung.get(uuid)
        return span is not None and span.holds(now)

    def is_loaded(self, now: float) -> bool:
        """Whether there is a driver at all."""
        return self.unloaded is None or not self.unloaded.holds(now)

    def counted(self) -> tuple[GpuIdentity, ...]:
        """Return the GPUs that the driver counts, as they are now."""
        cards = self.partitions
        return tuple(
            replace(gpu, mig_enabled=gpu.uuid in self.mig) if cards is None else cards.identity(gpu)
            for gpu in self.gpus
            if gpu.uuid not in self.pulled
        )

    def killed_host_stays_until(self, now: float) -> float:
        """Return when a process in the driver's hands that is killed now is reaped."""
        span = self.killed_hosts_stay
        return span.until if span is not None and span.holds(now) else now

    def found(self, uuids: Collection[str], now: float) -> None:
        """Take in which GPUs the driver host reads from now on."""
        before = dict(self.found_at)
        self.found_at = {uuid: before.get(uuid, now) for uuid in uuids}

    def out_since(self, uuid: str, now: float) -> float | None:
        """Return since when nothing can have been read of a GPU; None: it can be read."""
        hung = self.hung.get(uuid)
        since = [
            self.unanswered_since,
            self.lost.get(uuid),
            self.pulled.get(uuid),
            hung.since if hung is not None and hung.holds(now) else None,
            self.unloaded.since if self.unloaded is not None and not self.is_loaded(now) else None,
        ]
        return min((each for each in since if each is not None), default=None)

    def mend(self) -> None:
        """Have everything work, as far as nobody has to start a driver host for it."""
        self.hung.clear()
        self.lost.clear()
        self.pulled.clear()
        self.silent.clear()
        self.mig.clear()
        self.worn.clear()
        self.xids.clear()
        self.unloaded = self.killed_hosts_stay = None
