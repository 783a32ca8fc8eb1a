"""MIG on a real card, as root: what it offers is read and a plan is made; nothing is changed."""

from pathlib import Path

import pytest

from stoker.agent.driver_host.frames import RealDriver
from stoker.agent.mig.choosing import choose
from stoker.agent.mig.in_the_way import NOBODY_THERE
from stoker.agent.mig.stepping import ChildStepper
from stoker.agent.mig.steps import next_steps
from stoker.agent.partitions import Target
from stoker.core.mig.boards import board_of
from stoker.core.mig.geometry import Wanted

pytestmark = pytest.mark.gpu


async def test_the_driver_tells_what_the_table_says(tmp_path: Path) -> None:
    gpus = await ChildStepper(RealDriver(), tmp_path).read(None)
    assert gpus, "no card here has MIG"
    for gpu in gpus:
        board = board_of(gpu.pci_device_id, gpu.model)
        if board is None:
            continue
        told = {each.name: each for each in gpu.geometry.profiles}
        for profile in board.geometry.profiles:
            if profile.name in told and not profile.is_estimated:
                mine = told[profile.name]
                shape = (mine.profile_id, mine.compute_slices, mine.memory_slices, mine.starts)
                assert shape == (
                    *(profile.profile_id, profile.compute_slices),
                    *(profile.memory_slices, profile.starts),
                )


async def test_a_plan_is_made_and_nothing_is_changed(tmp_path: Path) -> None:
    stepper = ChildStepper(RealDriver(), tmp_path)
    before = await stepper.read(None)
    assert before, "no card here has MIG"
    for gpu in before:
        smallest = min(gpu.geometry.profiles, key=lambda each: each.memory_slices)
        found = choose(gpu, Wanted(True, ((smallest.name, 1),)), NOBODY_THERE)
        assert isinstance(found, Target)
        assert next_steps(gpu, found) or gpu.is_enabled
    assert await stepper.read(None) == before
