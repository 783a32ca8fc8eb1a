"""kill -9 in the middle of partitioning: afterwards the old layout or the new one, and it is said.

A step is cut at two places: just before the driver does it, and when it is done and not yet told.
Killed is the agent, or the process that does the step. Whoever is left, or starts anew, reads the
card, and goes on or goes back.
"""

import json
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil
import pytest
from tests.support.mig_agent import FINAL, MigAgent
from tests.support.recorder import Recorder
from tests.support.waiting import until, until_true

CHILD = "stoker.agent.mig.child"
# A process that does a step has come to the place where it is held up after so long, most likely;
# an earlier kill is as good a test of another moment.
HELD_UP_SECONDS = 1.0

HALVES, WHOLE, OFF = {"4g.40gb": 1, "3g.40gb": 1}, {"7g.80gb": 1}, dict[str, int]()
CARDS = {
    "off": [],
    "halves": [("4g.40gb", 0, True), ("3g.40gb", 4, True)],
    "whole": [("7g.80gb", 0, True)],
}
DEVICES: Mapping[str, Mapping[str, int]] = {"off": OFF, "halves": HALVES, "whole": WHOLE}
# Every way between them, with the number of its steps.
PLANS = {
    ("off", "halves"): 5,
    ("off", "whole"): 3,
    ("halves", "whole"): 6,
    ("whole", "halves"): 6,
    ("halves", "off"): 5,
    ("whole", "off"): 3,
}

Victim = Literal["agent", "step"]
Cut = Literal["before", "after"]
CUTS: Mapping[Cut, tuple[str, ...]] = {
    "before": (
        "nvmlDeviceSetMigMode",
        "nvmlDeviceCreateGpuInstanceWithPlacement",
        "nvmlGpuInstanceCreateComputeInstance",
        "nvmlComputeInstanceDestroy",
        "nvmlGpuInstanceDestroy",
    ),
    "after": ("nvmlShutdown",),
}


@dataclass(frozen=True)
class Kill:
    """Who is killed, where in which step of which plan."""

    old: str
    new: str
    step: int  # counted from 0
    cut: Cut
    victim: Victim

    def __str__(self) -> str:
        return f"{self.old}-{self.new}-{self.step}-{self.cut}-{self.victim}"


KILLS = [
    Kill(old, new, step, cut, victim)
    for (old, new), steps in PLANS.items()
    for step in range(steps)
    for cut in CUTS
    for victim in ("agent", "step")
]
FEW = [
    Kill("off", "whole", 0, "after", "agent"),
    Kill("off", "whole", 2, "before", "agent"),
    Kill("off", "whole", 1, "before", "step"),
    Kill("off", "whole", 2, "after", "step"),
]
# A round through all layouts, and not every combination of who and where.
ROUND = [
    each
    for each in KILLS
    if (each.old, each.new) in {("off", "halves"), ("halves", "whole"), ("whole", "off")}
    and (each.victim == "agent" or each.cut == "before")
]


@pytest.fixture
async def recorder() -> AsyncIterator[Recorder]:
    async with Recorder() as recorder:
        yield recorder


def steps_of(agent: MigAgent) -> list[psutil.Process]:
    """The processes of the agent that do, or read, something just now."""
    try:
        children = psutil.Process(agent.daemon.process.pid).children(recursive=True)
        return [each for each in children if CHILD in " ".join(each.cmdline())]
    except psutil.NoSuchProcess:  # it has just ended
        return []


def noted(agent: MigAgent) -> dict[str, Any]:
    """The operation in the agent's book."""
    book = json.loads((agent.daemon.data_dir / "mig.json").read_text())["book"]
    ((_, record),) = book["gpus"].items()
    operation: dict[str, Any] = record["operation"]
    return operation


async def held_up(agent: MigAgent) -> psutil.Process | None:
    """The process that was held up; None: everything was done before that."""

    async def look() -> tuple[psutil.Process | None] | None:
        for each in steps_of(agent):
            if time.time() - each.create_time() >= HELD_UP_SECONDS:
                return (each,)
        return (None,) if noted(agent)["state"] in FINAL else None

    (found,) = await until("a step to be held up", look)
    return found


async def kill(agent: MigAgent, kill: Kill) -> None:
    """Kill, once the steps before that one are done."""

    def is_due() -> bool:
        operation = noted(agent)
        is_begun = operation["id"] == "next" and operation["state"] == "applying"
        return operation["state"] in FINAL or (is_begun and operation["steps_done"] >= kill.step)

    await until_true(f"{kill.step} steps", is_due)
    agent.play({"faults": [{"fault": "hang", "function": each} for each in CUTS[kill.cut]]})
    step = await held_up(agent)
    if kill.victim == "agent":
        agent.daemon.kill()
        if step is not None:
            await until_true("the step to end with its agent", lambda: not is_there(step))
        agent.play({})
        await agent.daemon.start()
    else:
        if step is not None:
            step.kill()
        agent.play({})


def is_there(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


async def check(where: Kill, folder: Path, recorder: Recorder) -> None:
    agent = MigAgent(folder, "1xH100-80GB", recorder.address)
    try:
        await agent.daemon.start()
        await agent.gpu()
        if where.old != "off":
            await agent.applied(DEVICES[where.old], "first")
        assert agent.card() == CARDS[where.old]
        await agent.ask("apply", DEVICES[where.new], operation="next")
        await kill(agent, where)
        gpu = await agent.ended("next")
        card, told = agent.card(), [(each.profile, each.start) for each in gpu.instances]
        assert told == [(profile, start) for profile, start, _ in card]
        if gpu.state == "success":
            assert card == CARDS[where.new]
        else:
            assert gpu.state == "failed"
            assert gpu.reason
            assert card == CARDS[where.old]
        if where.victim == "agent":
            assert gpu.state == "success", gpu.reason  # what had begun goes on
        # And nothing is in the way of the next.
        assert (await agent.applied(WHOLE, "last")).state == "success"
        assert agent.card() == CARDS["whole"]
        await until_true("no process to be left", lambda: not steps_of(agent))
    finally:
        agent.daemon.end()
    assert "Traceback" not in agent.daemon.log


@pytest.mark.parametrize("where", FEW, ids=str)
async def test_old_or_new_and_never_between(
    where: Kill, tmp_path: Path, recorder: Recorder
) -> None:
    await check(where, tmp_path, recorder)


@pytest.mark.slow
@pytest.mark.parametrize("where", ROUND, ids=str)
async def test_old_or_new_on_a_round_through_all_layouts(
    where: Kill, tmp_path: Path, recorder: Recorder
) -> None:
    await check(where, tmp_path, recorder)


@pytest.mark.soak
@pytest.mark.parametrize("where", KILLS, ids=str)
async def test_old_or_new_wherever_it_is_cut(
    where: Kill, tmp_path: Path, recorder: Recorder
) -> None:
    await check(where, tmp_path, recorder)
