"""What outsiders saw of a simulated world: what was stored, promised and believed, for the
invariants to compare.

The processes call it at the moments that matter, and the checks of those moments (`moments`) are
made here; what has to hold at any time stands in `invariants`.
"""

from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf

from stoker.aggregator import events as e
from stoker.aggregator.fleet import Fleet
from stoker.aggregator.model import Allocation, Device
from stoker.aggregator.offers import KEY_PREFIX
from stoker.aggregator.sessions import OFFSET_WINDOW_SECONDS
from stoker.testing import moments, moments_of_frames
from stoker.testing.aggregator_store import LedgerFile
from stoker.testing.machine import DRIFT_RATIO_MAX, Machine
from stoker.testing.moments import Decided, Promise
from stoker.testing.moments_of_frames import Told
from stoker.v1 import agent_pb2, fleet_pb2


@dataclass(frozen=True, slots=True)
class Belief:
    """That a client may use these devices until then (virtual seconds)."""

    client: str
    id: str
    devices: tuple[Device, ...]
    until: float


# How the reason begins for which an allocation ends whose GPU is to be partitioned anew.
EVICTED = "drained: GPU "
NO_GPUS = Told(frozenset(), 0)


@dataclass(slots=True)
class Conversation:
    """What was said on the newest stream of a node, as far as checks need it."""

    boot_id: str
    travels: deque[tuple[float, float]]  # of the last messages: when they were taken in, how long
    error_seconds: float  # by how much the time of its last samples may be wrong
    told: Told  # by the last inventory on it

    def fastest(self, now: float, travel_seconds: float) -> float:
        """Take in one more message; return the time that the fastest of the last minute took,
        with how far the clocks may have drifted apart since.
        """
        self.travels.append((now, travel_seconds))
        while self.travels[0][0] < now - OFFSET_WINDOW_SECONDS:
            self.travels.popleft()
        return min(travel + DRIFT_RATIO_MAX * (now - at) for at, travel in self.travels)


@dataclass(slots=True)
class Heard:
    """The frames of one node, over all streams."""

    life: int = 0  # of the aggregator that took them in
    taken: int = 0  # the highest number in that life
    acked: int = 0  # the highest number that the agent heard to be taken in, in all lives
    acked_at: float = 0.0  # when it heard that
    conversation: Conversation = field(
        default_factory=lambda: Conversation("", deque(), 0.0, NO_GPUS)
    )


class Witness:
    """Sees everything, changes nothing."""

    def __init__(self, machines: Mapping[str, Machine]) -> None:
        self.counts: Counter[str] = Counter()  # how much of what happened
        self.promises: dict[str, Promise] = {}  # the last one per allocation, until it is over
        self.beliefs: dict[str, Belief] = {}  # by allocation
        self.version = 0  # rises with every change of the two above
        # From when on who uses a GPU may be made to go: the earliest deadline that was ever set.
        self.evicted_from: dict[str, float] = {}
        self.clock_error_seconds = inf  # by how much deadlines may be understood wrongly
        self._machines = machines
        self._durable: dict[str, Promise] = {}  # granted by the store; `until` means nothing there
        self._durable_gpus: dict[str, frozenset[str]] = {}  # by node, by the store
        self._kept_alive_at: dict[str, float] = {}  # when a keep-alive came last, by allocation
        self._keys: dict[str, str] = {}  # idempotency key -> allocation, by the store
        self._releases_asked: set[str] = set()
        self._given_up: set[str] = set()  # allocations that the store says are given up
        self._given_up_at: dict[str, float] = {}  # allocation -> when that was durable
        self._refused_by_node: set[str] = set()
        # Promised, and gone with a ledger that was lost: the answer may be on its way still.
        self._void: set[str] = set()
        self._vacated_at: dict[str, float] = {}  # GPU UUID -> when its last tenancy was given up
        self._groups_seen = 0
        self._events_seen = 0
        self._readings: dict[tuple[str, float], float] = {}  # node, its wall clock -> true time
        self._heard: dict[tuple[str, str], Heard] = {}  # by node and incarnation
        self._latest: dict[str, Heard] = {}  # by node

    # --- the store

    def stored(self, file: LedgerFile, now: float) -> None:
        """Take in all events that are durable by now."""
        if len(file.disk.durable) == self._groups_seen:
            return
        self._groups_seen = len(file.disk.durable)
        events = file.events
        for event in events[self._events_seen :]:
            self._take(event, now)
        self._events_seen = len(events)

    def _take(self, event: e.DurableEvent, now: float) -> None:
        self.counts[type(event).__name__] += 1
        match event:
            case e.AllocationGranted():
                moments.one_grant_per_key(event, self._keys)
                self.counts["granted from the queue"] += event.requested_at != event.at
            case e.AllocationReleasing():
                self._give_up(event, now)
            case e.AllocationEnded():
                self._vacated_at.update(self._vacated(event))
            case _:
                pass
        self._remember(event)

    def _remember(self, event: e.DurableEvent) -> None:
        match event:
            case e.AllocationGranted() | e.AllocationAdopted():
                self._durable[event.id] = Promise(event.id, event.placements, 0.0)
                self._void.discard(event.id)
                if isinstance(event, e.AllocationGranted) and event.idempotency_key:
                    self._keys[event.idempotency_key] = event.id
            case e.AllocationReleasing():
                self._given_up.add(event.id)
            case e.NodeRegistered(_, facts):
                self._durable_gpus[facts.name] = frozenset(
                    _named(gpu.uuid, in_mig_mode=bool(gpu.mig_enabled)) for gpu in facts.gpus
                )
            case _:
                pass

    def _give_up(self, event: e.AllocationReleasing, now: float) -> None:
        promise = self.promises.pop(event.id, None)
        was_released = event.id in self._releases_asked
        is_evicted = (
            promise is not None
            and event.reason.startswith(EVICTED)
            and any(
                self.evicted_from.get(device.uuid, inf) <= now + self.clock_error_seconds
                for each in promise.placements
                for device in each.devices
            )
        )
        moments.leases_run_their_time(event, promise, was_released or is_evicted, now)
        self.version += 1
        self._given_up_at[event.id] = now
        if is_evicted:  # its client may not have heard it yet, as below
            self.counts["evicted"] += 1
            self._refused_by_node.add(event.id)
            self.beliefs.pop(event.id, None)
        if event.reason.startswith("refused by node"):
            # The one way in which a client may believe for a while in what another has already:
            # its node could not take the allocation, and the client has not heard that yet.
            self.counts["refused by node"] += 1
            self._refused_by_node.add(event.id)
            self.beliefs.pop(event.id, None)
        elif not was_released and not is_evicted:
            self.counts["expired"] += 1

    def lost_ledger(self, file: LedgerFile, held: set[str]) -> None:
        """Take in that the ledger is what `file` has now: what was promised is void.

        Of what clients believe only that stays which their nodes `held`: it will be adopted.
        """
        self._void |= self.promises.keys()
        self.promises.clear()
        self.beliefs = {id_: each for id_, each in self.beliefs.items() if id_ in held}
        self._durable.clear()
        self._durable_gpus.clear()
        self._keys.clear()
        self._given_up.clear()
        self._given_up_at.clear()
        self._groups_seen = len(file.disk.durable)
        self._events_seen = len(file.events)
        for event in file.events:
            self._remember(event)
        self.version += 1

    def recovered(self, fleet: Fleet, replayed: Fleet) -> None:
        """Take in that the aggregator has started anew."""
        self.counts["aggregator starts"] += 1
        moments.what_is_restored_is_what_was_stored(fleet, replayed)

    # --- decisions and answers

    def decided(
        self, fleet: Fleet, events: Sequence[e.DurableEvent], now: float, wall: float
    ) -> None:
        """Look at a round's events before they are stored."""
        for event in events:
            known = fleet.allocations.get(getattr(event, "id", ""))
            if isinstance(event, e.AllocationReleasing) and known is not None:
                kept_at = self._kept_alive_at.get(event.id)
                moments.what_is_kept_alive_does_not_expire(
                    event, known.request.ttl_seconds, kept_at, now
                )
        if not any(isinstance(event, e.AllocationGranted) for event in events):
            return
        decided = Decided.of(fleet, wall)
        vacated_at = dict(self._vacated_at)
        for number, event in enumerate(events, 1):
            if isinstance(event, e.AllocationGranted) and not _is_held(fleet, event):
                moments.a_gang_is_whole(event)
                for part in moments.parts(event):
                    self._look_at(decided, part, vacated_at, now)
                    # For which of those that wait a move makes room, only the aggregator knows.
                    if not event.idempotency_key.startswith(KEY_PREFIX):
                        moments.nobody_overtakes_the_queue(decided, part)
            elif isinstance(event, e.AllocationEnded):
                vacated_at.update(self._vacated(event))
            decided.take(event, number)

    def _vacated(self, event: e.AllocationEnded) -> dict[str, float]:
        """Return when the GPUs that become free were given up; none for a request that waited."""
        given_up_at = self._given_up_at.get(event.id)
        if given_up_at is None:
            return {}
        promise = self._durable[event.id]
        return {d.uuid: given_up_at for each in promise.placements for d in each.devices}

    def _look_at(
        self,
        decided: Decided,
        grant: moments.Part,
        vacated_at: Mapping[str, float],
        now: float,
    ) -> None:
        moments.grants_fit_the_last_report(decided, grant)
        status = decided.fleet.status(grant.node)
        table = status.processes
        assert table is not None  # checked just now
        began = self._readings.get((grant.node, table.started_at))
        moments.devices_were_looked_at_since_the_last_tenant(grant, status, vacated_at, began)
        cards = self._machines[grant.node].cards
        moments.processes_were_read_since_the_gpu_came_back(
            grant, status.samples or {}, cards.found_at, began
        )
        interval_seconds = decided.fleet.nodes[grant.node].facts.interval_seconds
        travel_seconds = self._latest[grant.node].conversation.error_seconds
        moments.placement_uses_samples_that_are_young(
            grant, status.samples or {}, interval_seconds, now, travel_seconds
        )
        since = {device.uuid: cards.out_since(device.uuid, now) for device in grant.devices}
        out_since = {uuid: at for uuid, at in since.items() if at is not None}
        moments.nothing_goes_where_nothing_is_read(
            grant, out_since, interval_seconds, now, travel_seconds
        )

    def promised(self, allocation: Allocation, until: float) -> None:
        """Take in that a client is answered that it has an allocation until then, or longer."""
        self.counts["acknowledged"] += 1
        promise = moments.promise_of(allocation, until)
        is_over = promise.id in self._given_up
        moments.acknowledged_is_durable(promise, self._durable, is_over)
        self.promises[promise.id] = promise
        self.version += 1

    def kept_alive(self, id_: str, now: float) -> None:
        """Take in that a keep-alive has come to the aggregator's host, read or not."""
        self._kept_alive_at[id_] = now

    def keep_alive_lost(self, id_: str) -> None:
        """Take in that the line of a keep-alive broke before it was read."""
        self._kept_alive_at.pop(id_, None)

    def shown(self, message: fleet_pb2.Node, now: float) -> None:
        """Take in what a client is shown of a node."""
        heard = self._latest.get(message.name)
        if heard is None:
            return
        cards = self._machines[message.name].cards
        values: dict[str, float] = {}
        for gpu in message.gpus:
            if gpu.HasField("energy_joules"):
                values[gpu.uuid] = gpu.energy_joules
                self.counts["values shown"] += 1
            told = {field.name for field, _ in gpu.ListFields()}
            for fact, since in cards.silent.get(gpu.uuid, {}).items():
                if fact in told:
                    values[f"{gpu.uuid} {fact}"] = since
        for missing in message.missing_gpus:
            self.counts[f"missing: {missing.error_kind}"] += 1
        moments_of_frames.nothing_shown_is_old(
            message.name,
            values,
            message.interval_seconds,
            now,
            heard.conversation.error_seconds,
        )

    def release_asked(self, id_: str) -> None:
        """Take in that a client gives an allocation back."""
        self._releases_asked.add(id_)

    def believes(self, client: str, id_: str, devices: tuple[Device, ...], until: float) -> None:
        """Take in that a client has heard that it has these devices."""
        if id_ in self._refused_by_node or id_ in self._void:
            return  # the news that it is over is on its way; see `_give_up` and `lost_ledger`
        self.beliefs[id_] = Belief(client, id_, devices, until)
        self.version += 1

    def believes_no_more(self, id_: str) -> None:
        """Take in that a client has given up an allocation in its mind."""
        self.beliefs.pop(id_, None)
        self.version += 1

    # --- nodes

    def reading_begun(self, node: str, wall: float, now: float) -> None:
        """Take in that a node reads its processes, and what its clock shows then."""
        self._readings[node, wall] = now

    def greeted(self, hello: agent_pb2.Hello, life: int, now: float) -> None:
        """Take in that the aggregator, in that life of its, begins to take an agent's frames in."""
        heard = self._heard.setdefault((hello.node, hello.incarnation), Heard())
        if heard.life != life:
            heard.life, heard.taken = life, 0
        machine = self._machines[hello.node]
        travel = now - machine.true_time(hello.boot_id, hello.monotonic_seconds)
        told = _told_by(hello, Told(self._durable_gpus.get(hello.node, frozenset()), 0))
        # The samples of its last stream are shown until this one brings others.
        last = self._latest.get(hello.node)
        error = max(travel, last.conversation.error_seconds if last else 0.0)
        heard.conversation = Conversation(hello.boot_id, deque([(now, travel)]), error, told)
        self._latest[hello.node] = heard

    def heard_ack(self, node: str, sequence: int, now: float) -> None:
        """Take in up to which frame an agent has heard that it was taken in."""
        heard = self._latest[node]
        if sequence > heard.acked:
            heard.acked, heard.acked_at = sequence, now

    def took_frame(
        self,
        event: e.FrameArrived,
        told: agent_pb2.Frame,
        taken: int,
        now: float,
        virtual: Callable[[float], float],
    ) -> None:
        """Take in that the aggregator takes a frame in; by its tables it has up to `taken`."""
        self.counts["frames"] += 1
        node, frame = event.node, event.frame
        heard = self._latest[node]
        moments_of_frames.what_is_taken_in_shows(node, frame.sequence, taken)
        boot_id = heard.conversation.boot_id
        made_at = self._machines[node].true_time(boot_id, frame.monotonic_seconds)
        moments_of_frames.frames_are_taken_in_once_and_in_order(node, frame.sequence, heard.taken)
        moments_of_frames.what_was_acknowledged_is_not_sent_again(
            node, frame.sequence, made_at, heard.acked, heard.acked_at
        )
        heard.taken = frame.sequence
        said = heard.conversation
        travel_seconds = said.fastest(now, now - made_at)
        if frame.samples is not None:
            said.error_seconds = travel_seconds
        said.told = _told_by(told, said.told)
        moments_of_frames.samples_are_not_older_than_they_claim(
            node, frame.samples or {}, virtual, now, travel_seconds
        )

    def acknowledged(self, node: str, sequence: int, reading: agent_pb2.Frame) -> None:
        """Take in that the aggregator acknowledges frames, while it reads that one."""
        told = self._latest[node].conversation.told
        known = self._durable_gpus.get(node, frozenset())
        if _told_by(reading, told) != told:
            return  # the ledger may be ahead already
        moments_of_frames.acknowledged_frames_are_durable(node, sequence, told, known)


def _is_held(fleet: Fleet, grant: e.AllocationGranted) -> bool:
    """Whether the node has it already: an older ledger takes over what came after its time."""
    return any(grant.id in (fleet.status(each.node).held or {}) for each in grant.placements)


def _told_by(told: agent_pb2.Hello | agent_pb2.Frame, otherwise: Told) -> Told:
    """Return the GPUs that a message tells of; it need not tell of any."""
    if not told.HasField("inventory"):
        return otherwise
    gpus = told.inventory.gpus
    names = frozenset(_named(gpu.uuid, in_mig_mode=gpu.mig_enabled) for gpu in gpus)
    return Told(names, len(told.inventory.missing))


def _named(uuid: str, *, in_mig_mode: bool) -> str:
    """Return a GPU with what the ledger must know of it: one in MIG mode is nobody's."""
    return f"{uuid} in MIG mode" if in_mig_mode else uuid
