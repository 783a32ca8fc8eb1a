"""What the policies go by, made from the mix of requests and the fleet, and made again in time."""

import numpy as np

from stoker.aggregator.model import COMPUTE_MILLI
from stoker.aggregator.placing import kernels as k
from stoker.aggregator.placing.columns import Columns
from stoker.aggregator.placing.filters import matches_gpu
from stoker.aggregator.placing.fragmentation import points, usual, worths
from stoker.aggregator.placing.kernels import Floats, Ints
from stoker.aggregator.placing.losses import SHORTFALLS, Losses, losses
from stoker.aggregator.placing.mix import Mix
from stoker.aggregator.placing.policies import Policies
from stoker.aggregator.placing.scarcity import Demand, Prices, demand, prices
from stoker.aggregator.placing.shapes import Card, Shape, Size, Take, size_of
from stoker.aggregator.placing.tasks import Task

# The mix is read again when so many requests have come since, at first when it has grown by a
# quarter; prices go by the fleet as well, and are looked at again after about a fiftieth of it.
# Both take longer on large fleets, which change less with each request.
MIX_READ_AFTER = 2_000
MIX_READ_FIRST = 10
PRICED_AFTER = 10
_ROWS_PER_REQUEST = 6
# What a fleet is asked for before anything has been: single whole GPUs with most of their part of
# the host. It counts as so many requests, that all others outweigh in the end.
PRIOR_WEIGHT = 2.0
PRIOR_PART = 0.9

_NO_INTS: Ints = np.zeros(0, np.int64)
_POINTS = points()


class Tables:
    """The tables of all policies, as arrays for the kernels."""

    def __init__(
        self, columns: Columns, policies: Policies, mix: Mix, *, is_learning: bool
    ) -> None:
        self.epoch = 0  # rises when the mix was read, so that no score holds any more
        self.priced = 0  # rises when `gains` are others; rows that matter to are marked as changed
        self.worth_left: Ints = np.zeros((1, 1, k.IDLE + 1), np.int64)
        self.worth_free: Ints = np.zeros((1, 1, 1), np.int64)
        self.levels: Ints = _NO_INTS
        self.points: Ints = _POINTS
        self.rests: Floats = np.zeros((1, k.IDLE + 1))
        self.drains: Floats = np.zeros((1, 4))
        self.shortfalls: Floats = SHORTFALLS
        self.jobs: Ints = np.zeros((0, 3), np.int64)
        self.job_prices: Floats = np.zeros((0, 1))
        # What the kernels have found each row to be worth, at which version of it.
        self.worths: Floats = np.zeros((0, 2))
        self.versions: Ints = _NO_INTS
        self._columns = columns
        modes = policies.modes()
        self._counts_losses = k.LOSS in modes
        self._counts_fragments = bool(modes & {k.FGD, k.LOSS})
        self._mix = mix
        self._is_learning = is_learning
        self._made_for = (-1, -1)  # cards, slots of the widest row
        self._read_at = 0  # how many had arrived when the mix was read
        self._losses: Losses | None = None
        self._demand: Demand | None = None
        self._prices: Prices | None = None
        self._asked = 0  # how often they were wanted since the prices were made

    def learn(self, shape: Shape) -> None:
        """Count a request in the mix."""
        if self._is_learning:
            self._mix.add(shape)

    def bring_up_to_date(self) -> None:
        """Make again what is due; called once for every request."""
        columns = self._columns
        made_for = (len(columns.cards), columns.slots.shape[1])
        if made_for != self._made_for or (self._is_learning and self._is_mix_due()):
            self._made_for = made_for
            self._read_mix()
        if len(self.versions) != len(columns.rows):
            self._forget_worths()
        self._asked += 1
        if self._asked >= max(PRICED_AFTER, columns.count // _ROWS_PER_REQUEST):
            self._price()

    def gains(self, shape: Shape) -> Floats:
        """Return by card what the shape itself is worth, less what its scarcity costs, in GPUs."""
        gains = np.zeros(max(1, len(self._columns.cards)))
        if self._losses is None or self._prices is None or shape.gpus == 0:
            return gains
        for number, card in enumerate(self._columns.cards):
            value = least = float(shape.gpus)
            size = size_of(shape, card)
            if shape.take is Take.SHARE:
                pieces = self._losses.prices[number]
                value, least = pieces.price_of(size.milli), pieces.least_of(size.milli)
            gains[number] = least - self._prices.scarcity[number] * value
        return gains

    # --- helpers

    def _is_mix_due(self) -> bool:
        since = self._mix.arrived - self._read_at
        seldom = max(MIX_READ_AFTER, self._columns.count // 2)
        return since >= min(seldom, max(MIX_READ_FIRST, self._read_at // 4))

    def _read_mix(self) -> None:
        self._read_at = self._mix.arrived
        self.epoch += 1
        cards = len(self._columns.cards)
        tasks = self._tasks()
        if self._counts_fragments and cards:
            worth = worths(usual(tasks), cards, self._columns.slots.shape[1])
            self.worth_left, self.worth_free = worth.left, worth.free
            self.levels = worth.levels
        if self._counts_losses and cards:
            self._losses = losses(tasks, cards, self._losses)
            self.rests, self.drains = self._losses.rests, self._losses.drains
            self._demand = demand(tasks, self._losses, cards)
            self.jobs = self._demand.jobs
            self._forget_worths()
            self._prices = None  # all scores are made anew
            self._price()

    def _forget_worths(self) -> None:
        self.worths = np.zeros((len(self._columns.rows), 2))
        self.versions = np.full(len(self._columns.rows), -1, np.int64)

    def _price(self) -> None:
        self._asked = 0
        if self._losses is None or self._demand is None:
            return
        before, after = self._prices, prices(self._demand, self._losses, self._columns)
        self._prices = after
        if before is None:
            self.job_prices = after.jobs
            self.priced += 1
            return
        is_dearer = before.scarcity != after.scarcity
        is_other = before.jobs != after.jobs
        if not is_dearer.any() and not is_other.any():
            return
        self.job_prices = after.jobs
        self.priced += 1
        rows = self._columns.rows[: self._columns.count]
        cards, free = rows[:, k.ROW_CARD], rows[:, k.ROW_FREE]
        # Only where a job could go does its price count.
        least = np.where(is_other, self.jobs[:, [k.JOB_GPUS]], free.max(initial=0) + 1)
        concerned = is_dearer[cards] | (free >= least.min(axis=0, initial=len(free))[cards])
        self._columns.mark(np.flatnonzero(concerned & (cards >= 0)))

    def _tasks(self) -> list[Task]:
        cards = self._columns.cards
        tasks: list[Task] = []
        for shape, weight in self._mix.shapes():
            if shape.take is Take.MIG:
                continue  # cards in MIG mode serve nobody else
            sizes = [size_of(shape, card) for card in cards]
            request = shape.sample()
            fits = tuple(
                shape.gpus > 0 and is_large_enough(size, card) and matches_gpu(request, gpu.gpu)
                for size, card, gpu in zip(sizes, cards, self._columns.card_samples, strict=True)
            )
            milli = tuple(
                size.milli if is_large_enough(size, card) else 0
                for size, card in zip(sizes, cards, strict=True)
            )
            tasks.append(
                Task(
                    cpu_milli=shape.cpu_milli,
                    memory_bytes=shape.host_memory_bytes,
                    gpus=shape.gpus,
                    is_share=shape.take is Take.SHARE,
                    milli=milli,
                    fits=fits,
                    weight=weight,
                )
            )
        if self._is_learning:
            tasks.append(self._prior())
        return tasks

    def _prior(self) -> Task:
        cpu = memory = gpus = 0
        for node in self._columns.nodes.values():
            facts = node.node.facts
            if facts.gpus:
                gpus += len(facts.gpus)
                cpu += facts.cpu_milli or 0
                memory += facts.host_memory_bytes or 0
        cards = len(self._columns.cards)
        return Task(
            cpu_milli=int(PRIOR_PART * cpu / max(1, gpus)),
            memory_bytes=int(PRIOR_PART * memory / max(1, gpus)),
            gpus=1,
            is_share=False,
            milli=(COMPUTE_MILLI,) * cards,
            fits=(True,) * cards,
            weight=PRIOR_WEIGHT * self._mix.weight_of_oldest,
        )


def is_large_enough(size: Size, card: Card) -> bool:
    """Whether a GPU of the card could give so much while nobody uses it."""
    return size.memory_bytes <= card.memory_total_bytes
