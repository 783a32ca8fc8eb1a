"""Values for tests of the aggregator's decisions, and a scene: a fleet with nodes that obey."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from stoker.aggregator import commands
from stoker.aggregator import events as e
from stoker.aggregator.cordoning import CordonPolicy
from stoker.aggregator.decisions import Round
from stoker.aggregator.fleet import Fleet, Snapshot
from stoker.aggregator.model import (
    Allocation,
    AllocationState,
    Command,
    DriverState,
    Frame,
    Gpu,
    GpuSample,
    HeldAllocation,
    HoldRefusal,
    NodeFacts,
    Request,
)
from stoker.aggregator.processes import Process, ProcessTable
from stoker.aggregator.tenancy import allocations_on
from stoker.aggregator.upkeep import CordonWatch
from stoker.aggregator.verdicts import GpuHealth, RepairAction, Verdict
from stoker.aggregator.views import FleetView
from stoker.aggregator.wishes import (
    Allocate,
    Queued,
    Release,
    Reply,
    Settled,
    Wish,
)

GIB = 2**30
H100 = "NVIDIA H100 80GB HBM3"
A100 = "NVIDIA A100-SXM4-40GB"
T4 = "Tesla T4"
START = 1_000_000.0


def make_gpus(node: str, count: int, model: str = H100, gib: int = 80) -> tuple[Gpu, ...]:
    return tuple(Gpu(f"{node}-{i}", model, i, gib * GIB, number=i + 1) for i in range(count))


def make_facts(
    name: str = "n1", gpus: int | tuple[Gpu, ...] = 8, pool: str = "", incarnation: str = ""
) -> NodeFacts:
    return NodeFacts(
        name=name,
        incarnation=incarnation or f"journal of {name}",
        boot_id=f"boot of {name}",
        agent_version="1",
        simulated=True,
        pool=pool,
        gpus=make_gpus(name, gpus) if isinstance(gpus, int) else gpus,
    )


def whole(gpus: int = 1, **fields: Any) -> Request:
    return replace(Request(gpus, "ann", 60.0), **fields)


def share(gib: float, **fields: Any) -> Request:
    return whole(1, memory_bytes=int(gib * GIB), **fields)


def make_samples(gpus: Iterable[Gpu], reserved_bytes: int = 0) -> dict[str, GpuSample]:
    sample = GpuSample(memory_used_bytes=0, memory_reserved_bytes=reserved_bytes)
    return {gpu.uuid: sample for gpu in gpus}


def make_process(gpu_uuid: str, pid: int = 4242, **fields: Any) -> Process:
    return replace(Process(gpu_uuid, pid, "bob", "python train.py"), **fields)


def make_health(
    uuid: str, verdict: Verdict = Verdict.UNHEALTHY, check: str = "xid", **fields: Any
) -> GpuHealth:
    """A verdict; unless it is healthy, for a fault that only a reset mends."""
    if verdict is Verdict.HEALTHY:
        return replace(GpuHealth(uuid, verdict), **fields)
    reason = f"{check} was found"
    ill = GpuHealth(uuid, verdict, RepairAction.RESET_GPU, check, reason, since=1.0)
    return replace(ill, **fields)


class Scene:
    """A fleet with its nodes. What is decided is applied at once; time stands until it is moved."""

    def __init__(self, *nodes: NodeFacts, policy: CordonPolicy | None = None) -> None:
        self.now = START
        self.fleet = Fleet()
        self.log: list[e.DurableEvent] = []
        # What each node holds, as its journal has it.
        self.journals: dict[str, dict[str, HeldAllocation]] = {}
        self._sequences: dict[str, int] = {}
        self._sessions = 0
        self._ids = 0
        self.watch = CordonWatch(policy or CordonPolicy())
        self._command_ids: dict[str, int] = {}
        for facts in nodes:
            self.join(facts)

    # --- nodes

    def join(self, facts: NodeFacts) -> None:
        """The node is registered, connects, and reports everything."""
        self.record(e.NodeRegistered(self.now, facts))
        self.connect(facts.name)
        self.report(facts.name)

    def connect(self, node: str) -> None:
        self._sessions += 1
        held = tuple(self.journals.setdefault(node, {}).values())
        acked = self.fleet.status(node).acked_sequence
        self._command_ids[node] = 0
        self.fleet.note(e.AgentConnected(self.now, node, self._sessions, held, acked))

    def disconnect(self, node: str, reason: str = "the stream broke") -> None:
        session = self.fleet.status(node).session
        self.fleet.note(e.AgentDisconnected(self.now, node, session, reason))

    def report(self, node: str, **parts: Any) -> None:
        """The node sends a frame in which everything is well, but for `parts`."""
        gpus = self.fleet.nodes[node].facts.gpus
        wellness: dict[str, Any] = {
            "samples": make_samples(gpus),
            "processes": ProcessTable(self.now, ()),
            "driver": DriverState.READING,
            "held": tuple(self.journals[node].values()),
        }
        self.frame(node, **{**wellness, **parts})

    def frame(self, node: str, **parts: Any) -> None:
        """The node sends a frame with these parts only."""
        self._sequences[node] = self._sequences.get(node, 0) + 1
        frame = Frame(self._sequences[node], self.now, self.now, **parts)
        session = self.fleet.status(node).session
        self.fleet.note(e.FrameArrived(self.now, node, session, frame, self.now))

    def judge(self, node: str, *verdicts: GpuHealth) -> None:
        """The node tells that these GPUs are so, and all others well; it is decided on."""
        told = {gpu.uuid: make_health(gpu.uuid, Verdict.HEALTHY) for gpu in self.gpus_of(node)}
        told |= {each.uuid: each for each in verdicts}
        self.frame(node, health=tuple(told.values()))
        self.decide()

    def gpus_of(self, node: str) -> tuple[Gpu, ...]:
        return self.fleet.nodes[node].facts.gpus

    def cordons(self) -> dict[str, str]:
        """Return why each GPU that is cordoned is."""
        table = self.fleet.conditions.table.items()
        return {uuid: each.cordon.reason for uuid, each in table if each.cordon is not None}

    def sample(self) -> None:
        """Every connected node sends samples."""
        for name, node in self.fleet.nodes.items():
            if self.fleet.status(name).session:
                self.frame(name, samples=make_samples(node.facts.gpus))

    def later(self, seconds: float) -> None:
        """Time passes; the nodes that are connected have gone on sampling."""
        self.now += seconds
        self.sample()

    def send_commands(self, node: str) -> tuple[Command, ...]:
        """The node is told what differs."""
        status = self.fleet.status(node)
        told = commands.difference(
            node,
            allocations_on(self.fleet, node),
            status.held or {},
            self.fleet.sent[node],
            self._command_ids[node] + 1,
            inventory_known=bool(self.fleet.nodes[node].facts.gpus),
        )
        self._command_ids[node] += len(told)
        self.fleet.note(e.CommandsSent(self.now, node, status.session, told))
        return told

    def obey(self, node: str) -> tuple[Command, ...]:
        """The node is told what differs, does it and reports."""
        told = self.send_commands(node)
        for command in told:
            if command.hold is not None:
                self.journals[node][command.allocation_id] = command.hold
            else:
                self.journals[node].pop(command.allocation_id, None)
        held = tuple(self.journals[node].values())
        self.frame(node, held=held, commands_done=self._command_ids[node])
        return told

    def refuse(self, node: str, allocation_id: str, reason: str) -> None:
        done = self._command_ids[node]
        refusal = HoldRefusal(allocation_id, reason)
        self.frame(node, refusals=(refusal,), commands_done=done)

    # --- decisions

    def record(self, *events: e.DurableEvent) -> None:
        for event in events:
            self.fleet.apply(event, self.fleet.version + 1)
            self.log.append(event)

    def new_id(self) -> str:
        self._ids += 1
        return f"a{self._ids}"

    def decide(self, *wishes: Wish, serve: bool = False) -> list[Reply]:
        """One round: housekeeping, the wishes, then the queue when `serve`; all of it applied."""
        nodes, self.fleet.unreconciled = self.fleet.unreconciled, set()
        one = Round(self.fleet, self.now, self.new_id, watch=self.watch)
        one.housekeep(nodes)
        replies = [one.wish(wish) for wish in wishes]
        if serve:
            one.serve_queue()
        self.record(*one.events)
        return replies

    def allocate(self, request: Request, key: str = "", wait_seconds: float = 0.0) -> Reply:
        (reply,) = self.decide(Allocate(request, key, wait_seconds))
        return reply

    def grant(self, request: Request, key: str = "") -> Allocation:
        """Return the allocation that `request` gets at once."""
        reply = self.allocate(request, key)
        assert isinstance(reply, Settled), reply
        return self.fleet.allocations[reply.id]

    def wait(self, request: Request, wait_seconds: float = 3600.0) -> Allocation:
        """Return the allocation that waits for `request`, with its client on the line."""
        reply = self.allocate(request, wait_seconds=wait_seconds)
        assert isinstance(reply, Queued), reply
        self.fleet.note(e.WaiterAttached(self.now, reply.id))
        return self.fleet.allocations[reply.id]

    def release(self, allocation_id: str) -> Reply:
        (reply,) = self.decide(Release(allocation_id))
        return reply

    def hand_back(self, allocation_id: str) -> None:
        """Release it, and have its node let go of it."""
        node = self.fleet.allocations[allocation_id].node
        self.release(allocation_id)
        self.obey(node)
        self.decide()
        assert self.state(allocation_id) is AllocationState.ENDED

    # --- reading

    def state(self, allocation_id: str) -> AllocationState:
        return self.fleet.allocations[allocation_id].state

    def view(self) -> FleetView:
        return self.fleet.view(self.now)

    def replayed(self) -> Fleet:
        """Return the fleet that everything which was recorded gives."""
        fleet = Fleet.restored(Snapshot(0, (), ()))
        for version, event in enumerate(self.log, 1):
            fleet.apply(event, version)
        return fleet

    def change_facts(self, node: str, **fields: Any) -> None:
        facts = self.fleet.nodes[node].facts
        self.record(e.NodeRegistered(self.now, replace(facts, **fields)))


def waiting_scene() -> tuple[Scene, str, str]:
    """One GPU, granted to the first, wanted by the second."""
    scene = Scene(make_facts(gpus=1))
    holder = scene.grant(whole(ttl_seconds=1e6))
    scene.obey("n1")
    return scene, holder.id, scene.wait(whole(), wait_seconds=60.0).id


def durable_tables(fleet: Fleet) -> Mapping[str, object]:
    """Return everything that a restart must bring back, in its order where that has a meaning."""
    return {
        "version": fleet.version,
        "nodes": list(fleet.nodes.items()),
        "allocations": list(fleet.allocations.items()),
        "keys": dict(fleet.keys),
        "claims": dict(fleet.claims),
        "tenants": dict(fleet.tenants),
        "homes": dict(fleet.homes),
        "queue": fleet.queue(),
        "waiting": dict(fleet.waiting),
        "ended": list(fleet.ended.items()),
        "drains": dict(fleet.drains),
        "conditions": dict(fleet.conditions.table),
        "failures": fleet.conditions.failures,
        "conditions, what follows": (
            set(fleet.conditions.notable),
            set(fleet.conditions.cordoned_by_health),
            dict(fleet.conditions.drains),
            dict(fleet.conditions.told_by),
        ),
    }
