"""The fleet as flat columns: one row per node and GPU model, as the kernels read them.

Only what is other than it was is written, and only rows that really differ are logged as changed:
a node whose temperature was told again, or that a stored round shows once more as its draft did,
costs no new score.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from stoker.aggregator.model import COMPUTE_MILLI, Gpu, MigDevice
from stoker.aggregator.placing import kernels as k
from stoker.aggregator.placing.kernels import Ints
from stoker.aggregator.placing.shapes import Card, card_of
from stoker.aggregator.views import GpuView, NodeView

# Label names that requests have asked about; beyond that the classes are made anew.
LABELS_MAX = 32
# The log of changed rows is cut when it is so much longer than there are rows.
_LOG_FACTOR = 4
_LOG_MIN = 4096
_POWER_WATTS_MAX = 1500.0
# A host that idles would have to be paid for whole, so those in use go before all that idle.
_IN_USE = 512

Class = tuple[str, str, tuple[str | None, ...]]  # pool, driver version, values of the asked labels
MigKind = tuple[str, int, int]  # profile, bytes, card


@dataclass(slots=True)
class _Row:
    """What was written of a row, to compare with."""

    number: int
    model: str
    gpus: tuple[GpuView, ...]  # those of the model, in PCI order
    slots: list[tuple[int, ...]]
    migs: dict[int, int]
    fixed: tuple[int, ...] = ()  # columns of what stays with the inventory
    moving: tuple[int, ...] = ()  # columns of what changes with every grant
    thrift: int = 0
    is_even: bool = False  # no two of its GPUs lie better to each other than any others


class Columns:
    """The rows of all nodes that were loaded; see the module's sentence.

    Arrays are replaced when they grow, so readers take them anew for each use.
    """

    def __init__(self, *, keeps_kinds: bool = False) -> None:
        """`keeps_kinds`: what kinds of task are on each node shall be told too."""
        self.rows: Ints = np.zeros((0, k.ROW_COLUMNS), np.int64)
        self.slots: Ints = np.zeros((0, 1, k.SLOT_COLUMNS), np.int64)
        self.migs: Ints = np.zeros((0, 1), np.int64)
        self.count = 0  # of rows in use; those beyond are empty
        self.row_nodes: list[str] = []  # the node of each row
        self.cards: list[Card] = []
        self.card_samples: list[GpuView] = []  # one GPU of each card
        self.classes: list[Class] = []
        self.class_samples: list[NodeView] = []  # one node of each class
        self.mig_kinds: list[MigKind] = []
        self.mig_samples: list[MigDevice] = []  # one device of each kind
        self.labels: tuple[str, ...] = ()
        self.generation = 0  # rises when classes are made anew
        self.naming = 0  # rises when a row is given to another node
        self.log: Ints = np.zeros(_LOG_MIN, np.int64)
        self.last: Ints = np.zeros(0, np.int64)
        self.log_start = 0  # the position, since ever, of the first entry of `log`
        self.log_end = 0
        self._keeps_kinds = keeps_kinds
        self._card_ids: dict[Card, int] = {}
        self._class_ids: dict[Class, int] = {}
        self._mig_ids: dict[MigKind, int] = {}
        self._rows: dict[str, tuple[_Row, ...]] = {}
        self._nodes: dict[str, NodeView] = {}
        self._aside: set[str] = set()
        self._unused: list[int] = []

    # --- reading

    @property
    def nodes(self) -> Mapping[str, NodeView]:
        """The nodes as they were loaded last."""
        return self._nodes

    def rows_of(self, node: str) -> list[int]:
        """Return the numbers of a node's rows; none for a node that is not known."""
        return [row.number for row in self._rows.get(node, ())]

    def gpus_of(self, row: int) -> tuple[GpuView, ...]:
        """Return the GPUs of a row, as they were loaded last."""
        return self._row(row).gpus

    def is_even(self, row: int) -> bool:
        """Whether it is all the same which of the row's free GPUs go together."""
        return self._row(row).is_even

    def is_aside(self, node: str) -> bool:
        """Whether the node was put aside."""
        return node in self._aside

    def aside(self) -> list[str]:
        """Return the nodes that were put aside."""
        return sorted(self._aside)

    # --- changing

    def put_aside(self, node: str) -> None:
        """Let nothing fit on the node until it is loaded again."""
        self._aside.add(node)
        for row in self._rows[node]:
            self._write_moving(row, _closed(row.moving))

    def remove(self, node: str) -> None:
        """Forget the node."""
        for row in self._rows.pop(node):
            self._free_row(row)
        del self._nodes[node]
        self._aside.discard(node)

    def load(self, node: NodeView) -> None:
        """Take the node as it is now."""
        name = node.name
        before = self._nodes.get(name)
        is_same = before is not None and before.node.facts is node.node.facts
        if not is_same and (before is None or _models(node) != _models(before)):
            for row in self._rows.get(name, ()):
                self._free_row(row)
            self._rows[name] = self._new_rows(node)
        rows = self._rows[name]
        self._nodes[name] = node
        self._aside.discard(name)
        for nth, row in enumerate(rows):
            gpus = node.gpus
            if len(rows) > 1:
                gpus = tuple(gpu for gpu in gpus if gpu.gpu.model == row.model)
            self._write_slots(row, gpus)
            row.gpus = gpus
            if not is_same:
                self._write_fixed(row, node, is_first=nth == 0)
            free = left = 0
            for slot in row.slots:
                left += slot[k.SLOT_LEFT]
                free += slot[k.SLOT_LEFT] == k.IDLE
            is_idle = left == k.IDLE * len(row.slots)
            moving = (
                1 if node.node.cordoned is None and not node.problem else 0,
                # A host that tells of no CPUs has none for those that want some.
                node.cpu_free_milli or 0,
                node.host_memory_free_bytes or 0,
                free,
                left,
                row.thrift if is_idle else row.thrift + _IN_USE,
                _kinds(node) if self._keeps_kinds else 0,
            )
            if moving != row.moving:
                self._write_moving(row, moving)

    def ask_labels(self, names: set[str]) -> None:
        """Tell nodes apart by these labels from now on."""
        if names <= set(self.labels):
            return
        wanted = names | set(self.labels)
        self.labels = tuple(sorted(wanted if len(wanted) <= LABELS_MAX else names))
        self.generation += 1
        self.classes.clear()
        self.class_samples.clear()
        self._class_ids.clear()
        for name, node in self._nodes.items():
            class_id = self._class_id(node)
            for row in self._rows[name]:
                row.fixed = (class_id, *row.fixed[k.ROW_CARD :])
                self.rows[row.number, k.ROW_CLASS] = class_id

    def mark(self, numbers: Ints) -> None:
        """Log these rows as changed, though only what they are judged by has."""
        for number in numbers.tolist():
            self._log(number)

    # --- helpers

    def _row(self, number: int) -> _Row:
        rows = self._rows[self.row_nodes[number]]
        return next(row for row in rows if row.number == number)

    def _class_id(self, node: NodeView) -> int:
        facts = node.node.facts
        labels = facts.labels or {}
        key = (facts.pool, facts.driver_version, tuple(labels.get(name) for name in self.labels))
        found = self._class_ids.get(key)
        if found is None:
            found = self._class_ids[key] = len(self.classes)
            self.classes.append(key)
            self.class_samples.append(node)
        return found

    def _card_id(self, gpu: GpuView) -> int:
        card = card_of(gpu.gpu)
        found = self._card_ids.get(card)
        if found is None:
            found = self._card_ids[card] = len(self.cards)
            self.cards.append(card)
            self.card_samples.append(gpu)
        return found

    def _mig_id(self, gpu: GpuView, device: MigDevice) -> int:
        kind = (device.profile, device.memory_total_bytes, self._card_id(gpu))
        found = self._mig_ids.get(kind)
        if found is None:
            found = self._mig_ids[kind] = len(self.mig_kinds)
            self.mig_kinds.append(kind)
            self.mig_samples.append(device)
            if found >= self.migs.shape[1]:
                more = np.zeros((self.migs.shape[0], max(4, found)), np.int64)
                self.migs = np.concatenate([self.migs, more], axis=1)
        return found

    def _new_rows(self, node: NodeView) -> tuple[_Row, ...]:
        return tuple(_Row(self._take_row(node.name), model, (), [], {}) for model in _models(node))

    def _take_row(self, node: str) -> int:
        self.naming += 1
        if self._unused:
            number = self._unused.pop()
            self.row_nodes[number] = node
            return number
        number = self.count
        self.count += 1
        self.row_nodes.append(node)
        if number >= self.rows.shape[0]:
            more = max(64, number)
            self.rows = _grown(self.rows, more)
            self.slots = _grown(self.slots, more)
            self.migs = _grown(self.migs, more)
            self.last = _grown(self.last, more)
        return number

    def _free_row(self, row: _Row) -> None:
        self.rows[row.number, : k.ROW_VERSION] = 0
        self.slots[row.number] = 0
        self.migs[row.number] = 0
        self._log(row.number)
        self._unused.append(row.number)

    def _write_fixed(self, row: _Row, node: NodeView, *, is_first: bool) -> None:
        gpus = [gpu.gpu for gpu in row.gpus]
        cards = {slot[k.SLOT_CARD] for slot in row.slots}
        fixed = (
            self._class_id(node),
            row.slots[0][k.SLOT_CARD] if row.slots else -1,
            len(row.slots),
            1 if len(cards) > 1 else 0,
            1 if is_first else 0,
        )
        row.thrift = _thrift(gpus)
        row.is_even = len(cards) == 1 and _is_even(gpus)
        if fixed != row.fixed:
            row.fixed = fixed
            self.rows[row.number, : k.ROW_OPEN] = fixed
            self._log(row.number)

    def _write_migs(self, row: _Row, gpus: tuple[GpuView, ...]) -> bool:
        migs: dict[int, int] = {}
        for gpu in gpus:
            for device in gpu.mig_free:
                kind = self._mig_id(gpu, device)
                migs[kind] = migs.get(kind, 0) + 1
        if migs == row.migs:
            return False
        row.migs = migs
        self.migs[row.number] = 0
        for kind, free in migs.items():
            self.migs[row.number, kind] = free
        return True

    def _write_moving(self, row: _Row, moving: tuple[int, ...]) -> None:
        row.moving = moving
        self.rows[row.number, k.ROW_OPEN : k.ROW_VERSION] = moving
        self._log(row.number)

    def _write_slots(self, row: _Row, gpus: tuple[GpuView, ...]) -> None:
        """Write those of the row's GPUs that are other values than they were."""
        if len(gpus) > self.slots.shape[1]:
            wider = np.zeros((self.slots.shape[0], len(gpus), k.SLOT_COLUMNS), np.int64)
            wider[:, : self.slots.shape[1]] = self.slots
            self.slots = wider
        before = row.gpus
        is_as_long = len(before) == len(gpus)
        if not is_as_long:
            self.slots[row.number] = 0
            row.slots = [(0,) * k.SLOT_COLUMNS] * len(gpus)
        changed = has_migs = False
        for place, gpu in enumerate(gpus):
            if gpu.mig_free:
                has_migs = True
            if is_as_long and before[place] is gpu:
                continue
            slot = (
                *(self._card_id(gpu), _left(gpu), gpu.room_bytes, gpu.compute_free_milli),
                gpu.usable_bytes,
            )
            if slot != row.slots[place]:
                row.slots[place] = slot
                self.slots[row.number, place] = slot
                changed = True
        if has_migs or row.migs:
            changed = self._write_migs(row, gpus) or changed
        if changed:
            self._log(row.number)

    def _log(self, number: int) -> None:
        end = self.log_end - self.log_start
        if end >= len(self.log):
            room = max(_LOG_MIN, _LOG_FACTOR * self.rows.shape[0])
            kept = min(end, room // 2)
            self.log_start += end - kept
            log = np.zeros(room, np.int64)
            log[:kept] = self.log[end - kept : end]
            self.log = log
            # Where a row was named last before the cut, no reader looks any more.
            self.last -= end - kept
            end = kept
        self.rows[number, k.ROW_VERSION] += 1
        self.log[end] = number
        self.last[number] = end
        self.log_end += 1


def _left(gpu: GpuView) -> int:
    """Return how many thousandths of it are left, by memory and compute; all only if it is idle."""
    if gpu.is_free:
        return k.IDLE
    usable = gpu.usable_bytes
    if usable <= 0 or gpu.room_bytes <= 0:
        return 0
    by_memory = gpu.room_bytes * COMPUTE_MILLI // usable
    return max(0, min(by_memory, gpu.compute_free_milli, k.IDLE - 1))


def _closed(moving: tuple[int, ...]) -> tuple[int, ...]:
    return (0, *moving[k.ROW_CPU - k.ROW_OPEN :])


def _thrift(gpus: Sequence[Gpu]) -> int:
    """Return how little the cards may draw, 0..511: more for those that may draw less.

    Limits are of the card, not measured: what a card draws now says nothing about what it will
    draw with one more tenant.
    """
    limit = max((gpu.power_limit_watts or 0.0 for gpu in gpus), default=0.0)
    return round(511 * (1.0 - min(limit, _POWER_WATTS_MAX) / _POWER_WATTS_MAX))


def _is_even(gpus: Sequence[Gpu]) -> bool:
    """Whether any GPUs of these lie to each other as any others do."""
    return len({(gpu.numa_node, gpu.nvswitch_links) for gpu in gpus}) <= 1 and not any(
        gpu.nvlink_peers for gpu in gpus
    )


def _kinds(node: NodeView) -> int:
    """Return which kinds of task are on the node, one bit each: shares, and so many whole GPUs."""
    gpus: dict[str, int] = {}
    kinds = 0
    for gpu in node.gpus:
        for claim in gpu.claims:
            if claim.memory_bytes is None:
                gpus[claim.allocation_id] = gpus.get(claim.allocation_id, 0) + 1
            else:
                kinds |= 1
    for count in gpus.values():
        kinds |= 1 << min(count, 60)
    return kinds


def _models(node: NodeView) -> list[str]:
    return list(dict.fromkeys(gpu.gpu.model for gpu in node.gpus)) or [""]


def _grown(array: Ints, more: int) -> Ints:
    return np.concatenate([array, np.zeros((more, *array.shape[1:]), np.int64)])
