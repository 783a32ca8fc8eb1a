"""The running aggregator: its parts put together, served, watched, and stopped in order."""

import asyncio
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path

import grpc
from grpc import aio
from grpc_reflection.v1alpha import reflection  # type: ignore[import-untyped]

from stoker.aggregator import compiled
from stoker.aggregator.api import FleetService
from stoker.aggregator.api_services import RoutingService
from stoker.aggregator.config import Settings
from stoker.aggregator.control import Control
from stoker.aggregator.exporter import Exporter, in_the_loop
from stoker.aggregator.failures import CallFailure
from stoker.aggregator.findings import Findings
from stoker.aggregator.health import SERVICE as HEALTH
from stoker.aggregator.health import Health
from stoker.aggregator.ledger import Ledger
from stoker.aggregator.meters import Meters
from stoker.aggregator.partitioner import Partitioner
from stoker.aggregator.picture import Picture, take_picture
from stoker.aggregator.placing.kernels import Kernels
from stoker.aggregator.placing.placer import Placer
from stoker.aggregator.ports import check_free, in_use
from stoker.aggregator.rpc import add_service
from stoker.aggregator.service_metrics import ServiceCollector
from stoker.aggregator.sessions import AgentLink
from stoker.aggregator.store import OnCommit, Store
from stoker.core.addresses import Address
from stoker.core.clock import Clock
from stoker.core.errors import StoreError
from stoker.core.sdnotify import Notifier
from stoker.v1 import agent_pb2, fleet_pb2, services_pb2

# Where a running aggregator says how to reach it: {"pid", "version", "listen", "metrics"}.
RUNNING_NAME = "aggregator.json"
# The folder of the compiled loops of placement; may be deleted at any time.
COMPILED_NAME = "compiled"
LINK = agent_pb2.DESCRIPTOR.services_by_name["AgentLink"]
FLEET = fleet_pb2.DESCRIPTOR.services_by_name["Fleet"]
SERVICES = services_pb2.DESCRIPTOR.services_by_name["Services"]
# A request, a hello or a frame is a few kilobytes; a message beyond this is refused unread.
MESSAGE_BYTES_MAX = 4 << 20
# Streams of agents, waiting requests and watches at once; more are refused.
CALLS_MAX = 100_000
# How soon a change of health shows.
HEALTH_SECONDS = 0.25
# What calls have left to end when the aggregator stops.
STOP_SECONDS = 1.0

OpenStore = Callable[[Path, OnCommit], Store]

_OPTIONS: tuple[tuple[str, int], ...] = (
    # Otherwise a second server on the port gets some of the connections, and nobody an error.
    ("grpc.so_reuseport", 0),
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_send_message_length", -1),
    # A peer that vanished without a word is noticed after the time plus the timeout.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    # Agents and clients look the same way whether we are there.
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
)

_log = logging.getLogger(__name__)


class Aggregator:
    """One aggregator. `run` returns when `stop` was called."""

    def __init__(
        self,
        settings: Settings,
        *,
        version: str,
        clock: Clock,
        notifier: Notifier,
        open_store: OpenStore = Store,
    ) -> None:
        """Take what it goes by; `open_store` is how the ledger's file is opened."""
        self._settings = settings
        self._version = version
        self._clock = clock
        self._notifier = notifier
        self._open_store = open_store
        self._stopping = asyncio.Event()
        self.is_serving = asyncio.Event()
        self.address = settings.listen  # with its real port once it is serving
        self.metrics_address = settings.metrics_listen

    def stop(self) -> None:
        """Have `run` return soon."""
        self._stopping.set()

    async def run(self) -> None:
        """Run until stopped; raises StokerError for what a person can mend."""
        meters = Meters()
        store = self._open_store(self._settings.data_dir, meters.committed)
        try:
            ledger = Ledger(store, meters, self._clock.now())
            await self._serve(ledger, meters)
            await _keep_snapshot(ledger)
        finally:
            await asyncio.to_thread(store.close)

    async def _serve(self, ledger: Ledger, meters: Meters) -> None:
        link = AgentLink(ledger, meters, self._clock, self._version)
        policy, findings = self._settings.cordoning, Findings(self._settings.lemons)
        placer = Placer(self._settings.policies)
        control = Control(ledger, link, meters, self._clock, policy, findings, placer)
        service = FleetService(
            ledger,
            control,
            meters,
            self._clock,
            self._version,
            policy,
            findings,
            self._settings.rebalance,
            placer,
            relay=link.ask_about_mig,
        )
        cuts = self._settings.partitioning
        partitioner = Partitioner(ledger.fleet, link.ask_about_mig, meters, self._clock, cuts)
        routing = RoutingService(ledger.fleet, self._clock)
        health = Health((LINK.full_name, FLEET.full_name, SERVICES.full_name))
        server = aio.server(options=_OPTIONS, maximum_concurrent_rpcs=CALLS_MAX)
        add_service(server, LINK, {"Connect": link.connect})
        add_service(server, FLEET, service.methods())
        add_service(server, SERVICES, routing.methods())
        add_service(server, HEALTH, health.methods())
        names = (each.full_name for each in (LINK, FLEET, SERVICES, HEALTH))
        reflection.enable_server_reflection((*names, reflection.SERVICE_NAME), server)
        self.address = _bind(server, self._settings.listen)

        def picture() -> Picture:
            return take_picture(ledger.fleet, self._clock.now(), policy, findings)

        exporter = Exporter(self._settings.metrics_listen, picture, meters, self._version)
        meters.registry.register(ServiceCollector(in_the_loop(routing.picture)))
        self.metrics_address = exporter.address
        running = self._settings.data_dir / RUNNING_NAME
        try:
            async with asyncio.TaskGroup() as tasks:
                loops = [
                    tasks.create_task(control.run(), name="control"),
                    tasks.create_task(link.run(), name="acknowledgements"),
                    tasks.create_task(routing.run(), name="routing"),
                    tasks.create_task(service.rebalancing.run(), name="rebalancing"),
                    tasks.create_task(partitioner.run(), name="partitioning"),
                    tasks.create_task(self._watch_health(control, health), name="health"),
                    tasks.create_task(self._compile(placer, ledger, meters), name="compiling"),
                ]
                await control.turned()
                await server.start()
                self._announce(running)
                self.is_serving.set()
                await self._stopping.wait()
                self._tell(STOPPING="1")
                health.set(is_serving=False)
                await _stop_serving(server, link, routing)
                for each in loops:
                    each.cancel()
        finally:
            await server.stop(None)
            running.unlink(missing_ok=True)
            await asyncio.to_thread(exporter.close)

    async def _watch_health(self, control: Control, health: Health) -> None:
        """Let health, and the service manager's watchdog, follow the control loop."""
        await control.turned()
        health.set(is_serving=True)
        self._tell(READY="1")
        last = ""
        while True:
            trouble = control.trouble()
            if trouble != last:
                health.set(is_serving=not trouble)
                if trouble:
                    _log.error("not serving: %s", trouble)
                    self._tell(STATUS=f"not serving: {trouble}")
                else:
                    _log.info("serving again")
            if not trouble:
                self._tell(WATCHDOG="1", STATUS=f"serving on {self.address}")
            last = trouble
            await self._clock.sleep(HEALTH_SECONDS)

    async def _compile(self, placer: Placer, ledger: Ledger, meters: Meters) -> None:
        """Have placement run compiled once the fleet is worth it."""

        def use(kernels: Kernels) -> None:
            placer.use(kernels)
            meters.is_compiled.set(1)

        await compiled.run_when_worth_it(
            use,
            lambda: len(ledger.fleet.homes),
            self._settings.compile_from_gpus,
            self._settings.data_dir / COMPILED_NAME,
            self._clock,
        )

    def _announce(self, path: Path) -> None:
        facts = {
            "pid": os.getpid(),
            "version": self._version,
            "listen": str(self.address),
            "metrics": str(self.metrics_address),
        }
        fresh = path.with_suffix(".new")
        try:
            fresh.write_text(json.dumps(facts) + "\n", encoding="utf-8")
            fresh.replace(path)
        except OSError as error:
            raise StoreError(f"{path}: {error.strerror}") from error
        _log.info("serving on %s, metrics on %s", self.address, self.metrics_address)

    def _tell(self, **state: str) -> None:
        try:
            self._notifier.tell(**state)
        except OSError as error:
            _log.warning("the service manager cannot be told %s: %s", state, error)


def _bind(server: aio.Server, address: Address) -> Address:
    # gRPC says only that it failed, and that in the log of its core; so the port is tried first.
    check_free(address, "listen")
    try:
        return Address(address.host, server.add_insecure_port(str(address)))
    except RuntimeError as error:
        raise in_use(address, "listen") from error


async def _stop_serving(server: aio.Server, link: AgentLink, routing: RoutingService) -> None:
    """End streams with a word, give short calls time to end, cut off the rest."""
    leaving = CallFailure(grpc.StatusCode.UNAVAILABLE, "STOPPING", "the aggregator is stopping")
    link.close(leaving)
    routing.close(leaving)
    await server.stop(STOP_SECONDS)


async def _keep_snapshot(ledger: Ledger) -> None:
    try:
        await ledger.keep_snapshot()
    except StoreError as error:
        # Nothing is lost by it: the events are there, the next start replays them.
        _log.warning("no snapshot at the end: %s", error)
