"""The health of the fleet as a list for clients: GPUs worst first, and what was noticed."""

from collections.abc import Iterator
from dataclasses import dataclass

from stoker.aggregator.cordoning import CordonPolicy
from stoker.aggregator.findings import Finding
from stoker.aggregator.fleet import Fleet
from stoker.aggregator.model import Gpu
from stoker.aggregator.upkeep import review_of
from stoker.aggregator.verdicts import (
    Condition,
    GpuCordon,
    GpuHealth,
    RepairAction,
    Verdict,
    by_severity,
)
from stoker.aggregator.wire_fleet import health_of
from stoker.aggregator.wire_health import cordon_message, health_message
from stoker.v1 import fleet_pb2


@dataclass(frozen=True, slots=True)
class GpuRow:
    """What a message about one GPU is made of; immutable, so that it can be made later."""

    node: str
    uuid: str
    gpu: Gpu | None  # None: no node has it any more
    slot: str
    health: GpuHealth | None
    cordon: GpuCordon | None
    withheld: str
    allocation_ids: tuple[str, ...]

    @property
    def rank(self) -> tuple[tuple[int, int], str, int, str]:
        """The order in a list: worst first, then by node and index."""
        verdict = self.health.verdict if self.health else Verdict.UNKNOWN
        action = self.health.action if self.health else RepairAction.NONE
        index = self.gpu.index if self.gpu else 0
        return (by_severity(verdict, action), self.node, index, self.uuid)

    @property
    def is_healthy(self) -> bool:
        """Whether there is nothing to tell of it."""
        is_ill = self.health is not None and self.health.verdict is not Verdict.HEALTHY
        return not is_ill and self.cordon is None

    def message(self) -> fleet_pb2.GpuCondition:
        """Return the GPU as a message."""
        return fleet_pb2.GpuCondition(
            node=self.node,
            uuid=self.uuid,
            index=self.gpu.index if self.gpu else 0,
            model=self.gpu.model if self.gpu else "",
            pci_bus_id=self.slot,
            health=health_message(self.health),
            cordon=cordon_message(self.cordon),
            cordon_withheld=self.withheld,
            allocation_ids=self.allocation_ids,
        )


def gpu_rows(
    fleet: Fleet, policy: CordonPolicy, now: float, *, include_healthy: bool
) -> list[GpuRow]:
    """Return the GPUs that are not well or are cordoned, on request all, worst first."""
    withheld = review_of(fleet, policy, now).withheld
    # In a fleet that is well, a look at every GPU would hold up the loop for nothing.
    gpus = _gpus(fleet) if include_healthy else _notable(fleet)
    rows = (_row(fleet, *each, withheld.get(each[0], "")) for each in gpus)
    return sorted(
        (row for row in rows if include_healthy or not row.is_healthy), key=lambda row: row.rank
    )


def finding_message(finding: Finding) -> fleet_pb2.Finding:
    """Return what was noticed as a message."""
    return fleet_pb2.Finding(
        kind=finding.kind,
        node=finding.node,
        gpu_uuid=finding.uuid,
        pci_bus_id=finding.slot,
        reason=finding.reason,
        since=finding.since,
        allocation_id=finding.allocation_id,
    )


def _notable(fleet: Fleet) -> Iterator[tuple[str, str, Gpu | None]]:
    """Yield, as `_gpus` does, those of which the ledger knows that something is wrong or done."""
    by_node: dict[str, dict[str, Gpu]] = {}
    for uuid in fleet.conditions.notable:
        home = fleet.conditions.table[uuid].node
        homes = fleet.homes.get(uuid, (home,))
        home = home if home in homes else homes[0]
        if home not in by_node:
            by_node[home] = {gpu.uuid: gpu for gpu in fleet.nodes[home].facts.gpus}
        yield uuid, home, by_node[home].get(uuid)


def _gpus(fleet: Fleet) -> Iterator[tuple[str, str, Gpu | None]]:
    """Yield every GPU once: its UUID, the node it is told of in, and its facts if it is there."""
    for name, node in fleet.nodes.items():
        for gpu in node.facts.gpus:
            known = fleet.conditions.get(gpu.uuid)
            homes = fleet.homes[gpu.uuid]
            home = known.node if known is not None and known.node in homes else homes[0]
            if home == name:
                yield gpu.uuid, name, gpu
    for uuid, condition in fleet.conditions.table.items():
        if uuid not in fleet.homes:
            yield uuid, condition.node, None


def _row(fleet: Fleet, uuid: str, node: str, gpu: Gpu | None, withheld: str) -> GpuRow:
    condition = fleet.conditions.get(uuid) or Condition(uuid, node)
    return GpuRow(
        node=node,
        uuid=uuid,
        gpu=gpu,
        slot=gpu.pci_bus_id if gpu else condition.slot,
        health=health_of(fleet.status(node), condition, uuid),
        cordon=condition.cordon,
        withheld=withheld,
        allocation_ids=tuple(claim.allocation_id for claim in fleet.claims.get(uuid, ())),
    )
