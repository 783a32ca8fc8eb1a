"""Which GPUs DCGM is asked about, and how what it tells joins what NVML told.

One fact of one GPU has one source for good: what NVML told once is never taken from DCGM, not even
when NVML does not tell it for a moment. Else a series would change its meaning between two points.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from stoker.agent.dcgm.fields import FIELDS, WHOLE_GPU_FIELDS
from stoker.agent.facts import Fact
from stoker.agent.readings import GpuReading, Inventory, MigDeviceReading, ReadFailure

# Of a failure of DCGM: which of its facts are missing is for DCGM to know.
DCGM = "dcgm"
# The compute capability of Hopper: NVML tells hardware counters (GPM) from there on.
GPM_SINCE = 9
# Who may have GPM and has told nothing in so many readings, over so long, has none (an old driver).
READINGS_UNTOLD_MIN = 3
UNTOLD_SECONDS_MIN = 5.0

_FACTS = frozenset(FIELDS.values())
# NVML may tell traffic in other ways; the rest only GPM has.
_DECIDING = frozenset(fact for number, fact in FIELDS.items() if number not in WHOLE_GPU_FIELDS)

_NOTHING: Mapping[Fact, float] = {}
_NO_FACTS = frozenset[Fact]()


@dataclass(frozen=True, slots=True)
class Question:
    """What DCGM is asked: the GPUs by UUID, each with the numbers of its GPU instances."""

    gpus: Mapping[str, frozenset[int]]
    profiling: bool  # False: leave the hardware counters to somebody else's profiler


@dataclass(frozen=True, slots=True)
class Told:
    """What DCGM answered."""

    facts: Mapping[str, Mapping[Fact, float]] = field(
        default_factory=dict[str, Mapping[Fact, float]]
    )
    # By UUID of the GPU and number of the GPU instance.
    instances: Mapping[tuple[str, int], Mapping[Fact, float]] = field(
        default_factory=dict[tuple[str, int], Mapping[Fact, float]]
    )
    failures: Mapping[str, ReadFailure] = field(default_factory=dict[str, ReadFailure])


class Sources:
    """Remembers what NVML told of each GPU and MIG device."""

    def __init__(self) -> None:
        self._told: dict[str, set[Fact]] = {}
        self._may_tell: dict[str, bool] = {}  # as far as it is known
        # Readings in a row without what GPM tells, and when the first of them was.
        self._untold: dict[str, tuple[int, float]] = {}

    def learn(self, inventory: Inventory) -> None:
        """Learn which GPUs can have GPM."""
        for gpu in inventory.gpus:
            if gpu.compute_capability is not None:
                major, _, _ = gpu.compute_capability.partition(".")
                self._may_tell.setdefault(gpu.uuid, int(major) >= GPM_SINCE)

    def question(self, readings: Sequence[GpuReading], *, profiling: bool) -> Question:
        """Learn from NVML's readings; return what to ask DCGM about them."""
        for reading in readings:
            self._learn(reading, profiling=profiling)
        return Question(
            {
                reading.uuid: frozenset(mig.gpu_instance_id for mig in reading.mig_devices)
                for reading in readings
                if not reading.is_lost and self._is_for_dcgm(reading.uuid, profiling=profiling)
            },
            profiling,
        )

    def merged(self, reading: GpuReading, told: Told) -> GpuReading:
        """Return the reading with the facts that DCGM alone tells."""
        failure = told.failures.get(reading.uuid)
        return replace(
            reading,
            facts=self._joined(reading.uuid, reading.facts, told.facts.get(reading.uuid, _NOTHING)),
            mig_devices=tuple(
                self._merged_device(reading.uuid, device, told) for device in reading.mig_devices
            ),
            failures=reading.failures if failure is None else (*reading.failures, failure),
        )

    def _merged_device(self, gpu: str, device: MigDeviceReading, told: Told) -> MigDeviceReading:
        facts = told.instances.get((gpu, device.gpu_instance_id), _NOTHING)
        return replace(device, facts=self._joined(device.uuid, device.facts, facts))

    def _joined(
        self, uuid: str, facts: Mapping[Fact, float], more: Mapping[Fact, float]
    ) -> Mapping[Fact, float]:
        mine = self._told.get(uuid, set())
        return {**{fact: more[fact] for fact in more if fact not in mine}, **facts}

    def _is_for_dcgm(self, uuid: str, *, profiling: bool) -> bool:
        if self._told.get(uuid, _NO_FACTS) & _DECIDING:
            return False
        may_tell = self._may_tell.get(uuid)
        # In a pause nobody tells anything: who is not known to need no DCGM must not disturb the
        # profiler through it.
        return may_tell is False or (may_tell is None and not profiling)

    def _learn(self, reading: GpuReading, *, profiling: bool) -> None:
        told = self._remember(reading.uuid, reading.facts)
        for device in reading.mig_devices:
            # Of the instances of a GPU NVML tells all or nothing.
            told |= self._remember(device.uuid, device.facts)
        if told & _DECIDING:
            self._told.setdefault(reading.uuid, set()).update(told)
        elif any(failure.fact in _FACTS for failure in reading.failures) or reading.is_lost:
            self._untold.pop(reading.uuid, None)
        elif profiling:
            readings, since = self._untold.get(reading.uuid, (0, reading.at))
            self._untold[reading.uuid] = (readings + 1, since)
            if readings + 1 >= READINGS_UNTOLD_MIN and reading.at - since >= UNTOLD_SECONDS_MIN:
                self._may_tell[reading.uuid] = False

    def _remember(self, uuid: str, facts: Mapping[Fact, float]) -> set[Fact]:
        told = _FACTS.intersection(facts)
        if told:
            self._told.setdefault(uuid, set()).update(told)
        return set(told)
