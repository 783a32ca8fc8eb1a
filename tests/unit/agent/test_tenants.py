"""What is made of a process that the driver lists, and of looks into /proc that may never end."""

import pytest

from stoker.agent.model import ProcessSeen
from stoker.agent.proctable import ProcessFacts
from stoker.agent.readings import ProcessReading
from stoker.agent.tenants import in_thread, see


def test_a_process_is_what_the_driver_and_proc_tell() -> None:
    reading = ProcessReading("GPU-0", 42, "compute", 2**30, "/usr/bin/python3")
    facts = ProcessFacts(42, "python3 train.py", 12.5, "ann", "a")
    assert see(reading, facts) == ProcessSeen(
        "GPU-0", 42, "ann", "python3 train.py", 2**30, 12.5, "a"
    )
    assert see(reading, ProcessFacts(42, "train")).user == ""


async def test_what_is_raised_in_a_thread_is_raised_where_it_is_awaited() -> None:
    def fail() -> int:
        raise KeyError("missing")

    assert await in_thread(lambda: 42) == 42
    with pytest.raises(KeyError, match="missing"):
        await in_thread(fail)
