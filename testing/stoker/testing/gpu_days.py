"""Virtual GPU-days: a fleet's healthy noise, what is planted in it, and how soon that is found.

Seeded, and free of I/O. Failures come event by event over weeks, telemetry (`gpu_noise`) step by
step over days; each has its runner, which tells what was found and when.

The base rate of failures is what Meta published of the Llama 3 run (`RATE_PUBLISHED_PER_GPU_DAY`).
Beside them come what is no card's fault: power losses and driver crashes of whole nodes, a round of
maintenance reboots, and the Xids of programs, of which health makes no failure at all.
"""

import math
from bisect import bisect_right, insort
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from random import Random

from stoker.aggregator.lemons import (
    RATE_PUBLISHED_PER_GPU_DAY,
    Failure,
    Lemon,
    LemonKind,
    LemonPolicy,
    Place,
    find_lemons,
)
from stoker.aggregator.stragglers import Straggler, StragglerPolicy, Stragglers
from stoker.testing.gpu_noise import ALL_WORK, EQUAL_WORK, HeldBack, NoisyNode, Work

HOUR = 3600.0
DAY = 24 * HOUR

# What a failing card shows, by how often: the rows of Meta's table, in the words of the driver.
_SHOWN = {"Xid 79": 148, "Xid 94": 72, "Xid 95": 19, "Xid 119": 17, "hw_slowdown": 6}
_PLANTED = "Xid 79"
_APART_SECONDS = LemonPolicy().burst_seconds + HOUR
_PROGRAM_XIDS = ("Xid 13", "Xid 31", "Xid 43", "Xid 45")


# Steps; how much of the time gangs are under load need not be known more precisely.
_LOOKED_AT_EVERY = 16


class Cause(StrEnum):
    """Whose fault a happening is."""

    CARD = "card"  # of the card, or of the slot that it is in
    NODE = "node"  # of what all cards of the node share
    PROGRAM = "program"


@dataclass(frozen=True, slots=True)
class Happening:
    """A fault that a GPU told of."""

    at: float
    uuid: str
    place: Place
    what: str
    cause: Cause

    @property
    def failure(self) -> Failure:
        """It as the aggregator takes it down."""
        return Failure(self.at, self.uuid, self.place.node, self.place.slot, self.what)


@dataclass(frozen=True, slots=True)
class Swap:
    """Somebody exchanges what is in two slots."""

    at: float
    one: Place
    other: Place


@dataclass(frozen=True, slots=True)
class Planted:
    """What shall be found, and from when on it can be."""

    kind: LemonKind
    uuid: str  # empty: a slot
    place: Place  # of the slot; of a card: where it was first
    failures: tuple[float, ...]  # its separate failures

    def is_found_by(self, lemon: Lemon) -> bool:
        """Whether the finding is of this card or slot."""
        if lemon.kind is LemonKind.GPU:
            return lemon.uuid == self.uuid
        return self.kind is LemonKind.SLOT and Place(lemon.node, lemon.slot) == self.place


@dataclass(frozen=True, slots=True)
class Size:
    """How large a fleet is, and for how long it is watched: 10,080 GPU-days."""

    nodes: int = 42
    gpus: int = 8
    days: float = 30.0

    @property
    def gpu_days(self) -> float:
        """Return the product."""
        return self.nodes * self.gpus * self.days


@dataclass(frozen=True, slots=True)
class Rates:
    """How often things happen."""

    card_per_gpu_day: float = RATE_PUBLISHED_PER_GPU_DAY
    node_per_node_day: float = 0.01  # power, driver; much more than published, to be strict
    program_per_gpu_day: float = 0.2
    maintenance_days: float = 14.0  # from one round of reboots to the next; infinity: none


@dataclass(slots=True)
class Weeks:
    """The failures of a fleet over weeks; times are seconds since they began."""

    rng: Random
    size: Size = field(default_factory=Size)
    rates: Rates = field(default_factory=Rates)
    happenings: list[Happening] = field(default_factory=list[Happening])
    swaps: list[Swap] = field(default_factory=list[Swap])
    planted: list[Planted] = field(default_factory=list[Planted])
    first: dict[str, Place] = field(default_factory=dict[str, Place])  # where cards are at first
    seconds: float = 0.0
    # By the number of swaps before.
    _places: dict[int, dict[str, Place]] = field(default_factory=dict[int, dict[str, Place]])

    def __post_init__(self) -> None:
        self.seconds = self.size.days * DAY
        for node in range(self.size.nodes):
            for index in range(self.size.gpus):
                place = Place(f"node-{node:02}", f"0000:{0x1B + 0x10 * index:02x}:00.0")
                self.first[f"GPU-{node:02}-{index}"] = place

    def add_noise(self) -> None:
        """Let happen what happens in every healthy fleet; after everything was planted."""
        rates, size = self.rates, self.size
        gpus = size.nodes * size.gpus
        uuids = tuple(self.first)
        for at in self._moments(rates.card_per_gpu_day * gpus):
            what = self.rng.choices(tuple(_SHOWN), tuple(_SHOWN.values()))[0]
            self._fail(at, self.rng.choice(uuids), what)
        nodes = sorted({place.node for place in self.first.values()})
        for at in self._moments(rates.node_per_node_day * size.nodes):
            self._fail_node(at, self.rng.choice(nodes), self.rng.choice(("Xid 79", "gpu_lost")))
        begin = self.rng.uniform(0, rates.maintenance_days) * DAY
        while begin < self.seconds:
            for number, node in enumerate(nodes):
                if self._is_apart(at := begin + number * 1200.0):
                    self._fail_node(at, node, "gpu_missing")
            begin += rates.maintenance_days * DAY
        for at in self._moments(rates.program_per_gpu_day * gpus):
            uuid, what = self.rng.choice(uuids), self.rng.choice(_PROGRAM_XIDS)
            self._happen(at, uuid, what, Cause.PROGRAM)

    def plant_card(self, uuid: str, *, is_moved: bool = True) -> None:
        """Let a card fail every day or two; every other time somebody puts it elsewhere."""
        first, times = self.place(uuid, 0.0), self._separate_times()
        for number, at in enumerate(times, 1):
            self._fail(at, uuid, _PLANTED)
            if is_moved and number % 2 == 0:
                self._move(at + self.rng.uniform(6, 9) * HOUR, self.place(uuid, at))
        self.planted.append(Planted(LemonKind.GPU, uuid, first, times))

    def plant_slot(self, uuid: str) -> None:
        """Let whatever is in that card's slot fail every day or two; each time it is exchanged."""
        place, times = self.place(uuid, 0.0), self._separate_times()
        for at in times:
            self._fail(at, self.card(place, at), _PLANTED)
            self._move(at + self.rng.uniform(6, 9) * HOUR, place)
        self.planted.append(Planted(LemonKind.SLOT, "", place, times))

    def places(self, now: float) -> Mapping[str, Place]:
        """Return where each card is."""
        done = bisect_right(self.swaps, now, key=lambda swap: swap.at)
        if done not in self._places:
            cards = {place: uuid for uuid, place in self.first.items()}
            for swap in self.swaps[:done]:
                cards[swap.one], cards[swap.other] = cards[swap.other], cards[swap.one]
            self._places[done] = {uuid: place for place, uuid in cards.items()}
        return self._places[done]

    def place(self, uuid: str, now: float) -> Place:
        """Return where the card is."""
        return self.places(now)[uuid]

    def card(self, place: Place, now: float) -> str:
        """Return what is in the slot."""
        return next(uuid for uuid, where in self.places(now).items() if where == place)

    def _moments(self, per_day: float) -> Iterator[float]:
        """Yield the moments of a Poisson process, but for those near a planted failure."""
        at = self.rng.expovariate(per_day) * DAY if per_day else math.inf
        while at < self.seconds:
            if self._is_apart(at):
                yield at
            at += self.rng.expovariate(per_day) * DAY

    def _separate_times(self) -> tuple[float, ...]:
        """Return four times when a planted fault comes, and no other planted one does."""
        times: list[float] = []
        at = self.rng.uniform(2, 8) * DAY
        while len(times) < 4:
            if self._is_apart(at):
                times.append(at)
                at += self.rng.uniform(1, 2) * DAY
            at += 2 * HOUR
        return tuple(times)

    def _is_apart(self, at: float) -> bool:
        """Whether no planted failure is near, which in one burst with another would not count."""
        times = (time for each in self.planted for time in each.failures)
        return all(abs(at - time) > _APART_SECONDS for time in times)

    def _fail(self, at: float, uuid: str, what: str) -> None:
        """Let a card fail: told several times at once, and again when mending is tried."""
        self._happen(at, uuid, what, Cause.CARD)
        for _ in range(self.rng.randrange(4)):
            self._happen(at + self.rng.uniform(0.0, 5.0), uuid, what, Cause.CARD)
        for _ in range(self.rng.randrange(3)):
            self._happen(at + self.rng.uniform(0.1, 5.5) * HOUR, uuid, what, Cause.CARD)

    def _fail_node(self, at: float, node: str, what: str) -> None:
        for uuid, place in self.places(at).items():
            if place.node == node:
                self._happen(at + self.rng.uniform(0.0, 90.0), uuid, what, Cause.NODE)

    def _happen(self, at: float, uuid: str, what: str, cause: Cause) -> None:
        happening = Happening(at, uuid, self.place(uuid, at), what, cause)
        insort(self.happenings, happening, key=lambda h: (h.at, h.uuid))

    def _move(self, at: float, place: Place) -> None:
        """Exchange the card in that slot with one of another node."""
        others = sorted(p for p in self.first.values() if p.node != place.node)
        insort(self.swaps, Swap(at, place, self.rng.choice(others)), key=lambda swap: swap.at)
        self._places.clear()


@dataclass(frozen=True, slots=True)
class LemonOutcome:
    """What was found in weeks of failures."""

    wrongly: tuple[Lemon, ...]  # nothing is wrong with them
    found_at: Mapping[Planted, float]
    lemons: Mapping[Planted, Lemon]  # as each was told at the end
    failures: int


def run_weeks(weeks: Weeks, policy: LemonPolicy | None = None) -> LemonOutcome:
    """Look for lemons whenever the answer can have changed, to the minute."""
    policy = policy or LemonPolicy()
    wrongly: dict[tuple[LemonKind, str, str, str], Lemon] = {}
    found_at: dict[Planted, float] = {}
    lemons: dict[Planted, Lemon] = {}
    # Of a program's fault health says that the program is to be restarted: no failure of the GPU.
    failures = [each.failure for each in weeks.happenings if each.cause is not Cause.PROGRAM]
    waits = (0.0, policy.together_seconds)
    moments = {math.ceil((each.at + wait) / 60) for each in failures for wait in waits}
    for now in sorted(60.0 * minute for minute in moments):
        known = failures[: bisect_right(failures, now, key=lambda failure: failure.at)]
        for lemon in find_lemons(known, weeks.places(now), now, policy):
            planted = next((each for each in weeks.planted if each.is_found_by(lemon)), None)
            if planted is None:
                wrongly.setdefault((lemon.kind, lemon.uuid, lemon.node, lemon.slot), lemon)
            else:
                found_at.setdefault(planted, now)
                lemons[planted] = lemon
    return LemonOutcome(tuple(wrongly.values()), found_at, lemons, len(failures))


@dataclass(frozen=True, slots=True)
class Behind:
    """A card that is planted as a straggler."""

    node: int
    index: int
    how: HeldBack


@dataclass(frozen=True, slots=True)
class StragglerOutcome:
    """What was found in days of telemetry."""

    wrongly: tuple[Straggler, ...]  # nothing is wrong with them
    load_seconds: Mapping[Behind, float]  # how long its gang was under load until it was found
    found: Mapping[Behind, Straggler]
    gpu_days: float  # that were observed
    load_share: float  # how much of that gangs were under load


def run_telemetry(
    rng: Random,
    size: Size,
    step_seconds: float,
    behind: Sequence[Behind] = (),
    policy: StragglerPolicy | None = None,
    works: Sequence[Work] = ALL_WORK,
) -> StragglerOutcome:
    """Look for stragglers among `size.nodes` gangs; nodes with a planted one do `EQUAL_WORK`."""
    policy = policy or StragglerPolicy()
    held: dict[int, dict[int, HeldBack]] = {}
    for each in behind:
        held.setdefault(each.node, {})[each.index] = each.how
    nodes = [
        NoisyNode(
            Random(rng.getrandbits(64)),
            f"node-{number:02}",
            size.gpus,
            held.get(number),
            EQUAL_WORK if number in held else works,
        )
        for number in range(size.nodes)
    ]
    sought = {nodes[each.node].uuid(each.index): each for each in behind}
    load_seconds = dict.fromkeys(behind, 0.0)
    wrongly: dict[tuple[str, str], Straggler] = {}
    found: dict[Behind, Straggler] = {}
    stragglers = Stragglers(policy)
    steps = math.ceil(size.days * DAY / step_seconds)
    loaded = looked_at = 0
    for step in range(steps):
        now = step * step_seconds
        gangs = [node.at(now) for node in nodes]
        stragglers.observe(now, gangs)
        if step % _LOOKED_AT_EVERY == 0:
            looked_at += len(gangs)
            loaded += sum((gang.members[0].utilization_ratio or 0.0) > 0.3 for gang in gangs)
        for each in load_seconds.keys() - found.keys():
            utilization = gangs[each.node].members[each.index].utilization_ratio or 0.0
            load_seconds[each] += step_seconds * (utilization >= policy.load_min)
        for row in stragglers.found():
            planted = sought.get(row.uuid)
            if planted is None:
                wrongly.setdefault((row.allocation_id, row.uuid), row)
            else:
                found.setdefault(planted, row)
    gpu_days = steps * step_seconds / DAY * size.nodes * size.gpus
    return StragglerOutcome(
        tuple(wrongly.values()), load_seconds, found, gpu_days, loaded / looked_at
    )
