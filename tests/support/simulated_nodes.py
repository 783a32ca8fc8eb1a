"""Simulated nodes on a clock that moves when told."""

from pathlib import Path
from typing import Any

import pynvml  # type: ignore[import-untyped]
import pytest

from stoker.agent.simulated.nvml import SimulatedNvml
from stoker.core.gpu_models import MODELS

NVML: Any = pynvml
MIB, GIB = 2**20, 2**30
NO_PROCESSES = str(Path(__file__).parent)  # a folder that is no /proc


class World:
    """A clock that moves when told, and when a call hangs."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def pause(self, seconds: float) -> None:
        self.now += seconds


def node(world: World, count: int = 4, model: str = "H100-80GB", **options: Any) -> SimulatedNvml:
    """Return an opened driver on so many equal cards."""
    options = {"proc": NO_PROCESSES, "node": "n1", **options}
    cards = [MODELS[model]] * count
    nvml = SimulatedNvml(cards, now=lambda: world.now, pause=world.pause, **options)
    nvml.nvmlInit()
    return nvml


def refused(error: str) -> Any:
    """Expect the driver's error of this name."""
    code = getattr(NVML, f"NVML_ERROR_{error}")
    return pytest.raises(NVML.NVMLError, check=lambda raised: raised.value == code)


def outcome(ask: Any, *arguments: Any) -> Any:
    """Return the answer, or the name of the driver's error."""
    try:
        return ask(*arguments)
    except NVML.NVMLError as raised:
        names = {getattr(NVML, n): n for n in dir(NVML) if n.startswith("NVML_ERROR_")}
        return names[raised.value].removeprefix("NVML_ERROR_")


def fields_of(struct: Any) -> dict[str, Any]:
    """Return a struct's fields by name."""
    return {name: getattr(struct, name) for name, *_ in struct._fields_}
