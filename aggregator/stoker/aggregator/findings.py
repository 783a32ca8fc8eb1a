"""What the fleet notices by comparing: cards and slots that keep failing, GPUs behind their peers.

Lemons follow from the ledger's failures, so a restart finds the same. Stragglers are looked for
among the samples of running gangs and are gone with the process. Neither changes anything.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

from stoker.aggregator.fleet import INTERVALS_FRESH, Fleet
from stoker.aggregator.lemons import Lemon, LemonPolicy, Place, find_lemons
from stoker.aggregator.model import Device, GpuSample, Placement
from stoker.aggregator.stragglers import Gang, Member, Straggler, Stragglers

# Fewer have no majority to be behind.
GANG_GPUS_MIN = 3
# What is found of the ledger's failures stays so for so long, unless another GPU fails.
LEMONS_SECONDS = 60.0

STRAGGLER = "straggler"
KINDS = ("lemon_gpu", "lemon_slot", STRAGGLER)


@dataclass(frozen=True, slots=True)
class Finding:
    """Something noticed, for a person to look at."""

    kind: str  # one of KINDS
    node: str
    uuid: str  # empty: a slot without a card
    slot: str  # the PCI address; empty: not known
    reason: str
    since: float  # aggregator's clock
    allocation_id: str = ""  # of a straggler


class Findings:
    """What is noticed of one fleet."""

    def __init__(
        self, policy: LemonPolicy | None = None, stragglers: Stragglers | None = None
    ) -> None:
        self._policy = policy or LemonPolicy()
        self._stragglers = Stragglers() if stragglers is None else stragglers
        self._lemons: tuple[Lemon, ...] = ()
        self._lemons_of: tuple[int, int] | None = None  # version of conditions, minute

    def observe(self, fleet: Fleet, now: float) -> None:
        """Compare the GPUs of each gang, by the newest samples of its nodes."""
        self._stragglers.observe(now, list(gangs(fleet, now)))

    def found(self, fleet: Fleet, now: float) -> tuple[Finding, ...]:
        """Return all that is noticed as of `now`."""
        found = [_of_lemon(lemon) for lemon in self._find_lemons(fleet, now)]
        stragglers = self._stragglers.found()
        if stragglers:
            places = _places(fleet)
            found += [_of_straggler(each, places) for each in stragglers]
        return tuple(found)

    def _find_lemons(self, fleet: Fleet, now: float) -> tuple[Lemon, ...]:
        conditions = fleet.conditions
        if not conditions.failures:
            return ()
        minute = (conditions.version, int(now // LEMONS_SECONDS))
        if self._lemons_of != minute:
            self._lemons_of = minute
            self._lemons = find_lemons(conditions.failures, _places(fleet), now, self._policy)
        return self._lemons


def gangs(fleet: Fleet, now: float) -> Iterator[Gang]:
    """Yield the GPUs of every allocation that has enough of one model for itself."""
    for id_ in fleet.expires:
        allocation = fleet.allocations[id_]
        devices = [device for device in allocation.devices if device.exclusive]
        for model in sorted({device.model for device in devices}):
            alike = [device for device in devices if device.model == model]
            if len(alike) >= GANG_GPUS_MIN:
                mine = {device.uuid for device in alike}
                members = (
                    _members(fleet, placement, mine, now) for placement in allocation.placements
                )
                yield Gang(id_, model, tuple(chain.from_iterable(members)))


def _members(fleet: Fleet, placement: Placement, uuids: set[str], now: float) -> Iterator[Member]:
    name = placement.node
    samples = fleet.status(name).samples or {}
    oldest = now - INTERVALS_FRESH * fleet.nodes[name].facts.interval_seconds
    for device in placement.devices:
        sample = samples.get(device.uuid)
        if device.uuid in uuids and sample is not None and sample.at >= oldest:
            yield _member(device, name, sample)


def _member(device: Device, node: str, sample: GpuSample) -> Member:
    return Member(
        uuid=device.uuid,
        node=node,
        index=device.index,
        sm_clock_hertz=sample.sm_clock_hertz,
        memory_clock_hertz=sample.memory_clock_hertz,
        power_watts=sample.power_watts,
        utilization_ratio=sample.utilization_ratio,
        temperature_celsius=sample.temperature_celsius,
    )


def _places(fleet: Fleet) -> dict[str, Place]:
    """Return where each card is; one that two nodes list is where it was told of last."""
    places: dict[str, Place] = {}
    for name, node in fleet.nodes.items():
        for gpu in node.facts.gpus:
            known = fleet.conditions.get(gpu.uuid)
            if gpu.uuid not in places or (known is not None and known.node == name):
                places[gpu.uuid] = Place(name, gpu.pci_bus_id)
    return places


def _of_lemon(lemon: Lemon) -> Finding:
    return Finding(lemon.kind, lemon.node, lemon.uuid, lemon.slot, lemon.reason, lemon.since)


def _of_straggler(straggler: Straggler, places: dict[str, Place]) -> Finding:
    place = places.get(straggler.uuid)
    return Finding(
        STRAGGLER,
        straggler.node,
        straggler.uuid,
        place.slot if place else "",
        straggler.reason,
        straggler.since,
        straggler.allocation_id,
    )
