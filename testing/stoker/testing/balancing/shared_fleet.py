"""Nodes whose GPUs are shared, and the aggregator that places replicas on them, in virtual time.

The aggregator is the production's: its fleet takes the events that agents and the ledger would
cause, and a decision is the request, the view, the placement, the admission, and the grant. What
the GPUs do follows from who is on them, and comes back to the aggregator in frames alone.
"""

import time
from collections.abc import Sequence
from random import Random

from stoker.aggregator import events as e
from stoker.aggregator.admission import objection
from stoker.aggregator.fleet import Fleet
from stoker.aggregator.model import DriverState, Frame, Gpu, GpuSample, NodeFacts, Request
from stoker.aggregator.placing.place import find_place
from stoker.aggregator.placing.placer import Placer
from stoker.aggregator.processes import ProcessTable
from stoker.testing.balancing.arrivals import Replica

GPU_MEMORY_BYTES = 80 * 2**30
START = 1_000_000.0

_MODEL = "NVIDIA H100 80GB HBM3"
_TTL_SECONDS = 1e9  # leases are released, and never run out
# As often as the aggregator forgets what has ended.
_FORGOTTEN_AT_ONCE = 500


class Running:
    """A replica on a GPU."""

    def __init__(self, replica: Replica, granted_at: float) -> None:
        self._replica = replica
        self._random = Random(replica.noise)
        self._granted_at = granted_at
        self.demand = 0.0  # of the GPU's compute, now
        self.memory_bytes = 0

    def live_until(self, now: float) -> None:
        """Be what it is at `now`: its model is loaded little by little, and then it serves."""
        replica = self._replica
        begun = (now - self._granted_at) / replica.start_seconds
        self.memory_bytes = int(replica.memory_used_bytes * min(1.0, max(0.0, begun)))
        swing = self._random.uniform(0.5, 1.5)
        self.demand = replica.demand * swing if begun >= 1 else 0.0


class SharedFleet:
    """The nodes, what runs on their GPUs, and what the aggregator knows of it."""

    def __init__(self, nodes: int, gpus_each: int, placer: Placer) -> None:
        self.now = 0.0  # seconds from the beginning
        self.refused = 0
        self.decisions = 0
        self.decision_seconds = 0.0  # of this thread's own CPU time
        self._fleet = Fleet()
        self._placer = placer
        self._sequence = 0
        self._gpus: dict[str, dict[str, Running]] = {}  # UUID -> allocation id -> replica
        self._homes: dict[str, str] = {}  # allocation id -> UUID
        self._names = [f"n{number:02}" for number in range(nodes)]
        for session, name in enumerate(self._names, 1):
            facts = _facts(name, gpus_each)
            self._gpus.update({gpu.uuid: {} for gpu in facts.gpus})
            self._record(e.NodeRegistered(START, facts))
            self._fleet.note(e.AgentConnected(START, name, session, (), 0))

    def ask(self, replica: Replica) -> str | None:
        """Return the allocation that the replica gets; None: there is no room for it."""
        began = time.thread_time()
        request = Request(1, "service", _TTL_SECONDS, memory_bytes=replica.memory_bytes)
        now, id_ = START + self.now, f"a{replica.number}"
        view = self._fleet.view(now)
        plan = find_place(request, view, placer=self._placer)
        if plan is not None:
            why_not = objection(plan, request, view)
            assert not why_not, f"{plan} for {request}: {why_not}"
            self._record(e.AllocationGranted(now, id_, request, "", now, plan.placements))
        self.decision_seconds += time.thread_time() - began
        self.decisions += 1
        if plan is None:
            self.refused += 1
            return None
        uuid = self._homes[id_] = plan.devices[0].uuid
        self._gpus[uuid][id_] = Running(replica, self.now)
        return id_

    def end(self, id_: str) -> None:
        """Release what is held under that id; its node lets go of it at once."""
        now = START + self.now
        del self._gpus[self._homes.pop(id_)][id_]
        self._record(e.AllocationReleasing(now, id_, "it ended"))
        self._record(e.AllocationEnded(now, id_, "it ended"))
        if len(self._fleet.ended) >= _FORGOTTEN_AT_ONCE:
            self._record(e.AllocationsForgotten(now, tuple(self._fleet.ended)))

    def live(self) -> None:
        """Let every replica be what it is now."""
        for tenants in self._gpus.values():
            for running in tenants.values():
                running.live_until(self.now)

    def report(self, number: int) -> None:
        """Send a frame of that node."""
        name, now = self._names[number], START + self.now
        self._sequence += 1
        samples = {
            gpu.uuid: GpuSample(
                memory_used_bytes=self._memory_bytes(gpu.uuid),
                memory_reserved_bytes=0,
                utilization_ratio=min(1.0, self._demand(gpu.uuid)),
                at=now,
            )
            for gpu in self._fleet.nodes[name].facts.gpus
        }
        status = self._fleet.status(name)
        # What an allocation's processes do is in the samples; nobody else has any.
        is_first = status.acked_sequence == 0
        frame = Frame(
            sequence=self._sequence,
            at=now,
            monotonic_seconds=self.now,
            samples=samples,
            processes=ProcessTable(now, ()) if is_first else None,
            held=() if is_first else None,
            driver=DriverState.READING if is_first else None,
        )
        self._fleet.note(e.FrameArrived(now, name, status.session, frame, now))

    def demands(self) -> Sequence[float]:
        """Return how much of its compute is asked of each GPU now; above 1 some has to wait."""
        return [self._demand(uuid) for uuid in self._gpus]

    def memory_ratios(self) -> Sequence[float]:
        """Return how much of the memory of each GPU is in use now."""
        return [self._memory_bytes(uuid) / GPU_MEMORY_BYTES for uuid in self._gpus]

    def _demand(self, uuid: str) -> float:
        return sum(running.demand for running in self._gpus[uuid].values())

    def _memory_bytes(self, uuid: str) -> int:
        return sum(running.memory_bytes for running in self._gpus[uuid].values())

    def _record(self, event: e.DurableEvent) -> None:
        self._fleet.apply(event, self._fleet.version + 1)


def _facts(name: str, gpus: int) -> NodeFacts:
    return NodeFacts(
        name=name,
        incarnation=f"journal of {name}",
        boot_id=f"boot of {name}",
        agent_version="0",
        simulated=True,
        gpus=tuple(
            Gpu(f"GPU-{name}-{index}", _MODEL, index, GPU_MEMORY_BYTES, number=index + 1)
            for index in range(gpus)
        ),
    )
