"""Partitions through nvidia-ml-py and a library in C: pointers, arrays and structs as in nvml.h."""

from collections.abc import Generator
from pathlib import Path

import pytest
from tests.support.mig_steps import destroy, empty, fill, make
from tests.support.nvml_library import build_mig
from tests.support.root_helper import open_folder, running

from stoker.agent.driver_host.frames import RealDriver
from stoker.agent.mig.stepping import (
    ChildStepper,
    FailureKind,
    HelperStepper,
    LineStepper,
    StepFailed,
)
from stoker.agent.partitions import Activation, GpuPartitions

GPU = "GPU-f0f0f0f0-0000-4000-8000-000000000001"

pytestmark = pytest.mark.compiler


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the library."""
    return build_mig(tmp_path_factory.mktemp("nvml"))


@pytest.fixture(params=["helper", "child"])
def stepper(
    request: pytest.FixtureRequest, library: Path, monkeypatch: pytest.MonkeyPatch
) -> Generator[LineStepper]:
    with open_folder() as folder:
        monkeypatch.setenv("LD_LIBRARY_PATH", str(library))
        monkeypatch.setenv("FAKE_NVML_MIG", str(folder / "card"))
        if request.param == "child":
            yield ChildStepper(RealDriver(), folder / "locks")
            return
        with running(folder) as found:
            yield HelperStepper(found.helper)


async def read(stepper: LineStepper) -> GpuPartitions:
    (now,) = await stepper.read(GPU)
    return now


async def test_every_step_and_back(stepper: LineStepper) -> None:
    before = await read(stepper)
    assert await stepper.read(None) == (before,)
    assert (before.model, before.pci_device_id) == ("Foreign Accelerator 80G", 0x12345678)
    assert (before.is_enabled, before.toggles_at_once) == (False, False)
    offered = {each.name: (each.starts, each.memory_slices) for each in before.geometry.profiles}
    assert offered == {"1g.10gb": (tuple(range(7)), 1), "3g.40gb": ((0, 4), 4)}
    assert await stepper.set_mode(GPU, True) is Activation.DONE
    now = await read(stepper)
    for step in (make(now, "3g.40gb", 4), make(now, "1g.10gb", 2)):
        await stepper.do(GPU, step, now)
    now = await read(stepper)
    await stepper.do(GPU, fill(now, 4, 1), now)
    now = await read(stepper)
    await stepper.do(GPU, fill(now, 4, 1), now)
    now = await read(stepper)
    assert [(each.profile, each.start, each.size) for each in now.instances] == [
        ("1g.10gb", 2, 1),
        ("3g.40gb", 4, 4),
    ]
    parts = now.instances[1].compute_instances
    assert [(each.id, each.start, each.compute_slices) for each in parts] == [(0, 0, 1), (1, 1, 1)]
    assert len({each.uuid for each in parts}) == 2
    with pytest.raises(StepFailed, match="In use by another client") as raised:
        await stepper.do(GPU, destroy(now, 4), now)
    assert raised.value.kind is FailureKind.BUSY
    with pytest.raises(StepFailed, match="Insufficient Resources") as raised:
        await stepper.do(GPU, make(now, "3g.40gb", 0), now)
    assert raised.value.kind is FailureKind.NO_ROOM
    for number in (0, 1):
        await stepper.do(GPU, empty(now, 4, number), now)
    for start in (2, 4):
        await stepper.do(GPU, destroy(now, start), now)
    assert await stepper.set_mode(GPU, False) is Activation.DONE
    assert await read(stepper) == before
