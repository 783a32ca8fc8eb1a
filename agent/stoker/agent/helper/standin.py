"""The simulated driver in place of the real one, for tests and demonstrations; root sets it up."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from stoker.agent.mig.calls import Calls
from stoker.agent.mig.reading import find_gpu
from stoker.agent.nvml.table import Code, Handle
from stoker.agent.simulated.nvml import SimulatedNvml
from stoker.agent.simulated.scenario import NOTHING_HAPPENS, ScenarioFile
from stoker.core.errors import StokerError
from stoker.core.gpu_models import GpuModel, parse_simulate_spec

_LISTS = ("nvmlDeviceGetComputeRunningProcesses", "nvmlDeviceGetGraphicsRunningProcesses")


def simulated(options: Sequence[str]) -> SimulatedNvml:
    """Return the functions of a simulated driver; raises BadInput for options that make none.

    It lets whoever asks change partitions, as if he were root: on it nothing is to be protected.
    """
    parser = argparse.ArgumentParser(prog="simulated driver", add_help=False, exit_on_error=False)
    parser.add_argument("--simulate", action="append", required=True)
    parser.add_argument("--node", default="")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scenario", type=Path)
    parser.add_argument("--mig-state", type=Path, required=True)
    given = parser.parse_args(list(options))
    models: list[GpuModel] = []
    for spec in ",".join(given.simulate).split(","):
        count, model = parse_simulate_spec(spec)
        models += [model] * count
    return SimulatedNvml(
        models,
        node=given.node,
        seed=given.seed,
        scenario=ScenarioFile(given.scenario) if given.scenario else NOTHING_HAPPENS,
        mig_state=given.mig_state,
        is_root=True,
    )


def objection(options: Sequence[str]) -> str:
    """Return why there can be no such simulated driver, in a line; empty: there can."""
    try:
        simulated(options)
    except (argparse.ArgumentError, StokerError) as error:
        return str(error)
    return ""


def users_of(options: Sequence[str], gpu: str) -> frozenset[int]:
    """Return the PIDs of who uses a simulated GPU, or a MIG device of it; raises StepFailed."""
    calls = Calls(simulated(options))
    calls.begin()
    try:
        card = find_gpu(calls, gpu).handle
        devices: list[Handle] = [card]
        what = f"{gpu}: who uses it cannot be read"
        for place in range(calls.ask(what, "nvmlDeviceGetMaxMigDeviceCount", card)):
            function = "nvmlDeviceGetMigDeviceHandleByIndex"
            device = calls.ask_unless((Code.NOT_FOUND,), what, function, card, place)
            devices += [] if isinstance(device, Code) else [device]
        found: set[int] = set()
        for device in devices:
            for function in _LISTS:
                users = calls.ask_unless((Code.NOT_SUPPORTED,), what, function, device)
                found |= set() if isinstance(users, Code) else {each.pid for each in users}
        return frozenset(found)
    finally:
        calls.end()
