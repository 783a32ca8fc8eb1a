"""Judges what DCGM says of one GPU: which of its values are facts, and why there are none."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from stoker.agent.dcgm.codes import (
    INSTANCE_NOT_FOUND,
    NO_DATA,
    NOT_WATCHED,
    OK,
    STALE_DATA,
    status_error,
)
from stoker.agent.dcgm.fields import FIELDS, in_base_unit, is_blank, is_fresh
from stoker.agent.driver import DriverError, NotAvailable
from stoker.agent.facts import Fact

# dcgm_field_entity_group_t
GPU, GPU_INSTANCE = 1, 4

_GONE = (NOT_WATCHED, INSTANCE_NOT_FOUND)
_ONLY_BLANKS = (
    "DCGM tells blanks only: its profiling is paused (`dcgmi profile --resume` ends that), "
    "or another profiler has the hardware counters"
)


@dataclass(frozen=True, slots=True)
class Entity:
    """A GPU or a GPU instance, by DCGM's own number."""

    group: int
    number: int


@dataclass(frozen=True, slots=True)
class Value:
    """The newest value of a field of an entity."""

    entity: Entity
    field: int
    status: int
    at: float  # Unix seconds
    value: float | str


@dataclass(frozen=True, slots=True)
class Judged:
    """The facts of a GPU (None) and of its instances by number; the error when there is none."""

    facts: Mapping[int | None, Mapping[Fact, float]]
    error: DriverError | None = None
    # DCGM measures nothing of the GPU, or of an instance, any more: that was reset or made anew.
    is_unwatched: bool = False


def judge(
    values: Iterable[Value],
    places: Mapping[Entity, int | None],
    now: float,
    interval_seconds: float,
) -> Judged:
    """Return the facts among the values of one GPU and its instances."""
    facts: dict[int | None, dict[Fact, float]] = {}
    statuses: Counter[int] = Counter()
    watched: set[Entity] = set()
    unwatched: set[Entity] = set()
    ages: list[float] = []
    untrue: list[Value] = []
    blanks = 0
    for value in values:
        (unwatched if value.status in _GONE else watched).add(value.entity)
        if value.status in (NO_DATA, STALE_DATA):
            continue
        if value.status != OK:
            statuses[value.status] += 1
            continue
        if isinstance(value.value, str) or is_blank(value.value):
            blanks += 1
            continue
        fact = in_base_unit(value.field, value.value)
        if fact is None:
            untrue.append(value)
        elif not is_fresh(value.at, now, interval_seconds):
            ages.append(now - value.at)
        else:
            facts.setdefault(places[value.entity], {})[FIELDS[value.field]] = fact
    is_unwatched = bool(unwatched - watched)
    if facts:
        return Judged(facts, is_unwatched=is_unwatched)
    if statuses:
        status, _ = statuses.most_common(1)[0]
        return Judged({}, status_error(status), is_unwatched)
    if ages:
        age = min(ages, key=abs)
        return Judged({}, NotAvailable(f"DCGM's newest value is {age:.1f} s old"))
    if untrue:
        first = untrue[0]
        found = f"DCGM's field {first.field} cannot be {first.value}"
        return Judged({}, NotAvailable(found))
    return Judged({}, NotAvailable(_ONLY_BLANKS if blanks else "DCGM has no values"))
