"""A round of decisions: wishes and due housekeeping in, durable events and replies out.

`Round` tries every wish on a draft of the fleet, in order, so that the second sees what the first
was given; the control loop then stores the events in one commit and only then sends the replies.
Nothing here waits or writes.
"""

from collections.abc import Callable
from typing import assert_never

from stoker.aggregator import events as e
from stoker.aggregator.admission import objection
from stoker.aggregator.adoption import adoptable, is_answer, profile_of
from stoker.aggregator.fleet import Fleet
from stoker.aggregator.model import (
    Allocation,
    AllocationState,
    HeldAllocation,
    Node,
    Placement,
    Plan,
    Refusals,
    Request,
)
from stoker.aggregator.placing.place import explain, find_place
from stoker.aggregator.placing.placer import Placer
from stoker.aggregator.queueing import Hosts, Kept, Shape, kept_ahead_of, shape_of
from stoker.aggregator.rebalancing import confirmed
from stoker.aggregator.tenancy import (
    allocations_on,
    former_name,
    granted_under_former_name,
    has_let_go,
)
from stoker.aggregator.upkeep import (
    CordonWatch,
    cordons,
    drained,
    judgements,
    next_drain,
    review_of,
    settles_at,
)
from stoker.aggregator.verdicts import Verdict
from stoker.aggregator.wishes import (
    Allocate,
    Cordon,
    Drain,
    KeyReused,
    MoveOver,
    Queued,
    Refused,
    Release,
    Reply,
    Settled,
    Uncordon,
    Unknown,
    Wish,
)
from stoker.core.units import format_duration

# A waiting request whose client is gone keeps its place so long, for a client that dials again.
WAITER_GRACE_SECONDS = 10.0
# Ended allocations are remembered so long, and not more than so many: for `why`, for retries with
# the same key, and for agents that come back late.
REMEMBERED_SECONDS = 86_400.0
REMEMBERED_MAX = 10_000
# Forgetting is itself an event, so it is done for many at a time: when so many are too many, or
# when the oldest is so much too old.
FORGOTTEN_AT_ONCE = 500
FORGOTTEN_LATE_SECONDS = 3_600.0


def consider(
    request: Request,
    fleet: Fleet,
    now: float,
    until: str | None = None,
    hosts: Hosts | None = None,
    placer: Placer | None = None,
) -> Plan | Refusals:
    """Return where `request` would go at `now`, or why nowhere, with the queue as it stands.

    For a newcomer; with `until` for the waiting allocation of that id. Changes nothing.
    """
    view = fleet.view(now)
    kept = kept_ahead_of(request.priority, fleet.queue(), view, until=until, hosts=hosts)
    plan = find_place(request, view, kept.nodes, placer)
    return plan or explain(request, view, kept.nodes, kept.ahead_of(request))


def next_due(fleet: Fleet, watch: CordonWatch | None = None) -> float | None:
    """Return when `Round.housekeep` has something to do though nothing happens; None: never.

    `watch` is the one that rounds are given; without one, cordons are nobody's business.
    """
    times = [at + WAITER_GRACE_SECONDS for at in fleet.detached_since.values()]
    if watch is not None:
        times += watch.flapping.values()
    cordons_at = None if watch is None else watch.next_due(fleet)
    others = (fleet.next_deadline(), next_drain(fleet), cordons_at)
    return min([*times, *(at for at in others if at is not None)], default=None)


class Round:
    """One round over a draft; `events` are what is to be stored, in order.

    A round is decided and its events are applied before the next one begins. `hosts`, `watch` and
    `placer` may be kept from round to round, for one and the same fleet.
    """

    def __init__(
        self,
        fleet: Fleet,
        now: float,
        new_id: Callable[[], str],
        hosts: Hosts | None = None,
        watch: CordonWatch | None = None,
        placer: Placer | None = None,
    ) -> None:
        self._fleet = fleet
        self._watch = watch or CordonWatch()
        self._draft = fleet.draft()
        self._now = now
        self._new_id = new_id
        self._hosts = hosts or Hosts()
        self._placer = placer
        self._kept: dict[int, Kept] = {}  # by the newcomer's priority, for the queue as it stands
        # Of newcomers, as long as nothing happens: a full fleet refuses many for the same reason.
        self._refusals: dict[tuple[Shape, int], Refusals] = {}
        self.events: list[e.DurableEvent] = []

    def wish(self, wish: Wish) -> Reply:
        """Decide one wish on the draft."""
        match wish:
            case Allocate():
                return self._allocate(wish)
            case Release(id_, reason):
                return self._release(id_, reason)
            case Cordon() | Drain():
                return self._cordon(wish)
            case Uncordon():
                return self._uncordon(wish)
            case MoveOver():
                return self._move_over(wish)
            case _:
                assert_never(wish)

    def housekeep(self, nodes: set[str]) -> None:
        """Do what is due: leases that ran out, waits that are over, reports of `nodes`, cordons by
        health, drains, forgetting.

        It goes by what is due in the fleet below, less what this round has settled before.
        `nodes` gains those whose verdicts are due once more.
        """
        nodes |= {name for name, at in self._watch.flapping.items() if at <= self._now}
        for id_ in self._fleet.expired(self._now):
            allocation = self._draft.allocations[id_]
            if allocation.state is AllocationState.GRANTED:
                ttl = format_duration(allocation.request.ttl_seconds)
                reason = f"expired: no keep-alive for {ttl}"
                self._happen(e.AllocationReleasing(self._now, id_, reason))
        self._end_waits()
        for name in sorted(nodes):
            self._reconcile(name)
            self._judge(name)
        self._tend_cordons()
        for event in list(drained(self._draft, self._now)):
            self._happen(event)
        self._forget()

    def serve_queue(self) -> None:
        """Grant what now fits, in the queue's order.

        A request without a client on the line is passed by, and what it waits for stays kept.
        """
        kept = Kept(self._draft.view(self._now), self._hosts)
        for waiting in self._draft.queue():
            request = waiting.request
            if waiting.id in self._draft.attached and not kept.leaves_nothing_for(request):
                plan = self._find_place(request, kept)
                if plan is not None:
                    self._grant(waiting.id, request, waiting.idempotency_key, plan, waiting)
                    continue
            kept.keep_for(waiting)

    # --- wishes

    def _allocate(self, wish: Allocate) -> Reply:
        if wish.idempotency_key and wish.idempotency_key in self._draft.keys:
            known = self._draft.allocations[self._draft.keys[wish.idempotency_key]]
            if not known.request.is_same_wish(wish.request):
                return KeyReused(known.id)
            if known.state is AllocationState.WAITING:
                return Queued(known.id)
            return Settled(known.id)
        request = wish.request
        if self._placer is not None:
            self._placer.learn(request)
        kept = self._kept_for_newcomer(request.priority)
        plan = self._find_place(request, kept)
        if plan is not None:
            id_ = self._new_id()
            self._grant(id_, request, wish.idempotency_key, plan, None)
            return Settled(id_)
        if wish.wait_seconds <= 0:
            return Refused(self._explain_to_newcomer(request, kept))
        id_ = self._new_id()
        wait_until = self._now + wish.wait_seconds
        self._happen(
            e.AllocationRequested(self._now, id_, request, wish.idempotency_key, wait_until)
        )
        return Queued(id_)

    def _release(self, id_: str, reason: str) -> Reply:
        known = self._draft.allocations.get(id_)
        if known is None:
            return Unknown(f"allocation {id_}")
        match known.state:
            case AllocationState.WAITING:
                self._happen(e.AllocationEnded(self._now, id_, f"cancelled: {reason}"))
            case AllocationState.GRANTED:
                self._happen(e.AllocationReleasing(self._now, id_, reason))
            case AllocationState.RELEASING | AllocationState.ENDED:
                pass  # releasing twice equals releasing once
            case _:
                assert_never(known.state)
        return Settled(id_)

    def _move_over(self, wish: MoveOver) -> Reply:
        known = self._draft.keys.get(wish.idempotency_key)
        if known is not None:
            return Settled(known)
        view, move = self._draft.view(self._now), wish.move
        moving = view.allocations.get(move.allocation_id)
        if moving is None:
            return Unknown(f"allocation {move.allocation_id}")
        # What waits ahead of that for which room is made keeps its nodes, as for a newcomer.
        request, queue = moving.request, self._draft.queue()
        kept = kept_ahead_of(request.priority, queue, view, move.goal, self._hosts)
        plan = confirmed(move, view, wish.kinds, self._draft.tenants, kept.nodes)
        if isinstance(plan, str):
            return Refused(Refusals(plan, ()))
        id_ = self._new_id()
        self._grant(id_, request, wish.idempotency_key, plan, None)
        return Settled(id_)

    def _cordon(self, wish: Cordon | Drain) -> Reply:
        node = self._named(wish)
        if isinstance(node, Unknown):
            return node
        if not wish.gpu_uuid:
            drain_at = self._drain_at(wish, node.drain_at)
            if (node.cordoned, node.drain_at) != (wish.reason, drain_at):
                self._happen(e.NodeCordoned(self._now, wish.node, wish.reason, drain_at))
            return Settled(wish.node)
        # An operator's cordon takes the place of one by health, and stays when that is well again.
        standing = self._draft.conditions.cordon_of(wish.gpu_uuid)
        before = None if standing is None or standing.by_health else standing
        drain_at = self._drain_at(wish, before.drain_at if before else None)
        if before is None or (before.reason, before.drain_at) != (wish.reason, drain_at):
            cordoned = e.GpuCordoned(
                self._now, wish.node, wish.gpu_uuid, wish.reason, by_health=False, drain_at=drain_at
            )
            self._happen(cordoned)
        return Settled(wish.node)

    def _uncordon(self, wish: Uncordon) -> Reply:
        node = self._named(wish)
        if isinstance(node, Unknown):
            return node
        if not wish.gpu_uuid:
            if node.cordoned is not None:
                self._happen(e.NodeUncordoned(self._now, wish.node))
            return Settled(wish.node)
        condition = self._draft.conditions.get(wish.gpu_uuid)
        if condition is not None and condition.cordon is not None:
            health = condition.health
            is_ill = health is not None and health.verdict is not Verdict.HEALTHY
            fault = health.fault if health is not None and is_ill else None
            uncordoned = e.GpuUncordoned(
                self._now, wish.node, wish.gpu_uuid, by_health=False, acknowledged=fault
            )
            self._happen(uncordoned)
        return Settled(wish.node)

    def _named(self, wish: Cordon | Drain | Uncordon) -> Node | Unknown:
        """Return the node that the wish names, if the GPU that it names is of that node."""
        node = self._draft.nodes.get(wish.node)
        if node is None:
            return Unknown(f"node {wish.node}")
        condition = self._draft.conditions.get(wish.gpu_uuid)
        # Also one that was taken out and is cordoned still.
        is_told_of = condition is not None and condition.node == wish.node
        gpus = node.facts.gpus
        if not wish.gpu_uuid or is_told_of or any(gpu.uuid == wish.gpu_uuid for gpu in gpus):
            return node
        has = ", ".join(f"{gpu.uuid} (GPU {gpu.index})" for gpu in gpus)
        what = f"GPU {wish.gpu_uuid} of node {wish.node}"
        return Unknown(what, f"it has {has or 'no GPUs'}")

    def _drain_at(self, wish: Cordon | Drain, before: float | None) -> float | None:
        """Return when what is held ends; a cordon leaves a drain that is under way as it is."""
        if isinstance(wish, Cordon):
            return before
        return None if wish.grace_seconds is None else self._now + wish.grace_seconds

    def _grant(
        self, id_: str, request: Request, key: str, plan: Plan, waited: Allocation | None
    ) -> None:
        # The draft is the fleet of this instant, so an objection here is a bug of the placement.
        why_not = objection(plan, request, self._draft.view(self._now))
        assert not why_not, f"{plan} for {request}: {why_not}"
        requested_at = waited.requested_at if waited else self._now
        self._happen(
            e.AllocationGranted(self._now, id_, request, key, requested_at, plan.placements)
        )

    def _find_place(self, request: Request, kept: Kept) -> Plan | None:
        return find_place(request, self._draft.view(self._now), kept.nodes, self._placer)

    def _kept_for_newcomer(self, priority: int) -> Kept:
        if priority not in self._kept:
            view = self._draft.view(self._now)
            queue = self._draft.queue()
            self._kept[priority] = kept_ahead_of(priority, queue, view, hosts=self._hosts)
        return self._kept[priority]

    def _explain_to_newcomer(self, request: Request, kept: Kept) -> Refusals:
        known = (shape_of(request), request.priority)
        if known not in self._refusals:
            view = self._draft.view(self._now)
            ahead = kept.ahead_of(request)
            self._refusals[known] = explain(request, view, kept.nodes, ahead)
        return self._refusals[known]

    # --- housekeeping

    def _judge(self, name: str) -> None:
        for event in list(judgements(self._draft, name, self._watch.policy, self._now)):
            self._happen(event)
        at = settles_at(self._draft, name, self._now)
        if at is None:
            self._watch.flapping.pop(name, None)
        else:
            self._watch.flapping[name] = at

    def _tend_cordons(self) -> None:
        if not self._watch.is_due(self._draft, self._now):
            return
        found = review_of(self._draft, self._watch.policy, self._now)
        self._watch.looked_at = self._now
        for event in cordons(found, self._now):
            self._happen(event)
        # What this round changes is looked at once more when it is stored, or was not.
        version = self._draft.conditions.version
        if version == self._fleet.conditions.version:
            self._watch.version, self._watch.due_at = version, found.due_at

    def _end_waits(self) -> None:
        reasons: dict[tuple[Shape, int], str] = {}  # many that wait for the same may end at once
        for id_ in self._fleet.waited_out(self._now):
            if id_ not in self._draft.waiting:
                continue
            waiting = self._draft.allocations[id_]
            request = waiting.request
            shape = (shape_of(request), request.priority)
            if shape not in reasons:
                answer = consider(request, self._draft, self._now, id_, self._hosts, self._placer)
                reasons[shape] = f": {answer.summary}" if isinstance(answer, Refusals) else ""
            waited = format_duration(self._now - waiting.requested_at)
            reason = f"waited {waited} in the queue{reasons[shape]}"
            self._happen(e.AllocationEnded(self._now, id_, reason))
        for id_, since in self._fleet.detached_since.items():
            if id_ in self._draft.waiting and since + WAITER_GRACE_SECONDS <= self._now:
                self._happen(e.AllocationEnded(self._now, id_, "cancelled: its client went away"))

    def _reconcile(self, name: str) -> None:
        """Compare what the node reported with what the ledger grants on it."""
        node = self._draft.nodes.get(name)
        status = self._draft.status(name)
        if node is None or status.held is None:
            return
        is_connected = status.session != 0
        for allocation in allocations_on(self._draft, name).values():
            if allocation.state is AllocationState.RELEASING:
                places = allocation.placements
                if all(has_let_go(self._draft, allocation.id, place) for place in places):
                    self._happen(e.AllocationEnded(self._now, allocation.id, allocation.reason))
            elif not is_connected:
                continue  # it may hold it when it is back
            elif status.refusals is not None and allocation.id in status.refusals:
                reason = f"refused by node {name}: {status.refusals[allocation.id]}"
                self._happen(e.AllocationReleasing(self._now, allocation.id, reason))
        if not is_connected:
            return
        for allocation in granted_under_former_name(self._draft, name):
            if allocation.state is AllocationState.GRANTED:
                former = former_name(self._draft, allocation, name)
                reason = f"its node {former} is called {name} now"
                self._happen(e.AllocationReleasing(self._now, allocation.id, reason))
        sent = self._draft.sent.get(name, {})
        for one in status.held.values():
            if one.id not in sent:  # otherwise it was told already to let go of it
                self._adopt(node, one)

    def _adopt(self, node: Node, held: HeldAllocation) -> None:
        """Take over what a node holds and the ledger does not know, unless its GPUs are taken.

        Of a restored database the ledger may know it as still waiting; then it is granted. What
        the node was told to let go of has ended and was forgotten: adopted, it would come back to
        life without a client. So would a part of a gang without the rest of it.
        """
        if held.is_leaving or held.gang_nodes > 1:
            return
        known = self._draft.allocations.get(held.id)
        if known is not None and known.state is not AllocationState.WAITING:
            return
        devices = adoptable(held, node.facts, self._draft.claims)
        if devices is None or (known is not None and not is_answer(devices, known.request)):
            return  # the difference of wanted and held then tells the node to drop it
        placements = (Placement(node.facts.name, devices),)
        if known is not None:
            self._happen(
                e.AllocationGranted(
                    self._now,
                    known.id,
                    known.request,
                    known.idempotency_key,
                    known.requested_at,
                    placements,
                )
            )
            return
        request = Request(
            gpus=len(devices),
            holder=held.holder,
            ttl_seconds=held.ttl_seconds,
            memory_bytes=held.memory_bytes,
            compute_milli=None if devices[0].mig_device_uuid else held.compute_milli,
            mig_profile=profile_of(devices),
            cpu_milli=held.cpu_milli,
            host_memory_bytes=held.host_memory_bytes,
        )
        self._happen(e.AllocationAdopted(self._now, held.id, request, placements))

    def _forget(self) -> None:
        ended = self._fleet.ended
        if not ended or next(iter(ended)) not in self._draft.ended:
            return
        surplus = len(ended) - REMEMBERED_MAX
        too_old = self._now - REMEMBERED_SECONDS
        oldest = next(iter(ended.values()))
        if surplus < FORGOTTEN_AT_ONCE and oldest > too_old - FORGOTTEN_LATE_SECONDS:
            return
        due: list[str] = []
        for id_, ended_at in ended.items():
            if len(due) >= surplus and ended_at > too_old:
                break
            due.append(id_)
        self._happen(e.AllocationsForgotten(self._now, tuple(due)))

    def _happen(self, event: e.DurableEvent) -> None:
        was_waiting = len(self._draft.waiting)
        self._draft.apply(event, self._draft.version + 1)
        self.events.append(event)
        self._refusals.clear()
        if len(self._draft.waiting) != was_waiting:
            self._kept.clear()
