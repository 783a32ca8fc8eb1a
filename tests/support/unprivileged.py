"""What an agent sees that runs as nobody; a program, for the tests that are run as root.

    python -m tests.support.unprivileged UID HELPER_SOCKET KMSG KUBELET_SOCKET PID

It prints JSON: of everything that root may see, either that or the sentence why it is not seen.
"""

import asyncio
import importlib
import json
import os
import sys
from collections.abc import Awaitable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar, cast

from tests.support.snapshots import GIB, VIEW

from stoker.agent.attribution.resolver import Attribution
from stoker.agent.driver_host.link import DriverHost
from stoker.agent.events import Event, KernelLogChanged, KernelLogRead, ProcessesTaken
from stoker.agent.holding import attribute
from stoker.agent.kernel_log import KernelLogFollower
from stoker.agent.model import HeldAllocation, NumberedGpu, NumberedInventory
from stoker.agent.privileged import Helper, HelperUnavailable
from stoker.agent.proctable import ProcTable
from stoker.agent.readings import GpuIdentity, ProcessesReading, ProcessReading
from stoker.agent.tenants import TenantReader
from stoker.core.clock import SystemClock

SECONDS_MAX = 20.0
GPU = "GPU-aaaaaaaa-0000-4000-8000-000000000000"
# A share of memory: only a process that names it belongs to it.
SHARE = HeldAllocation("a-1", (GPU,), GIB, "ann", 60.0, 0.0)

T = TypeVar("T")


async def look(helper: Helper, kmsg: Path, kubelet: Path, pid: int) -> dict[str, object]:
    """Return what can be seen of the process, of the kernel's log, and of what is handed out."""
    found: dict[str, object] = {"uid": os.geteuid()}
    holders = await said(helper.holders())
    if isinstance(holders, str):
        found["holders"] = holders
    else:
        found["holders"] = [
            [each.pid, each.uid, each.command.split()[0], *each.devices] for each in holders
        ]
    job = await said(helper.job_variables(pid))
    found["job"] = job if isinstance(job, str | None) else dict(job.variables)
    found["log"] = await first_of_log(helper, kmsg)
    taken = await processes_taken(helper, kubelet, pid)
    (process,) = taken.processes
    found["allocation"] = attribute(process, [SHARE], {})
    found["assigned"] = taken.assignments_unknown or [
        [each.gpu_uuid, each.holder] for each in taken.assignments
    ]
    return found


async def said(question: Awaitable[T]) -> T | str:
    try:
        return await question
    except HelperUnavailable as error:
        return str(error)


async def first_of_log(helper: Helper, kmsg: Path) -> list[str] | str:
    """Return the first lines that the follower tells, or why it does not follow."""
    outcome: asyncio.Future[list[str] | str] = asyncio.get_running_loop().create_future()

    def happen(event: Event) -> None:
        match event:
            case KernelLogRead(_, lines):
                outcome.set_result([line.text for line in lines])
            case KernelLogChanged(_, status) if not status.is_followed:
                outcome.set_result(status.reason)
            case _:
                pass

    follower = KernelLogFollower(
        helper, "", position=lambda: None, happen=happen, clock=SystemClock(), kmsg=kmsg
    )
    async with asyncio.timeout(SECONDS_MAX):
        following = asyncio.create_task(follower.run())
        try:
            return await outcome
        finally:
            following.cancel()


class OneProcess:
    """In place of the driver: it lists one process, on the only GPU."""

    def __init__(self, pid: int) -> None:
        self._pid = pid

    async def processes(self) -> ProcessesReading:
        return ProcessesReading(0.0, 0.0, (ProcessReading(GPU, self._pid, "compute"),))


async def processes_taken(helper: Helper, kubelet: Path, pid: int) -> ProcessesTaken:
    """Return the first reading of processes."""
    outcome: asyncio.Future[ProcessesTaken] = asyncio.get_running_loop().create_future()

    def happen(event: Event) -> None:
        if isinstance(event, ProcessesTaken):
            outcome.set_result(event)

    gpu = NumberedGpu(0, GpuIdentity(0, GPU, "H100", 80 * GIB, minor_number=0))
    view = replace(VIEW, inventory=NumberedInventory(None, None, (gpu,)), telemetry=())
    reader = TenantReader(
        cast(DriverHost, OneProcess(pid)),
        ProcTable(),
        3600.0,
        view=lambda: view,
        happen=happen,
        clock=SystemClock(),
        attribution=Attribution(helper=helper, pod_resources=kubelet, cgroup_root=None),
    )
    async with asyncio.timeout(SECONDS_MAX), asyncio.TaskGroup() as group:
        reading = group.create_task(reader.run())
        taken = await outcome
        reading.cancel()
    return taken


def main(uid: int, path: Path, kmsg: Path, kubelet: Path, pid: int) -> None:
    """Become that user for good, and look."""
    # Loaded when a thread is first wanted, and the interpreter's files may be root's alone.
    importlib.import_module("concurrent.futures.thread")
    os.setgroups([])
    os.setgid(uid)
    os.setuid(uid)
    found = asyncio.run(look(Helper(path), kmsg, kubelet, pid))
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    uid, *paths, pid = sys.argv[1:]
    helper, kmsg, kubelet = map(Path, paths)
    main(int(uid), helper, kmsg, kubelet, int(pid))
