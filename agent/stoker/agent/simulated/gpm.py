"""GPM on a simulated GPU: hardware counters as means over the time between two samples.

Two samples of a GPU, or of one GPU instance, hold its counters at two times; the metrics are what
lies between. A kernel keeps every SM and the tensor pipes busy to a fixed share, so all ratios
follow the load of that time.
"""

# ruff: noqa: N802 (the names are the driver's own)

import ctypes
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from stoker.agent.simulated.card import SimulatedCard
from stoker.agent.simulated.instances import MigDevice
from stoker.agent.simulated.library import NVML, error, error_code
from stoker.agent.simulated.session import (
    Device,
    SimulatedSession,
    of_card,
    of_device,
    of_system,
    told,
)

_MIB = 2**20

# By metric ID, what of the busy time a kernel of a training job makes of it.
_SHARES: Mapping[int, float] = MappingProxyType(
    {
        1: 1.0,  # graphics or compute engine
        2: 0.93,  # SMs
        3: 0.36,  # warps of the most possible
        4: 0.17,  # integer
        5: 0.58,  # any tensor pipe
        6: 0.0,  # DFMA
        7: 0.56,  # HMMA
        8: 0.0,  # DMMA
        9: 0.02,  # IMMA
        10: 0.47,  # DRAM bandwidth
        11: 0.0,  # FP64
        12: 0.12,  # FP32
        13: 0.05,  # FP16
    }
)
_PCIE_SENT, _PCIE_RECEIVED = 20, 21
_DECODER = 30
_ENGINES = range(30, 52)  # decoders, JPEG decoders, optical flow
_NVLINK_RECEIVED, _NVLINK_SENT = 60, 61
_LINK_FIRST = 62  # received and sent by turns
_SUPPORTED, _SUCCESS = 1, 0


_Carried = tuple[float, float] | None  # sent, received; None: not told of an instance


class _Sample(NamedTuple):
    """The counters of a GPU or of one GPU instance at one time."""

    card: SimulatedCard
    of: str  # the UUID of the GPU, or of the first device in its instance
    at: float
    busy_seconds: float
    decoder: float
    pcie_bytes: _Carried
    nvlink_bytes: _Carried  # of each link
    nvlink_count: int


class GpmFunctions(SimulatedSession):
    """Questions about hardware counters; Hopper and later."""

    def _prepare(self) -> None:
        super()._prepare()
        # By the address of a sample's memory, which is as opaque as the driver's own.
        # None: nothing was taken into it yet.
        self._gpm_samples: dict[int, tuple[Any, _Sample | None]] = {}

    @of_card
    def nvmlGpmQueryDeviceSupport(self, card: SimulatedCard, /) -> Any:
        support = NVML.c_nvmlGpmSupport_t()
        support.version = NVML.NVML_GPM_SUPPORT_VERSION
        support.isSupportedDevice = _SUPPORTED if card.model.has_gpm else 0
        return support

    @of_system
    def nvmlGpmSampleAlloc(self) -> Any:
        memory = ctypes.c_uint64()
        self._gpm_samples[ctypes.addressof(memory)] = (memory, None)
        return ctypes.cast(ctypes.pointer(memory), NVML.c_nvmlGpmSample_t)

    @of_system
    def nvmlGpmSampleFree(self, sample: Any, /) -> None:
        if self._gpm_samples.pop(_address(sample), None) is None:
            raise error("INVALID_ARGUMENT")

    @of_device
    def nvmlGpmSampleGet(self, device: Device, sample: Any, /) -> Any:
        card = device.card if isinstance(device, MigDevice) else device
        if isinstance(device, MigDevice):
            return self._fill(card, sample, _instance_sample(card, device.place.gpu_instance_id))
        return self._fill(card, sample, _card_sample(card))

    @of_card
    def nvmlGpmMigSampleGet(self, card: SimulatedCard, gpu_instance_id: int, sample: Any, /) -> Any:
        return self._fill(card, sample, _instance_sample(card, gpu_instance_id))

    def nvmlGpmMetricsGet(self, wanted: Any, /) -> Any:
        _, known = self._gpm_samples.get(_address(wanted.sample1), (None, None))
        # It has the faults of the GPU that the samples are of.
        scripted = self.admit("nvmlGpmMetricsGet", known.card if known else None)
        return told(scripted, lambda: self._metrics(wanted))

    def _metrics(self, wanted: Any) -> Any:
        if wanted.version != NVML.NVML_GPM_METRICS_GET_VERSION:
            raise error("ARGUMENT_VERSION_MISMATCH")
        first, second = self._taken(wanted.sample1), self._taken(wanted.sample2)
        if first.of != second.of or second.at <= first.at:
            raise error("INVALID_ARGUMENT")
        not_supported, seconds = error_code("NOT_SUPPORTED"), second.at - first.at
        for metric in wanted.metrics[: wanted.numMetrics]:
            value = _value(metric.metricId, first, second, seconds)
            metric.nvmlReturn = not_supported if value is None else _SUCCESS
            metric.value = 0.0 if value is None else value
        return wanted

    def _fill(self, card: SimulatedCard, sample: Any, taken: _Sample) -> Any:
        if not card.model.has_gpm:
            raise error("NOT_SUPPORTED")
        address, samples = _address(sample), self._gpm_samples
        if address not in samples:
            raise error("INVALID_ARGUMENT")
        samples[address] = (samples[address][0], taken)
        return sample

    def _taken(self, sample: Any) -> _Sample:
        _, taken = self._gpm_samples.get(_address(sample), (None, None))
        if taken is None:
            raise error("INVALID_ARGUMENT")
        return taken


def _address(sample: Any) -> int:
    return ctypes.cast(sample, ctypes.c_void_p).value or 0


def _card_sample(card: SimulatedCard) -> _Sample:
    return _Sample(
        card,
        card.uuid,
        card.now,
        card.busy_seconds,
        card.work.decoder,
        card.pcie_bytes,
        card.nvlink_bytes,
        card.model.nvlink_count,
    )


def _instance_sample(card: SimulatedCard, gpu_instance_id: int) -> _Sample:
    """Return the sample of a GPU instance; its compute instances share its counters."""
    devices = [d for d in card.mig_devices if d.place.gpu_instance_id == gpu_instance_id]
    if not devices:
        raise error("NOT_FOUND")
    return _Sample(
        card,
        devices[0].uuid,
        card.now,
        _mean([d.busy_seconds * d.place.compute_slices for d in devices], devices),
        _mean([d.work.decoder * d.place.compute_slices for d in devices], devices),
        None,
        None,
        0,
    )


def _mean(weighted: Sequence[float], devices: Sequence[MigDevice]) -> float:
    return sum(weighted) / devices[0].place.profile.compute_slices


def _value(metric: int, first: _Sample, second: _Sample, seconds: float) -> float | None:
    """Return a metric in the driver's units, percent or MiB per second; None without it."""
    if metric in _SHARES:
        busy = (second.busy_seconds - first.busy_seconds) / seconds
        return 100 * _SHARES[metric] * min(1.0, max(0.0, busy))
    if metric in _ENGINES:
        return 50 * (first.decoder + second.decoder) if metric == _DECODER else 0.0
    if metric in (_PCIE_SENT, _PCIE_RECEIVED):
        return _rate(first.pcie_bytes, second.pcie_bytes, metric == _PCIE_RECEIVED, seconds)
    if metric in (_NVLINK_SENT, _NVLINK_RECEIVED):
        each = _rate(first.nvlink_bytes, second.nvlink_bytes, metric == _NVLINK_RECEIVED, seconds)
        return each * second.nvlink_count if each is not None and second.nvlink_count else None
    link, sends = divmod(metric - _LINK_FIRST, 2)
    if 0 <= link < second.nvlink_count:
        return _rate(first.nvlink_bytes, second.nvlink_bytes, not sends, seconds)
    return None


def _rate(first: _Carried, second: _Carried, received: bool, seconds: float) -> float | None:
    if first is None or second is None:
        return None
    return (second[received] - first[received]) / seconds / _MIB
