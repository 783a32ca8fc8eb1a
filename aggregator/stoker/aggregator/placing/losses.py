"""How many GPUs a placement is expected to lose: the tables of the policy `fragmentation`.

A node is worth as many GPUs as the requests to come can use of it. A placement is scored by how
much more than its own share the node's worth falls by: what it *loses*. Everything is counted in
GPUs, so that no weights have to balance one kind of loss against another:

    worth = usable - max(L(CPU), L(memory)) + kept + 0.1 * (idle - F)
    usable = sum over the devices of V[thousandths left]

*Cut badly.* V[w] is what w thousandths of a GPU are worth where GPUs are cut well (`prices`).

*Run out of CPU or memory before GPUs.* To use its GPUs up, a node will be asked for about
`rho * usable` CPUs, give or take `sigma * sqrt(usable)`: rho is what the requests for its card take
per GPU, sigma how much that varies. What it is expected to want for is the newsvendor's loss,

    L(c) = s/rho * g((rho * usable - c) / s),  s = sigma * sqrt(usable),  g(z) = phi(z) + z * Phi(z)

(Arrow, Harris and Marschak, "Optimal inventory policy", Econometrica 1951), in GPUs. The policy
itself chooses what goes where, so the spread that a node really meets is less than that of a random
filling: sigma is taken KAPPA times.

The scarcer of the two decides: a GPU is lost once.

*Taken from those who can use nothing else.* `scarcity` prices models that are asked for by name,
and places for jobs of several GPUs (`kept`), by Littlewood's rule.

*Left in fragments.* A tenth of FGD's fragmentation F counts as well. While a fleet fills up it
changes nothing, the other terms see further; but where tenants come and go on a full fleet, it is
what tells which of the rests that they leave is the most use. A request that wants no GPU is not
held to it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import erf, exp, pi, sqrt

import numpy as np

from stoker.aggregator.placing import kernels as k
from stoker.aggregator.placing.kernels import Floats
from stoker.aggregator.placing.prices import NOTHING_CUT, Prices, cut
from stoker.aggregator.placing.tasks import Task

# Of the spread that a random filling would meet; 0.25..0.75 make no difference worth telling.
KAPPA = 0.5


def _shortfall(z: float) -> float:
    density = exp(-z * z / 2.0) / sqrt(2.0 * pi)
    return density + z * 0.5 * (1.0 + erf(z / sqrt(2.0)))


# Of a normal variable above z, expected; z in steps from -DEVIATIONS to DEVIATIONS.
SHORTFALLS: Floats = np.array(
    [
        0.0 if place == 0 else _shortfall(place / k.PER_DEVIATION - k.DEVIATIONS)
        for place in range(2 * k.DEVIATIONS * k.PER_DEVIATION + 1)
    ]
)


@dataclass(frozen=True, slots=True)
class Losses:
    """The tables that follow from the mix of requests alone."""

    prices: tuple[Prices, ...]  # by card
    rests: Floats  # [card, thousandths left]: V
    drains: Floats  # [card, rho and sigma of CPU, then of memory]

    def value_of(self, task: Task, card: int) -> float:
        """Return how many GPUs the task takes of the card, where it is cut well."""
        return _value_of(task, card, self.prices[card])


def losses(tasks: Sequence[Task], cards: int, before: Losses | None = None) -> Losses:
    """Return the tables for the tasks of a mix on so many cards.

    `before`: those of a mix like this one; they only save time.
    """
    known: dict[tuple[tuple[int, float], ...], Prices] = {}
    prices: list[Prices] = []
    for card in range(cards):
        wanted: dict[int, float] = {}
        for task in tasks:
            if task.is_share and task.milli[card] > 0:
                wanted[task.milli[card]] = wanted.get(task.milli[card], 0.0) + task.weight
        key = tuple(sorted(wanted.items()))
        if key not in known:
            is_like = before is not None and card < len(before.prices)
            patterns = before.prices[card].patterns if before is not None and is_like else ()
            known[key] = cut(wanted, patterns) if wanted else NOTHING_CUT
        prices.append(known[key])
    rests = np.array([each.rests for each in prices]).reshape(cards, k.IDLE + 1)
    drains = np.array([_drains(tasks, card, prices[card]) for card in range(cards)])
    return Losses(tuple(prices), rests, drains.reshape(cards, 4))


def _drains(tasks: Sequence[Task], card: int, prices: Prices) -> tuple[float, ...]:
    """Return rho and sigma of the requests that may use the card; of all where there are none."""
    on_gpus = [task for task in tasks if task.gpus > 0]
    able = [task for task in on_gpus if task.fits[card]] or on_gpus
    values = [_value_of(task, card, prices) for task in able]
    total = sum(task.weight * value for task, value in zip(able, values, strict=True))
    if total <= 0.0:
        return 0.0, 0.0, 0.0, 0.0
    found: list[float] = []
    for amounts in ([task.cpu_milli for task in able], [task.memory_bytes for task in able]):
        rho = sum(t.weight * amount for t, amount in zip(able, amounts, strict=True)) / total
        spread = sum(
            task.weight * (amount - rho * value) ** 2
            for task, amount, value in zip(able, amounts, values, strict=True)
        )
        found += [rho, KAPPA * sqrt(spread / total) + k.NOTHING]
    return tuple(found)


def _value_of(task: Task, card: int, prices: Prices) -> float:
    if not task.is_share:
        return float(task.gpus)
    return prices.price_of(task.milli[card]) if task.milli[card] > 0 else 0.0
