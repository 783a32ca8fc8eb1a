"""A node whose driver is broken and mended by the test: the real agent in this process with real
driver hosts, a real aggregator beside it, and somebody who never stops scraping.
"""

import asyncio
import contextlib
import json
import re
import time
import urllib.request
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support.assembled import assembled
from tests.support.pages import Page, read_page
from tests.support.waiting import until

from stoker.agent.config import AgentConfig, settle
from stoker.agent.daemon import Agent
from stoker.agent.driver_host.frames import SimulatedDriver
from stoker.agent.driver_host.states import Patience
from stoker.agent.metrics.exporter import MetricsServer
from stoker.client import AsyncFleet, Node
from stoker.testing.undying import Undying

GPUS = 4
MODEL = "H100-80GB"
INTERVAL_SECONDS = 0.2
SLOW_INTERVAL_SECONDS = 1.0
# After so long every fact had its turn.
ALL_READ_SECONDS = SLOW_INTERVAL_SECONDS + 2 * INTERVAL_SECONDS
# A scrape that takes longer counts as not answered; the goal, 0.1 s, is told and not asserted: what
# a busy machine adds is not the agent's.
SCRAPE_SECONDS_MAX = 1.0
SCRAPE_PAUSE_SECONDS = 0.1
# Beyond three intervals: for the scrape itself, and for a machine that has other things to do.
LATE_SECONDS_MAX = 1.0
# What is judged of a GPU has a table of its own (`test_health_table`).
JUDGED = ("stoker_gpu_health", "stoker_gpu_fault")
# A GPU that is well again can be had at once.
FLEET = {"STOKER_AGGREGATOR_HEALTH_UNCORDON_AFTER_SECONDS": "0s"}
# The last of the slow facts: with it a GPU tells all that it tells.
SLOW_SERIES = "stoker_gpu_power_limit_default_watts"
PATIENCE = Patience(
    start_seconds=30.0,
    call_seconds=2.0,
    end_grace_seconds=0.1,
    release_grace_seconds=0.1,
    kill_seconds=0.2,
    restart_seconds_min=0.05,
    restart_seconds_max=0.2,
    retrial_seconds_min=2.0,
    retrial_seconds_max=2.0,
)


@dataclass(frozen=True, slots=True)
class Scrape:
    """One answer of `/metrics`."""

    at: float  # monotonic, when it was asked for
    seconds: float  # until it was there
    energies: dict[str, float]  # by UUID, of the GPUs that told it


@dataclass
class FaultyNode:
    """The node, as clients, dashboards and the person who breaks it see it."""

    name: str
    fleet: AsyncFleet
    agent: Agent
    hosts: Undying
    address: str  # of its metrics
    fleet_address: str  # of the aggregator's metrics
    scenario: Path
    scrapes: list[Scrape] = field(default_factory=list[Scrape])
    unanswered: int = 0
    healthy: dict[str, frozenset[str]] = field(default_factory=dict[str, frozenset[str]])
    uuids: tuple[str, ...] = ()

    # --- breaking it, and mending it

    def script(self, **scenario: Any) -> None:
        """Have this happen to the simulated driver, and nothing else."""
        draft = self.scenario.with_suffix(".new")
        draft.write_text(json.dumps(scenario))
        draft.rename(self.scenario)

    # --- looking

    async def node(self) -> Node:
        """Return the node as clients are shown it."""
        return next(each for each in (await self.fleet.nodes()).nodes if each.name == self.name)

    async def page(self) -> Page:
        """Return its page for Prometheus."""
        return await _page(self.address, "/metrics")

    async def refusal(self, gpus: int = 1) -> str:
        """Return why a request for so many of its GPUs is not placed; empty: it would be."""
        found = await self.fleet.explain_request(gpus=gpus, node=self.name)
        if found.placeable:
            return ""
        assert found.refusals is not None
        return next(each.reason for each in found.refusals.nodes if each.node == self.name)

    async def told(self) -> str:
        """Return all that is told of the node now, as text that is the same in every run."""
        node, page = await self.node(), await self.page()
        lines = [f"node is {node.state}: {node.state_reason}".removesuffix(": ")]
        lines += [f"GPU {m.index} is out ({m.error_kind}): {m.reason}" for m in node.missing_gpus]
        for gpus in (1, GPUS - 1, GPUS):
            why_not = await self.refusal(gpus)
            lines.append(f"{gpus} GPUs: {f'refused, {why_not}' if why_not else 'placed'}")
        lines += [f"driver: {state}" for state in _set(page, "stoker_agent_driver_state")]
        shown = {gpu.uuid for gpu in node.gpus if gpu.last_sample_at is not None}
        series = series_by_gpu(page)
        for index, uuid in enumerate(self.uuids):
            found = series.get(uuid, frozenset())
            is_read = "stoker_gpu_energy_joules_total" in found
            fleet = "" if (uuid in shown) == is_read else "; the fleet says otherwise"
            lines.append(f"GPU {index}: {self._compared(uuid, found)}{fleet}")
        mig = page.get("stoker_mig_memory_used_bytes", {})
        lines += [f"MIG device of GPU {dict(of)['gpu']}: {dict(of)['profile']}" for of in mig]
        dcgm = await _page(self.address, "/metrics/dcgm")
        fleet_page = await _page(self.fleet_address, "/metrics")
        for where, samples in (
            ("DCGM's names", dcgm.get("DCGM_FI_DEV_POWER_USAGE", {})),
            ("the fleet's page", fleet_page.get("stoker_fleet_gpu_power_watts", {})),
        ):
            uuids = {value for labels in samples for _, value in labels}
            told = [str(index) for index, uuid in enumerate(self.uuids) if uuid in uuids]
            lines.append(f"power in {where}: GPU {', '.join(told) or 'none'}")
        missing = fleet_page.get("stoker_fleet_gpus_missing", {}).items()
        lines += [
            f"missing in the fleet's page: {value:g} {dict(labels)['error_kind']}"
            for labels, value in missing
            if dict(labels)["node"] == self.name
        ]
        return "\n".join(self._masked(line) for line in lines) + "\n"

    def _compared(self, uuid: str, found: frozenset[str]) -> str:
        lacking, new = self.healthy[uuid] - found, found - self.healthy[uuid]
        if len(found) < len(lacking):
            return f"only {', '.join(sorted(found)) or 'silence'}"
        parts = [f"not {', '.join(sorted(lacking))}"] if lacking else ["all series"]
        return "; ".join([*parts, *([f"also {', '.join(sorted(new))}"] if new else [])])

    def _masked(self, line: str) -> str:
        for index, uuid in enumerate(self.uuids):
            line = line.replace(uuid, f"UUID-{index}")
        line = re.sub(r"MIG-[0-9a-f-]{36}", "MIG-UUID", line)
        line = re.sub(r"(PID|host|boot) (?!500000)\d+", r"\1 N", line)
        line = re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d UTC", "TIME", line)
        return re.sub(r"\b\d+(\.\d+)?( ms|ms| s|s)\b", "T", line)

    # --- waiting

    async def until_told(
        self, what: str, *words: str, steady_seconds: float = 2 * INTERVAL_SECONDS
    ) -> str:
        """Return what is told once all these words are in it and it has not changed for so long."""
        text, since = "", 0.0

        async def look() -> str | None:
            nonlocal text, since
            before, text = text, await self.told()
            now = time.monotonic()
            if text != before:
                since = now
            is_steady = now - since >= steady_seconds
            return text if is_steady and all(word in text for word in words) else None

        try:
            return await until(what, look)
        except AssertionError as error:
            raise AssertionError(f"{error}; the last that was told:\n{text}") from None

    async def until_well(self) -> None:
        """Return once every GPU tells all that it told at first, and all can be had."""

        async def look() -> bool:
            series = series_by_gpu(await self.page())
            if any(series.get(uuid) != self.healthy[uuid] for uuid in self.uuids):
                return False
            return not await self.refusal(GPUS)

        try:
            await until("all to be well again", look)
        except AssertionError as error:
            raise AssertionError(f"{error}; the last that was told:\n{await self.told()}") from None

    async def seconds_until_refused(self) -> tuple[float, str]:
        """Return the time from now until nothing is placed here any more, and why it is not."""
        began = time.monotonic()
        reason = await until("requests to be refused", self._reason)
        return time.monotonic() - began, reason

    async def _reason(self) -> str | None:
        return await self.refusal() or None

    # --- what held all the time

    def check_scrapes(self, since: float) -> str:
        """Check that every scrape was answered and that none told an old value; return figures."""
        scrapes = [each for each in self.scrapes if each.at >= since]
        assert self.unanswered == 0, f"{self.unanswered} scrapes were not answered"
        assert scrapes
        first_told: dict[tuple[str, float], float] = {}
        oldest = 0.0
        for scrape in scrapes:
            for uuid, energy in scrape.energies.items():
                told_at = first_told.setdefault((uuid, energy), scrape.at)
                oldest = max(oldest, scrape.at - told_at)
        assert oldest <= 3 * INTERVAL_SECONDS + LATE_SECONDS_MAX, "a value stood still"
        times = sorted(each.seconds for each in scrapes)
        return (
            f"{len(times)} scrapes, median {1e3 * times[len(times) // 2]:.0f} ms, "
            f"longest {1e3 * times[-1]:.0f} ms, oldest value {oldest:.2f} s"
        )

    async def scrape_for_ever(self) -> None:
        """Scrape as a hasty Prometheus does, and note how it went."""
        while True:
            began = time.monotonic()
            try:
                text = await asyncio.to_thread(_scrape, self.address, "/metrics")
            except OSError:
                self.unanswered += 1
                continue
            seconds = time.monotonic() - began
            energies = read_page(text).get("stoker_gpu_energy_joules_total", {})
            told = {dict(labels)["uuid"]: value for labels, value in energies.items()}
            self.scrapes.append(Scrape(began, seconds, told))
            await asyncio.sleep(SCRAPE_PAUSE_SECONDS)


def series_by_gpu(page: Page) -> dict[str, frozenset[str]]:
    """Return the names of the series of each GPU, with what tells several of one name apart."""
    found: dict[str, set[str]] = {}
    common = {"node", "gpu", "uuid", "model"}
    for name, samples in page.items():
        if not name.startswith("stoker_gpu_") or name.startswith(JUDGED):
            continue
        for labels, value in samples.items():
            given = dict(labels)
            uuid = given.get("uuid")
            if uuid is None:
                continue
            if name == "stoker_gpu_up":
                found.setdefault(uuid, set()).add(f"{name}={value:g}")
                continue
            others = (
                ""
                if name.endswith("_info")
                else ",".join(value for label, value in labels if label not in common)
            )
            found.setdefault(uuid, set()).add(f"{name}[{others}]" if others else name)
    return {uuid: frozenset(names) for uuid, names in found.items()}


def _set(page: Page, name: str) -> list[str]:
    return [dict(labels)["state"] for labels, value in page.get(name, {}).items() if value]


async def _page(address: str, path: str) -> Page:
    return read_page(await asyncio.to_thread(_scrape, address, path))


def _scrape(address: str, path: str) -> str:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"http://{address}{path}", timeout=SCRAPE_SECONDS_MAX) as answer:
        text: str = answer.read().decode()
    return text


@contextlib.asynccontextmanager
async def faulty_node(
    folder: Path, name: str, aggregator: str, fleet_metrics: str
) -> AsyncGenerator[FaultyNode]:
    """A node that is well, and all of whose GPUs can be had."""
    hosts, scenario = Undying(), folder / "scenario.json"
    written = AgentConfig(
        node=name,
        aggregator=(aggregator,),
        interval_seconds=INTERVAL_SECONDS,
        slow_interval_seconds=SLOW_INTERVAL_SECONDS,
        processes_interval_seconds=1.0,
        data_dir=folder / "agent",
    )
    settings = settle(written, {}, hostname=name)
    source = SimulatedDriver((f"{GPUS}x{MODEL}",), name, 0, str(scenario))
    async with contextlib.AsyncExitStack() as opened:
        agent = opened.enter_context(assembled(settings, source, PATIENCE, hosts))
        listen = settings.metrics_listen.__class__("127.0.0.1", 0)
        server = MetricsServer(listen, agent.snapshot, settings.metrics)
        opened.push_async_callback(asyncio.to_thread, server.close)
        fleet = await opened.enter_async_context(AsyncFleet(aggregator, timeout=10.0))
        node = FaultyNode(name, fleet, agent, hosts, str(server.address), fleet_metrics, scenario)
        running = asyncio.create_task(agent.run())
        scraping = asyncio.create_task(node.scrape_for_ever())
        try:
            await _until_whole(node)
            yield node
        finally:
            scraping.cancel()
            hosts.let_go()
            agent.stop()
            await asyncio.wait([scraping, running])
        running.result()


async def _until_whole(node: FaultyNode) -> None:
    """Return once every GPU has told the same for some samples, and all can be had."""

    async def look() -> bool:
        found = {each.name: each for each in (await node.fleet.nodes()).nodes}.get(node.name)
        if found is None or len(found.gpus) < GPUS:
            return False
        node.uuids = tuple(gpu.uuid for gpu in found.gpus)
        before, node.healthy = node.healthy, series_by_gpu(await node.page())
        if any(SLOW_SERIES not in node.healthy.get(uuid, ()) for uuid in node.uuids):
            return False
        await asyncio.sleep(2 * INTERVAL_SECONDS)
        return node.healthy == before and not await node.refusal(GPUS)

    await until("a node that is well", look)
