"""What is known of every GPU now: readings of different rates folded into one picture.

A value stays in the picture until it is read anew, is too old for its rate, or the GPU cannot be
read: then everything goes at once, the slow facts too, because nothing about a GPU that does not
answer is known. What the agent itself counted (Xids, failures) stays.

Between two scrapes only the last value would be seen; so of some facts the picture also has the
least, the most and the mean over a window that should be at least as long as the time between two
scrapes. It needs no reset, so any number of scrapers see the same.
"""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from stoker.agent.facts import Fact, Rate, facts_at
from stoker.agent.readings import Extent, GpuReading, GpuSample, MigDeviceReading
from stoker.agent.sampling import sample

# The facts whose extent over the window is told.
WINDOWED = (Fact.UTILIZATION_RATIO, Fact.MEMORY_UTILIZATION_RATIO, Fact.POWER_WATTS)
# A slow fact is told for so many of its intervals after it was read.
INTERVALS_FRESH = 3.0
# Unless told otherwise. Prometheus scrapes most often every 15, 30 or 60 seconds.
SLOW_SECONDS = 10.0
WINDOW_SECONDS = 60.0
# A window is kept in so many parts at the most, whatever its length and the time between readings.
WINDOW_PARTS = 600
# Different Xids of one GPU that are counted apart; there are about 170. More are a broken driver.
XIDS_MAX = 256


@dataclass(frozen=True, slots=True)
class XidCount:
    """How often an Xid was seen since the agent started, and when last."""

    total: int
    last_at: float


@dataclass(frozen=True, slots=True)
class GpuTelemetry:
    """What may be told of one GPU now."""

    uuid: str
    at: float  # of the newest reading
    facts: Mapping[Fact, float]
    by_label: Mapping[Fact, Mapping[str, float]]
    mig_devices: tuple[MigDeviceReading, ...]
    extents: Mapping[Fact, Extent]  # over the window


@dataclass(slots=True)
class _Part:
    """What a stretch of a window adds to its mean."""

    since: float  # when its first reading was
    mean_sum: float = 0.0
    readings: int = 0
    samples: int = 0


_Moments = deque[tuple[float, float]]  # (since when its part is, value), oldest first


@dataclass(slots=True)
class _Window:
    """Extents of the last seconds; each step costs the same, however long the window is.

    It is kept in parts of a `WINDOW_PARTS`th of its length, so it never has more of them, however
    often is read. Beside them are the values that may yet be the least (the most): each is smaller
    (larger) than everything after it.
    """

    parts: deque[_Part] = field(default_factory=deque[_Part])
    least: _Moments = field(default_factory=_Moments)
    most: _Moments = field(default_factory=_Moments)
    mean_sum: float = 0.0
    readings: int = 0
    samples: int = 0

    def add(self, now: float, extent: Extent, seconds: float) -> None:
        if not self.parts or now - self.parts[-1].since >= seconds / WINDOW_PARTS:
            self.parts.append(_Part(now))
        part = self.parts[-1]
        part.mean_sum += extent.mean
        part.readings += 1
        part.samples += extent.samples
        self.mean_sum += extent.mean
        self.readings += 1
        self.samples += extent.samples
        while self.least and self.least[-1][1] >= extent.least:
            self.least.pop()
        while self.most and self.most[-1][1] <= extent.most:
            self.most.pop()
        for moments, value in ((self.least, extent.least), (self.most, extent.most)):
            if not moments or moments[-1][0] != part.since:  # else that one outlasts this
                moments.append((part.since, value))
        self._forget(now - seconds)

    def _forget(self, until: float) -> None:
        while self.parts[0].since <= until:
            part = self.parts.popleft()
            self.mean_sum -= part.mean_sum
            self.readings -= part.readings
            self.samples -= part.samples
        for moments in (self.least, self.most):
            while moments[0][0] <= until:
                moments.popleft()

    def extent(self) -> Extent:
        """Return the extent of all; the mean gives every reading the same weight."""
        least, most = self.least[0][1], self.most[0][1]
        # A sum from which was taken as much as was added is not exactly what it should be.
        mean = min(most, max(least, self.mean_sum / self.readings))
        return Extent(least, most, mean, self.samples)


@dataclass(frozen=True, slots=True)
class _Slow:
    """The slow facts of a reading that had them."""

    at: float  # monotonic
    facts: Mapping[Fact, float]
    by_label: Mapping[Fact, Mapping[str, float]]
    mig_devices: Mapping[str, Mapping[Fact, float]]  # by UUID


@dataclass(slots=True)
class _Gpu:
    """What is remembered of one GPU while it answers."""

    reading: GpuReading  # the newest
    facts: Mapping[Fact, float]  # of the newest, with what was made of it and the one before
    slow: _Slow | None = None
    windows: dict[Fact, _Window] = field(default_factory=dict[Fact, _Window])


class Telemetry:
    """The picture of the node's GPUs. Times are monotonic seconds."""

    def __init__(
        self, *, slow_seconds: float = SLOW_SECONDS, window_seconds: float = WINDOW_SECONDS
    ) -> None:
        """Take the time between two readings of slow facts, and the length of the window."""
        self._slow_seconds_max = INTERVALS_FRESH * slow_seconds
        self._window_seconds = window_seconds
        self._gpus: dict[str, _Gpu] = {}
        self._xids: dict[str, Mapping[int, XidCount]] = {}
        self._failures: dict[tuple[str, str], int] = {}

    @property
    def xids(self) -> Mapping[str, Mapping[int, XidCount]]:
        """The Xids seen, by UUID, then by number."""
        return dict(self._xids)

    @property
    def failures(self) -> Mapping[tuple[str, str], int]:
        """How often reading failed, by fact (or `WHOLE_GPU`) and kind of error."""
        return dict(self._failures)

    def take(self, readings: Sequence[GpuReading], now: float) -> tuple[GpuSample, ...]:
        """Take in the readings of a tick; return the samples of the GPUs that were read.

        A GPU that is not among the readings, or of which nothing was read, is forgotten.
        """
        before, self._gpus = self._gpus, {}
        return tuple(self._take(before, readings, now))

    def _take(
        self, before: Mapping[str, _Gpu], readings: Sequence[GpuReading], now: float
    ) -> Iterator[GpuSample]:
        for reading in readings:
            for failure in reading.failures:
                key = (failure.fact, failure.error_kind)
                self._failures[key] = self._failures.get(key, 0) + 1
            self._count_xids(reading)
            if reading.is_lost:
                continue
            gpu = before.get(reading.uuid)
            made = sample(gpu.reading if gpu else None, reading)
            if made.is_empty:
                continue
            facts = reading.facts
            if made.power_watts is not None:
                facts = {**facts, Fact.POWER_WATTS: made.power_watts}
            if gpu is None:
                gpu = _Gpu(reading, facts)
            gpu.reading, gpu.facts = reading, facts
            if Rate.SLOW in reading.rates:
                gpu.slow = _slow_part(reading, now)
            self._widen(gpu, now)
            self._gpus[reading.uuid] = gpu
            yield made

    def forget(self) -> None:
        """Know nothing any more: the tick failed."""
        self._gpus = {}

    def forget_slow(self) -> None:
        """Know no slow fact any more: the GPUs are not those that told them, or not as they were.

        A GPU whose MIG mode was toggled is not busy as it was, and does not say so by itself.
        """
        for gpu in self._gpus.values():
            gpu.slow = None

    def gpus(self, now: float) -> tuple[GpuTelemetry, ...]:
        """Return what may be told now, in the order of the readings."""
        return tuple(self._tell(gpu, now) for gpu in self._gpus.values())

    def _tell(self, gpu: _Gpu, now: float) -> GpuTelemetry:
        reading, slow = gpu.reading, gpu.slow
        facts, by_label, mig = gpu.facts, reading.by_label, reading.mig_devices
        is_fresh = slow is not None and now - slow.at <= self._slow_seconds_max
        if slow is not None and is_fresh and Rate.SLOW not in reading.rates:
            facts = {**slow.facts, **facts}
            by_label = {**slow.by_label, **by_label}
            mig = tuple(
                replace(each, facts={**slow.mig_devices.get(each.uuid, {}), **each.facts})
                for each in mig
            )
        return GpuTelemetry(
            uuid=reading.uuid,
            at=reading.at,
            facts=facts,
            by_label=by_label,
            mig_devices=mig,
            extents={fact: window.extent() for fact, window in gpu.windows.items()},
        )

    def _widen(self, gpu: _Gpu, now: float) -> None:
        """Add the reading to the windows; what was not told now ends its window."""
        for fact in WINDOWED:
            extent = gpu.reading.extents.get(fact)
            value = gpu.facts.get(fact)
            if extent is None and value is not None:
                extent = Extent(value, value, value, 1)
            if extent is None:
                gpu.windows.pop(fact, None)
                continue
            gpu.windows.setdefault(fact, _Window()).add(now, extent, self._window_seconds)

    def _count_xids(self, reading: GpuReading) -> None:
        if not reading.xids:
            return
        counts = dict(self._xids.get(reading.uuid, {}))
        for seen in reading.xids:
            before = counts.get(seen.xid)
            if before is not None or len(counts) < XIDS_MAX:
                counts[seen.xid] = XidCount(1 + (before.total if before else 0), seen.at)
        self._xids[reading.uuid] = counts


def _slow_part(reading: GpuReading, now: float) -> _Slow:
    slow = facts_at(Rate.SLOW)
    return _Slow(
        at=now,
        facts={fact: value for fact, value in reading.facts.items() if fact in slow},
        by_label={fact: values for fact, values in reading.by_label.items() if fact in slow},
        mig_devices={
            device.uuid: {fact: value for fact, value in device.facts.items() if fact in slow}
            for device in reading.mig_devices
        },
    )
