"""10,000 days of sound GPUs, with all the noise that sound GPUs make: no verdict but healthy.

The noise is of the kinds that fleets tell of, and more of it: programs that crash, PCIe packets
sent again, corrected bits, short power capping and braking, heat below the limit and for moments
at it, links at rest and with a few errors, ticks that fail. In the same noise planted faults are
found.
"""

from collections.abc import Callable
from random import Random

import pytest

from stoker.agent.facts import Fact
from stoker.agent.health.history import FAULTS_PER_GPU_MAX
from stoker.agent.verdicts import Check, GpuHealth, RepairAction, Verdict
from stoker.core.gpu_models import MODELS
from stoker.testing.judged_node import Card, JudgedNode

GPUS, DAYS, SEEDS = 8, 125, 10  # of one node
# A day passes in coarse steps, and a few times in it comes a busy moment of fine ones.
DAY_SECONDS, STEP_SECONDS, FINE_SECONDS = 86400.0, 3600.0, 10.0
MOMENTS, FINE_STEPS = 4, 12

APPLICATION_XIDS = (13, 31, 32, 43, 45, 68, 69, 94, 109)
QUIET_XIDS = (37, 38, 44, 63, 66, 121, 141)
_COUNTERS = (Fact.PCIE_REPLAYS, Fact.ECC_CORRECTED_VOLATILE_ERRORS)


class NoisyNode:
    """A node whose GPUs are sound, and noisy."""

    def __init__(self, seed: int) -> None:
        self.rng = Random(seed)
        model = self.rng.choice([MODELS["H100-80GB"], MODELS["A100-40GB"], MODELS["T4"]])
        self.node = JudgedNode(GPUS, model)
        self.bad: list[GpuHealth] = []
        self._judged: tuple[GpuHealth, ...] = ()
        self._xids: dict[int, tuple[int, ...]] = {}
        # What a GPU does in a fine step, and how often in a day that begins.
        self.kinds: dict[Callable[[Card, int], None], float] = {
            self._crash: 0.5,
            self._replay: 1.0,
            self._correct: 0.5,
            self._cap: 1.0,
            self._brake: 0.1,
            self._warm: 0.5,
            self._hot: 0.05,
            self._rest: 1.0,
            self._fail: 0.1,
            self._link: 0.2,
        }

    def day(self) -> None:
        """Let a day pass."""
        for moment in range(MOMENTS):
            for step in range(round(DAY_SECONDS / STEP_SECONDS / MOMENTS)):
                self.node.tick(STEP_SECONDS, slow=step == 0)
                self._judge()
            self._pass_moment()
            if moment == 0:
                self.node.silence(5)
                self._judge()

    def _pass_moment(self) -> None:
        noise = [
            (act, card)
            for card in self.node.cards
            for act, rate in self.kinds.items()
            if self.rng.random() < rate / MOMENTS
        ]
        for step in range(FINE_STEPS):
            self._xids = {}
            for card in self.node.cards:
                self._calm(card)
            for act, card in noise:
                act(card, step)
            self.node.tick(FINE_SECONDS, slow=step % 4 == 0, xids=self._xids)
            self._judge()
        for card in self.node.cards:
            self._calm(card)

    def _calm(self, card: Card) -> None:
        card.reasons, card.failure = {}, None
        for fact in [fact for fact in card.facts if fact not in _COUNTERS]:
            del card.facts[fact]

    def _judge(self) -> None:
        judged = self.node.judge.gpus()
        if judged is not self._judged:
            self._judged = judged
            self.bad += [each for each in judged if each.verdict is not Verdict.HEALTHY]

    # --- what sound GPUs do

    def _crash(self, card: Card, step: int) -> None:
        if step > self.rng.randrange(FINE_STEPS):
            return
        xid = self.rng.choice(APPLICATION_XIDS + QUIET_XIDS)
        self._xids[self.node.cards.index(card)] = (xid,) * self.rng.choice((1, 3, 30))
        text = f"NVRM: Xid ({card.kernel_address}): {xid}, pid=7, name=train, noise"
        self.node.log(*[text] * self.rng.choice((1, 1, 5)))

    def _replay(self, card: Card, _: int) -> None:
        _grow(card, Fact.PCIE_REPLAYS, self.rng.choice((0, 0, 1)))

    def _correct(self, card: Card, _: int) -> None:
        _grow(card, Fact.ECC_CORRECTED_VOLATILE_ERRORS, self.rng.choice((0, 0, 1, 3)))

    def _cap(self, card: Card, _: int) -> None:
        card.reasons["sw_power_cap"] = 1.0
        card.reasons["sw_thermal_slowdown"] = float(self.rng.random() < 0.3)

    def _brake(self, card: Card, step: int) -> None:
        if step < 4:
            card.reasons["hw_slowdown"] = card.reasons["hw_power_brake_slowdown"] = 1.0

    def _warm(self, card: Card, _: int) -> None:
        limit = card.model.temperature_slowdown_celsius
        card.facts[Fact.TEMPERATURE_CELSIUS] = limit - self.rng.randint(1, 10)

    def _hot(self, card: Card, step: int) -> None:
        if 1 <= step < 3:
            card.reasons["hw_thermal_slowdown"] = 1.0

    def _rest(self, card: Card, _: int) -> None:
        card.facts[Fact.UTILIZATION_RATIO] = 0.0
        card.facts[Fact.PCIE_LINK_GENERATION] = 1.0

    def _fail(self, card: Card, step: int) -> None:
        if step == 5:  # one tick; the ticks before and after it are answered
            card.failure = ("driver_timeout", "no answer within 1 s")

    def _link(self, card: Card, _: int) -> None:
        if not card.model.nvlink_count:
            return
        for fact, most in ((Fact.NVLINK_CRC_FLIT_ERRORS, 200), (Fact.NVLINK_REPLAY_ERRORS, 2)):
            links = card.by_label.setdefault(fact, {})
            links["2"] = links.get("2", 0.0) + self.rng.randint(0, most)


def _grow(card: Card, fact: Fact, amount: int) -> None:
    card.facts[fact] = card.facts.get(fact, 0.0) + amount


@pytest.mark.parametrize("seed", range(SEEDS))
def test_sound_gpus_are_healthy_all_the_time(seed: int) -> None:
    noisy = NoisyNode(seed)
    for _ in range(DAYS):
        noisy.day()
    assert noisy.bad == []
    # What is written of it is little: some records for each moment, and few are kept.
    assert len(noisy.node.written) < 16 * GPUS * DAYS
    assert len(noisy.node.history.faults) <= GPUS * len(APPLICATION_XIDS + QUIET_XIDS)
    assert GPUS * FAULTS_PER_GPU_MAX > len(noisy.node.history.faults) > 0


# name, what a GPU tells from some moment on, what is found of it, within so many seconds
PLANTED: list[tuple[str, dict[Fact, float], tuple[str, ...], tuple[int, ...], Check, float]] = [
    ("Xid", {}, (), (119,), Check.XID, 10),
    ("row", {Fact.REMAPPED_ROWS_FAILED: 1.0}, (), (), Check.ROW_REMAP_FAILED, 20),
    ("heat", {}, ("hw_thermal_slowdown",), (), Check.THERMAL, 80),
    ("brake", {}, ("hw_power_brake_slowdown",), (), Check.POWER_BRAKE, 380),
    ("narrow link", {Fact.PCIE_LINK_WIDTH: 4.0}, (), (), Check.PCIE_LINK, 90),
]


@pytest.mark.parametrize("planted", PLANTED, ids=[each[0] for each in PLANTED])
def test_planted_fault_is_found_in_the_noise(
    planted: tuple[str, dict[Fact, float], tuple[str, ...], tuple[int, ...], Check, float],
) -> None:
    _, facts, reasons, xids, check, seconds = planted
    noisy = NoisyNode(seed=1)
    noisy.day()
    node = noisy.node
    node.cards[5].facts.update(facts)
    node.cards[5].reasons = dict.fromkeys(reasons, 1.0)
    node.tick(FINE_SECONDS, xids={5: xids})
    node.run(seconds - FINE_SECONDS)
    found = {each.uuid: each for each in node.judge.gpus() if each.verdict is not Verdict.HEALTHY}
    assert set(found) == {node.cards[5].uuid}
    health = found[node.cards[5].uuid]
    assert health.check is check
    assert health.action is not RepairAction.NONE
