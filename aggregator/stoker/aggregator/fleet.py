"""The fleet as the aggregator knows it: events go in, readers get an immutable view.

Theory of operation. Durable tables (nodes, allocations, and what follows from them: claims, keys,
queue) change only by durable events, in the order in which the ledger stored them; the same events
give the same tables, on every restart and in every replay. Volatile tables (what nodes reported,
when leases run out, who is on the line) live as long as the process.

A `draft` is a fleet laid over this one, on which a batch of decisions is tried out before it is
stored. Every table that `apply` touches is overlaid there; what only `note` touches is shared, and
a draft refuses `note`. So nothing that is tried on a draft shows in the fleet below.

A GPU is one thing wherever it is listed: claims are kept by its UUID, not by node. A host that was
renamed, or a card that was moved, is thereby listed twice and still granted once.
"""

from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, replace
from typing import assert_never

from stoker.aggregator import events as e
from stoker.aggregator import reports
from stoker.aggregator.deadlines import Deadlines
from stoker.aggregator.draft import Overlay
from stoker.aggregator.model import (
    TRANSITIONS,
    Allocation,
    AllocationState,
    Claim,
    Command,
    Node,
    NodeFacts,
    NodeStatus,
)
from stoker.aggregator.tables import Names, add_name, drop_name
from stoker.aggregator.views import FleetView, NodeView, view_node

# A sample is fresh for so many sampling intervals; after that nothing is placed on the node.
INTERVALS_FRESH = 3.0

_NEVER_CONNECTED = NodeStatus()


class InvalidTransition(Exception):
    """A durable event that the tables do not allow: a bug, told with the whole story."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The durable tables whole, after the event with id `version`."""

    version: int
    nodes: tuple[Node, ...]
    allocations: tuple[Allocation, ...]


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
        self._leases = Deadlines(self.expires)
        self._waits = Deadlines(self.wait_until)
        self._views: dict[str, NodeView] = {}
        self._dirty: dict[str, None] = {}  # nodes in order, so that views are the same every time
        self._is_draft = False
        self._is_recovered = True

    # --- reading

    def view(self, now: float) -> FleetView:
        """Return what placement decides on, as of `now` (Unix seconds)."""
        for name in self._dirty:
            self._views[name] = view_node(self.nodes[name], self.claims, self.status(name))
        self._dirty.clear()
        return FleetView(now, self._views, self.fresh_until, self.hosts_version)

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

    def allocations_on(self, node: str) -> dict[str, Allocation]:
        """Return by id what the node shall hold or let go of: granted and releasing.

        Also what it shall let go of that was granted under a former name of the node.
        """
        own = {id_: self.allocations[id_] for id_ in self.tenants.get(node, ())}
        former = self.granted_under_former_name(node)
        return own | {a.id: a for a in former if a.state is AllocationState.RELEASING}

    def granted_under_former_name(self, node: str) -> list[Allocation]:
        """Return what is granted on GPUs of the node under another name that its agent had.

        The journal that would hold them is this agent's, so its report speaks for them.
        """
        agent = self.nodes[node].facts
        found: dict[str, Allocation] = {}
        for claim in (c for gpu in agent.gpus for c in self.claims.get(gpu.uuid, ())):
            allocation = self.allocations[claim.allocation_id]
            former = self.nodes[allocation.node].facts
            is_same_agent = former.name != node and former.incarnation == agent.incarnation
            if is_same_agent and self.status(former.name).session == 0:
                found[allocation.id] = allocation
        return list(found.values())

    def snapshot(self) -> Snapshot:
        """Return the durable tables whole."""
        return Snapshot(self.version, tuple(self.nodes.values()), tuple(self.allocations.values()))

    def draft(self) -> "Fleet":
        """Return a fleet laid over this one: durable events applied to it leave this one as it is.

        It is valid until the next event is applied here. What is due when is not known to it.
        """
        assert self._is_recovered, "decided on before Recovered, leases would end early"
        draft = Fleet()
        draft.version = self.version
        draft.nodes = Overlay(self.nodes)
        draft.allocations = Overlay(self.allocations)
        draft.keys = Overlay(self.keys)
        draft.claims = Overlay(self.claims)
        draft.tenants = Overlay(self.tenants)
        draft.homes = Overlay(self.homes)
        draft.waiting = Overlay(self.waiting)
        draft.ended = Overlay(self.ended)
        draft.statuses = Overlay(self.statuses)
        draft.expires = Overlay(self.expires)
        draft.wait_until = Overlay(self.wait_until)
        draft.attached = Overlay(self.attached)
        draft.detached_since = Overlay(self.detached_since)
        draft.unreconciled = set(self.unreconciled)
        draft.capacity_version = self.capacity_version
        draft.hosts_version = self.hosts_version
        draft.sent = self.sent
        draft.fresh_until = self.fresh_until
        draft._leases = Deadlines(draft.expires)
        draft._waits = Deadlines(draft.wait_until)
        draft._views = dict(self.view(0.0).nodes)
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
        for node in snapshot.nodes:
            fleet.nodes[node.facts.name] = node
            fleet._list_gpus(node.facts.name, None, node.facts)
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
            case e.NodeCordoned(_, name, reason):
                self._cordon(self._known(name, event), reason, version)
            case e.NodeUncordoned(_, name):
                self._cordon(self._known(name, event), None, version)
                self.capacity_version += 1
            case e.AllocationRequested():
                self._request(event, version)
            case e.AllocationGranted():
                self._grant(event, event.requested_at, event.idempotency_key, version)
            case e.AllocationAdopted():
                self._grant(event, event.at, "", version)
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
        state = before.state if before else None
        if type(event).__name__ not in TRANSITIONS[state].get(to, ()):
            raise InvalidTransition(f"{event}: {state} cannot become {to}; it was {before}")
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

    def _cordon(self, node: Node, reason: str | None, version: int) -> None:
        self.nodes[node.facts.name] = replace(node, cordoned=reason, version=version)
        self._dirty[node.facts.name] = None

    def _list_gpus(self, name: str, before: NodeFacts | None, facts: NodeFacts) -> None:
        listed = {gpu.uuid for gpu in before.gpus} if before else set[str]()
        lists = {gpu.uuid for gpu in facts.gpus}
        for uuid in lists - listed:
            add_name(self.homes, uuid, name)
        for uuid in listed - lists:
            drop_name(self.homes, uuid, name)
        status = self.statuses.get(name)
        if lists - listed and status is not None and status.processes is not None:
            # The last process table was read before these GPUs were there.
            unread = (*status.processes.unread_gpu_uuids, *sorted(lists - listed))
            table = replace(status.processes, unread_gpu_uuids=unread)
            self.statuses[name] = replace(status, processes=table)
        self._dirty[name] = None

    def _request(self, event: e.AllocationRequested, version: int) -> None:
        self._require(event.id, AllocationState.WAITING, event)
        waiting = Allocation(
            id=event.id,
            state=AllocationState.WAITING,
            request=event.request,
            requested_at=event.at,
            version=version,
            idempotency_key=event.idempotency_key,
            wait_until=event.wait_until,
        )
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

    def _grant(
        self,
        event: e.AllocationGranted | e.AllocationAdopted,
        requested_at: float,
        idempotency_key: str,
        version: int,
    ) -> None:
        before = self._require(event.id, AllocationState.GRANTED, event)
        self._known(event.node, event)
        if not 0 < len({device.uuid for device in event.devices}) == len(event.devices):
            raise InvalidTransition(f"{event}: no devices, or one twice")
        for device in event.devices:
            others = self.claims.get(device.uuid, ())
            if others and (device.exclusive or any(c.memory_bytes is None for c in others)):
                raise InvalidTransition(f"{event}: GPU {device.uuid} is taken by {others}")
        granted = Allocation(
            id=event.id,
            state=AllocationState.GRANTED,
            request=event.request,
            requested_at=requested_at,
            version=version,
            idempotency_key=idempotency_key,
            node=event.node,
            devices=event.devices,
            granted_at=event.at,
        )
        if before is not None:
            self._leave_queue(event.id)
        self._put(granted)
        self._claim(granted)
        self._lease(granted.id, event.at)

    def _give_up(self, event: e.AllocationReleasing, version: int) -> None:
        before = self._require(event.id, AllocationState.RELEASING, event)
        assert before is not None
        self.allocations[event.id] = replace(
            before, state=AllocationState.RELEASING, reason=event.reason, version=version
        )
        self.expires.pop(event.id, None)
        self.unreconciled.add(before.node)

    def _end(self, event: e.AllocationEnded, version: int) -> None:
        before = self._require(event.id, AllocationState.ENDED, event)
        assert before is not None
        if before.state is AllocationState.WAITING:
            self._leave_queue(event.id)
        else:
            self._unclaim(before)
        self.allocations[event.id] = replace(
            before,
            state=AllocationState.ENDED,
            ended_at=event.at,
            reason=event.reason,
            version=version,
            wait_until=None,
        )
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
            claim = Claim(allocation.id, None if device.exclusive else device.memory_bytes)
            others = self.claims.get(device.uuid, ())
            self.claims[device.uuid] = tuple(
                sorted((*others, claim), key=lambda one: one.allocation_id)
            )
            self._dirty.update(dict.fromkeys(self.homes.get(device.uuid, ())))
        add_name(self.tenants, allocation.node, allocation.id)

    def _unclaim(self, allocation: Allocation) -> None:
        for device in allocation.devices:
            claims = self.claims.pop(device.uuid)
            others = tuple(claim for claim in claims if claim.allocation_id != allocation.id)
            if others:
                self.claims[device.uuid] = others
            self._dirty.update(dict.fromkeys(self.homes.get(device.uuid, ())))
        drop_name(self.tenants, allocation.node, allocation.id)
        self.capacity_version += 1

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
        self._is_recovered = True

    def _connect(self, event: e.AgentConnected) -> None:
        self.statuses[event.node] = reports.after_connect(self.status(event.node), event)
        self.sent[event.node] = {}
        self.unreconciled.add(event.node)
        self._dirty[event.node] = None

    def _take_frame(self, event: e.FrameArrived, before: NodeStatus) -> None:
        name = event.node
        after = self.statuses[name] = reports.after_frame(before, event, self.tenants.get(name, ()))
        if reports.tells_of_allocations(before, event.frame):
            self.unreconciled.add(name)
        if reports.changes_placement(before, after):
            self._dirty[name] = None
            self.capacity_version += 1
            self.hosts_version += 1  # what the driver keeps for itself may be another amount
        if after.last_sample_at is not None and after.last_sample_at != before.last_sample_at:
            interval = self.nodes[name].facts.interval_seconds
            fresh_until = after.last_sample_at + INTERVALS_FRESH * interval
            if self.fresh_until.get(name, 0.0) < event.at <= fresh_until:
                self.capacity_version += 1
            self.fresh_until[name] = fresh_until

    def _remember_commands(self, event: e.CommandsSent) -> None:
        status = self.status(event.node)
        if status.session != event.session:
            return
        # What is over is not needed any more: without this a long stream would be remembered whole.
        live = {*self.allocations_on(event.node), *(status.held or ())}
        sent = {id_: c for id_, c in self.sent[event.node].items() if id_ in live}
        self.sent[event.node] = {**sent, **{c.allocation_id: c for c in event.commands}}
