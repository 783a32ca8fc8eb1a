"""An agent on simulated GPUs that are partitioned: asked at its socket, looked at on its card."""

import asyncio
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.support.daemons import Daemon, python_module
from tests.support.waiting import until

from stoker.agent.mig.library import Library
from stoker.agent.simulated.nvml import SimulatedNvml
from stoker.core.gpu_models import parse_simulate_spec
from stoker.core.local import AskMig, Mig, NoAgent, ask
from stoker.core.mig.reports import GpuMigFacts, MigAsk, MigEntry, MigReport, Verb

NODE = "node-a"
FINAL = frozenset({"success", "failed", "reboot-required"})
MIG_STATE = "simulated-mig.json"
SCENARIO = "scenario.json"


class MigAgent:
    """One agent, which may live several times; `address` is that of its aggregator."""

    def __init__(self, folder: Path, simulate: str, address: str, *options: str) -> None:
        self.folder = folder
        count, model = parse_simulate_spec(simulate)
        self._models = [model] * count
        self.scenario = folder / SCENARIO
        command = [
            *python_module("stoker.agent"),
            *("--node", NODE, "--aggregator", address, "--data-dir", str(folder / NODE)),
            *("--metrics-listen", "127.0.0.1:0", "--simulate", simulate),
            *("--interval", "100ms", "--processes-interval", "500ms"),
            *("--scenario", str(self.scenario)),
            *options,
        ]
        self.daemon = Daemon(NODE, command, folder, "agent.json")
        self.socket = folder / NODE / "agent.sock"

    def play(self, scenario: Mapping[str, Any]) -> None:
        """Let this happen on the simulated GPUs."""
        fresh = self.scenario.with_suffix(".new")
        fresh.write_text(json.dumps(scenario))
        fresh.rename(self.scenario)

    async def ask(
        self,
        verb: Verb,
        devices: Mapping[str, int] | None = None,
        *,
        operation: str = "",
        gpus: tuple[str, ...] = (),
        drain: float = 0.0,
        evict: bool = False,
    ) -> MigReport:
        """Ask for these devices on the GPUs, or for MIG off where none are named but asked for."""
        entries = () if devices is None else (entry(devices),)
        asked = MigAsk(verb, operation, "test", entries, gpus, drain, evict)
        answer = await asyncio.to_thread(ask, [self.socket], AskMig(asked), Mig)
        return answer.report

    async def gpu(self, index: int = 0) -> GpuMigFacts:
        """How a GPU is now, once the agent answers and its partitions were read."""

        async def look() -> GpuMigFacts | None:
            try:
                gpus = (await self.ask("status")).gpus
            except NoAgent:
                assert self.daemon.is_running, self.daemon.log_end()
                return None
            except Exception as error:
                if "starting" in str(error):
                    return None
                raise
            return gpus[index] if len(gpus) > index and not gpus[index].unread else None

        return await until("the agent to tell of its partitions", look)

    async def ended(self, operation: str, index: int = 0) -> GpuMigFacts:
        """How a GPU is once that operation has come to an end."""

        async def look() -> GpuMigFacts | None:
            gpu = await self.gpu(index)
            return gpu if gpu.operation_id == operation and gpu.state in FINAL else None

        return await until(f"the end of operation {operation}", look)

    async def applied(self, devices: Mapping[str, int], operation: str, **more: Any) -> GpuMigFacts:
        """Apply, and return how it ended."""
        await self.ask("apply", devices, operation=operation, **more)
        return await self.ended(operation)

    def card(self, index: int = 0) -> list[tuple[str, int, bool]]:
        """What is on the card, whatever the agent says: profile, place, whether it is a device."""
        state = self.folder / NODE / MIG_STATE
        table = SimulatedNvml(self._models, node=NODE, mig_state=state, is_root=True)
        with Library(table) as library:
            gpu = library.read_all().gpus[index]
        return [(each.profile, each.start, bool(each.compute_instances)) for each in gpu.instances]


def entry(devices: Mapping[str, int]) -> MigEntry:
    return MigEntry(mig_enabled=bool(devices), mig_devices=dict(devices))
