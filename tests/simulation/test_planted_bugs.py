"""The invariants bite: each bug that is planted here is found by some of a few seeds.

A planted bug is a small patch of a production class, or of what stands for the machine: something
that somebody might write by mistake. Beside each stands the promise that it must be seen to break.
"""

# pyright: reportPrivateUsage=false

import asyncio
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest

from stoker.agent.events import Event, JournalSaved, LinkDown, ProcessesTaken, ProcessReadingBegun
from stoker.agent.facts import Fact
from stoker.agent.journal import encode_batch
from stoker.agent.readings import GpuIdentity, GpuReading
from stoker.agent.records import Record
from stoker.agent.state import NodeState
from stoker.aggregator import (
    commands,
    inventories,
    reports,
    sessions,
    views,
    wire_fleet,
)
from stoker.aggregator.control import Control
from stoker.aggregator.cordoning import CordonPolicy
from stoker.aggregator.decisions import Round
from stoker.aggregator.events import DurableEvent, FrameArrived, NodeRegistered
from stoker.aggregator.fleet import Fleet, Snapshot
from stoker.aggregator.model import Allocation, Claim, Gpu, GpuSample, NodeFacts, NodeStatus
from stoker.aggregator.processes import ProcessTable
from stoker.aggregator.queueing import Kept
from stoker.aggregator.sessions import AgentLink, ClockOffset
from stoker.aggregator.store import StoredEvent
from stoker.aggregator.verdicts import GpuCordon
from stoker.aggregator.views import FleetView, GpuView, NodeView
from stoker.aggregator.wire import Hello
from stoker.testing import machine
from stoker.testing.agent_process import AgentProcess
from stoker.testing.aggregator_store import LedgerFile, SimulatedStore
from stoker.testing.driver_host import DriverHost
from stoker.testing.faults import Faults
from stoker.testing.network import NO_FAULTS, NetworkFaults
from stoker.testing.world import Scenario, SimulationFailed, World

SEEDS = range(1, 9)
SECONDS = 120.0

Patch = pytest.MonkeyPatch


# --- the ledger


def reply_before_commit(patch: Patch) -> None:
    real = SimulatedStore.append
    last_ids: dict[SimulatedStore, int] = {}

    def append(self: SimulatedStore, events: Sequence[DurableEvent]) -> "asyncio.Future[range]":
        future = real(self, events)
        first = last_ids.get(self, len(self._file.events)) + 1
        last_ids[self] = first + len(events) - 1
        future.set_result(range(first, first + len(events)))
        return future

    patch.setattr(SimulatedStore, "append", append)


def last_event_lost_on_restart(patch: Patch) -> None:
    real = LedgerFile.load

    def load(self: LedgerFile) -> tuple[Snapshot | None, list[StoredEvent]]:
        snapshot, events = real(self)
        return snapshot, events[:-1]

    patch.setattr(LedgerFile, "load", load)


def leases_not_prolonged_on_restart(patch: Patch) -> None:
    def recover(self: Fleet, at: float) -> None:
        self._is_recovered = True

    patch.setattr(Fleet, "_recover", recover)


def idempotency_keys_forgotten(patch: Patch) -> None:
    def put(self: Fleet, allocation: Allocation) -> None:
        self.allocations[allocation.id] = allocation

    patch.setattr(Fleet, "_put", put)


def keep_alive_promised_while_the_lease_is_being_ended(patch: Patch) -> None:
    async def settled(self: Control, allocation_id: str) -> None:
        pass

    patch.setattr(Control, "settled", settled)


# --- decisions


def wishes_do_not_see_each_other(patch: Patch) -> None:
    def happen(self: Round, event: DurableEvent) -> None:
        self.events.append(event)

    patch.setattr(Round, "_happen", happen)


def foreign_processes_ignored(patch: Patch) -> None:
    real = views.view_gpu

    def view_gpu(
        gpu: Gpu,
        claims: tuple[Claim, ...],
        held_for: Collection[str],
        status: NodeStatus,
        cordon: GpuCordon | None = None,
    ) -> GpuView:
        table = status.processes and replace(status.processes, processes=())
        return real(gpu, claims, held_for, replace(status, processes=table), cordon)

    patch.setattr(views, "view_gpu", view_gpu)


def cordons_of_gpus_ignored(patch: Patch) -> None:
    real = views.view_gpu

    def view_gpu(
        gpu: Gpu,
        claims: tuple[Claim, ...],
        held_for: Collection[str],
        status: NodeStatus,
        cordon: GpuCordon | None = None,
    ) -> GpuView:
        return real(gpu, claims, held_for, status)

    patch.setattr(views, "view_gpu", view_gpu)


def assignments_ignored(patch: Patch) -> None:
    real = views.view_gpu

    def view_gpu(
        gpu: Gpu,
        claims: tuple[Claim, ...],
        held_for: Collection[str],
        status: NodeStatus,
        cordon: GpuCordon | None = None,
    ) -> GpuView:
        table = status.processes
        blind = table and replace(table, assignments=(), assignments_unknown="")
        return real(gpu, claims, held_for, replace(status, processes=blind), cordon)

    patch.setattr(views, "view_gpu", view_gpu)


def share_of_cordons_not_kept(patch: Patch) -> None:
    def limit(self: CordonPolicy, gpus_total: int) -> int:
        return gpus_total

    patch.setattr(CordonPolicy, "limit", limit)


def node_seen_as(**otherwise: Any) -> Callable[[Patch], None]:
    """Whoever decides sees every node with these fields of its view."""

    def plant(patch: Patch) -> None:
        real = views.view_node

        def view_node(*args: Any) -> NodeView:
            return replace(real(*args), **otherwise)

        patch.setattr("stoker.aggregator.fleet.view_node", view_node)

    return plant


def cordons_of_nodes_ignored(patch: Patch) -> None:
    real = views.view_node

    def view_node(*args: Any) -> NodeView:
        seen = real(*args)
        return replace(seen, node=replace(seen.node, cordoned=None))

    patch.setattr("stoker.aggregator.fleet.view_node", view_node)


def ages_ignored(patch: Patch) -> None:
    real = Fleet.view

    def view(self: Fleet, now: float) -> FleetView:
        seen = real(self, now)
        return replace(seen, fresh_until=dict.fromkeys(seen.nodes, float("inf")))

    patch.setattr(Fleet, "view", view)


def queue_overtaken(patch: Patch) -> None:
    def keep_for(self: Kept, waiting: Allocation) -> None:
        pass

    patch.setattr(Kept, "keep_for", keep_for)


# --- letting go


def drop_confirmed_without_commands_done(patch: Patch) -> None:
    def has_let_go(allocation_id: str, held: Any, sent: Any, commands_done: int) -> bool:
        return allocation_id not in held

    patch.setattr(commands, "has_let_go", has_let_go)


def released_without_waiting_for_the_node(patch: Patch) -> None:
    def has_let_go(allocation_id: str, held: Any, sent: Any, commands_done: int) -> bool:
        return True

    patch.setattr(commands, "has_let_go", has_let_go)


def processes_read_once_and_remembered(patch: Patch) -> None:
    real_handle = AgentProcess._handle
    real_read = AgentProcess._read_processes
    remembered: dict[AgentProcess, ProcessesTaken] = {}

    def handle(self: AgentProcess, event: Event) -> None:
        if isinstance(event, ProcessesTaken):
            remembered[self] = event
        real_handle(self, event)

    def read(self: AgentProcess) -> None:
        last = remembered.pop(self, None)
        if last is None:
            real_read(self)
        else:
            real_handle(self, ProcessReadingBegun(self._wall()))
            real_handle(self, last)

    patch.setattr(AgentProcess, "_handle", handle)
    patch.setattr(AgentProcess, "_read_processes", read)


def holds_being_journaled_left_out_after_a_reconnect(patch: Patch) -> None:
    real = NodeState.handle

    def handle(self: NodeState, event: Event, monotonic: float) -> Any:
        actions = real(self, event, monotonic)
        if isinstance(event, LinkDown):
            self._carried.clear()
        return actions

    patch.setattr(NodeState, "handle", handle)


def journal_said_to_be_saved_before_it_is(patch: Patch) -> None:
    def save(self: AgentProcess, ticket: int, records: tuple[Record, ...]) -> None:
        self.disk.write(encode_batch(records), lambda reason: None)
        self.after(0.0, lambda: self._handle(JournalSaved(self._wall(), ticket)))

    patch.setattr(AgentProcess, "_save", save)


# --- frames


def frames_taken_in_twice(patch: Patch) -> None:
    real = AgentLink._begin

    def begin(self: AgentLink, hello: Hello) -> Any:
        self._progress.pop(hello.facts.name, None)
        return real(self, hello)

    patch.setattr(AgentLink, "_begin", begin)


def gpus_compared_with_what_is_applied_only(patch: Patch) -> None:
    async def record(self: AgentLink, facts: NodeFacts) -> None:
        known = self._ledger.fleet.nodes.get(facts.name)
        if known is None or known.facts != facts:
            await self._ledger.record(NodeRegistered(self._clock.now(), facts))

    patch.setattr(AgentLink, "_record", record)


def samples_dated_by_their_arrival(patch: Patch) -> None:
    def delay(self: ClockOffset, sent: float, arrived: float) -> float:
        return 0.0

    patch.setattr(ClockOffset, "delay", delay)


# --- cards and drivers


def hangs_not_noticed(patch: Patch) -> None:
    def blocks_on(self: DriverHost, gpus: Any, call: str) -> bool:
        return False

    patch.setattr(DriverHost, "_blocks_on", blocks_on)


def old_values_shown(patch: Patch) -> None:
    def fresh_sample(sample: GpuSample | None, oldest: float) -> GpuSample | None:
        return sample

    patch.setattr(wire_fleet, "fresh_sample", fresh_sample)


def facts_kept_that_were_not_told(patch: Patch) -> None:
    real = machine.Machine.reading
    told: dict[str, dict[Fact, float]] = {}

    def reading(self: machine.Machine, gpu: GpuIdentity, now: float) -> GpuReading:
        found = real(self, gpu, now)
        if found.facts:
            told[gpu.uuid] = {**told.get(gpu.uuid, {}), **found.facts}
            return replace(found, facts=told[gpu.uuid])
        return found

    patch.setattr(machine.Machine, "reading", reading)


def gpu_that_comes_back_trusted_at_once(patch: Patch) -> None:
    def doubt_processes(self: NodeState, doubted: set[str]) -> Any:
        yield from ()

    patch.setattr(NodeState, "_doubt_processes", doubt_processes)
    patch.setattr(NodeState, "_lose_processes", doubt_processes)
    patch.setattr(reports, "_doubted", _not_doubted)


def _not_doubted(table: ProcessTable, uuids: frozenset[str]) -> ProcessTable:
    return table


def missing_gpus_never_back(patch: Patch) -> None:
    real = reports.after_frame

    def after_frame(
        before: NodeStatus, event: FrameArrived, tenants: Collection[str]
    ) -> NodeStatus:
        after = real(before, event, tenants)
        return replace(after, missing=tuple(dict.fromkeys((*before.missing, *after.missing))))

    patch.setattr(reports, "after_frame", after_frame)


def missing_gpus_taken_for_others(patch: Patch) -> None:
    """As if a GPU that cannot be read were simply not there: its slot is given up."""
    real = inventories.with_inventory

    def with_inventory(facts: NodeFacts, inventory: Any, known: NodeFacts | None) -> NodeFacts:
        return real(facts, replace(inventory, gpus=inventory.gpus[:-1]), known)

    patch.setattr(sessions, "with_inventory", with_inventory)


def standstill_not_noticed(patch: Patch) -> None:
    def look_at_clock(self: Control) -> float:
        return self._clock.now()

    patch.setattr(Control, "_look_at_clock", look_at_clock)


@dataclass(frozen=True)
class Planted:
    what: str
    plant: Callable[[Patch], None]
    breaks: frozenset[str]
    faults: Faults | None = None  # None: what the seed draws


def planted(
    plant: Callable[[Patch], None], *breaks: str, what: str = "", faults: Faults | None = None
) -> Planted:
    return Planted(what or plant.__name__, plant, frozenset(breaks), faults)


SLOW_DISKS = replace(
    Faults.none(),
    agent_disk_slow=3.0,
    network=NetworkFaults(stream_breaks_per_message=0.03, slow=0.05),
)

BUGS = (
    planted(reply_before_commit, "acknowledged_is_durable"),
    planted(last_event_lost_on_restart, "what_is_restored_is_what_was_stored"),
    planted(
        leases_not_prolonged_on_restart,
        "leases_run_their_time",
        "what_is_kept_alive_does_not_expire",
    ),
    planted(idempotency_keys_forgotten, "one_grant_per_key"),
    planted(
        keep_alive_promised_while_the_lease_is_being_ended,
        "leases_run_their_time",
        faults=replace(
            Faults.none(), aggregator_disk_slow=2.0, network=replace(NO_FAULTS, slow=1.0)
        ),
    ),
    planted(wishes_do_not_see_each_other, "InvalidTransition", "grants_fit_the_last_report"),
    planted(foreign_processes_ignored, "grants_fit_the_last_report"),
    planted(cordons_of_nodes_ignored, "grants_fit_the_last_report"),
    planted(node_seen_as(problem=""), "grants_fit_the_last_report", what="driver_ignored"),
    planted(
        ages_ignored,
        "grants_fit_the_last_report",
        faults=replace(Faults.none(), agent_cut_off=4.0),
    ),
    planted(queue_overtaken, "nobody_overtakes_the_queue"),
    planted(
        drop_confirmed_without_commands_done,
        "what_has_ended_is_held_by_nobody",
        "every_gpu_can_be_had_again",
        "devices_were_looked_at_since_the_last_tenant",
    ),
    planted(released_without_waiting_for_the_node, "what_has_ended_is_held_by_nobody"),
    planted(processes_read_once_and_remembered, "devices_were_looked_at_since_the_last_tenant"),
    planted(
        holds_being_journaled_left_out_after_a_reconnect,
        "what_has_ended_is_held_by_nobody",
        faults=SLOW_DISKS,
    ),
    planted(journal_said_to_be_saved_before_it_is, "what_has_ended_is_held_by_nobody"),
    planted(
        frames_taken_in_twice,
        "frames_are_taken_in_once_and_in_order",
        "what_was_acknowledged_is_not_sent_again",
    ),
    planted(
        gpus_compared_with_what_is_applied_only,
        "acknowledged_frames_are_durable",
        faults=replace(
            Faults.none(),
            aggregator_disk_slow=1.0,
            mig_toggled=1.0,
            network=NetworkFaults(stream_breaks_per_message=0.08, slow=0.1),
        ),
    ),
    planted(samples_dated_by_their_arrival, "samples_are_not_older_than_they_claim"),
    planted(hangs_not_noticed, "nothing_goes_where_nothing_is_read"),
    planted(old_values_shown, "nothing_shown_is_old"),
    planted(
        facts_kept_that_were_not_told,
        "nothing_shown_is_old",
        faults=replace(Faults.none(), fact_silent=2.0),
    ),
    planted(
        gpu_that_comes_back_trusted_at_once,
        "processes_were_read_since_the_gpu_came_back",
        faults=replace(Faults.none(), gpu_lost=2.0, gpu_pulled=2.0),
    ),
    planted(missing_gpus_never_back, "everybody_is_up_and_heard", "nobody_overtakes_the_queue"),
    planted(missing_gpus_taken_for_others, "acknowledged_frames_are_durable"),
    planted(cordons_of_gpus_ignored, "grants_fit_the_last_report"),
    planted(assignments_ignored, "grants_fit_the_last_report"),
    planted(
        share_of_cordons_not_kept,
        "few_gpus_are_cordoned_for_their_health",
        faults=replace(Faults.none(), xid_told=2.0),
    ),
    planted(
        standstill_not_noticed,
        "what_is_kept_alive_does_not_expire",
        faults=replace(Faults.none(), aggregator_stalled=8.0),
    ),
)


def find(bug: Planted) -> tuple[int, SimulationFailed]:
    for seed in SEEDS:
        try:
            World(Scenario(seed, seconds=SECONDS, faults=bug.faults)).run()
        except SimulationFailed as failure:
            return seed, failure
    pytest.fail(f"no seed of {SEEDS} found it")


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.what)
def test_a_planted_bug_is_found(bug: Planted, monkeypatch: Patch) -> None:
    bug.plant(monkeypatch)
    seed, failure = find(bug)
    assert failure.invariant in bug.breaks, failure
    assert f"make simulate SEED={seed} " in str(failure)
