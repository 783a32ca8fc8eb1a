"""Stragglers: GPUs that are behind the others of their gang, found in telemetry alone.

In a synchronous job every step waits for the slowest GPU, and nothing fails: so what is looked for
is a GPU that the hardware holds back while its peers are not.

What is compared is what a program cannot change by having more or less to do:

* `sm_clock`: the SM clock under load. Healthy cards of one model differ by 8 % in speed (Sinha et
  al., "Not All GPUs Are Created Equal", SC22): one below 0.9 of its gang's median is outside that.
  A card at its power limit clocks down, too, when its program asks more of it than of the others (a
  heavier stage of a pipeline); but then it draws more than they do, and one that is throttled or
  bad draws as much or less. So a low clock counts only where the power is not above the median.
* `memory_clock`: it is the same on all cards of a model under load.
* `pcie_link`: what its link can carry, by generation and lanes, is the same in all healthy hosts.
  How much it does carry tells nothing: a synchronous job loads as much on every GPU.

What is left out, because healthy jobs show the same: utilization (by NVML's definition a GPU that
waits in a collective is busy, and one that waits for its data loader is not, whoever is to blame)
and power by itself (a GPU that waits for another, and one with less to do, both draw less).

How it is decided. At every moment the median of the gang's GPUs under load and their median
absolute deviation say who is behind: below `behind_ratio` of the median, and by more than
`spread_min` robust standard deviations (2.5, as Leys et al. advise, J. Exp. Soc. Psychol. 49,
2013), so that a gang whose clocks differ for reasons of its own is not judged. Over time a
cumulative sum decides (Page, "Continuous Inspection Schemes", Biometrika 41, 1954): each second
behind adds `1 - behind_share`, each second on a level takes `behind_share` away. Who is behind all
the time is found after `observed_seconds` of load; who is level for a fifth of it, never. The same
sum, kept from growing beyond twice what is needed, ends it: after five minutes of load on a level
at most. Time without load counts neither way.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum
from operator import attrgetter
from statistics import median

import msgspec

# From the median absolute deviation to the standard deviation, if values were normal.
_NORMAL = 1.4826


# Thousands of these are made for every observation; see `GpuSample`.
class Member(msgspec.Struct, frozen=True, gc=False):
    """One GPU of a gang at one instant; None is "not read" or "not supported", never zero."""

    uuid: str
    node: str
    index: int
    sm_clock_hertz: float | None = None
    memory_clock_hertz: float | None = None
    power_watts: float | None = None
    utilization_ratio: float | None = None
    temperature_celsius: float | None = None
    # What its PCIe link can carry one way, as it is now: 16 lanes of generation 5 are 63e9.
    pcie_link_bytes_per_second: float | None = None


class Gang(msgspec.Struct, frozen=True, gc=False):
    """The GPUs of one model that one allocation holds."""

    allocation_id: str
    model: str
    members: tuple[Member, ...]


class Signal(StrEnum):
    """In what a GPU is behind."""

    SM_CLOCK = "sm_clock"
    MEMORY_CLOCK = "memory_clock"
    PCIE_LINK = "pcie_link"


@dataclass(frozen=True, slots=True)
class StragglerPolicy:
    """Who is behind, and for how long until it is told."""

    gpus_min: int = 3  # under load, in one gang
    load_min: float = 0.3  # utilization from which a GPU is under load
    behind_ratio: float = 0.9  # of the gang's median
    level_ratio: float = 0.93  # from which one that was found has caught up
    spread_min: float = 2.5  # robust standard deviations
    power_ratio_max: float = 1.05  # a lower SM clock at more power than this is due to its work
    behind_share: float = 0.8  # of the time under load
    observed_seconds: float = 600.0
    # What one observation stands for at most: a pause of the observer is evidence of nothing.
    step_seconds_max: float = 60.0
    # Evidence that is not enough lapses after so long without load: it may be another program's.
    forget_seconds: float = 1800.0


@dataclass(frozen=True, slots=True)
class Straggler:
    """A GPU that is behind its peers."""

    allocation_id: str
    node: str
    uuid: str
    since: float  # it has been behind
    signal: Signal
    reason: str  # one sentence for a person: what was seen when it was found


@dataclass(slots=True)
class _Trail:
    """The evidence on one GPU by one signal."""

    signal: Signal
    since: float
    judged_at: float
    evidence_seconds: float = 0.0
    found: Straggler | None = None


_Trails = dict[tuple[str, Signal], _Trail]  # by UUID and signal; only where there is evidence

_Read = Callable[[Member], float | None]
_POWER: _Read = attrgetter("power_watts")
_TEMPERATURE: _Read = attrgetter("temperature_celsius")


@dataclass(frozen=True, slots=True)
class _Kind:
    """How a signal is read, and told."""

    signal: Signal
    read: _Read
    name: str
    unit: str
    size: float  # of the unit, in the base unit


_KINDS = (
    _Kind(Signal.SM_CLOCK, attrgetter("sm_clock_hertz"), "SM clock", "MHz", 1e6),
    _Kind(Signal.MEMORY_CLOCK, attrgetter("memory_clock_hertz"), "memory clock", "MHz", 1e6),
    _Kind(Signal.PCIE_LINK, attrgetter("pcie_link_bytes_per_second"), "PCIe link", "GB/s", 1e9),
)
_ORDER = {kind.signal: order for order, kind in enumerate(_KINDS)}


class Stragglers:
    """Watches gangs; what it keeps is a few numbers per GPU that was behind lately."""

    def __init__(self, policy: StragglerPolicy | None = None) -> None:
        self._policy = policy or StragglerPolicy()
        self._needed_seconds = (1 - self._policy.behind_share) * self._policy.observed_seconds
        self._observed_at: float | None = None
        self._gangs: dict[tuple[str, str], _Trails] = {}

    def __len__(self) -> int:
        """Return how many GPUs and signals there is evidence on."""
        return sum(map(len, self._gangs.values()))

    def observe(self, now: float, gangs: Iterable[Gang]) -> None:
        """Take in how all gangs are now, in Unix seconds; of those left out all is forgotten."""
        since = now if self._observed_at is None else self._observed_at
        elapsed = min(max(0.0, now - since), self._policy.step_seconds_max)
        self._observed_at = max(now, since)
        before, self._gangs = self._gangs, {}
        load_min, gpus_min = self._policy.load_min, self._policy.gpus_min
        for gang in gangs:
            key = (gang.allocation_id, gang.model)
            trails = before.get(key)
            loaded = [
                member
                for member in gang.members
                if member.utilization_ratio is not None and member.utilization_ratio >= load_min
            ]
            if len(loaded) >= gpus_min and elapsed > 0.0:
                trails = self._judged(now, elapsed, gang.allocation_id, loaded, trails)
            if trails:
                self._gangs[key] = self._lapsed(now, trails)

    def found(self) -> tuple[Straggler, ...]:
        """Return who is behind, one row per GPU: of several signals the first counts."""
        rows: dict[tuple[str, str, str], Straggler] = {}
        for trails in self._gangs.values():
            for trail in sorted(trails.values(), key=lambda trail: _ORDER[trail.signal]):
                if (row := trail.found) is not None:
                    rows.setdefault((row.allocation_id, row.node, row.uuid), row)
        return tuple(rows[key] for key in sorted(rows))

    def _judged(
        self,
        now: float,
        elapsed: float,
        allocation_id: str,
        loaded: list[Member],
        trails: _Trails | None,
    ) -> _Trails | None:
        """Return the gang's trails after one more moment."""
        for kind in _KINDS:
            members, values = _told(kind.read, loaded)
            if len(values) < self._policy.gpus_min:
                continue
            # Nearly always nobody is behind, and nobody was.
            if not trails and min(values) >= self._policy.behind_ratio * max(values):
                continue
            trails = {} if trails is None else trails
            moment = _Moment(self._policy, kind, members, values)
            for member, value in zip(members, values, strict=True):
                self._weigh(now, elapsed, trails, moment, member, value, allocation_id)
        return trails

    def _weigh(
        self,
        now: float,
        elapsed: float,
        trails: _Trails,
        moment: "_Moment",
        member: Member,
        value: float,
        allocation_id: str,
    ) -> None:
        """Add what this moment says of one GPU to its evidence."""
        policy = self._policy
        key = (member.uuid, moment.signal)
        trail = trails.get(key)
        is_behind = moment.is_behind(member, value)
        if trail is None:
            if not is_behind:
                return
            trail = trails[key] = _Trail(moment.signal, since=now - elapsed, judged_at=now)
        trail.judged_at = now
        if is_behind:
            gained = trail.evidence_seconds + (1 - policy.behind_share) * elapsed
            trail.evidence_seconds = min(gained, 2 * self._needed_seconds)
            if trail.found is None and trail.evidence_seconds >= self._needed_seconds:
                reason = moment.reason(member, value)
                trail.found = Straggler(
                    allocation_id, member.node, member.uuid, trail.since, moment.signal, reason
                )
        elif trail.found is None or moment.is_level(member, value):
            trail.evidence_seconds -= policy.behind_share * elapsed
            if trail.evidence_seconds <= 0.0:
                del trails[key]

    def _lapsed(self, now: float, trails: _Trails) -> _Trails:
        """Return the trails without old evidence that was not enough."""
        since = now - self._policy.forget_seconds
        return {k: t for k, t in trails.items() if t.found is not None or t.judged_at >= since}


class _Moment:
    """One signal of a gang's GPUs under load at one instant."""

    def __init__(
        self, policy: StragglerPolicy, kind: _Kind, members: list[Member], values: list[float]
    ) -> None:
        self.signal = kind.signal
        self._kind = kind
        self._policy = policy
        self._members = members
        self._median = median(values)
        self._spread = _NORMAL * median(abs(value - self._median) for value in values)
        self._power: float | None = None
        if kind.signal is Signal.SM_CLOCK:
            self._power = _median_read(members, _POWER)

    def is_behind(self, member: Member, value: float) -> bool:
        """Whether the hardware holds it back, and not its peers."""
        return (
            value < self._policy.behind_ratio * self._median
            and self._median - value > self._policy.spread_min * self._spread
            and not self._works_more(member)
        )

    def is_level(self, member: Member, value: float) -> bool:
        """Whether it has caught up."""
        return value >= self._policy.level_ratio * self._median or self._works_more(member)

    def reason(self, member: Member, value: float) -> str:
        """Return what is seen, with what the peers show."""
        unit, size = self._kind.unit, self._kind.size
        what = f"{self._kind.name} {value / size:.0f} {unit} under load"
        peers = f"the {self._median / size:.0f} {unit} of its {len(self._members)} GPUs' median"
        told = [f"{what}, {value / self._median:.2f} of {peers}"]
        for read, unit in ((_POWER, "W"), (_TEMPERATURE, "C")):
            own, usual = read(member), _median_read(self._members, read)
            if own is not None and usual is not None:
                told.append(f"{own:.0f} {unit} (median {usual:.0f} {unit})")
        return "; ".join(told)

    def _works_more(self, member: Member) -> bool:
        return (
            self._power is not None
            and member.power_watts is not None
            and member.power_watts > self._policy.power_ratio_max * self._power
        )


def _told(read: _Read, members: list[Member]) -> tuple[list[Member], list[float]]:
    """Return the members that were read, and their values."""
    values = [value for value in map(read, members) if value is not None]
    if len(values) < len(members):
        members = [member for member in members if read(member) is not None]
    return members, values


def _median_read(members: list[Member], read: _Read) -> float | None:
    """Return the median of those that were read; None: none was."""
    values = [value for value in map(read, members) if value is not None]
    return median(values) if values else None
