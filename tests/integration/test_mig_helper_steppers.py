"""Who changes partitions: the helper where it does, else a child, else nobody, and what is said."""

import asyncio
import contextlib
import os
import sys
from collections.abc import AsyncGenerator, Generator
from pathlib import Path

import pytest
from tests.support.mig_steps import Node, fill, make, turned_on
from tests.support.root_helper import SECONDS_MAX, open_folder, running

from stoker.agent.driver_host.frames import RealDriver, SimulatedDriver
from stoker.agent.mig import stepping
from stoker.agent.mig.stepping import (
    ChildStepper,
    FailureKind,
    HelperStepper,
    StepFailed,
    StepsUnavailable,
    available_stepper,
)
from stoker.agent.partitions import SetMode
from stoker.agent.privileged import Helper

GPU = "GPU-0000000a-0000-4000-8000-00000000000f"
OLDER = b'{"refused": "no such verb: \'mig_read\'; there are list_holders"}\n'


@pytest.fixture
def folder() -> Generator[Path]:
    with open_folder() as folder:
        yield folder


@pytest.fixture
def node(folder: Path) -> Node:
    return Node(folder)


@pytest.fixture
def path(folder: Path) -> Path:
    return folder / "helper.sock"


@pytest.fixture
def without_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)


@contextlib.asynccontextmanager
async def one_who_says(path: Path, said: bytes, *, stays: bool = False) -> AsyncGenerator[None]:
    """Listen in place of the helper."""
    visits: list[asyncio.Task[None]] = []

    async def visit(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readline()
        writer.write(said)
        with contextlib.suppress(ConnectionError):
            if stays:
                await reader.read()
            writer.close()
            await writer.wait_closed()

    def receive(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        visits.append(asyncio.create_task(visit(reader, writer)))

    async with await asyncio.start_unix_server(receive, path):
        yield
        await asyncio.gather(*visits)


# --- who does it


async def test_the_helper_does_it_where_it_is_there(node: Node) -> None:
    elsewhere = SimulatedDriver(node.source.specs, "n1", mig_state_path=str(node.folder / "other"))
    with running(node.folder, *node.options) as found:
        stepper = available_stepper(found.helper, elsewhere)
        await stepper.set_mode(node.uuids[0], True)
    assert node.now().is_enabled
    assert not (node.folder / "other").exists()


@pytest.mark.usefixtures("without_root")
async def test_on_simulated_gpus_a_child_does_it_without_a_helper(node: Node, path: Path) -> None:
    stepper = available_stepper(Helper(path), node.source)
    await stepper.set_mode(node.uuids[0], True)
    assert node.now().is_enabled


@pytest.mark.usefixtures("without_root")
async def test_an_older_helper_that_does_not_know_the_verb(node: Node, path: Path) -> None:
    async with one_who_says(path, OLDER):
        stepper = available_stepper(Helper(path), node.source)
        assert len(await stepper.read(None)) == 2
    async with one_who_says(path, OLDER):
        real = available_stepper(Helper(path), RealDriver())
        with pytest.raises(StepsUnavailable, match="it refuses: no such verb: 'mig_read'"):
            await real.read(None)


async def test_a_helper_with_the_real_gpus_is_not_one_for_simulated_ones(node: Node) -> None:
    with running(node.folder) as found:
        stepper = available_stepper(found.helper, node.source)
        assert [gpu.uuid for gpu in await stepper.read(None)] == list(node.uuids)
        await stepper.set_mode(node.uuids[0], True)
    assert node.now().is_enabled


@pytest.mark.usefixtures("without_root")
async def test_a_helper_with_simulated_gpus_is_not_one_for_the_real_ones(node: Node) -> None:
    before = node.do(turned_on)
    with running(node.folder, *node.options) as found:
        stepper = available_stepper(found.helper, RealDriver())
        for asked in (
            stepper.read(None),
            stepper.set_mode(GPU, False),
            stepper.do(GPU, SetMode(is_enabled=False), before),
            stepper.end_holder(GPU, 4_194_304, 1),
        ):
            with pytest.raises(StepsUnavailable, match="does so for simulated GPUs"):
                await asked


@pytest.mark.usefixtures("without_root")
async def test_nobody_may_do_it(path: Path) -> None:
    stepper = available_stepper(Helper(path), RealDriver())
    found = f"partitions cannot be read: helper at {path}: .*is stoker-agent-helper running"
    with pytest.raises(StepsUnavailable, match=f"the GPUs: {found}"):
        await stepper.read(None)
    with pytest.raises(StepsUnavailable, match=f"{GPU}: MIG mode cannot be changed: helper at"):
        await stepper.set_mode(GPU, True)
    # Simulated GPUs that no file keeps are those of one process, so no other can change them.
    alone = available_stepper(Helper(path), SimulatedDriver(("1xH100-80GB",), "n1"))
    with pytest.raises(StepsUnavailable, match="is stoker-agent-helper running"):
        await alone.read(None)


async def test_the_real_gpus_take_a_folder_that_nobody_else_writes_to(folder: Path) -> None:
    locks = folder / "open"
    locks.mkdir()
    locks.chmod(0o777)
    with pytest.raises(StepsUnavailable, match=f"{locks} can be written to by others"):
        await ChildStepper(RealDriver(), locks).read(None)


async def test_a_simulation_that_cannot_be(folder: Path) -> None:
    source = SimulatedDriver(("1xNothing",), "n1", mig_state_path=str(folder / "mig.json"))
    with pytest.raises(StepFailed, match="Nothing") as raised:
        await ChildStepper(source, folder).read(None)
    assert raised.value.kind is FailureKind.DRIVER_GONE


async def test_a_child_that_cannot_be_started(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(StepsUnavailable, match="no process can be started: No such file"):
        await ChildStepper(node.source, node.folder).read(None)


async def test_a_child_that_breaks_is_quoted(
    node: Node, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = folder / "python"
    program.write_text("#!/bin/sh\necho 'first' >&2\necho 'it broke' >&2\nexit 3\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    stepper = ChildStepper(node.source, folder)
    with pytest.raises(StepFailed) as raised:
        await stepper.read(None)
    assert raised.value.kind is FailureKind.INTERRUPTED
    assert "ended with status 3 and no answer: 'it broke'" in str(raised.value)


async def test_a_child_that_does_not_answer_in_time_is_killed(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = node.do(turned_on)
    node.play({"fault": "hang", "function": "nvmlDeviceCreateGpuInstanceWithPlacement"})
    monkeypatch.setattr(stepping, "STEP_SECONDS_MAX", 0.5)
    monkeypatch.setattr(stepping, "_MARGIN_SECONDS", 0.0)
    stepper = ChildStepper(node.source, node.folder)
    with pytest.raises(StepFailed, match=r"has not answered for 0.5 s") as raised:
        await stepper.do(node.uuids[0], make(before, "3g.40gb", 4), before)
    assert raised.value.kind is FailureKind.INTERRUPTED
    assert node.now() == before


# --- what comes back

SAID = {
    "no word": (b"", "it has hung up", FailureKind.INTERRUPTED),
    "half a line": (b'{"ok": tr', "in the middle of a line", FailureKind.INTERRUPTED),
    "nonsense": (b"ok\n", "cannot be understood", FailureKind.INTERRUPTED),
    "GPUs that are none": (
        b'{"ok": true, "gpus": [1], "is_simulated": true}\n',
        "cannot be understood",
        FailureKind.UNKNOWN,
    ),
    "neither yes nor no": (
        b'{"is_simulated": true}\n',
        "neither yes nor no",
        FailureKind.UNKNOWN,
    ),
    "a kind of failure that is to come": (
        b'{"failed": "bewitched", "message": "it is bewitched", "is_simulated": true}\n',
        "it is bewitched",
        FailureKind.UNKNOWN,
    ),
}


@pytest.mark.parametrize(("said", "reason", "kind"), SAID.values(), ids=SAID)
async def test_an_answer_that_is_none(
    said: bytes, reason: str, kind: FailureKind, path: Path
) -> None:
    stepper = HelperStepper(Helper(path), is_simulated=True)
    async with one_who_says(path, said):
        with pytest.raises(StepFailed, match=reason) as raised:
            await stepper.read(GPU)
    assert raised.value.kind is kind


async def test_a_mode_that_is_not_told(path: Path) -> None:
    stepper = HelperStepper(Helper(path))
    async with one_who_says(path, b'{"ok": true}\n'):
        with pytest.raises(StepFailed, match="does not say how"):
            await stepper.set_mode(GPU, True)


async def test_a_helper_that_does_not_answer_in_time(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stepping, "_SECONDS", {"mig_read": 0.05})
    monkeypatch.setattr(stepping, "_MARGIN_SECONDS", 0.0)
    async with one_who_says(path, b"", stays=True):
        with pytest.raises(StepFailed, match="it has not answered for 0.05 s") as raised:
            await HelperStepper(Helper(path)).read(GPU)
    assert raised.value.kind is FailureKind.INTERRUPTED


async def test_steps_on_two_gpus_at_once(node: Node) -> None:
    """Two operations go on beside each other; each finds what it wants at its end."""
    first, second = node.uuids
    stepper = ChildStepper(node.source, node.folder)
    before = node.do(turned_on)
    await stepper.set_mode(second, True)

    async def story(uuid: str, profile: str) -> None:
        await stepper.do(uuid, make(before, profile, 4), before)
        (now,) = await stepper.read(uuid)
        await stepper.do(uuid, fill(now, 4), now)

    async with asyncio.timeout(SECONDS_MAX), asyncio.TaskGroup() as both:
        both.create_task(story(first, "3g.40gb"))
        both.create_task(story(second, "2g.20gb"))
    found = [[each.profile for each in node.now(index).instances] for index in (0, 1)]
    assert found == [["3g.40gb"], ["2g.20gb"]]
