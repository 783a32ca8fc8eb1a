"""A fleet of the aggregator's own, without its doors: requests go the way that production takes.

Nodes come as events that a real agent would cause. A decision is the view of the fleet,
`find_place`, the admission, and the grant applied to the fleet; what it took is kept, in seconds of
this thread's own CPU time, so that neighbours on the machine do not show.
"""

import time
from collections.abc import Sequence

from stoker.aggregator import events as e
from stoker.aggregator.admission import objection
from stoker.aggregator.fleet import Fleet
from stoker.aggregator.model import DriverState, Frame, Gpu, GpuSample, NodeFacts, Placement
from stoker.aggregator.placing.place import find_place
from stoker.aggregator.placing.placer import Placer
from stoker.aggregator.processes import ProcessTable
from stoker.testing.workloads.tasks import Host, Task

# Recorded workloads tell no GPU memory: shares are parts of a GPU, and the memory follows.
GPU_MEMORY_BYTES = 16 * 2**30
START = 1_000_000.0
# No node reports twice, so that a run takes no time of its own: what it said once stays fresh.
_INTERVAL_SECONDS = 1e12
# As often as the aggregator forgets what has ended.
_FORGOTTEN_AT_ONCE = 500


class Stage:
    """The fleet, and what was asked of it so far."""

    def __init__(self, hosts: Sequence[Host], placer: Placer) -> None:
        self._fleet = Fleet()
        self._placer = placer
        self._now = START
        self.refused = 0
        self.decision_seconds: list[float] = []  # of each
        for session, host in enumerate(hosts, 1):
            self._join(host, session)
        placer.sync(self._fleet.view(self._now))

    def ask(self, task: Task, id_: str) -> tuple[Placement, ...] | None:
        """Return what the task got, under that id; None: there is no place for it."""
        request = task.request()
        began = time.thread_time()
        self._placer.learn(request)
        view = self._fleet.view(self._now)
        plan = find_place(request, view, placer=self._placer)
        if plan is not None:
            why_not = objection(plan, request, view)
            assert not why_not, f"{plan} for {request}: {why_not}"
            granted = e.AllocationGranted(self._now, id_, request, "", self._now, plan.placements)
            self._fleet.apply(granted, self._fleet.version + 1)
        self.decision_seconds.append(time.thread_time() - began)
        if plan is None:
            self.refused += 1
            return None
        return plan.placements

    def end(self, id_: str) -> None:
        """Release what is held under that id; its node lets go of it at once."""
        self._record(e.AllocationReleasing(self._now, id_, "it ended"))
        self._record(e.AllocationEnded(self._now, id_, "it ended"))
        if len(self._fleet.ended) >= _FORGOTTEN_AT_ONCE:
            self._record(e.AllocationsForgotten(self._now, tuple(self._fleet.ended)))

    def _join(self, host: Host, session: int) -> None:
        facts = facts_of(host)
        self._record(e.NodeRegistered(self._now, facts))
        self._fleet.note(e.AgentConnected(self._now, host.name, session, (), 0))
        frame = Frame(
            sequence=1,
            at=self._now,
            monotonic_seconds=0.0,
            samples={
                gpu.uuid: GpuSample(memory_used_bytes=0, memory_reserved_bytes=0)
                for gpu in facts.gpus
            },
            processes=ProcessTable(self._now, ()),
            held=(),
            driver=DriverState.READING,
        )
        self._fleet.note(e.FrameArrived(self._now, host.name, session, frame, self._now))

    def _record(self, event: e.DurableEvent) -> None:
        self._fleet.apply(event, self._fleet.version + 1)


def facts_of(host: Host) -> NodeFacts:
    """Return what the host's agent says of it."""
    return NodeFacts(
        name=host.name,
        incarnation=f"journal of {host.name}",
        boot_id=f"boot of {host.name}",
        agent_version="0",
        simulated=True,
        interval_seconds=_INTERVAL_SECONDS,
        gpus=tuple(
            Gpu(
                uuid=f"GPU-{host.name}-{index}",
                model=host.model,
                index=index,
                memory_total_bytes=GPU_MEMORY_BYTES,
                number=index + 1,
            )
            for index in range(host.gpus)
        ),
        cpu_milli=host.cpu_milli,
        host_memory_bytes=host.memory_bytes,
    )
