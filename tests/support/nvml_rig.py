"""An `NvmlDriver` on simulated cards: a clock set by hand, and the calls that it made."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stoker.agent.facts import Fact, Rate
from stoker.agent.nvml.driver import NvmlDriver
from stoker.agent.readings import GpuReading
from stoker.agent.simulated.nvml import SimulatedNvml
from stoker.agent.simulated.scenario import Fault, Scenario
from stoker.core.gpu_models import MODELS

NO_PROCESSES = str(Path(__file__).parent)  # a folder that is no /proc

FAST, SLOW = (Rate.FAST,), (Rate.FAST, Rate.SLOW)


class Rig:
    """A driver on four simulated cards, or as many as asked for."""

    def __init__(
        self, *faults: Fault, model: str = "H100-80GB", gpus: int = 4, **scenario: Any
    ) -> None:
        self.now = 5_000.0
        self.plugged_in = {"0000:18:00.0", "0000:25:00.0"}  # as the kernel knows them
        self.calls: list[tuple[int, str]] = []
        self.nvml = SimulatedNvml(
            [MODELS[model]] * gpus,
            node="n1",
            scenario=Scenario(faults=faults, **scenario),
            now=lambda: self.now,
            proc=NO_PROCESSES,
        )
        self.driver = NvmlDriver(
            self.nvml,
            simulated=True,
            now=lambda: self.now,
            announce=lambda index, function: self.calls.append((index, function)),
            known_to_kernel=lambda: frozenset(self.plugged_in),
        )

    def opened(self) -> "Rig":
        """Open the driver, and look for the GPUs."""
        self.driver.open()
        self.inventory = self.driver.inventory()
        self.calls.clear()
        return self

    def play(self, *faults: Fault, **scenario: Any) -> None:
        """Let this happen from now on."""
        self.nvml.play(Scenario(faults=faults, **scenario))

    def sample(
        self, rates: Sequence[Rate] = FAST, *, profiling: bool = False
    ) -> tuple[GpuReading, ...]:
        """Read after a second, hardware counters only when asked; `calls` are those of it."""
        self.now += 1
        self.calls.clear()
        return self.driver.sample(rates, profiling=profiling)

    def asked(self, index: int) -> list[str]:
        """Return the functions that were called for a GPU."""
        return [function for gpu, function in self.calls if gpu == index]

    def count(self, index: int) -> Counter[str]:
        """Return how often each function was called for a GPU."""
        return Counter(self.asked(index))


def told(reading: GpuReading) -> set[Fact]:
    """Return the facts that a reading has, those with a label too."""
    return {*reading.facts, *reading.by_label}


def failed(reading: GpuReading) -> dict[str, str]:
    """Return the kinds of errors by fact."""
    return {failure.fact: failure.error_kind for failure in reading.failures}
