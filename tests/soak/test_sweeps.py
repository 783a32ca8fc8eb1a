"""Sweeping for a day costs no memory and no open file, however much comes and goes on the GPUs."""

import json
import os
import random
import subprocess
import sys
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tests.support.nvml_library import build_full, counting, environment
from tests.support.sweeping import NODE, Plan, Sweeping, Told, slope

from stoker.agent.simulated.nvml import SimulatedNvml
from stoker.core.gpu_models import find_model

GPUS = 16
MODEL = find_model("H100-80GB")
TELL_EVERY = 25
# The first part of a run is not looked at: caches fill, and the interpreter takes its arenas.
WARM_UP_RATIO = 0.25
KIB = 1024
# In 1,000 sweeps, by the length of the run: steps of the allocator (arenas of 1 MiB) weigh less the
# longer it is. An object of 100 bytes kept for each GPU at each sweep would be 1,560 KiB.
GROWTH_KIB_MAX = {1_500: 1024.0, 18_000: 32.0}
LAYOUTS = (
    ("1g.10gb",) * 7,
    ("3g.40gb", "3g.40gb"),
    ("4g.40gb", "2g.20gb", "1g.10gb"),
    ("1c.3g.40gb", "1c.3g.40gb", "2g.20gb"),
    (),
)
FIRST_SCRIPTED_PID = 5_000_000
XIDS = (13, 31, 43, 45, 63, 79, 94)


class Churn:
    """What comes and goes between two parts of a run: MIG layouts, processes, Xids, faults."""

    def __init__(self, path: Path, seed: int) -> None:
        self._path = path
        self._rng = random.Random(seed)
        self._next_pid = FIRST_SCRIPTED_PID
        self._uuids = SimulatedNvml([MODEL] * GPUS, node=NODE).uuids
        self._real: list[subprocess.Popen[bytes]] = []
        self.real_pids: set[int] = set()

    def change(self) -> None:
        """Write the next scenario, end the real processes of the last one, start others."""
        rng = self._rng
        partitioned = rng.sample(range(GPUS), rng.randint(0, 6))
        scenario = {
            "mig": [{"gpu": gpu, "devices": rng.choice(LAYOUTS)} for gpu in partitioned],
            "processes": [self._process(gpu) for gpu in range(GPUS) if rng.random() < 0.7],
            "events": [
                {"gpu": rng.randrange(GPUS), "xid": rng.choice(XIDS), "at_seconds": 0.01}
                for _ in range(rng.randint(0, 3))
            ],
            "faults": [
                {
                    "fault": "fail",
                    "gpu": rng.randrange(GPUS),
                    "function": "nvmlDeviceGetUtilizationRates",
                    "error": rng.choice(["UNKNOWN", "TIMEOUT"]),
                }
            ],
        }
        draft = self._path.with_suffix(".new")
        draft.write_text(json.dumps(scenario), encoding="utf-8")
        draft.rename(self._path)
        self.end()
        self._real = [self._start() for _ in range(rng.randint(0, 2))]
        self.real_pids.update(each.pid for each in self._real)

    def end(self) -> None:
        """End the real processes."""
        while self._real:
            process = self._real.pop()
            process.kill()
            process.wait()

    def _process(self, gpu: int) -> dict[str, object]:
        self._next_pid += 1
        memory, utilization = f"{self._rng.randint(1, 9)}GiB", round(self._rng.random(), 2)
        return {"gpu": gpu, "pid": self._next_pid, "memory": memory, "utilization": utilization}

    def _start(self) -> subprocess.Popen[bytes]:
        gpus = ",".join(self._rng.sample(self._uuids, self._rng.randint(1, GPUS)))
        use = {"CUDA_VISIBLE_DEVICES": gpus, "STOKER_SIMULATED_WORKLOAD": "memory=1GiB"}
        return subprocess.Popen(["sleep", "600"], env={**os.environ, **use})


@contextmanager
def churning(path: Path) -> Generator[Churn]:
    churn = Churn(path, seed=20_261_122)
    try:
        churn.change()
        yield churn
    finally:
        churn.end()


def parts(sweeping: Sweeping, plan: Plan, churn: Churn | None = None) -> Iterator[Told]:
    for _ in range(plan.sweeps // plan.tell_every):
        yield sweeping.hear()
        if churn is not None:
            churn.change()
        sweeping.go_on()


def check_flat(told: list[Told]) -> None:
    """Neither process grows, and the number of their open files does not change at all."""
    sweeps = told[-1].sweeps
    settled = [each for each in told if each.sweeps > WARM_UP_RATIO * sweeps]
    assert {each.agent_files for each in settled} == {settled[0].agent_files}
    assert {each.host_files for each in settled} == {settled[0].host_files}
    assert {each.host_starts for each in told} == {1}
    growth = {
        name: slope([(each.sweeps, getattr(each, name)) for each in settled]) * 1000 / KIB
        for name in ("agent_rss_bytes", "host_rss_bytes")
    }
    sizes = {
        name: [round(getattr(each, name) / KIB) for each in (told[0], settled[0], settled[-1])]
        for name in growth
    }
    sys.stdout.write(f"{sweeps} sweeps: KiB per 1,000 sweeps {growth}, KiB {sizes}\n")
    assert max(growth.values()) < GROWTH_KIB_MAX[sweeps], (growth, sizes)


def plans() -> list[object]:
    short, long = pytest.mark.slow, pytest.mark.soak
    return [
        pytest.param(1_500, id="1500 sweeps", marks=short),
        pytest.param(18_000, id="18000 sweeps", marks=long),
    ]


@pytest.mark.parametrize("sweeps", plans())
def test_sweeps_over_simulated_gpus_are_flat(sweeps: int, tmp_path: Path) -> None:
    scenario = tmp_path / "scenario.json"
    plan = Plan(sweeps, TELL_EVERY, (f"{GPUS}x{MODEL.name}",), str(scenario))
    with churning(scenario) as churn, Sweeping(plan, os.environ) as sweeping:
        told = list(parts(sweeping, plan, churn))
    assert sum(each.readings for each in told) == GPUS * sweeps
    assert sum(each.empty_readings for each in told) == 0
    # What should come and go did: partitions, GPUs that changed their mode, processes, errors.
    assert sum(each.mig_devices for each in told) > sweeps
    assert sum(each.inventories for each in told) > len(told) / 2
    pids = {pid for each in told for pid in each.pids}
    assert len(pids & churn.real_pids) > len(told) / 4
    assert len(pids - churn.real_pids) > len(told)
    assert sum(each.xids for each in told) > len(told) / 4
    check_flat(told)


@pytest.mark.compiler
@pytest.mark.parametrize("sweeps", plans())
def test_sweeps_through_a_library_are_flat(sweeps: int, tmp_path: Path) -> None:
    with counting(tmp_path / "page") as page:
        given = environment(build_full(tmp_path), page=page, gpus=GPUS, pids=[os.getpid()])
        plan = Plan(sweeps, TELL_EVERY)
        things: list[int] = []
        told: list[Told] = []
        with Sweeping(plan, {**os.environ, **given}) as sweeping:
            for each in parts(sweeping, plan):
                told.append(each)
                things.append(page.read().things)
        assert sum(each.readings for each in told) == GPUS * sweeps
        # What the driver gave for sampling: as much as in the beginning, and all of it back.
        assert set(things) == {things[0]}
        assert page.read().things == 0
    check_flat(told)
