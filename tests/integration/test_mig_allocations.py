"""A MIG device from a client's wish to its node and back: granted, held, used, refused, free."""

import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
from tests.support.daemons import Stage
from tests.support.waiting import until

from stoker.client import AsyncFleet, Process, Refused

LAYOUT = {"mig": [{"gpu": 0, "devices": ["3g.40gb", "1g.10gb"]}]}


@pytest.fixture
async def fleet(tmp_path: Path) -> AsyncIterator[AsyncFleet]:
    """An aggregator and a node of two GPUs, the first of which is partitioned."""
    scenario = tmp_path / "scenario.json"
    scenario.write_text(json.dumps(LAYOUT))
    options = ("--scenario", str(scenario), "--interval", "0.2s", "--processes-interval", "0.5s")
    async with Stage(tmp_path) as stage:
        await stage.aggregator().start()
        await stage.agent("n1", "2xH100-80GB", *options).start()
        async with stage.fleet() as fleet:
            yield fleet


@contextmanager
def workload(environment: Mapping[str, str]) -> Generator[int]:
    """Run a process that uses the GPUs that its environment names."""
    sleep = [sys.executable, "-c", "import time; time.sleep(600)"]
    own = {**os.environ, **environment, "STOKER_SIMULATED_WORKLOAD": "memory=2GiB"}
    with subprocess.Popen(sleep, env=own) as process:
        try:
            yield process.pid
        finally:
            process.kill()


async def seen(fleet: AsyncFleet, pid: int) -> Process:
    async def look() -> Process | None:
        gpus = [gpu for node in (await fleet.nodes()).nodes for gpu in node.gpus]
        return next((each for gpu in gpus for each in gpu.processes if each.pid == pid), None)

    return await until(f"process {pid}", look)


async def test_a_mig_device_from_wish_to_release(fleet: AsyncFleet) -> None:
    small = await fleet.request(mig="1g.10gb", wait="20s")
    (device,) = small.devices
    assert (device.mig_profile, device.exclusive) == ("1g.10gb", False)
    assert small.env["CUDA_VISIBLE_DEVICES"] == device.mig_device_uuid
    with workload(small.env) as pid:
        assert (await seen(fleet, pid)).allocation_id == small.id

    with pytest.raises(Refused):
        await fleet.request(mig="1g.10gb")
    large = await fleet.request(mig="any", memory="20GiB")
    assert (large.devices[0].mig_profile, large.devices[0].uuid) == ("3g.40gb", device.uuid)
    whole = await fleet.request(gpus=1)
    assert (whole.devices[0].mig_device_uuid, whole.devices[0].exclusive) == ("", True)
    with pytest.raises(Refused):
        await fleet.request(gpus=1)  # a partitioned GPU is nobody's as a whole

    await fleet.release(small.id)
    again = await fleet.request(mig="1g.10gb", wait="20s")
    assert again.devices[0].mig_device_uuid == device.mig_device_uuid


async def test_several_mig_devices_and_enough_of_a_gpus_compute(fleet: AsyncFleet) -> None:
    both = await fleet.request(mig="any", gpus=2, wait="20s")
    names = [each.mig_device_uuid for each in both.devices]
    assert sorted(each.mig_profile for each in both.devices) == ["1g.10gb", "3g.40gb"]
    assert both.env["CUDA_VISIBLE_DEVICES"] == ",".join(names)
    with pytest.raises(Refused):
        await fleet.request(mig="any")
    await fleet.release(both.id)
    most = await fleet.request(mig="any", compute=0.4, wait="20s")
    assert [each.mig_profile for each in most.devices] == ["3g.40gb"]
    with pytest.raises(Refused):
        await fleet.request(mig="any", compute=0.4)
