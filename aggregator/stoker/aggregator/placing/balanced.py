"""The policy `balanced`: to the GPU that is least loaded, by what it does and what it was promised.

Theory of operation. Of each GPU it estimates how busy its compute and how full its memory will be
once everything that was granted has started:

    estimate = min(measured + sum(w * share), max(measured, promised))

`measured` is the newest sample's utilisation, and its used memory over all memory. `share` is what
one allocation was promised of the GPU (where no compute was promised, the same part of it as of the
memory), `promised` the sum over all of them. `w` says how much of an allocation a sample cannot
have seen: 1 when it was taken before the grant, falling to 0 over SETTLE_SECONDS after, in which a
service starts and loads its model. So a burst sees its own grants, also those of the same round,
and is not heaped on whichever GPU happened to look idle in the last sample. What an allocation is
seen to use and still counted for is bounded by the promise. Without a sample, or where the card
does not tell, the estimate is what is promised: unknown is never idle.

The load that a request would leave is the smooth maximum (c^4 + m^4)^(1/4) of compute and memory
with the request's own share in it: the scarcer of the two decides, the other one a little. Greedy
choice of the least in such a norm is what Awerbuch, Azar et al. (Load balancing in the Lp norm,
FOCS 1995) prove to stay within a constant of the best; to count what was just bound and is not
measured yet is how Trimaran's plugins for the Kubernetes scheduler keep from a herd.

Hysteresis: loads within HYSTERESIS of the least are equal, and among equals go first the least
promised memory, then the node's name, then the GPU's index. So the noise of a reading does not
move requests about. Whole GPUs go to the node with the least mean load of its GPUs, likewise.

What it costs: estimates are kept for each node and made anew when its view or its samples are
others than they were (about 3 us for each GPU). A decision then looks once at each node (0.1 us)
and, for parts of GPUs, at each GPU in compiled loops (10 ns).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from stoker.aggregator.model import COMPUTE_MILLI, GpuSample, NodeStatus, Placement, Plan, Request
from stoker.aggregator.placing.devices import choose, gpus_for_part
from stoker.aggregator.placing.preferences import Tiers, has_preferences
from stoker.aggregator.views import FleetView, GpuView, NodeView

# How long after its grant an allocation shows all of its load: processes start, models are loaded.
SETTLE_SECONDS = 30.0
# Differences of load that are none: about what utilisation swings by from second to second.
HYSTERESIS = 0.05

_POWER = 4
_NOBODY = ""  # has the number 0
_ROWS_FIRST = 1024
_GPUS_PER_NODE_MAX = 1 << 16  # in the order of ties

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Load:
    """What is made of one GPU, as parts of it; beyond 1 more is promised than there is."""

    compute: float
    memory: float
    promised_memory: float

    @property
    def norm(self) -> float:
        """Both as one number."""
        return float((self.compute**_POWER + self.memory**_POWER) ** (1 / _POWER))


def estimate(
    gpu: GpuView, sample: GpuSample | None, view: FleetView, settle_seconds: float = SETTLE_SECONDS
) -> Load:
    """Return the load of a GPU once everything that was granted has started.

    With `settle_seconds` of 0 what was measured is believed: grants are counted only where nothing
    was measured.
    """
    total = gpu.gpu.memory_total_bytes
    promised_compute = promised_memory = unseen_compute = unseen_memory = 0.0
    for claim in gpu.claims:
        memory = 1.0 if claim.memory_bytes is None else claim.memory_bytes / total
        compute = claim.compute_milli / COMPUTE_MILLI if claim.compute_milli else memory
        promised_compute += compute
        promised_memory += memory
        allocation = view.allocations.get(claim.allocation_id)
        granted_at = allocation.granted_at if allocation is not None else None
        if sample is not None and granted_at is not None and settle_seconds > 0:
            seen = (sample.at - granted_at) / settle_seconds
            unseen = 1.0 - min(1.0, max(0.0, seen))
            unseen_compute += unseen * compute
            unseen_memory += unseen * memory
    compute, memory = promised_compute, promised_memory
    if sample is not None and sample.utilization_ratio is not None:
        used = sample.utilization_ratio
        compute = min(used + unseen_compute, max(used, promised_compute))
    if sample is not None and sample.memory_used_bytes is not None:
        used = sample.memory_used_bytes / total
        memory = min(used + unseen_memory, max(used, promised_memory))
    return Load(compute, memory, promised_memory)


@dataclass(slots=True)
class _Known:
    """A node as it was when its loads were estimated."""

    node: NodeView
    status: NodeStatus | None
    number: int  # in the table of nodes
    start: int  # its first GPU in the table of GPUs


class Balancer:
    """Finds the least loaded place among nodes that fit; kept from round to round.

    Estimates are kept with the very values that they were made of, so that a draft that was thrown
    away leaves nothing behind.
    """

    def __init__(
        self, settle_seconds: float = SETTLE_SECONDS, hysteresis: float = HYSTERESIS
    ) -> None:
        self._settle_seconds = settle_seconds
        self._hysteresis = hysteresis
        self._known: dict[str, _Known] = {}
        self._names = [_NOBODY]  # by number
        self._order: Ints = np.zeros(0, np.int64)  # of the nodes by name, by number
        self._gpus = _Gpus()

    def find(self, request: Request, view: FleetView, names: Iterable[str]) -> Plan | None:
        """Return the least loaded place on one node; None: `names` has none.

        `names` are nodes that fit. What the request prefers goes before the load.
        """
        able = list(names)
        if has_preferences(request) and able:
            tiers = Tiers(request, view)
            met = {name: tiers.of(view.nodes[name]) for name in able}
            best = min(met.values())
            able = [name for name in able if met[name] == best]
        if request.is_whole:
            ordered = self.ordered(view, able)
            return _plan(request, view, ordered[0], ()) if ordered else None
        return self._find_part(request, view, able)

    def ordered(self, view: FleetView, names: Iterable[str]) -> list[str]:
        """Return the nodes by the mean load of their GPUs, the least loaded first."""
        numbers = [self._take_in(name, view).number for name in names]
        if not numbers:
            return []
        gpus = self._gpus
        loads = gpus.mean_by_node(_norm(gpus.compute, gpus.memory), len(self._names))[numbers]
        promised = gpus.mean_by_node(gpus.promised, len(self._names))[numbers]
        over = loads - loads.min()
        over[over <= self._hysteresis] = 0.0
        best_first = np.lexsort((self._node_order()[numbers], promised, over))
        return [self._names[numbers[place]] for place in best_first]

    def _find_part(self, request: Request, view: FleetView, names: Sequence[str]) -> Plan | None:
        numbers = [self._take_in(name, view).number for name in names]
        gpus = self._gpus
        is_able = np.zeros(len(self._names), np.bool_)
        is_able[numbers] = True
        after, fits = gpus.loads_with(request)
        fits &= is_able[gpus.node_numbers]
        while fits.any():
            row = self._least_loaded(np.where(fits, after, np.inf))
            node = self._known[self._names[gpus.node_numbers[row]]].node
            uuid = gpus.uuids[row]
            # The filters have the last word: on the model, and on who else is there.
            if any(gpu.gpu.uuid == uuid for gpu in gpus_for_part(request, node)):
                return _plan(request, view, node.name, (uuid,))
            fits[row] = False
        return None

    def _least_loaded(self, after: Floats) -> int:
        gpus = self._gpus
        (near,) = np.nonzero(after <= after.min() + self._hysteresis)
        promised = gpus.promised[near]
        near = near[promised == promised.min()]
        order = (
            self._node_order()[gpus.node_numbers[near]] * _GPUS_PER_NODE_MAX + gpus.indexes[near]
        )
        return int(near[np.argmin(order)])

    def _node_order(self) -> Ints:
        if len(self._order) != len(self._names):
            by_name = sorted(range(len(self._names)), key=self._names.__getitem__)
            self._order = np.zeros(len(self._names), np.int64)
            self._order[by_name] = np.arange(len(by_name))
        return self._order

    def _take_in(self, name: str, view: FleetView) -> _Known:
        """Return the node; what is known of its GPUs is made anew if it is not what it was."""
        node, status = view.nodes[name], view.statuses.get(name)
        known = self._known.get(name)
        if known is not None and known.node is node and known.status is status:
            return known
        if known is None or len(known.node.gpus) != len(node.gpus):
            if known is None:
                known = self._known[name] = _Known(node, status, len(self._names), 0)
                self._names.append(name)
            else:
                self._gpus.drop(known.start, len(known.node.gpus))
            known.start = self._gpus.add([gpu.gpu.uuid for gpu in node.gpus])
            self._gpus.describe(known.start, known.number, node.gpus)
        elif known.node is not node:
            self._gpus.describe(known.start, known.number, node.gpus)
        known.node, known.status = node, status
        samples = (status.samples if status is not None else None) or {}
        loads = [
            estimate(gpu, samples.get(gpu.gpu.uuid), view, self._settle_seconds)
            for gpu in node.gpus
        ]
        self._gpus.load(known.start, loads)
        return known


class _Gpus:
    """GPUs as columns; those of one node stand side by side."""

    def __init__(self) -> None:
        self.uuids: list[str] = []
        self._floats: Floats = np.zeros((3, _ROWS_FIRST))
        self._ints: Ints = np.zeros((6, _ROWS_FIRST), np.int64)

    @property
    def compute(self) -> Floats:
        """How busy they are, as a part of them."""
        return self._floats[0, : len(self.uuids)]

    @property
    def memory(self) -> Floats:
        """How full they are, as a part of them."""
        return self._floats[1, : len(self.uuids)]

    @property
    def promised(self) -> Floats:
        """How much of the memory is promised, as a part of it."""
        return self._floats[2, : len(self.uuids)]

    @property
    def node_numbers(self) -> Ints:
        """Whose they are."""
        return self._ints[0, : len(self.uuids)]

    @property
    def indexes(self) -> Ints:
        """Their positions in PCI order."""
        return self._ints[1, : len(self.uuids)]

    def mean_by_node(self, values: Floats, nodes: int) -> Floats:
        """Return for each node the mean of what is told of each GPU."""
        counts = np.bincount(self.node_numbers, minlength=nodes)
        sums = np.bincount(self.node_numbers, weights=values, minlength=nodes)
        return sums / np.maximum(counts, 1)

    def add(self, uuids: Sequence[str]) -> int:
        """Return the first of the rows for these."""
        start = len(self.uuids)
        self.uuids += uuids
        while len(self.uuids) > self._ints.shape[1]:
            self._floats = np.concatenate((self._floats, np.zeros_like(self._floats)), axis=1)
            self._ints = np.concatenate((self._ints, np.zeros_like(self._ints)), axis=1)
        return start

    def drop(self, start: int, count: int) -> None:
        """Let these rows be nobody's; hosts that are rebuilt are too few to use them again."""
        self._ints[:, start : start + count] = 0
        self._floats[:, start : start + count] = 0.0

    def describe(self, start: int, number: int, gpus: Sequence[GpuView]) -> None:
        """Write what the GPUs of a node are and have left."""
        rows = [
            (
                *(number, gpu.gpu.index, gpu.usable_bytes, gpu.room_bytes),
                *(gpu.compute_free_milli, len(gpu.mig_free)),
            )
            for gpu in gpus
        ]
        self._ints[:, start : start + len(rows)] = np.array(rows, np.int64).reshape(-1, 6).T

    def load(self, start: int, loads: Sequence[Load]) -> None:
        """Write the loads of a node."""
        rows = [(load.compute, load.memory, load.promised_memory) for load in loads]
        self._floats[:, start : start + len(rows)] = np.array(rows).reshape(-1, 3).T

    def loads_with(self, request: Request) -> tuple[Floats, Flags]:
        """Return the load of each GPU with a part of it given to `request`, and where that fits."""
        count = len(self.uuids)
        compute, memory, _ = self._floats[:, :count]
        _, _, totals, rooms, millis, mig_devices = self._ints[:, :count]
        if request.memory_bytes is not None:
            sizes = np.full(count, request.memory_bytes, np.int64)
        else:
            sizes = totals * (request.compute_milli or 0) // COMPUTE_MILLI
        memory_share = sizes / np.maximum(totals, 1)
        compute_share = memory_share
        if request.compute_milli is not None:
            compute_share = np.full(count, request.compute_milli / COMPUTE_MILLI)
        if request.mig_profile is not None:
            fits = mig_devices > 0
        else:
            fits = (rooms > 0) & (rooms >= sizes) & (millis >= (request.compute_milli or 0))
        return _norm(compute + compute_share, memory + memory_share), fits


def _norm(compute: Floats, memory: Floats) -> Floats:
    # Multiplied out: numpy's power of floats takes ten times as long.
    return np.sqrt(np.sqrt((compute * compute) ** 2 + (memory * memory) ** 2))


def _plan(request: Request, view: FleetView, name: str, prefer: Sequence[str]) -> Plan:
    devices = choose(request, view.nodes[name], view, prefer)
    assert devices is not None, f"{name} fits no more: {request}"
    return Plan((Placement(name, devices),))
