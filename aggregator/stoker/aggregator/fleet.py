"""The fleet as the aggregator knows it: events go in, readers get an immutable view.

Theory of operation. Durable tables (nodes, allocations, conditions of GPUs, and what follows from
them: claims, keys, queue) change only by durable events, in the order in which the ledger stored
them; the same events give the same tables, on every restart and in every replay. Volatile tables
(what nodes reported, when leases run out, who is on the line) live as long as the process.

A `draft` is a fleet laid over this one, on which a batch of decisions is tried out before it is
stored. Every table that `apply` touches is overlaid there; what only `note` touches is shared, and
a draft refuses `note`. So nothing that is tried on a draft shows in the fleet below.

A GPU is one thing wherever it is listed: claims and its condition are kept by its UUID, not by
node. A host that was renamed, or a card that was moved, is thereby listed twice and still granted
once, and its cordon goes with it.
"""

from collections import ChainMap
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, replace
from typing import assert_never

from stoker.aggregator import events as e
from stoker.aggregator import lives, reports
from stoker.aggregator.changelog import ChangeLog
from stoker.aggregator.conditions import ConditionEvent, Conditions
from stoker.aggregator.deadlines import Deadlines
from stoker.aggregator.draft import Overlay
from stoker.aggregator.lemons import Failure
from stoker.aggregator.lives import InvalidTransition
from stoker.aggregator.model import (
    Allocation,
    AllocationState,
    Claim,
    Command,
    Node,
    NodeFacts,
    NodeStatus,
)
from stoker.aggregator.tables import Names, add_name, drop_name
from stoker.aggregator.tenancy import allocations_on
from stoker.aggregator.verdicts import Condition
from stoker.aggregator.views import Claimed, FleetView, NodeView, view_node

# A sample is fresh for so many sampling intervals; after that nothing is placed on the node.
INTERVALS_FRESH = 3.0

_NEVER_CONNECTED = NodeStatus()

# Tables that `apply` touches, and that a draft therefore lays its own over.
_OVERLAID = (
    *("nodes", "allocations", "keys", "claims", "tenants", "homes", "waiting", "ended", "drains"),
    *("statuses", "expires", "wait_until", "attached", "detached_since"),
)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The durable tables whole, after the event with id `version`."""

    version: int
    nodes: tuple[Node, ...]
    allocations: tuple[Allocation, ...]
    conditions: tuple[Condition, ...] = ()
    failures: tuple[Failure, ...] = ()


class Fleet:
    """The state; see the module's theory of operation. Tables are for reading only."""

    def __init__(self) -> None:
        self.version = 0
        self.nodes: MutableMapping[str, Node] = {}
        self.allocations: MutableMapping[str, Allocation] = {}
        self.keys: MutableMapping[str, str] = {}  # idempotency key -> allocation id
        self.claims: MutableMapping[str, tuple[Claim, ...]] = {}  # by GPU UUID
        self.tenants: Names = {}  # node -> ids of what it holds or shall let go of
        self.homes: Names = {}  # GPU UUID -> nodes that list it
        self.waiting: MutableMapping[str, tuple[int, int]] = {}  # id -> (-priority, arrival)
        self.ended: MutableMapping[str, float] = {}  # id -> when, oldest first
        self.conditions = Conditions()
        self.drains: MutableMapping[str, float] = {}  # node -> when what it holds is released
        # Volatile, and touched by `apply`.
        self.statuses: MutableMapping[str, NodeStatus] = {}
        self.expires: MutableMapping[str, float] = {}  # of granted allocations
        self.wait_until: MutableMapping[str, float] = {}  # of waiting allocations
        self.attached: MutableMapping[str, int] = {}  # waiting id -> clients on the line
        # Waiting id -> since when nobody is on the line.
        self.detached_since: MutableMapping[str, float] = {}
        self.unreconciled: set[str] = set()  # nodes whose report about allocations changed
        self.capacity_version = 0  # rises when something that waits might fit now
        self.hosts_version = 0  # see FleetView
        # Volatile, and touched by `note` alone.
        # Node -> allocation id -> last command of this stream.
        self.sent: dict[str, Mapping[str, Command]] = {}
        self.fresh_until: dict[str, float] = {}
        self.leaving: set[str] = set()  # nodes that ask holders to be gone (see `leaving`)
        self._leases = Deadlines(self.expires)
        self._waits = Deadlines(self.wait_until)
        self._views: MutableMapping[str, NodeView] = {}
        # Nodes in order, so that views are the same every time -> the GPUs whose claims changed;
        # None: anything may be other than it was.
        self._dirty: dict[str, set[str] | None] = {}
        self._log = ChangeLog()
        self._is_draft = False
        self._is_recovered = True

    # --- reading

    def view(self, now: float) -> FleetView:
        """Return what placement decides on, as of `now` (Unix seconds)."""
        for name, claimed in self._dirty.items():
            self._views[name] = view_node(
                self.nodes[name],
                self.claims,
                self.status(name),
                self.conditions.table,
                [self.allocations[id_] for id_ in self.tenants.get(name, ())],
                None if claimed is None else Claimed(self._views[name], claimed),
            )
            self._log.add(name)
        self._dirty.clear()
        (self._log.parent or self._log).looked_at = now
        tables = (self.statuses, self.allocations, self._log)
        return FleetView(now, self._views, self.fresh_until, self.hosts_version, *tables)

    def status(self, node: str) -> NodeStatus:
        """Return what the node last reported; a node that never connected has an empty one."""
        return self.statuses.get(node, _NEVER_CONNECTED)

    def expires_at(self, allocation_id: str) -> float | None:
        """Return when the lease runs out without a further keep-alive; None unless granted."""
        return self.expires.get(allocation_id)

    def expired(self, now: float) -> list[str]:
        """Return the granted allocations whose lease has run out by `now`, earliest first."""
        return self._leases.due(now)

    def waited_out(self, now: float) -> list[str]:
        """Return the waiting allocations whose time to wait is over by `now`, earliest first."""
        return self._waits.due(now)

    def next_deadline(self) -> float | None:
        """Return the earliest time at which a lease runs out or a wait is over; None: neither."""
        times = [at for at in (self._leases.first(), self._waits.first()) if at is not None]
        return min(times, default=None)

    def queue(self) -> list[Allocation]:
        """Return the waiting allocations, highest priority first, then in order of arrival."""
        return [
            self.allocations[id_]
            for id_, _ in sorted(self.waiting.items(), key=lambda item: item[1])
        ]

    def snapshot(self) -> Snapshot:
        """Return the durable tables whole."""
        return Snapshot(
            self.version,
            tuple(self.nodes.values()),
            tuple(self.allocations.values()),
            tuple(self.conditions.table.values()),
            self.conditions.failures,
        )

    def draft(self) -> "Fleet":
        """Return a fleet laid over this one: durable events applied to it leave this one as it is.

        It is valid until the next event is applied here. What is due when is not known to it.
        """
        assert self._is_recovered, "decided on before Recovered, leases would end early"
        draft = Fleet()
        draft.version = self.version
        for table in _OVERLAID:
            setattr(draft, table, Overlay(getattr(self, table)))
        draft.conditions = self.conditions.draft()
        draft.unreconciled = set(self.unreconciled)
        draft.capacity_version = self.capacity_version
        draft.hosts_version = self.hosts_version
        draft.sent = self.sent
        draft.fresh_until, draft.leaving = self.fresh_until, self.leaving
        draft._leases = Deadlines(draft.expires)
        draft._waits = Deadlines(draft.wait_until)
        self.view(self._log.looked_at)
        draft._views = ChainMap({}, self._views)  # thousands of nodes take long to copy
        draft._log = ChangeLog(self._log)
        draft._is_draft = True
        return draft

    @staticmethod
    def restored(snapshot: Snapshot) -> "Fleet":
        """Return the fleet that `snapshot` was taken of; volatile tables start empty.

        Later events are applied next, then `Recovered` is noted; before that it takes no draft.
        """
        fleet = Fleet()
        fleet.version = snapshot.version
        fleet._is_recovered = False
        fleet.conditions.restore(snapshot.conditions, snapshot.failures)
        for node in snapshot.nodes:
            fleet.nodes[node.facts.name] = node
            fleet._list_gpus(node.facts.name, None, node.facts)
            fleet._note_drain(node)
        ended: list[Allocation] = []
        for allocation in snapshot.allocations:
            fleet._put(allocation)
            match allocation.state:
                case AllocationState.WAITING:
                    fleet._enter_queue(allocation)
                case AllocationState.GRANTED | AllocationState.RELEASING:
                    fleet._claim(allocation)
                case AllocationState.ENDED:
                    ended.append(allocation)
                case _:
                    assert_never(allocation.state)
        for allocation in sorted(ended, key=lambda allocation: allocation.version):
            fleet.ended[allocation.id] = allocation.ended_at or 0.0
        return fleet

    # --- the door

    def apply(self, event: e.DurableEvent, version: int) -> None:
        """Change the durable tables as `event` says; `version` is its id in the ledger, rising.

        Raises InvalidTransition, and changes nothing, for an event that cannot have happened.
        """
        assert version > self.version, f"event {version} after {self.version}: {event}"
        match event:
            case e.NodeRegistered(at, facts):
                self._register(at, facts, version)
            case e.NodeCordoned(_, name, reason, drain_at):
                self._cordon(self._known(name, event), reason, drain_at, version)
            case e.NodeUncordoned(_, name):
                self._cordon(self._known(name, event), None, None, version)
                self.capacity_version += 1
            case e.GpuHealthChanged() | e.GpuForgotten() | e.GpuCordoned() | e.GpuUncordoned():
                self._known(event.node, event)
                self._change_condition(event)
            case e.AllocationRequested():
                self._request(event, version)
            case e.AllocationGranted() | e.AllocationAdopted():
                self._grant(event, version)
            case e.AllocationReleasing():
                self._give_up(event, version)
            case e.AllocationEnded():
                self._end(event, version)
            case e.AllocationsForgotten():
                self._forget(event)
            case _:
                assert_never(event)
        self.version = version

    def note(self, event: e.VolatileEvent) -> None:
        """Change the volatile tables as `event` says.

        Reports of a stream that was replaced, and frames that were taken in before, change nothing.
        """
        assert not self._is_draft, f"a draft takes durable events only: {event}"
        match event:
            case e.AgentConnected():
                self._connect(event)
            case e.AgentDisconnected(_, node, session, reason):
                if self.status(node).session == session:
                    self.statuses[node] = replace(
                        self.statuses[node], session=0, disconnected_reason=reason
                    )
                    self._dirty[node] = None
            case e.FrameArrived():
                status = self.status(event.node)
                if status.session == event.session and event.frame.sequence > status.acked_sequence:
                    self._take_frame(event, status)
            case e.KeptAlive(at, id_):
                if id_ in self.expires:
                    self._lease(id_, at)
            case e.Recovered(at):
                self._recover(at)
            case e.WaiterAttached(_, id_):
                if id_ in self.waiting:
                    self.attached[id_] = self.attached.get(id_, 0) + 1
                    self.detached_since.pop(id_, None)
                    self.capacity_version += 1
            case e.WaiterDetached(at, id_):
                if self.attached.get(id_, 0) > 1:
                    self.attached[id_] -= 1
                elif self.attached.pop(id_, 0):
                    self.detached_since[id_] = at
            case e.CommandsSent():
                self._remember_commands(event)
            case _:
                assert_never(event)

    # --- helpers of apply: each checks first, then changes

    def _known(self, name: str, event: e.DurableEvent) -> Node:
        node = self.nodes.get(name)
        if node is None:
            raise InvalidTransition(f"{event}: there is no node {name}")
        return node

    def _require(self, id_: str, to: AllocationState, event: e.DurableEvent) -> Allocation | None:
        before = self.allocations.get(id_)
        lives.require(before, to, event)
        return before

    def _put(self, allocation: Allocation) -> None:
        self.allocations[allocation.id] = allocation
        if allocation.idempotency_key:
            self.keys[allocation.idempotency_key] = allocation.id

    def _register(self, at: float, facts: NodeFacts, version: int) -> None:
        known = self.nodes.get(facts.name)
        node = known or Node(facts, registered_at=at, version=version)
        self.nodes[facts.name] = replace(node, facts=facts, version=version)
        self._list_gpus(facts.name, known.facts if known else None, facts)
        self.unreconciled.add(facts.name)
        self.capacity_version += 1
        self.hosts_version += 1
        self.conditions.version += 1  # the share that may be cordoned goes by how many there are

    def _cordon(self, node: Node, reason: str | None, drain_at: float | None, version: int) -> None:
        after = replace(node, cordoned=reason, drain_at=drain_at, version=version)
        self.nodes[node.facts.name] = after
        self._note_drain(after)
        self._dirty[node.facts.name] = None

    def _note_drain(self, node: Node) -> None:
        if node.drain_at is not None:
            self.drains[node.facts.name] = node.drain_at
        else:
            self.drains.pop(node.facts.name, None)

    def _change_condition(self, event: ConditionEvent) -> None:
        before = self.conditions.cordon_of(event.uuid)
        self.conditions.apply(event)
        if self.conditions.cordon_of(event.uuid) != before:
            self._dirty.update(dict.fromkeys(self.homes.get(event.uuid, ())))
            self.capacity_version += 1
            self.hosts_version += 1  # nobody waits for a GPU that is cordoned

    def _list_gpus(self, name: str, before: NodeFacts | None, facts: NodeFacts) -> None:
        listed = {gpu.uuid for gpu in before.gpus} if before else set[str]()
        lists = {gpu.uuid for gpu in facts.gpus}
        for uuid in lists - listed:
            add_name(self.homes, uuid, name)
        for uuid in listed - lists:
            drop_name(self.homes, uuid, name)
        status = self.statuses.get(name)
        if lists - listed and status is not None:
            self.statuses[name] = reports.after_listing(status, lists - listed)
        self._dirty[name] = None

    def _request(self, event: e.AllocationRequested, version: int) -> None:
        self._require(event.id, AllocationState.WAITING, event)
        waiting = lives.requested(event, version)
        self._put(waiting)
        self._enter_queue(waiting)
        self.detached_since[event.id] = event.at

    def _enter_queue(self, waiting: Allocation) -> None:
        # It does not change while it waits, so its version is when it arrived.
        self.waiting[waiting.id] = (-waiting.request.priority, waiting.version)
        if waiting.wait_until is not None:
            self.wait_until[waiting.id] = waiting.wait_until
            self._waits.add(waiting.id)

    def _leave_queue(self, id_: str) -> None:
        del self.waiting[id_]
        self.wait_until.pop(id_, None)
        self.attached.pop(id_, None)
        self.detached_since.pop(id_, None)
        self.capacity_version += 1  # those behind it may go now

    def _grant(self, event: e.AllocationGranted | e.AllocationAdopted, version: int) -> None:
        before = self._require(event.id, AllocationState.GRANTED, event)
        for placement in event.placements:
            self._known(placement.node, event)
        lives.require_free(event, self.claims)
        granted = lives.granted(event, version)
        if before is not None:
            self._leave_queue(event.id)
        self._put(granted)
        self._claim(granted)
        self._lease(granted.id, event.at)

    def _give_up(self, event: e.AllocationReleasing, version: int) -> None:
        before = self._require(event.id, AllocationState.RELEASING, event)
        assert before is not None
        self.allocations[event.id] = lives.given_up(before, event, version)
        self.expires.pop(event.id, None)
        self.unreconciled.update(before.nodes)

    def _end(self, event: e.AllocationEnded, version: int) -> None:
        before = self._require(event.id, AllocationState.ENDED, event)
        assert before is not None
        if before.state is AllocationState.WAITING:
            self._leave_queue(event.id)
        else:
            self._unclaim(before)
        self.allocations[event.id] = lives.ended(before, event, version)
        self.ended[event.id] = event.at

    def _forget(self, event: e.AllocationsForgotten) -> None:
        for id_ in event.ids:
            if id_ not in self.ended:
                raise InvalidTransition(
                    f"{event}: {id_} has not ended: {self.allocations.get(id_)}"
                )
        for id_ in event.ids:
            del self.ended[id_]
            key = self.allocations.pop(id_).idempotency_key
            if key:
                del self.keys[key]

    def _claim(self, allocation: Allocation) -> None:
        for device in allocation.devices:
            claim = lives.claim_of(allocation.id, device)
            others = self.claims.get(device.uuid, ())
            self.claims[device.uuid] = tuple(
                sorted((*others, claim), key=lambda one: one.allocation_id)
            )
            self._claims_changed(device.uuid)
        for node in allocation.nodes:
            add_name(self.tenants, node, allocation.id)
            self._dirty.setdefault(node, set())

    def _unclaim(self, allocation: Allocation) -> None:
        for device in allocation.devices:
            claims = self.claims.pop(device.uuid, ())
            others = tuple(claim for claim in claims if claim.allocation_id != allocation.id)
            if others:
                self.claims[device.uuid] = others
            self._claims_changed(device.uuid)
        for node in allocation.nodes:
            drop_name(self.tenants, node, allocation.id)
            self._dirty.setdefault(node, set())
        self.capacity_version += 1

    def _claims_changed(self, uuid: str) -> None:
        for node in self.homes.get(uuid, ()):
            claimed = self._dirty.setdefault(node, set())
            if claimed is not None:
                claimed.add(uuid)

    def _lease(self, id_: str, since: float) -> None:
        """Let the lease run for its TTL from `since`."""
        expires_at = since + self.allocations[id_].request.ttl_seconds
        before = self.expires.get(id_)
        self.expires[id_] = expires_at
        if before is None or expires_at < before:  # the clock may have been set back
            self._leases.add(id_)

    # --- helpers of note

    def _recover(self, at: float) -> None:
        for allocation in self.allocations.values():
            if allocation.state is AllocationState.GRANTED:
                self._lease(allocation.id, at)
            elif allocation.state is AllocationState.WAITING and allocation.id not in self.attached:
                self.detached_since[allocation.id] = at
        for name, status in self.statuses.items():
            if status.health_at is not None:  # what was told meanwhile has not been read yet
                self.statuses[name] = replace(status, health_at=at)
        self.conditions.version += 1
        self._is_recovered = True

    def _connect(self, event: e.AgentConnected) -> None:
        self.statuses[event.node] = reports.after_connect(self.status(event.node), event)
        self.sent[event.node] = {}
        self.leaving.discard(event.node)
        self.unreconciled.add(event.node)
        self._dirty[event.node] = None

    def _take_frame(self, event: e.FrameArrived, before: NodeStatus) -> None:
        name = event.node
        after = self.statuses[name] = reports.after_frame(before, event, self.tenants.get(name, ()))
        if reports.tells_of_allocations(before, event.frame) or event.frame.health is not None:
            self.unreconciled.add(name)
        if after.health_at != before.health_at:
            self.conditions.version += 1
        if after.mig is not before.mig:
            self._dirty[name] = None
            (self.leaving.add if reports.asks_to_leave(after) else self.leaving.discard)(name)
        if reports.changes_placement(before, after):
            self._dirty[name] = None
            self.capacity_version += 1
            self.hosts_version += 1  # what the driver keeps for itself may be another amount
        if after.last_sample_at is not None and after.last_sample_at != before.last_sample_at:
            interval = self.nodes[name].facts.interval_seconds
            fresh_until = after.last_sample_at + INTERVALS_FRESH * interval
            if self.fresh_until.get(name, 0.0) < max(event.at, self._log.looked_at) <= fresh_until:
                self.capacity_version += 1
                self._log.add(name)
            self.fresh_until[name] = fresh_until

    def _remember_commands(self, event: e.CommandsSent) -> None:
        status = self.status(event.node)
        if status.session != event.session:
            return
        # What is over is not needed any more: without this a long stream would be remembered whole.
        live = {*allocations_on(self, event.node), *(status.held or ())}
        sent = {id_: c for id_, c in self.sent[event.node].items() if id_ in live}
        self.sent[event.node] = {**sent, **{c.allocation_id: c for c in event.commands}}
