"""What is made of a process that the driver lists, and of looks into /proc that may never end."""

import asyncio
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from tests.support.waiting import until_true

from stoker.agent import tenants
from stoker.agent.model import ProcessSeen
from stoker.agent.privileged import Helper, HelperUnavailable, RawHolder
from stoker.agent.proctable import ProcessFacts, ProcTable
from stoker.agent.readings import ProcessReading
from stoker.agent.tenants import HOLDERS_ASKED_MAX, HolderReader, in_thread, see


def test_a_process_is_what_the_driver_and_proc_tell() -> None:
    reading = ProcessReading("GPU-0", 42, "compute", 2**30, "/usr/bin/python3")
    facts = ProcessFacts(42, "python3 train.py", 12.5, "ann", "a")
    assert see(reading, facts) == ProcessSeen(
        "GPU-0", 42, "ann", "python3 train.py", 2**30, 12.5, "a"
    )
    assert see(reading, ProcessFacts(42, "train")).user == ""
    assert see(replace(reading, gpu_instance_id=9), facts).gpu_instance_id == 9


async def test_what_is_raised_in_a_thread_is_raised_where_it_is_awaited() -> None:
    def fail() -> int:
        raise KeyError("missing")

    assert await in_thread(lambda: 42) == 42
    with pytest.raises(KeyError, match="missing"):
        await in_thread(fail)


HOLDER = RawHolder(42, 1000, "python3 train.py", 500, "0::/", ("/dev/nvidia0",))


class SlowHelper(Helper):
    """A helper that answers when it is told to, and knows how many wait for it."""

    def __init__(self) -> None:
        super().__init__(Path("/nowhere"))
        self.may_answer = asyncio.Event()
        self.asked = 0

    async def holders(self) -> tuple[RawHolder, ...]:
        self.asked += 1
        await self.may_answer.wait()
        return (HOLDER,)


class NamesThatHang(ProcTable):
    """A table of processes that asks a directory server for names, which is away for a while."""

    def __init__(self) -> None:
        super().__init__()
        self.is_back = threading.Event()
        self.looks = 0

    def user_name(self, uid: int) -> str:
        self.looks += 1
        self.is_back.wait()
        return f"user-{uid}"


async def test_however_many_ask_for_holders_the_helper_is_asked_by_few() -> None:
    helper = SlowHelper()
    reader = HolderReader(helper, ProcTable())
    asking = [asyncio.create_task(reader.read()) for _ in range(3 * HOLDERS_ASKED_MAX)]
    await until_true("all turns to be taken", lambda: helper.asked == HOLDERS_ASKED_MAX)
    helper.may_answer.set()
    told = await asyncio.gather(*asking)
    assert {(each.pid, each.command) for (each,) in told} == {(42, "python3 train.py")}
    assert helper.asked == 3 * HOLDERS_ASKED_MAX  # everybody is told how it is since they asked


async def test_names_that_do_not_come_are_said_not_to_and_pile_up_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tenants, "LOOK_UP_SECONDS", 0.02)
    helper, names = SlowHelper(), NamesThatHang()
    helper.may_answer.set()
    reader = HolderReader(helper, names)
    for _ in range(3):
        with pytest.raises(HelperUnavailable, match="names of users and pods have not come within"):
            await reader.read()
    assert names.looks == 1
    names.is_back.set()
    monkeypatch.setattr(tenants, "LOOK_UP_SECONDS", 5.0)
    assert [each.user for each in await reader.read()] == ["user-1000"]
