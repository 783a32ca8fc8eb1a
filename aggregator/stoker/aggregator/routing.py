"""How a service's calls are dealt out among its endpoints: a weight for each, with its reason.

Theory of operation. Calls are dealt in proportion to

    capacity x speed x headroom x memory x queue x success        (each of the last five at most 1)

The factors are floored, so that an endpoint that can be called always gets a few calls, by which
its recovery shows:

* speed: the square of the fastest median latency of the service over its own. The best static split
  over servers of different speed leaves the slow ones idle while there is little to do, and goes
  towards their rates of service as it grows (Tantawi and Towsley, J. ACM 32, 1985). So does this:
  where the fast ones are called more than they can take, their latency rises, and with it the part
  of the others. The median, because the tail of a busy replica belongs to its queue.
* headroom: 1 - 0.75 u, u the utilization of its busiest GPU. The mean response time of a processor
  that is shared is S / (1 - u) (M/G/1 with processor sharing; Kleinrock, Queueing Systems II,
  1976). NVML's figure says that a kernel ran, not that the GPU was full, so an always busy GPU
  keeps a quarter.
* memory: 1 up to 90 % of the fullest GPU's memory, from there down to a quarter at 100 %.
* queue: 1 / (1 + x / mean x), x the operations under way for each unit of capacity: weighted least
  request, as Envoy's balancer does it, with the mean for its 1, because reports are half a second
  old. What a client does between reports it knows itself: power of two choices on its own calls
  (Mitzenmacher 2001), in the SDK.
* success: (1 - part that failed)^2. A replica that fails at once is fast and idle; without this
  factor it would draw every call (latencies are of operations that succeeded).

What is not known of an endpoint is taken to be the median of what is known of its peers. Inputs are
smoothed before (`services`), and a published weight stands until one has moved by more than a fifth
(`kept_steady`): otherwise readers of the same report would swing from one endpoint to the next.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

SPEED_MIN = 0.02
BUSY_PART = 0.75  # of an always busy GPU's headroom that is gone
MEMORY_PRESSURE_FROM = 0.9
MEMORY_MIN = 0.25
SUCCESS_MIN = 0.05
# A weight stands until one of its service has moved by more than this part of the larger.
DEAD_BAND = 0.2
# A factor is named as a reason when it costs an endpoint so much of what its best peer has.
_WORTH_TELLING = 0.8


@dataclass(frozen=True, slots=True)
class Load:
    """How an endpoint fares, smoothed; None: not known."""

    utilization_ratio: float | None = None  # of its busiest GPU
    memory_used_ratio: float | None = None  # of its fullest GPU
    in_flight: float | None = None  # operations under way
    latency_p50_seconds: float | None = None  # of operations that succeeded
    error_ratio: float | None = None


@dataclass(frozen=True, slots=True)
class Candidate:
    """An endpoint that may be called, or why it must not be."""

    id: str
    load: Load
    capacity: int | None = None  # calls at a time, as it says
    out: str = ""  # why no call goes to it; empty: it is well


@dataclass(frozen=True, slots=True)
class Share:
    """An endpoint's part of the calls, from 0 to 1, and why."""

    weight: float
    reason: str


def weigh(candidates: Sequence[Candidate]) -> dict[str, Share]:
    """Return each endpoint's share by id; together 1, or 0 where none can be called."""
    shares = {each.id: Share(0.0, each.out) for each in candidates if each.out}
    well = [each for each in candidates if not each.out]
    if not well:
        return {each.id: shares[each.id] for each in candidates}
    capacities = _capacities(well)
    factors = {name: filled(well, capacities) for name, filled in _FACTORS.items()}
    scores = list(capacities)
    for values in factors.values():
        scores = [score * value for score, value in zip(scores, values, strict=True)]
    total = sum(scores)
    best = {name: max(values) for name, values in factors.items()}
    for place, each in enumerate(well):
        costly = [
            (values[place] / best[name], name)
            for name, values in factors.items()
            if values[place] < _WORTH_TELLING * best[name]
        ]
        shares[each.id] = Share(scores[place] / total, _reason(each, costly))
    return {each.id: shares[each.id] for each in candidates}


def kept_steady(fresh: Mapping[str, Share], published: Mapping[str, Share]) -> bool:
    """Whether the published shares still stand: the same endpoints are in, and none moved far."""
    if fresh.keys() != published.keys():
        return False
    for id_, share in fresh.items():
        old, new = published[id_].weight, share.weight
        if (old == 0.0) != (new == 0.0) or abs(new - old) > DEAD_BAND * max(new, old):
            return False
        if new == 0.0 and share.reason != published[id_].reason:
            return False
    return True


# --- the factors: one value for each endpoint, from above 0 to 1


def _capacities(well: Sequence[Candidate]) -> list[float]:
    """Return what each can do at a time; equal unless every one of them says it."""
    told = [each.capacity for each in well if each.capacity is not None]
    return [float(each) for each in told] if len(told) == len(well) else [1.0] * len(well)


def _speeds(well: Sequence[Candidate], capacities: Sequence[float]) -> list[float]:
    known = [each.load.latency_p50_seconds for each in well]
    fastest = min((each for each in known if each is not None), default=1.0)
    return _filled(
        known, lambda seconds: max(SPEED_MIN, (fastest / seconds) ** 2 if seconds else 1.0)
    )


def _headrooms(well: Sequence[Candidate], capacities: Sequence[float]) -> list[float]:
    return _filled([each.load.utilization_ratio for each in well], lambda u: 1 - BUSY_PART * u)


def _memories(well: Sequence[Candidate], capacities: Sequence[float]) -> list[float]:
    def left(used: float) -> float:
        beyond = max(0.0, used - MEMORY_PRESSURE_FROM) / (1 - MEMORY_PRESSURE_FROM)
        return 1 - (1 - MEMORY_MIN) * min(1.0, beyond)

    return _filled([each.load.memory_used_ratio for each in well], left)


def _queues(well: Sequence[Candidate], capacities: Sequence[float]) -> list[float]:
    each_slot = [
        None if each.load.in_flight is None else each.load.in_flight / capacity
        for each, capacity in zip(well, capacities, strict=True)
    ]
    known = [each for each in each_slot if each is not None]
    # One call under way is no queue, whatever the mean.
    mean = max(sum(known) / len(known) if known else 0.0, len(capacities) / sum(capacities))
    return _filled(each_slot, lambda x: 1 / (1 + x / mean))


def _successes(well: Sequence[Candidate], capacities: Sequence[float]) -> list[float]:
    return _filled(
        [each.load.error_ratio for each in well], lambda failed: max(SUCCESS_MIN, (1 - failed) ** 2)
    )


_FACTORS: Mapping[str, Callable[[Sequence[Candidate], Sequence[float]], list[float]]] = {
    "speed": _speeds,
    "headroom": _headrooms,
    "memory": _memories,
    "queue": _queues,
    "success": _successes,
}


def _filled(known: Sequence[float | None], factor: Callable[[float], float]) -> list[float]:
    """Return the factor of each; of what is not known the median of the others, or 1."""
    values = [None if each is None else factor(each) for each in known]
    typical = median([each for each in values if each is not None] or [1.0])
    return [typical if each is None else each for each in values]


# --- the reasons


def _reason(each: Candidate, costly: Sequence[tuple[float, str]]) -> str:
    """Return what costs it calls beside its best peer, the most costly first."""
    parts = [part for _, name in sorted(costly) if (part := _told(name, each.load))]
    return "; ".join(parts) or "as well as its peers"


def _told(name: str, load: Load) -> str:
    """Return one factor in words; empty: it is only assumed, from the peers."""
    match name:
        case "speed" if load.latency_p50_seconds is not None:
            return f"slower: a median of {_duration(load.latency_p50_seconds)}"
        case "headroom" if load.utilization_ratio is not None:
            return f"its GPU is {_percent(load.utilization_ratio)} busy"
        case "memory" if load.memory_used_ratio is not None:
            return f"its GPU's memory is {_percent(load.memory_used_ratio)} full"
        case "queue" if load.in_flight is not None:
            return f"{load.in_flight:.1f} operations under way"
        case "success" if load.error_ratio is not None:
            return f"{_percent(load.error_ratio)} of its operations fail"
        case _:
            return ""


def _percent(ratio: float) -> str:
    return f"{100 * ratio:.0f} %"


def _duration(seconds: float) -> str:
    return f"{seconds * 1000:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"
