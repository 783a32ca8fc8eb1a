"""Real processes of this machine that say they use simulated GPUs."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.simulated_nodes import GIB, NVML, World, node

from stoker.agent.simulated.scenario import Scenario, ScriptedMig
from stoker.agent.simulated.workloads import (
    CONTEXT_BYTES,
    parse_devices,
    parse_workload,
)

UUIDS = ("GPU-aaaa1111", "GPU-aaaa2222", "GPU-bbbb3333", "MIG-cccc4444")


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("GPU-aaaa1111", {"GPU-aaaa1111"}),
        ("GPU-bbbb3333,GPU-aaaa1111", {"GPU-aaaa1111", "GPU-bbbb3333"}),
        ("GPU-bb", {"GPU-bbbb3333"}),
        ("MIG-cccc4444", {"MIG-cccc4444"}),
        ("GPU-aaaa", set[str]()),  # ambiguous
        ("GPU-aaaa1111,nonsense,GPU-bbbb3333", {"GPU-aaaa1111"}),
        ("0,1", set[str]()),  # indices are of the real driver
        ("all", set(UUIDS)),
        ("", set[str]()),
    ],
)
def test_which_gpus_cuda_visible_devices_means(text: str, meant: set[str]) -> None:
    assert parse_devices(text, UUIDS) == meant


@pytest.mark.parametrize(
    ("text", "memory", "utilization"),
    [
        ("memory=4GiB utilization=0.8", 4 * GIB, 0.8),
        ("utilization=0.5", CONTEXT_BYTES, 0.5),
        ("memory=1GiB", GIB, 0.0),
        ("utilization=7 memory=lots", CONTEXT_BYTES, 1.0),
        ("utilization=much", CONTEXT_BYTES, 0.0),
        ("", CONTEXT_BYTES, 0.0),
    ],
)
def test_what_a_workload_holds(text: str, memory: int, utilization: float) -> None:
    assert parse_workload(text) == (memory, utilization)


class Machine:
    """Real processes, and a /proc that shows no others: somebody else may simulate here too."""

    def __init__(self, proc: Path) -> None:
        self.proc = proc
        self._processes: list[subprocess.Popen[bytes]] = []

    def start(self, **environment: str) -> subprocess.Popen[bytes]:
        """Return a process that runs, with its own environment, until its input ends."""
        program = "import sys; print('here', flush=True); sys.stdin.read()"
        process = subprocess.Popen(
            [sys.executable, "-c", program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **environment},
        )
        self._processes.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == b"here\n"
        (self.proc / str(process.pid)).symlink_to(f"/proc/{process.pid}")
        return process

    def stop(self) -> None:
        for process in self._processes:
            process.kill()
            process.communicate()


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    made = Machine(tmp_path)
    yield made
    made.stop()


def test_a_real_process_that_says_so_uses_a_simulated_gpu(machine: Machine) -> None:
    world = World()
    nvml = node(world, proc=str(machine.proc))
    gpus = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(4)]

    def listed() -> list[tuple[int, int]]:
        world.now += 1
        return [
            (index, process.pid)
            for index, gpu in enumerate(gpus)
            for process in nvml.nvmlDeviceGetComputeRunningProcesses(gpu)
        ]

    work = "memory=4GiB utilization=0.8"
    user = machine.start(STOKER_SIMULATED_WORKLOAD=work, CUDA_VISIBLE_DEVICES=nvml.uuids[2])
    machine.start(STOKER_SIMULATED_WORKLOAD=work, CUDA_VISIBLE_DEVICES="")
    machine.start(CUDA_VISIBLE_DEVICES=nvml.uuids[1])
    assert listed() == [(2, user.pid)]
    assert nvml.nvmlSystemGetProcessName(user.pid) == sys.executable
    world.now += 1
    assert nvml.nvmlDeviceGetUtilizationRates(gpus[2]).gpu > 70
    memory = nvml.nvmlDeviceGetMemoryInfo(gpus[2], NVML.nvmlMemory_v2)
    assert memory.used == 4 * GIB
    user.kill()
    user.wait()
    # Seen at once, without another look at all processes.
    world.now += 1
    assert nvml.nvmlDeviceGetUtilizationRates(gpus[2]).gpu == 0
    assert listed() == []


def test_a_real_process_can_use_one_mig_device(machine: Machine) -> None:
    world = World()
    layout = ScriptedMig(gpu=0, devices=("3g.40gb", "1g.10gb"))
    nvml = node(world, proc=str(machine.proc), scenario=Scenario(mig=(layout,)))
    gpu = nvml.nvmlDeviceGetHandleByIndex(0)
    device = nvml.nvmlDeviceGetMigDeviceHandleByIndex(gpu, 1)
    user = machine.start(
        STOKER_SIMULATED_WORKLOAD="memory=2GiB utilization=0.7",
        CUDA_VISIBLE_DEVICES=nvml.nvmlDeviceGetUUID(device),
    )
    world.now += 1
    (listed,) = nvml.nvmlDeviceGetComputeRunningProcesses(gpu)
    instance = nvml.nvmlDeviceGetGpuInstanceId(device)
    assert (listed.pid, listed.gpuInstanceId) == (user.pid, instance)
    assert nvml.nvmlDeviceGetMemoryInfo(device).used == 2 * GIB
