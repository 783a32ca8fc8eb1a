"""The scores of shapes on rows, kept up to date: only rows that changed since are scored again."""

from dataclasses import dataclass, replace

import numpy as np

from stoker.aggregator.model import COMPUTE_MILLI, Request
from stoker.aggregator.placing import kernels as k
from stoker.aggregator.placing.columns import Columns
from stoker.aggregator.placing.filters import matches_gpu
from stoker.aggregator.placing.kernels import Flags, Floats, Ints, Kernels, Keys, Slots
from stoker.aggregator.placing.mig_parts import is_mig_match
from stoker.aggregator.placing.node_filters import (
    asked_driver,
    asked_labels,
    asked_pool,
    gang_label,
)
from stoker.aggregator.placing.policies import Policies, Policy
from stoker.aggregator.placing.shapes import Shape, Take, size_of
from stoker.aggregator.placing.tables import Tables, is_large_enough

# Scores that are remembered, over all shapes; 5 bytes each. The shapes longest unused go first.
SCORES_MAX = 8_000_000
SHAPES_MIN = 64
_MIXED_MAX = 100_000  # points of a place that is the best for every part of a mixture


@dataclass(slots=True)
class Scores:
    """What is remembered of one shape under one policy."""

    request: Request  # one of the shape
    ask: Ints
    rule: Ints
    gains: Floats
    needs: Ints
    mig_ranks: Ints
    class_fits: Flags
    keys: Keys
    best: Slots
    position: int = -1  # in the log of the columns; -1: nothing is known
    generation: int = -1
    epoch: int = -1
    priced: int = -1
    classes: int = 0
    cards: int = -1  # that the needs are of; without any there is one row all the same
    kinds: int = 0  # of MIG devices that are ranked
    used_at: int = 0


class Scoring:
    """Scores shapes on the rows of `columns` by the policies and the mix of requests."""

    def __init__(
        self, columns: Columns, policies: Policies, tables: Tables, kernels: Kernels
    ) -> None:
        self.kernels = kernels
        self._columns = columns
        self._policies = policies
        self._tables = tables
        self._kept: dict[tuple[Shape, Policy, Policy | None], Scores] = {}
        self._uses = 0

    def scores(self, shape: Shape, policy: Policy, *, everywhere: bool) -> Scores:
        """Return the shape's scores under the policy as the columns are now.

        `everywhere`: also on nodes that follow another policy.
        """
        if not policy.parts:
            return self._scores(shape, policy, None if everywhere else policy)
        # Parts are made comparable: the worst place that fits is 0 for each of them, the best 1.
        owner = None if everywhere else policy
        parts = [(self._scores(shape, part, owner), weight) for part, weight in policy.parts]
        first = parts[0][0]
        fits = first.keys != k.NO_FIT
        total = np.zeros(len(first.keys))
        for part, weight in parts:
            points = (part.keys >> k.TIE_BITS).astype(np.float64)
            least, most = points[fits].min(initial=np.inf), points[fits].max(initial=-np.inf)
            if most > least:
                total += weight * (points - least) / (most - least)
        total *= _MIXED_MAX / sum(weight for _, weight in parts)
        mixed = (total.astype(np.int32) << k.TIE_BITS) | (first.keys & k.TIE_MAX)
        return replace(first, keys=np.where(fits, mixed, k.NO_FIT).astype(np.int32))

    def _scores(self, shape: Shape, policy: Policy, owner: Policy | None) -> Scores:
        """Return the scores on the nodes that follow `owner`; None: on all."""
        key = (shape, policy, owner)
        found = self._kept.get(key)
        if found is None:
            self._make_room()
            found = self._kept[key] = _new_scores(shape, policy)
        self._uses += 1
        found.used_at = self._uses
        self._bring_up_to_date(found, shape, owner)
        return found

    def slots_of(self, scores: Scores, row: int) -> list[int]:
        """Return all slots of the row that a share of the shape fits on."""
        count = int(self._columns.rows[row, k.ROW_SLOTS])
        slots = self._columns.slots[row, :count]
        needs = scores.needs[slots[:, k.SLOT_CARD]]
        parts = slots[:, k.SLOT_USABLE] * needs[:, k.NEED_COMPUTE] // COMPUTE_MILLI
        rooms = np.where(needs[:, k.NEED_ROOM] > 0, needs[:, k.NEED_ROOM], parts)
        fits = (
            (needs[:, k.NEED_FITS] == 1)
            & (slots[:, k.SLOT_ROOM] >= np.maximum(rooms, 1))
            & (slots[:, k.SLOT_COMPUTE] >= needs[:, k.NEED_COMPUTE])
        )
        return [int(slot) for slot in np.flatnonzero(fits)]

    # --- helpers

    def _bring_up_to_date(self, scores: Scores, shape: Shape, owner: Policy | None) -> None:
        columns = self._columns
        is_new = (
            scores.epoch != self._tables.epoch
            or scores.generation != columns.generation
            or scores.position < columns.log_start
            or columns.log_end - scores.position > columns.count
        )
        rows = len(columns.rows)
        if len(scores.keys) < rows:
            scores.keys = np.full(rows, k.NO_FIT, np.int32)
            scores.best = np.full(rows, -1, np.int8)
            is_new = True
        if not is_new and scores.position == columns.log_end:
            return
        if scores.cards != len(columns.cards):
            scores.needs = self._needs(scores.request, shape)
            scores.cards = len(columns.cards)
        if scores.priced != self._tables.priced:
            scores.gains = self._tables.gains(shape)
            scores.priced = self._tables.priced
        kinds = len(columns.mig_kinds)
        if scores.kinds != kinds or len(scores.mig_ranks) != columns.migs.shape[1]:
            scores.mig_ranks = self._mig_ranks(scores.request, shape)
            scores.kinds = kinds
        if scores.generation != columns.generation:
            scores.classes = 0
        if scores.classes != len(columns.classes):
            self._judge_classes(scores, owner)
        tables = self._tables
        start = -1 if is_new else scores.position - columns.log_start
        self.kernels.refresh(
            columns.rows[: columns.count],
            columns.slots,
            columns.migs,
            scores.class_fits,
            scores.needs,
            scores.mig_ranks,
            scores.ask,
            scores.rule,
            tables.worth_left,
            tables.worth_free,
            tables.levels,
            tables.points,
            tables.rests,
            tables.drains,
            tables.shortfalls,
            tables.jobs,
            tables.job_prices,
            scores.gains,
            tables.worths,
            tables.versions,
            columns.log,
            columns.last,
            start,
            columns.log_end - columns.log_start,
            scores.keys,
            scores.best,
        )
        scores.position = columns.log_end
        scores.epoch = self._tables.epoch
        scores.generation = columns.generation

    def _make_room(self) -> None:
        rows = max(1, self._columns.rows.shape[0])
        if len(self._kept) >= max(SHAPES_MIN, SCORES_MAX // rows):
            oldest = sorted(self._kept, key=lambda key: self._kept[key].used_at)
            for key in oldest[: len(oldest) // 4]:
                del self._kept[key]

    def _judge_classes(self, scores: Scores, owner: Policy | None) -> None:
        columns, request = self._columns, scores.request
        fits = np.zeros(len(columns.classes), np.uint8)
        fits[: scores.classes] = scores.class_fits[: scores.classes]
        for number in range(scores.classes, len(fits)):
            node = columns.class_samples[number]
            is_ours = owner is None or self._policies.of(node.node.facts.pool) is owner
            fits[number] = is_ours and not (
                asked_pool(request, node)
                or asked_labels(request, node)
                or asked_driver(request, node)
                or gang_label(request, node)
            )
        scores.class_fits = fits
        scores.classes = len(fits)

    def _needs(self, request: Request, shape: Shape) -> Ints:
        columns = self._columns
        needs = np.zeros((max(1, len(columns.cards)), k.NEED_COLUMNS), np.int64)
        for number, card in enumerate(columns.cards):
            size = size_of(shape, card)
            gpu = columns.card_samples[number].gpu
            fits = matches_gpu(request, gpu) and is_large_enough(size, card)
            is_part = shape.take is Take.SHARE and shape.memory_bytes is None
            room = 0 if is_part else size.memory_bytes
            needs[number] = (fits, room, size.compute_milli, size.milli)
        return needs

    def _mig_ranks(self, request: Request, shape: Shape) -> Ints:
        """Return for each kind of MIG device which would be taken first; -1: never."""
        columns = self._columns
        ranks = np.full(columns.migs.shape[1], -1, np.int64)
        if shape.take is not Take.MIG:
            return ranks
        fitting = [
            (memory, number)
            for number, (_, memory, card) in enumerate(columns.mig_kinds)
            if matches_gpu(request, columns.card_samples[card].gpu)
            and is_mig_match(request, columns.mig_samples[number], columns.card_samples[card].gpu)
        ]
        sizes = sorted({memory for memory, _ in fitting})
        for memory, number in fitting:
            ranks[number] = sizes.index(memory)
        return ranks


def _new_scores(shape: Shape, policy: Policy) -> Scores:
    ask = np.zeros(k.ASK_COLUMNS, np.int64)
    ask[k.ASK_TAKE] = shape.take
    ask[k.ASK_GPUS] = shape.gpus
    ask[k.ASK_CPU] = shape.cpu_milli
    ask[k.ASK_MEMORY] = shape.host_memory_bytes
    ask[k.ASK_KIND] = 0 if shape.take is Take.SHARE else min(shape.gpus, 60)
    return Scores(
        shape.sample(),
        ask,
        np.array([policy.mode, policy.tie], np.int64),
        np.zeros(0, np.float64),
        np.zeros((0, k.NEED_COLUMNS), np.int64),
        np.zeros(0, np.int64),
        np.zeros(0, np.uint8),
        np.zeros(0, np.int32),
        np.zeros(0, np.int8),
    )
