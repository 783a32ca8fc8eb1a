"""Has GPUs cut up by demand, in pools whose operator said so; see `partitioning` for the rules.

Every few seconds it looks at what waits and at GPUs that may be cut. What may be done without
asking anybody is asked of the node's agent, which does it, or refuses, by the same rules as for a
person: nobody who uses a GPU is drained, and an operation that it knows is not begun again. What
may not is told in the log, once.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from stoker.aggregator.cuts import PartitioningOptions, Proposal
from stoker.aggregator.cutting import cut_gpus, demands, operation_of
from stoker.aggregator.failures import CallFailure
from stoker.aggregator.fleet import Fleet
from stoker.aggregator.gpu_mig import GpuMig
from stoker.aggregator.meters import Meters
from stoker.aggregator.partitioning import propose
from stoker.core.clock import Clock
from stoker.core.mig.geometry import MigState
from stoker.v1 import mig_pb2

# How often it looks.
EVERY_SECONDS = 5.0
# What was begun and is not told to be over by then counts as over: the node was lost, say.
UNDER_WAY_SECONDS = 600.0
# A GPU whose node refused is left alone for so long.
REFUSED_SECONDS = 60.0

_UNDER_WAY = (MigState.PENDING, MigState.DRAINING, MigState.APPLYING, MigState.ROLLING_BACK)

_log = logging.getLogger(__name__)

Ask = Callable[[str, mig_pb2.MigAsk], Awaitable[mig_pb2.MigAnswer]]


@dataclass(frozen=True, slots=True)
class _Begun:
    operation_id: str
    node: str
    for_allocations: tuple[str, ...]
    at: float


class Partitioner:
    """The loop; `options` are by pool, and without any it does nothing."""

    def __init__(
        self,
        fleet: Fleet,
        ask: Ask,
        meters: Meters,
        clock: Clock,
        options: Mapping[str, PartitioningOptions],
    ) -> None:
        """`ask` asks the agent of a node about its partitions; raises CallFailure."""
        self._fleet = fleet
        self._ask = ask
        self._meters = meters
        self._clock = clock
        self._options = options
        self._begun: dict[str, _Begun] = {}  # by GPU UUID
        self._refused: dict[str, float] = {}  # GPU UUID -> when
        self._told: frozenset[str] = frozenset()  # proposals that are in the log

    async def run(self) -> None:
        """Look, and have done what may be done, until cancelled."""
        while self._options:
            await self._clock.sleep(EVERY_SECONDS)
            await self.look()

    async def look(self) -> tuple[Proposal, ...]:
        """Look once; return what is proposed."""
        now = self._clock.now()
        self._forget(now)
        found = self._proposals(now) if self._fleet.waiting else ()
        self._meters.partitions_proposed.set(len(found))
        self._tell([each for each in found if not each.is_automatic])
        async with asyncio.TaskGroup() as tasks:
            for proposal in found:
                if proposal.is_automatic and proposal.gpu_uuid not in self._refused:
                    tasks.create_task(self._apply(proposal, now))
        return found

    def _proposals(self, now: float) -> tuple[Proposal, ...]:
        view = self._fleet.view(now)
        gpus = [
            gpu
            for gpu in cut_gpus(view, self._fleet.conditions.table, self._options.keys())
            if gpu.uuid not in self._begun
        ]
        if not gpus:
            return ()
        slices = max(gpu.geometry.compute_slices for gpu in gpus)
        served = {id_ for begun in self._begun.values() for id_ in begun.for_allocations}
        waiting = demands(self._fleet.queue(), view, slices, served)
        return propose(gpus, waiting, self._options, now)

    async def _apply(self, proposal: Proposal, now: float) -> None:
        mig = self._mig(proposal.node, proposal.gpu_uuid)
        assert mig is not None, f"{proposal.gpu_uuid} was proposed for, and nothing is told of it"
        id_ = operation_of(proposal, mig)
        self._begun[proposal.gpu_uuid] = _Begun(id_, proposal.node, proposal.for_allocations, now)
        where = f"GPU {proposal.gpu_index} of node {proposal.node}"
        try:
            answer = await self._ask(proposal.node, _ask_for(proposal, id_))
            refusal = answer.refusal
        except CallFailure as failure:
            refusal = failure.sentence
        if not refusal:
            self._meters.partitions.labels("begun").inc()
            _log.info("%s is partitioned by demand (%s): %s", where, id_, proposal.why)
            return
        del self._begun[proposal.gpu_uuid]
        self._refused[proposal.gpu_uuid] = now
        self._meters.partitions.labels("refused").inc()
        _log.warning("%s cannot be partitioned by demand: %s", where, refusal)

    def _forget(self, now: float) -> None:
        """Forget what is over."""
        for uuid, begun in list(self._begun.items()):
            mig = self._mig(begun.node, uuid)
            is_ours = mig is not None and mig.operation_id == begun.operation_id
            is_over = is_ours and mig is not None and mig.state not in _UNDER_WAY
            if is_over or now - begun.at >= UNDER_WAY_SECONDS:
                del self._begun[uuid]
        for uuid, at in list(self._refused.items()):
            if now - at >= REFUSED_SECONDS:
                del self._refused[uuid]

    def _mig(self, node: str, uuid: str) -> GpuMig | None:
        return (self._fleet.status(node).mig or {}).get(uuid)

    def _tell(self, found: list[Proposal]) -> None:
        """Write proposals to the log that a person must have done, each once while it stands."""
        told = {f"GPU {each.gpu_index} of node {each.node}: {each.why}": each for each in found}
        for sentence in told:
            if sentence not in self._told:
                _log.info("proposed, for an operator to do: %s", sentence)
        self._told = frozenset(told)


def _ask_for(proposal: Proposal, operation_id: str) -> mig_pb2.MigAsk:
    wanted = proposal.wanted
    entry = mig_pb2.MigEntry(
        devices=[proposal.gpu_index],
        mig_enabled=wanted.is_enabled,
        mig_devices=dict(wanted.devices),
    )
    return mig_pb2.MigAsk(
        verb=mig_pb2.MIG_VERB_APPLY,
        operation_id=operation_id,
        config="by-demand",
        entries=[entry],
        gpus=[proposal.gpu_uuid],
    )
