"""Lemons: cards and slots that keep failing, told apart, with the odds that it is only chance.

What counts as one failure. A card's failures within `burst_seconds` of the first are one incident:
the same fault, told by several Xids or met again by each attempt to mend it (reset, reboot, the
next job). An incident that begins within `together_seconds` of another card's failure on the same
node has something in common with it (power, the driver, a reboot): it tells nothing of any one card
and does not count. What is left are separate failures of single cards; each counts once that time
has passed, as only then it is known to be one.

Whose they are. A card that failed in several slots took its fault along: it is the card. A slot in
which different cards failed kept it: it is the slot. Whichever explains more of the failures is
taken first, and what it explains counts for no other; where both explain as many, or the card has
never been elsewhere, it is the card.

What chance would do. A healthy fleet's failures are a Poisson process, of the same rate on every
GPU. With mu failures expected per GPU and window, those that are the k-th within the window behind
them, or a later one, come per GPU and length of a window in a number with the mean

    mu * P(N >= k - 1),   N ~ Poisson(mu)

(Mecke's equation: Last and Penrose, "Lectures on the Poisson Process", 2017, theorem 4.1). Unlike
the tail of one window it allows for looking at every moment, as scan statistics do (Naus, JASA 77,
1982). Times the number of cards and slots looked at (twice the GPUs; Bonferroni) it is `odds`: how
many such findings a healthy fleet would give per window, and so no less than the probability of
one. A fleet of any size is therefore silent for a whole window with probability 1 - `odds_max`.

mu is told from the share of the other GPUs that failed at all, which is 1 - exp(-mu) in a healthy
fleet: so one lemon, however often it fails, does not hide another, and where every GPU fails nobody
is a lemon. It is at least `rate_min_per_gpu_day`, so that a small or quiet fleet is not judged by a
rate of nearly zero.
"""

import math
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from enum import StrEnum
from heapq import heapify, heappop, heappush
from typing import NamedTuple

_DAY = 86400.0

# Meta's Llama 3 run: 16,384 GPUs for 54 days, interrupted by 148 faulty GPUs, 72 HBM3 memories, 19
# SRAM memories, 17 GPU system processors, 6 thermal interfaces and 6 silent corruptions of data
# ("The Llama 3 Herd of Models", 2024, table 5).
RATE_PUBLISHED_PER_GPU_DAY = (148 + 72 + 19 + 17 + 6 + 6) / (16384 * 54)


class LemonKind(StrEnum):
    """What keeps failing."""

    GPU = "lemon_gpu"  # the card, wherever it is
    SLOT = "lemon_slot"  # the place, whatever card is in it


@dataclass(frozen=True, slots=True, order=True)
class Place:
    """A slot of a node."""

    node: str
    slot: str  # PCI address


@dataclass(frozen=True, slots=True)
class Failure:
    """A GPU became unhealthy by a fault that is not its programs'; `at` in Unix seconds."""

    at: float
    uuid: str
    node: str
    slot: str  # PCI address; empty: not known
    what: str = ""  # in a word or two, for the reason: "Xid 79"


@dataclass(frozen=True, slots=True)
class LemonPolicy:
    """When failures are too many for chance."""

    window_seconds: float = 30 * _DAY
    failures_min: int = 3
    odds_max: float = 1e-3  # false findings in the whole fleet per window
    # Mending is tried within the same shift: reset, reboot, diagnosis, the next job.
    burst_seconds: float = 6 * 3600.0
    # A host with eight GPUs boots for up to ten minutes, and its cards are told of one by one.
    together_seconds: float = 600.0
    rate_min_per_gpu_day: float = RATE_PUBLISHED_PER_GPU_DAY


@dataclass(frozen=True, slots=True)
class Lemon:
    """A card or a slot that fails more often than chance explains."""

    kind: LemonKind
    node: str  # where the card is, or was last
    uuid: str  # the card; of a slot, the card that is in it now, empty: none
    slot: str
    since: float  # the first of the failures that count
    failures: int
    odds: float  # how many such findings a healthy fleet gives per window
    reason: str  # one sentence for a person


class _Incident(NamedTuple):
    at: float
    uuid: str
    place: Place
    what: str


@dataclass(frozen=True, slots=True)
class _Suspect:
    kind: LemonKind
    uuid: str  # empty: a slot
    place: Place  # of a card: where it failed last
    incidents: frozenset[_Incident]

    @property
    def rank(self) -> tuple[bool, str, Place]:
        """The order among those that explain as many failures: cards first."""
        return (self.kind is not LemonKind.GPU, self.uuid, self.place)


def find_lemons(
    failures: Iterable[Failure],
    gpus: Mapping[str, Place],
    now: float,
    policy: LemonPolicy | None = None,
) -> tuple[Lemon, ...]:
    """Return the cards and slots that keep failing, the worst first.

    `failures` are those of the window ending at `now`, in any order (others are ignored); `gpus` is
    where each card of the fleet is now. Cards that were replaced and nodes that are gone are not
    told of. The answer changes when a failure comes and `together_seconds` later, and when one
    leaves the window.
    """
    policy = policy or LemonPolicy()
    since, until = now - policy.window_seconds, now - policy.together_seconds
    told = (failure for failure in failures if failure.at <= now)
    incidents = tuple(i for i in _separate(told, policy) if since < i.at <= until)
    suspects = tuple(_suspects(incidents, policy.failures_min))
    if not suspects:
        return ()  # as nearly always; the rest looks at every GPU
    fleet = _Fleet(incidents, gpus, policy)
    explained: set[_Incident] = set()
    taken: list[tuple[_Suspect, AbstractSet[_Incident]]] = []
    # What is left of one to explain can only become less; so the first that still has all is next.
    waiting = [(-len(s.incidents), s.rank, s) for s in suspects if fleet.is_lemon(s, s.incidents)]
    heapify(waiting)
    while waiting:
        count, rank, suspect = heappop(waiting)
        left = suspect.incidents - explained
        if len(left) < -count:
            if fleet.is_lemon(suspect, left):
                heappush(waiting, (-len(left), rank, suspect))
            continue
        explained |= left
        taken.append((suspect, left))
    found = list(_found(taken, gpus, fleet))
    return tuple(sorted(found, key=lambda lemon: (lemon.odds, lemon.kind, lemon.uuid, lemon.slot)))


def _separate(failures: Iterable[Failure], policy: LemonPolicy) -> Iterator[_Incident]:
    """Yield the failures left when a burst counts once, and what a node shares not at all."""
    on_nodes: dict[str, list[Failure]] = {}
    last: dict[str, float] = {}
    begun: list[Failure] = []
    for failure in sorted(failures, key=lambda f: (f.at, f.uuid, f.node, f.slot, f.what)):
        on_nodes.setdefault(failure.node, []).append(failure)
        if failure.at - last.get(failure.uuid, -math.inf) >= policy.burst_seconds:
            last[failure.uuid] = failure.at
            begun.append(failure)
    for first in begun:
        if not _is_shared(first, on_nodes[first.node], policy.together_seconds):
            yield _Incident(first.at, first.uuid, Place(first.node, first.slot), first.what)


def poisson_tail(mean: float, least: int) -> float:
    """Return P(N >= least) of a Poisson variable with that mean, precise also where it is tiny."""
    if least <= mean:
        return 1.0 - math.fsum(_poisson(mean, number) for number in range(least))
    term = total = _poisson(mean, least)
    while term > total * 1e-17:
        least += 1
        term *= mean / least
        total += term
    return total


def _poisson(mean: float, number: int) -> float:
    if mean == 0:
        return float(number == 0)
    return math.exp(number * math.log(mean) - mean - math.lgamma(number + 1))


def _is_shared(first: Failure, on_node: Sequence[Failure], together_seconds: float) -> bool:
    """Whether another card of the node failed about then; `on_node` is in order of time."""
    if len(on_node) == 1:
        return False
    begin = bisect_left(on_node, first.at - together_seconds, key=lambda f: f.at)
    end = bisect_right(on_node, first.at + together_seconds, key=lambda f: f.at)
    return any(on_node[index].uuid != first.uuid for index in range(begin, end))


def _suspects(incidents: Sequence[_Incident], failures_min: int) -> Iterator[_Suspect]:
    """Yield the cards, and the slots in which different cards failed, that failed so often."""
    by_card: dict[str, list[_Incident]] = {}
    by_place: dict[Place, list[_Incident]] = {}
    for incident in incidents:
        by_card.setdefault(incident.uuid, []).append(incident)
        if incident.place.slot:
            by_place.setdefault(incident.place, []).append(incident)
    for uuid, own in by_card.items():
        if len(own) >= failures_min:
            last = max(own, key=lambda i: i.at)
            yield _Suspect(LemonKind.GPU, uuid, last.place, frozenset(own))
    for place, own in by_place.items():
        if len(own) >= failures_min and len({incident.uuid for incident in own}) > 1:
            yield _Suspect(LemonKind.SLOT, "", place, frozenset(own))


class _Fleet:
    """What a suspect is compared with."""

    def __init__(
        self, incidents: Sequence[_Incident], gpus: Mapping[str, Place], policy: LemonPolicy
    ) -> None:
        self.policy = policy
        self._counts = Counter(incident.uuid for incident in incidents)
        self.size = len(gpus) + sum(uuid not in gpus for uuid in self._counts)

    def mean(self, suspect: _Suspect) -> float:
        """Return how many failures are expected of one GPU in a window."""
        own = Counter(incident.uuid for incident in suspect.incidents)
        only_here = sum(count == self._counts[uuid] for uuid, count in own.items())
        share = (len(self._counts) - only_here) / max(1, self.size - 1)
        least = self.policy.rate_min_per_gpu_day * self.policy.window_seconds / _DAY
        return max(least, -math.log1p(-share)) if share < 1 else math.inf

    def odds(self, suspect: _Suspect, failures: int) -> float:
        """Return how many suspects with so many failures a healthy fleet gives per window."""
        mean = self.mean(suspect)
        if math.isinf(mean):
            return math.inf
        return 2 * self.size * mean * poisson_tail(mean, failures - 1)

    def is_lemon(self, suspect: _Suspect, incidents: AbstractSet[_Incident]) -> bool:
        """Whether chance does not explain so many."""
        policy, count = self.policy, len(incidents)
        return count >= policy.failures_min and self.odds(suspect, count) <= policy.odds_max


def _found(
    taken: Iterable[tuple[_Suspect, AbstractSet[_Incident]]],
    gpus: Mapping[str, Place],
    fleet: _Fleet,
) -> Iterator[Lemon]:
    """Yield what is still in the fleet of those taken for lemons."""
    nodes = {suspect.place.node for suspect, _ in taken}
    cards = {place: uuid for uuid, place in gpus.items() if place.node in nodes}
    nodes = {place.node for place in cards}
    for suspect, incidents in taken:
        place, card = suspect.place, cards.get(suspect.place, "")
        if suspect.kind is LemonKind.SLOT:
            if place.node in nodes:
                yield _lemon(suspect, place, card, incidents, fleet)
        elif suspect.uuid in gpus:
            yield _lemon(suspect, gpus[suspect.uuid], suspect.uuid, incidents, fleet)
        elif place.node in nodes and not card:
            # It is not counted any more, and still in its slot: nobody has put in another one.
            yield _lemon(suspect, place, suspect.uuid, incidents, fleet)


def _lemon(
    suspect: _Suspect,
    place: Place,
    card: str,
    incidents: AbstractSet[_Incident],
    fleet: _Fleet,
) -> Lemon:
    odds = fleet.odds(suspect, len(incidents))
    since = min(incident.at for incident in incidents)
    span = max(incident.at for incident in incidents) - since
    what = Counter(incident.what for incident in incidents if incident.what)
    told = ", ".join(
        f"{name} {count} times" if count > 1 else name
        for name, count in sorted(what.items(), key=lambda item: (-item[1], item[0]))
    )
    window_days = fleet.policy.window_seconds / _DAY
    return Lemon(
        kind=suspect.kind,
        node=place.node,
        uuid=card,
        slot=place.slot,
        since=since,
        failures=len(incidents),
        odds=odds,
        reason=(
            f"{len(incidents)} failures in {_span(span)}{f' ({told})' if told else ''}, "
            f"{_where(suspect, incidents)}; at the fleet's rate ({fleet.mean(suspect):.2g} per GPU "
            f"in {window_days:g} days) the odds of one such among {fleet.size} GPUs are "
            f"{_one_in(odds)}"
        ),
    )


def _where(suspect: _Suspect, incidents: AbstractSet[_Incident]) -> str:
    if suspect.kind is LemonKind.SLOT:
        cards = sorted({incident.uuid for incident in incidents})
        return f"of {len(cards)} cards in one slot: {', '.join(cards)}"
    places = sorted({incident.place for incident in incidents})
    if len(places) == 1:
        return "of one card in one slot"
    slots = ", ".join(f"{place.node} {place.slot}" for place in places)
    return f"of one card in {len(places)} slots: {slots}"


def _span(seconds: float) -> str:
    """Return a time in whole days, or hours below two days, rounded up."""
    hours = max(1, math.ceil(seconds / 3600))
    if hours < 48:
        return f"{hours} hour{'s' if hours > 1 else ''}"
    return f"{math.ceil(seconds / _DAY)} days"


def _one_in(odds: float) -> str:
    """Return the odds as a person says them: `1 in 4,000`, `1 in 10^9`."""
    times = 1 / odds if odds > 0 else math.inf
    if times < 1e6:
        return f"1 in {times:,.0f}"
    return f"1 in 10^{math.floor(math.log10(times))}" if times < 1e300 else "1 in 10^300"
