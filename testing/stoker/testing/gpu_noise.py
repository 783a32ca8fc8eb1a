"""What the GPUs of a node show while jobs come and go: healthy noise, and cards that are held back.

Seeded, and free of I/O. The figures are those of an H100 SXM; cards differ by a few per cent in the
clock that they reach at their power limit (Sinha et al., "Not All GPUs Are Created Equal", SC22).

For speed a phase of a job has few instants, drawn when it begins, and each is shown again and
again in random order: ten thousand GPU-days are many instants. What is low by chance thereby recurs
for as long as the phase lasts, which makes the noise harder to be silent about.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from random import Random

from stoker.aggregator.stragglers import Gang, Member

MODEL = "NVIDIA H100 80GB HBM3"
_INSTANTS_BITS = 3  # a phase has eight

_HOUR = 3600.0
_DAY = 24 * _HOUR
_SM_HERTZ, _SM_IDLE_HERTZ, _SM_STEP_HERTZ = 1980e6, 345e6, 15e6
_MEMORY_HERTZ = 2619e6
_POWER_WATTS, _POWER_IDLE_WATTS = 700.0, 75.0
_LINK, _LINK_BAD, _LINK_IDLE = 63e9, 16e9, 4e9  # 16 lanes of generation 5; 4 of them; generation 1


class Work(StrEnum):
    """What a job asks of its GPUs."""

    CAPPED = "capped"  # training at the power limit: clocks differ from card to card
    FULL_CLOCK = "full_clock"  # training below it
    UNEVEN = "uneven"  # the data loader of one rank is slow: it is idle for half of the time
    PIPELINE = "pipeline"  # two ranks have the heavier stages, and are at the power limit alone
    SERVING = "serving"  # every GPU as busy as its requests make it
    PARTIAL = "partial"  # one GPU is not used at all
    IDLE = "idle"


ALL_WORK = tuple(Work)
# That ask the same of every GPU.
EQUAL_WORK = (Work.CAPPED, Work.FULL_CLOCK)


class HeldBack(StrEnum):
    """What makes a card a straggler."""

    SLOW = "slow"  # by 15 %
    HOT = "hot"  # throttled at 88 C and more
    LINK = "link"  # its PCIe link has 4 of 16 lanes


class _Phase(StrEnum):
    RUN = "run"
    STALL = "stall"  # everybody waits for data
    CHECKPOINT = "checkpoint"  # nobody computes
    DIP = "dip"  # one card is slow for less time than anybody should be told of


@dataclass(slots=True)
class _Card:
    uuid: str
    silicon: float  # the clock that it reaches at its power limit, as a share of the usual
    warmth_celsius: float


class NoisyNode:
    """A node whose GPUs are held by one job after another, each an allocation of all of them."""

    def __init__(
        self,
        rng: Random,
        name: str,
        gpus: int,
        held_back: Mapping[int, HeldBack] | None = None,
        works: Sequence[Work] = ALL_WORK,
    ) -> None:
        self.name = name
        self.held_back = dict(held_back or {})
        self._rng = rng
        self._works = works
        self._cards = [
            _Card(f"GPU-{name}-{i}", min(1.035, max(0.965, rng.gauss(1.0, 0.015))), rng.gauss(0, 2))
            if i not in self.held_back
            else _Card(f"GPU-{name}-{i}", 1.0, 0.0)
            for i in range(gpus)
        ]
        self._tide = rng.uniform(0.0, 2 * math.pi)  # when its day is hottest
        self._jobs = 0
        self._job_until = self._phase_until = -math.inf
        self._work = Work.IDLE
        self._odd = 0  # the rank that differs, where one does
        self._instants: tuple[Gang, ...] = ()

    def uuid(self, index: int) -> str:
        """Return the UUID of the GPU at that position."""
        return self._cards[index].uuid

    def at(self, now: float) -> Gang:
        """Return what its GPUs show; `now` must not go back."""
        if now >= self._job_until:
            self._begin_job(now)
        if now >= self._phase_until:
            self._begin_phase(now)
        return self._instants[self._rng.getrandbits(_INSTANTS_BITS)]

    def _begin_job(self, now: float) -> None:
        self._jobs += 1
        self._work = self._rng.choice(self._works)
        self._odd = self._rng.randrange(len(self._cards))
        self._job_until = now + self._rng.uniform(0.5, 24) * _HOUR
        self._phase_until = now

    def _begin_phase(self, now: float) -> None:
        rng = self._rng
        kinds = (_Phase.RUN, _Phase.STALL, _Phase.CHECKPOINT, _Phase.DIP)
        phase = rng.choices(kinds, (80, 10, 8, 2))[0]
        minutes = {
            _Phase.RUN: rng.uniform(30, 240),
            _Phase.STALL: rng.uniform(0.2, 5),
            _Phase.CHECKPOINT: rng.uniform(0.5, 4),
            _Phase.DIP: rng.uniform(1, 4),
        }[phase]
        self._phase_until = now + 60 * minutes
        # The hall's air has a tide over the day, and its power limit now and then a lower one.
        heat = 5 * math.sin(2 * math.pi * now / _DAY + self._tide)
        cap = rng.uniform(0.8, 1.0)
        dipping = rng.randrange(len(self._cards)) if phase is _Phase.DIP else None
        job, cards = f"{self.name}-job-{self._jobs}", range(len(self._cards))
        self._instants = tuple(
            Gang(job, MODEL, tuple(self._drawn(i, phase, heat, cap, i == dipping) for i in cards))
            for _ in range(1 << _INSTANTS_BITS)
        )

    def _drawn(self, index: int, phase: _Phase, heat: float, cap: float, dips: bool) -> Member:
        """Return one instant of one GPU."""
        rng, card = self._rng, self._cards[index]
        busy, clock, power = self._asked(index, cap)
        if phase is _Phase.STALL:
            busy, power = rng.uniform(0.0, 0.25), rng.uniform(120.0, 200.0)
        if phase is _Phase.CHECKPOINT or self._work is Work.IDLE:
            busy, clock, power = 0.0, _SM_IDLE_HERTZ / _SM_HERTZ, _POWER_IDLE_WATTS
        celsius = 40 + 28 * power / _POWER_WATTS + heat + card.warmth_celsius + rng.gauss(0, 1.5)
        link = _LINK if busy > 0.0 else _LINK_IDLE  # it saves power
        held_back = self.held_back.get(index)
        if (held_back is HeldBack.SLOW or dips) and busy > 0.0:
            clock, power = 0.85 * clock, 0.85 * power
        elif held_back is HeldBack.HOT and busy > 0.0:
            clock, power, celsius = rng.uniform(0.70, 0.86) * clock, 0.75 * power, rng.gauss(89, 1)
        elif held_back is HeldBack.LINK:
            link, busy = min(link, _LINK_BAD), 0.6 * busy
        return Member(
            uuid=card.uuid,
            node=self.name,
            index=index,
            sm_clock_hertz=round(clock * _SM_HERTZ / _SM_STEP_HERTZ) * _SM_STEP_HERTZ,
            memory_clock_hertz=_MEMORY_HERTZ,
            power_watts=power,
            utilization_ratio=busy,
            temperature_celsius=celsius,
            pcie_link_bytes_per_second=link,
        )

    def _asked(self, index: int, cap: float) -> tuple[float, float, float]:
        """Return utilization, clock as a share of the highest, and power, as the job has them."""
        rng, card = self._rng, self._cards[index]
        capped = min(1.0, 0.86 * cap * card.silicon * rng.gauss(1.0, 0.015))
        is_odd = index == self._odd
        match self._work:
            case Work.CAPPED:
                return rng.uniform(0.95, 1.0), capped, cap * _POWER_WATTS + rng.gauss(0, 6)
            case Work.FULL_CLOCK:
                return rng.uniform(0.85, 1.0), rng.uniform(0.985, 1.0), rng.gauss(430, 25)
            case Work.UNEVEN if is_odd:
                return rng.uniform(0.3, 0.6), rng.uniform(0.985, 1.0), rng.gauss(280, 25)
            case Work.PIPELINE if is_odd or index == (self._odd + 1) % len(self._cards):
                return 1.0, min(capped, 0.86 * card.silicon), _POWER_WATTS + rng.gauss(0, 6)
            case Work.SERVING:
                busy = max(0.0, rng.uniform(-0.2, 1.0))
                idle = _SM_IDLE_HERTZ / _SM_HERTZ
                return busy, 1.0 if busy else idle, _POWER_IDLE_WATTS + 450 * busy
            case Work.PARTIAL if is_odd:
                return 0.0, _SM_IDLE_HERTZ / _SM_HERTZ, _POWER_IDLE_WATTS
            case Work.UNEVEN | Work.PIPELINE | Work.PARTIAL:
                return rng.uniform(0.95, 1.0), rng.uniform(0.985, 1.0), rng.gauss(540, 20)
            case Work.IDLE:
                return 0.0, _SM_IDLE_HERTZ / _SM_HERTZ, _POWER_IDLE_WATTS
