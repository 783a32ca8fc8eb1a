"""A node whose GPUs fall ill by script, and the fleet that decides what to do about it.

The agent is real and in this process, with real driver hosts; the aggregator is a process of its
own. The host can be rebooted, with another boot id and an empty kernel log.
"""

import asyncio
import contextlib
import json
import re
import time
import urllib.request
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.support.assembled import assembled
from tests.support.pages import Page, read_page
from tests.support.waiting import until

from stoker.agent.config import AgentConfig, settle
from stoker.agent.daemon import Agent
from stoker.agent.driver_host.frames import SimulatedDriver
from stoker.agent.driver_host.states import Patience
from stoker.agent.events import FaultsForgiven
from stoker.agent.health.options import HealthConfig
from stoker.agent.metrics.exporter import MetricsServer
from stoker.client import AsyncFleet, GpuCondition, Node
from stoker.testing.undying import Undying

GPUS = 4
MODEL = "H100-80GB"
INTERVAL_SECONDS = 0.1
SLOW_INTERVAL_SECONDS = 0.3
STEADY_SECONDS = 3 * INTERVAL_SECONDS
PATIENCE = Patience(
    start_seconds=30.0,
    call_seconds=2.0,
    end_grace_seconds=0.1,
    release_grace_seconds=0.1,
    kill_seconds=0.2,
    restart_seconds_min=0.05,
    restart_seconds_max=0.2,
    retrial_seconds_min=1.0,
    retrial_seconds_max=1.0,
)


class HealthNode:
    """One host with four GPUs; `reboot` and `restart` begin another life of it or of its agent."""

    def __init__(
        self, folder: Path, aggregator: str, fleet: AsyncFleet, health: HealthConfig
    ) -> None:
        self.name = "n1"
        self.fleet = fleet
        self._folder = folder
        self._aggregator = aggregator
        self._health = health
        self._scenario = folder / "scenario.json"
        self._kernel_log = folder / "kmsg"
        self._kernel_log.write_bytes(b"")
        self._lines = 0
        self._boots = 0
        self._resets = 0
        self._opened = contextlib.AsyncExitStack()
        self._agent: Agent | None = None
        self._metrics = ""
        self.uuids: tuple[str, ...] = ()
        self.addresses: tuple[str, ...] = ()  # on the PCI bus

    async def __aenter__(self) -> Self:
        await self.boot()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.shut_down()

    # --- its lives

    async def boot(self, **scenario: Any) -> None:
        """Boot the host: another boot id, an empty kernel log."""
        self._boots += 1
        self._lines = 0
        self._kernel_log.write_bytes(b"")
        self.script(**scenario)
        await self._start()

    async def reboot(self, **scenario: Any) -> None:
        """Shut down and boot, with these things wrong from then on."""
        await self.shut_down()
        await self.boot(**scenario)

    async def restart(self) -> None:
        """Restart the agent alone."""
        await self.shut_down()
        await self._start()

    async def shut_down(self) -> None:
        """End the agent."""
        await self._opened.aclose()
        self._opened = contextlib.AsyncExitStack()

    async def _start(self) -> None:
        written = AgentConfig(
            node=self.name,
            aggregator=(self._aggregator,),
            interval_seconds=INTERVAL_SECONDS,
            slow_interval_seconds=SLOW_INTERVAL_SECONDS,
            processes_interval_seconds=1.0,
            data_dir=self._folder / "agent",
            simulate=(f"{GPUS}x{MODEL}",),
            kernel_log=self._kernel_log,
            health=self._health,
        )
        settings = settle(written, {}, hostname=self.name)
        source = SimulatedDriver(settings.simulate, self.name, 0, str(self._scenario))
        hosts = Undying()
        boot = f"boot-{self._boots}"
        agent = self._opened.enter_context(assembled(settings, source, PATIENCE, hosts, boot))
        listen = settings.metrics_listen.__class__("127.0.0.1", 0)
        server = MetricsServer(listen, agent.snapshot, settings.metrics)
        self._opened.push_async_callback(asyncio.to_thread, server.close)
        self._metrics, self._agent = str(server.address), agent
        running = asyncio.create_task(agent.run())

        async def end() -> None:
            agent.stop()
            await running

        self._opened.push_async_callback(end)
        await until("the node to be read", self._is_read)

    async def _is_read(self) -> bool:
        node = await self._found()
        if node is None or node.state != "ready":
            return False
        if not self.uuids:
            known = [gpu for gpu in node.gpus if gpu.health is not None]
            if len(known) < GPUS:
                return False
            self.uuids = tuple(gpu.uuid for gpu in node.gpus)
            self.addresses = tuple(gpu.pci_bus_id for gpu in node.gpus)
        return any(gpu.last_sample_at is not None for gpu in node.gpus)

    # --- what befalls it

    def script(self, **scenario: Any) -> None:
        """Have this happen to the simulated driver, and nothing else."""
        draft = self._scenario.with_suffix(".new")
        draft.write_text(json.dumps(scenario))
        draft.rename(self._scenario)

    def log(self, *texts: str) -> None:
        """Let the kernel say these; "{0}" is the PCI address of GPU 0 as the kernel writes it."""
        addresses = [each.removeprefix("0000").lower() for each in self.addresses]
        records = ""
        for text in texts:
            self._lines += 1
            said = text.format(*addresses)
            records += f"4,{self._lines},{int(time.monotonic() * 1e6)},-;{said}\n"
        with self._kernel_log.open("a") as file:
            file.write(records)

    def set_healthy(self, gpu: int) -> None:
        """Say that a GPU is mended, as `stoker agent set-healthy` does."""
        assert self._agent is not None
        self._agent.happen(FaultsForgiven(time.time(), self.uuids[gpu], "root"))

    # --- what is told

    async def _found(self) -> Node | None:
        nodes = (await self.fleet.nodes()).nodes
        return next((each for each in nodes if each.name == self.name), None)

    async def told(self) -> str:
        """Return verdicts, cordons, placement and metrics, the same text in every run."""
        fleet = await self.fleet.health(include_healthy=True)
        lines: list[str] = []
        for each in sorted(fleet.gpus, key=lambda gpu: self._number(gpu.uuid)):
            lines += self._condition(each)
        for gpus in (1, GPUS - 1, GPUS):
            lines.append(f"{gpus} GPUs: {await self._placed(gpus)}")
        page = await self._page()
        for labels, value in sorted(page.get("stoker_gpu_fault", {}).items()):
            given = dict(labels)
            words = " ".join(given[word] for word in ("check", "code", "verdict", "action"))
            lines.append(f"fault of GPU {self._number(given['uuid'])}: {words} {value:g}")
        return "\n".join(self._masked(line) for line in lines) + "\n"

    def _condition(self, gpu: GpuCondition) -> Iterable[str]:
        health, name = gpu.health, f"GPU {self._number(gpu.uuid)}"
        assert health is not None
        if health.verdict == "healthy" and gpu.cordon is None:
            yield f"{name}: healthy"
            return
        yield f"{name}: {health.verdict}, {health.action}: {health.reason}"
        for fault in health.faults[1:]:
            yield f"  also {fault.verdict}, {fault.action}: {fault.reason}"
        if gpu.cordon is not None:
            whose = "for its health" if gpu.cordon.by_health else "by a person"
            yield f"  cordoned {whose}: {gpu.cordon.reason}"
        if gpu.cordon_withheld:
            yield f"  not cordoned: {gpu.cordon_withheld}"

    async def _placed(self, gpus: int) -> str:
        found = await self.fleet.explain_request(gpus=gpus, node=self.name)
        if found.placeable:
            return "placed"
        assert found.refusals is not None
        (refusal,) = (each for each in found.refusals.nodes if each.node == self.name)
        return f"refused ({refusal.filter}), {refusal.reason}"

    async def _page(self) -> Page:
        def scrape() -> str:
            opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
            with opener.open(f"http://{self._metrics}/metrics", timeout=5) as answer:
                text: str = answer.read().decode()
            return text

        return read_page(await asyncio.to_thread(scrape))

    def _number(self, uuid: str) -> str:
        return str(self.uuids.index(uuid)) if uuid in self.uuids else uuid

    def _masked(self, line: str) -> str:
        for index, uuid in enumerate(self.uuids):
            line = line.replace(uuid, f"UUID-{index}")
        for index, address in enumerate(self.addresses):
            for form in (
                address,
                address.removeprefix("0000"),
                address.removeprefix("0000").lower(),
            ):
                line = line.replace(form, f"PCI-{index}")
        line = re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d(:\d\d)? UTC", "TIME", line)
        line = re.sub(r"\b\d+ (PCIe replays|recover)", r"N \1", line)
        return re.sub(r"\b\d+(\.\d+)?( ms|ms| s|s)\b", "T", line)

    async def until_told(self, what: str, *words: str, but_not: tuple[str, ...] = ()) -> str:
        """Return what is told once these words are in it, those are not, and it stays the same."""
        text, since = "", 0.0

        async def look() -> str | None:
            nonlocal text, since
            before, text = text, await self.told()
            now = time.monotonic()
            if text != before:
                since = now
            is_it = all(word in text for word in words) and not any(w in text for w in but_not)
            return text if is_it and now - since >= STEADY_SECONDS else None

        try:
            return await until(what, look)
        except AssertionError as error:
            raise AssertionError(f"{error}; the last that was told:\n{text}") from None

    async def until_well(self) -> str:
        """Return what is told once every GPU is healthy and can be had."""
        return await self.until_told(
            "all to be well", f"{GPUS} GPUs: placed", but_not=("fault of",)
        )
