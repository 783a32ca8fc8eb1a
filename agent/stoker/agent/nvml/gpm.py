"""Hardware counters of Hopper and later (GPM): how busy which part of the chip was.

The driver counts all the time; a sample is a snapshot of the counters, and two of them make the
metrics of the time between. One older sample is kept, and each reading takes one newer. While
somebody else's profiler has the counters nothing is sampled, and what was kept is forgotten: it
would be the start of an interval in which they were not ours.
"""

import ctypes
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

from stoker.agent.driver import (
    DriverError,
    DriverUnavailable,
    FactUnavailable,
    GpuUnavailable,
)
from stoker.agent.facts import Fact
from stoker.agent.nvml.facts import Told
from stoker.agent.nvml.session import Device, Session
from stoker.agent.nvml.table import (
    GPM_METRIC,
    GPM_METRICS_AT,
    GPM_METRICS_GET_VERSION,
    Code,
    GpmMetricsGet,
    GpmSample,
    GpmSupport,
)
from stoker.agent.nvml.units import Meaning, counted_bytes, counted_ratio

# The driver makes nothing of samples that are closer.
INTERVAL_SECONDS_MIN: Final = 0.1
# What a metric's code is before the driver fills it in: NVML_ERROR_UNKNOWN.
_UNTOLD: Final = 999

# Metrics of nvml.h (NVML_GPM_METRIC_...): percent, or MiB per second.
METRICS: tuple[tuple[int, Fact, Meaning], ...] = (
    (1, Fact.GRAPHICS_ENGINE_ACTIVE_RATIO, counted_ratio),
    (2, Fact.SM_ACTIVE_RATIO, counted_ratio),
    (3, Fact.SM_OCCUPANCY_RATIO, counted_ratio),
    (4, Fact.INTEGER_ACTIVE_RATIO, counted_ratio),
    (5, Fact.TENSOR_ACTIVE_RATIO, counted_ratio),
    (7, Fact.TENSOR_HALF_ACTIVE_RATIO, counted_ratio),
    (8, Fact.TENSOR_DOUBLE_ACTIVE_RATIO, counted_ratio),
    (9, Fact.TENSOR_INTEGER_ACTIVE_RATIO, counted_ratio),
    (10, Fact.MEMORY_BANDWIDTH_RATIO, counted_ratio),
    (11, Fact.FP64_ACTIVE_RATIO, counted_ratio),
    (12, Fact.FP32_ACTIVE_RATIO, counted_ratio),
    (13, Fact.FP16_ACTIVE_RATIO, counted_ratio),
    (20, Fact.PCIE_TRANSMIT_BYTES_PER_SECOND, counted_bytes),
    (21, Fact.PCIE_RECEIVE_BYTES_PER_SECOND, counted_bytes),
    (60, Fact.NVLINK_RECEIVE_BYTES_PER_SECOND, counted_bytes),
    (61, Fact.NVLINK_TRANSMIT_BYTES_PER_SECOND, counted_bytes),
)
_BLANK: Final = b"".join(GPM_METRIC.pack(number, _UNTOLD, 0.0, 0, 0, 0) for number, _, _ in METRICS)


class GpmMetrics:
    """The struct in which the driver makes metrics of two samples; one for all GPUs."""

    def __init__(self, session: Session) -> None:
        """Make it; it has room for hundreds of metrics, so it is made once."""
        self._session = session
        self._struct: GpmMetricsGet = session.find("c_nvmlGpmMetricsGet_t")()
        self._struct.version = GPM_METRICS_GET_VERSION
        self._struct.numMetrics = len(METRICS)
        memory: Any = self._struct
        self._metrics = (ctypes.c_char * len(_BLANK)).from_buffer(memory, GPM_METRICS_AT)
        self._ask = session.find("nvmlGpmMetricsGet")

    def read(self, device: Device, older: GpmSample, newer: GpmSample, told: Told) -> None:
        """Take in what the samples tell; raises DriverError."""
        # A driver that does not fill in a metric must not leave that of another GPU behind.
        self._metrics.raw = _BLANK
        self._struct.sample1, self._struct.sample2 = older, newer
        self._session.call(device, "nvmlGpmMetricsGet", self._ask, self._struct)
        told_metrics = GPM_METRIC.iter_unpack(self._metrics)
        for (_, fact, meaning), (_, code, value, *_) in zip(METRICS, told_metrics, strict=True):
            if code == Code.SUCCESS:
                told.put(fact, meaning(value))
                continue
            if self._session.is_lacking(code):
                continue
            error = self._session.error(code, "nvmlGpmMetricsGet", device)
            if isinstance(error, DriverUnavailable | GpuUnavailable):
                raise error
            told.fail(fact, error)


@dataclass(slots=True)
class _Pair:
    """Two buffers for samples of one GPU, or of one GPU instance."""

    older: GpmSample
    newer: GpmSample
    older_at: float | None = None  # None: nothing is kept


class Gpm:
    """The counters of one GPU, as a whole and by GPU instance."""

    def __init__(self, session: Session, gpu: Device, metrics: GpmMetrics) -> None:
        """Take a GPU that has them."""
        self._session, self._gpu, self._metrics = session, gpu, metrics
        self._pairs: dict[int | None, _Pair] = {}
        self._unavailable: set[int | None] = set()

    @classmethod
    def of(cls, session: Session, gpu: Device, metrics: GpmMetrics | None) -> "Gpm | None":
        """Return the counters of a GPU, or None where there are none."""
        if metrics is None:
            return None
        try:
            support: GpmSupport = session.ask(gpu, "nvmlGpmQueryDeviceSupport", gpu.handle)
        except (DriverUnavailable, GpuUnavailable):
            raise
        except DriverError:
            return None
        return cls(session, gpu, metrics) if support.isSupportedDevice else None

    def read(self, told: Told, now: float, gpu_instance_id: int | None = None) -> None:
        """Take one sample, and in what it tells with the one before.

        Raises DriverUnavailable and GpuUnavailable.
        """
        if gpu_instance_id in self._unavailable:
            return
        try:
            self._read(told, now, gpu_instance_id)
        except FactUnavailable:
            self._unavailable.add(gpu_instance_id)
        except (DriverUnavailable, GpuUnavailable):
            raise
        except DriverError as error:
            if pair := self._pairs.get(gpu_instance_id):
                pair.older_at = None
            for _, fact, _ in METRICS:
                told.fail(fact, error)

    def _read(self, told: Told, now: float, gpu_instance_id: int | None) -> None:
        session, gpu = self._session, self._gpu
        pair = self._pairs.get(gpu_instance_id)
        if pair is None:
            pair = self._pairs[gpu_instance_id] = self._alloc()
        elif pair.older_at is not None and 0 <= now - pair.older_at < INTERVAL_SECONDS_MIN:
            return
        if gpu_instance_id is None:
            session.ask(gpu, "nvmlGpmSampleGet", gpu.handle, pair.newer)
        else:
            session.ask(gpu, "nvmlGpmMigSampleGet", gpu.handle, gpu_instance_id, pair.newer)
        # A clock that was set back tells no interval.
        had_older = pair.older_at is not None and now > pair.older_at
        pair.older, pair.newer, pair.older_at = pair.newer, pair.older, now
        if had_older:
            self._metrics.read(gpu, pair.newer, pair.older, told)

    def forget(self) -> None:
        """Let the next sample be a first one."""
        for pair in self._pairs.values():
            pair.older_at = None

    def keep_only(self, gpu_instance_ids: Iterable[int]) -> None:
        """Let go of what is kept of other GPU instances than these."""
        kept = {None, *gpu_instance_ids}
        self._unavailable &= kept
        for gpu_instance_id in [each for each in self._pairs if each not in kept]:
            self._free(self._pairs.pop(gpu_instance_id))

    def close(self) -> None:
        """Let go of all buffers."""
        while self._pairs:
            _, pair = self._pairs.popitem()
            self._free(pair)

    def _alloc(self) -> _Pair:
        older: GpmSample = self._session.ask(self._gpu, "nvmlGpmSampleAlloc")
        try:
            return _Pair(older, self._session.ask(self._gpu, "nvmlGpmSampleAlloc"))
        except DriverError:
            self._session.ask(self._gpu, "nvmlGpmSampleFree", older)
            raise

    def _free(self, pair: _Pair) -> None:
        for sample in (pair.older, pair.newer):
            try:
                self._session.ask(self._gpu, "nvmlGpmSampleFree", sample)
            except DriverError:
                return  # the session is gone, and the buffers with it
