"""The fleet as it would be with some allocations elsewhere: put and taken, and nothing happens.

A `Board` is laid over a view. What is taken is as if its nodes had let go of it: neither its claims
nor the processes and the hold that a node reports for it stand in the way any more. A board may be
laid over another, tried out, and thrown away. The view below must not change meanwhile; `standing`
makes one that does not.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from dataclasses import replace
from functools import partial
from heapq import merge

from stoker.aggregator.changelog import ChangeLog
from stoker.aggregator.draft import Overlay
from stoker.aggregator.lives import claim_of
from stoker.aggregator.model import Allocation, AllocationState, Claim, NodeStatus, Placement
from stoker.aggregator.tables import Names, add_name, drop_name
from stoker.aggregator.verdicts import Condition
from stoker.aggregator.views import FleetView, GpuView, NodeView, view_node

_HOLDING = (AllocationState.GRANTED, AllocationState.RELEASING)
_NOTHING_REPORTED = NodeStatus()

Claims = tuple[Claim, ...]
_Rank = tuple[tuple[bool, int], str]


def standing(view: FleetView) -> FleetView:
    """Return the view with tables of its own, which stay as they are when the fleet goes on."""
    return replace(
        view,
        nodes=dict(view.nodes),
        fresh_until=dict(view.fresh_until),
        statuses=dict(view.statuses),
        allocations=dict(view.allocations),
        log=ChangeLog(view.log),
    )


class Board:
    """Allocations put and taken on a view; `view` shows what comes of it."""

    def __init__(
        self,
        view: FleetView,
        tenants: Mapping[str, tuple[str, ...]] | None = None,
        below: "Board | None" = None,
    ) -> None:
        """`tenants`: by node the ids of what it holds; counted from the view when left out.

        `below`: the board that the view is of.
        """
        self._below = below
        self._orders: dict[bool, list[_Rank]] = {}  # of the lowest board
        self.touched: dict[str, None] = dict(below.touched) if below else {}
        self._nodes: MutableMapping[str, NodeView] = Overlay(view.nodes)
        self._statuses: MutableMapping[str, NodeStatus] = Overlay(view.statuses)
        self._allocations: MutableMapping[str, Allocation] = Overlay(view.allocations)
        self._log = ChangeLog(view.log)
        self.tenants: Names = Overlay(_tenants(view) if tenants is None else tenants)
        self.view = replace(
            view,
            nodes=self._nodes,
            statuses=self._statuses,
            allocations=self._allocations,
            log=self._log,
        )

    def trial(self) -> "Board":
        """Return a board over this one, valid until something is put or taken here."""
        return Board(self.view, self.tenants, self)

    def fullest(self, *, for_shares: bool) -> Iterator[NodeView]:
        """Yield the nodes with room, the fullest first; for shares those that have shares before.

        Most nodes are as they were below the lowest board, where they are put in order once.
        """
        same = (r for r in self.order(for_shares=for_shares) if r[1] not in self.touched)
        for _, name in merge(same, self._ranked(self.touched, for_shares=for_shares)):
            yield self._nodes[name]

    def order(self, *, for_shares: bool) -> "list[_Rank]":
        """Return the nodes with room as they were on the lowest board; some may be touched since.

        What was touched there before it was put in order is touched on every board above it.
        """
        if self._below is not None:
            return self._below.order(for_shares=for_shares)
        if for_shares not in self._orders:
            untouched = (name for name in self._nodes if name not in self.touched)
            self._orders[for_shares] = self._ranked(untouched, for_shares=for_shares)
        return self._orders[for_shares]

    def _ranked(self, names: Iterable[str], *, for_shares: bool) -> "list[_Rank]":
        ranks: list[_Rank] = []
        for name in names:
            node = self._nodes[name]
            if node.room_bytes_max > 0:
                has_none = for_shares and not any(_is_shared(gpu) for gpu in node.gpus)
                ranks.append(((has_none, node.free_gpus), name))
        return sorted(ranks)

    def put(self, allocation: Allocation, placements: tuple[Placement, ...]) -> None:
        """Grant the allocation, which waited or is new, these placements."""
        granted = replace(allocation, state=AllocationState.GRANTED, placements=placements)
        self._allocations[granted.id] = granted
        for placement in placements:
            new: dict[str, Claims] = {}
            for device in placement.devices:
                claim = claim_of(granted.id, device)
                new[device.uuid] = (*new.get(device.uuid, ()), claim)
            add_name(self.tenants, placement.node, granted.id)
            self._show(placement.node, partial(_with, new))

    def take(self, id_: str) -> Allocation:
        """End the allocation, as if its nodes had let go of it; return it as it was."""
        known = self._allocations[id_]
        self._allocations[id_] = replace(known, state=AllocationState.ENDED)
        for name in known.nodes:
            drop_name(self.tenants, name, id_)
            self._statuses[name] = _without(self._statuses.get(name, _NOTHING_REPORTED), id_)
            self._show(name, lambda _, old: tuple(c for c in old if c.allocation_id != id_))
        return known

    def _show(self, name: str, claims_of: Callable[[str, Claims], Claims]) -> None:
        """View the node anew; `claims_of` gives a GPU's claims from its UUID and the old ones."""
        before = self._nodes[name]
        conditions = {
            gpu.gpu.uuid: Condition(gpu.gpu.uuid, name, cordon=gpu.cordon)
            for gpu in before.gpus
            if gpu.cordon is not None
        }
        self._nodes[name] = view_node(
            before.node,
            {gpu.gpu.uuid: claims_of(gpu.gpu.uuid, gpu.claims) for gpu in before.gpus},
            self._statuses.get(name, _NOTHING_REPORTED),
            conditions,
            [self._allocations[id_] for id_ in self.tenants.get(name, ())],
        )
        self._log.add(name)
        self.touched[name] = None


def _is_shared(gpu: GpuView) -> bool:
    return bool(gpu.claims) and gpu.room_bytes > 0


def _tenants(view: FleetView) -> Mapping[str, tuple[str, ...]]:
    found: dict[str, list[str]] = {}
    for allocation in view.allocations.values():
        if allocation.state in _HOLDING:
            for name in allocation.nodes:
                found.setdefault(name, []).append(allocation.id)
    return {name: tuple(sorted(ids)) for name, ids in found.items()}


def _with(new: Mapping[str, Claims], uuid: str, old: Claims) -> Claims:
    if uuid not in new:
        return old
    return tuple(sorted((*old, *new[uuid]), key=lambda one: one.allocation_id))


def _without(status: NodeStatus, id_: str) -> NodeStatus:
    """Return what the node would report without the allocation."""
    held, table = status.held, status.processes
    if held is not None and id_ in held:
        held = {each: what for each, what in held.items() if each != id_}
    if table is not None and any(p.allocation_id == id_ for p in table.processes):
        processes = tuple(p for p in table.processes if p.allocation_id != id_)
        table = replace(table, processes=processes)
    return replace(status, held=held, processes=table)
