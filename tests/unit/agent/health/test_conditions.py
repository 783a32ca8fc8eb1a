"""What readings say: each check finds its fault after its time, and lets go of it after another."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import pytest

from stoker.agent.facts import CORRECTABLE, UNCORRECTABLE, Fact
from stoker.agent.health.options import HealthConfig
from stoker.agent.health.policy import Policy, policy_of
from stoker.agent.verdicts import Check, RepairAction, Verdict
from stoker.core.gpu_models import MODELS, GpuModel
from stoker.testing.judged_node import H100, Card, JudgedNode

T4 = MODELS["T4"]
BAD, LESS, GOOD = Verdict.UNHEALTHY, Verdict.DEGRADED, Verdict.HEALTHY
NONE, DRAIN = RepairAction.NONE, RepairAction.DRAIN
RESET, REBOOT, RMA = RepairAction.RESET_GPU, RepairAction.REBOOT, RepairAction.RMA

Ticking = Callable[[Card, float], None]  # what is told, by the seconds since it began


@dataclass(frozen=True, slots=True)
class Row:
    """A fault of a card, and what is to come of it."""

    name: str
    facts: Mapping[Fact, float | Callable[[float], float]]
    check: Check
    verdict: Verdict
    action: RepairAction
    reason: str
    code: str = ""
    labels: Mapping[Fact, Mapping[str, float | Callable[[float], float]]] | None = None
    reasons: tuple[str, ...] = ()
    within: float = 30.0  # seconds until it is found
    not_before: float = 0.0
    over_within: float = 30.0  # after it is gone
    model: GpuModel = H100

    def strike(self, card: Card, seconds: float) -> None:
        """Let the card tell what it tells so many seconds into the fault."""
        card.facts = {fact: _at(value, seconds) for fact, value in self.facts.items()}
        card.by_label = {
            fact: {label: _at(value, seconds) for label, value in values.items()}
            for fact, values in (self.labels or {}).items()
        }
        card.reasons = dict.fromkeys(self.reasons, 1.0)


def _at(value: float | Callable[[float], float], seconds: float) -> float:
    return value(seconds) if callable(value) else value


def per_minute(rate: float) -> Callable[[float], float]:
    return lambda seconds: float(int(rate * seconds / 60))


ROWS = [
    Row(
        "uncorrected memory error",
        {Fact.ECC_UNCORRECTED_VOLATILE_ERRORS: 1.0},
        Check.ECC_UNCORRECTED,
        BAD,
        RESET,
        "1 uncorrected memory error since the driver was loaded; memory is repaired at a reset "
        "only; the GPU needs a reset",
    ),
    Row(
        "corrected memory errors, fast",
        {Fact.ECC_CORRECTED_VOLATILE_ERRORS: per_minute(11)},
        Check.ECC_CORRECTED,
        LESS,
        NONE,
        "102 corrected memory errors in 600 s, at most 100 are usual; memory wears out; nothing "
        "is to be done about the GPU",
        within=600.0,
        not_before=500.0,
        over_within=620.0,
    ),
    Row(
        "row to be remapped",
        {Fact.REMAPPED_ROWS_PENDING: 1.0},
        Check.ROW_REMAP_PENDING,
        LESS,
        RESET,
        "a memory row waits to be replaced; that happens at the next reset; work can go on until "
        "then; the GPU needs a reset",
    ),
    Row(
        "row that cannot be remapped",
        {Fact.REMAPPED_ROWS_FAILED: 1.0},
        Check.ROW_REMAP_FAILED,
        BAD,
        RMA,
        "a memory row could not be replaced; the GPU has no spare rows left there; the hardware "
        "needs inspection",
    ),
    Row(
        "page to be retired",
        {Fact.RETIRED_PAGES_PENDING: 1.0},
        Check.RETIRED_PAGES,
        LESS,
        RESET,
        "a memory page waits to be taken out of use; that happens at the next reset; work can go "
        "on until then; the GPU needs a reset",
        code="pending",
        model=T4,
    ),
    Row(
        "no room for retired pages",
        {},
        Check.RETIRED_PAGES,
        BAD,
        RMA,
        "63 memory pages out of use; the next bad page cannot be taken out of use; the hardware "
        "needs inspection",
        code="full",
        labels={Fact.RETIRED_PAGES: {CORRECTABLE: 60.0, UNCORRECTABLE: 3.0}},
        model=T4,
    ),
    Row(
        "pages retired after uncorrected errors",
        {},
        Check.RETIRED_PAGES,
        LESS,
        RMA,
        "16 memory pages out of use after uncorrected errors; memory wears out; the hardware "
        "needs inspection",
        code="uncorrected",
        labels={Fact.RETIRED_PAGES: {CORRECTABLE: 0.0, UNCORRECTABLE: 16.0}},
        model=T4,
    ),
    Row(
        "NVLink down",
        {},
        Check.NVLINK_DOWN,
        BAD,
        RESET,
        "NVLink 4 is down; work on several GPUs fails, or waits for it; the GPU needs a reset",
        code="4",
        labels={Fact.NVLINK_UP: {"4": 0.0}},
        within=40.0,
        not_before=20.0,
        over_within=80.0,
    ),
    Row(
        "NVLink recovers",
        {},
        Check.NVLINK_ERRORS,
        LESS,
        RESET,
        "NVLink 7: 1 recoveries in 600 s; it is slow, and may go down; the GPU needs a reset",
        code="7",
        labels={Fact.NVLINK_RECOVERY_ERRORS: {"7": lambda s: float(s >= 20)}},
        over_within=620.0,
    ),
    Row(
        "NVLink sends again",
        {},
        Check.NVLINK_ERRORS,
        LESS,
        RESET,
        "NVLink 0: 104 replays in 600 s; it is slow, and may go down; the GPU needs a reset",
        code="0",
        labels={Fact.NVLINK_REPLAY_ERRORS: {"0": per_minute(48)}},
        within=150.0,
        not_before=120.0,
        over_within=620.0,
    ),
    Row(
        "CRC errors of an NVLink",
        {},
        Check.NVLINK_ERRORS,
        LESS,
        RESET,
        "NVLink 17: 6600 CRC errors in 60 s; it is slow, and may go down; the GPU needs a reset",
        code="17",
        labels={
            Fact.NVLINK_CRC_FLIT_ERRORS: {"17": per_minute(110 * 60)},
            Fact.NVLINK_CRC_DATA_ERRORS: {"17": 0.0},
        },
        within=80.0,
        over_within=620.0,
    ),
    Row(
        "PCIe replays",
        {Fact.PCIE_REPLAYS: per_minute(60)},
        Check.PCIE_REPLAYS,
        LESS,
        DRAIN,
        "310 PCIe replays in 600 s, at most 307 are usual for 16 lanes of generation 5; the card, "
        "the slot or a riser has a bad contact; let work end, place none, and look at it",
        within=330.0,
        not_before=290.0,
        over_within=620.0,
    ),
    Row(
        "PCIe link too narrow",
        {Fact.PCIE_LINK_WIDTH: 8.0},
        Check.PCIE_LINK,
        LESS,
        REBOOT,
        "PCIe link of 8 lanes of generation 5 under load, 16 of generation 5 are possible; it was "
        "not trained as it should be; the host needs a reboot",
        within=80.0,
        not_before=60.0,
    ),
    Row(
        "PCIe link too slow",
        {Fact.PCIE_LINK_GENERATION: 1.0},
        Check.PCIE_LINK,
        LESS,
        REBOOT,
        "PCIe link of 16 lanes of generation 1 under load, 16 of generation 5 are possible; it "
        "was not trained as it should be; the host needs a reboot",
        within=80.0,
        not_before=60.0,
    ),
    Row(
        "at its slowdown temperature",
        {Fact.TEMPERATURE_CELSIUS: H100.temperature_slowdown_celsius},
        Check.THERMAL,
        LESS,
        DRAIN,
        "at or above its slowdown temperature, or slowed down by heat for 60 s of the last 600 s; "
        "cooling does not keep up; let work end, place none, and look at it",
        within=70.0,
        not_before=50.0,
        over_within=700.0,
    ),
    Row(
        "hot memory",
        {Fact.MEMORY_TEMPERATURE_CELSIUS: 95.0},
        Check.THERMAL,
        LESS,
        DRAIN,
        "at or above its slowdown temperature, or slowed down by heat for 60 s of the last 600 s; "
        "cooling does not keep up; let work end, place none, and look at it",
        within=70.0,
        not_before=50.0,
        over_within=700.0,
    ),
    Row(
        "no degrees left",
        {Fact.TEMPERATURE_MARGIN_CELSIUS: 0.0},
        Check.THERMAL,
        LESS,
        DRAIN,
        "at or above its slowdown temperature, or slowed down by heat for 60 s of the last 600 s; "
        "cooling does not keep up; let work end, place none, and look at it",
        within=80.0,
        not_before=50.0,
        over_within=700.0,
    ),
    Row(
        "slowed down by heat",
        {},
        Check.THERMAL,
        LESS,
        DRAIN,
        "at or above its slowdown temperature, or slowed down by heat for 60 s of the last 600 s; "
        "cooling does not keep up; let work end, place none, and look at it",
        reasons=("hw_thermal_slowdown",),
        within=70.0,
        not_before=50.0,
        over_within=700.0,
    ),
    Row(
        "slowed down by hardware",
        {},
        Check.HW_SLOWDOWN,
        LESS,
        DRAIN,
        "slowed down by hardware for 360 s of the last 600 s; heat or power is beyond what the "
        "board may have; let work end, place none, and look at it",
        reasons=("hw_slowdown",),
        within=370.0,
        not_before=350.0,
        over_within=700.0,
    ),
    Row(
        "power brake",
        {},
        Check.POWER_BRAKE,
        LESS,
        DRAIN,
        "slowed down by the power supply for 360 s of the last 600 s; the host has too little "
        "power for its GPUs; let work end, place none, and look at it",
        reasons=("hw_power_brake_slowdown",),
        within=370.0,
        not_before=350.0,
        over_within=700.0,
    ),
    *(
        Row(
            f"driver asks: {words}",
            {Fact.RECOVERY_ACTION: number},
            Check.RECOVERY_ACTION,
            BAD,
            action,
            f"the driver asks for recovery: {words} ({number:.0f}); the driver itself asks for "
            f"it; {advice}",
            code=words.replace(" ", "_"),
        )
        for number, words, action, advice in (
            (1.0, "reset", RESET, "the GPU needs a reset"),
            (2.0, "reboot", REBOOT, "the host needs a reboot"),
            (3.0, "drain p2p", DRAIN, "let work end, place none, and look at it"),
            (4.0, "drain and reset", RESET, "the GPU needs a reset"),
            (9.0, "other", DRAIN, "let work end, place none, and look at it"),
        )
    ),
    Row(
        "no persistence mode",
        {Fact.PERSISTENCE_MODE: 0.0},
        Check.PERSISTENCE,
        LESS,
        NONE,
        "persistence mode is off; without users the driver is unloaded, the next one waits for "
        "it, and counters are lost; nothing is to be done about the GPU",
    ),
]


def strike(node: JudgedNode, row: Row, seconds: float) -> float | None:
    """Let the fault last; return after which time it was found."""
    found_after = None
    for tick in range(round(seconds / 10)):
        row.strike(node.cards[0], 10.0 * (tick + 1))
        node.tick(10.0)
        if found_after is None and node.gpu().verdict is not GOOD:
            found_after = 10.0 * (tick + 1)
    return found_after


def mend(node: JudgedNode, seconds: float) -> float | None:
    """Let the card be sound again (its counters stay); return after which time it is healthy."""
    card = node.cards[0]
    stays = (Fact.PCIE_REPLAYS, Fact.ECC_CORRECTED_VOLATILE_ERRORS)
    states = (Fact.NVLINK_UP, Fact.RETIRED_PAGES)
    for fact in [fact for fact in card.facts if fact not in stays]:
        del card.facts[fact]
    for fact in [fact for fact in card.by_label if fact in states]:
        del card.by_label[fact]
    card.reasons = {}
    for tick in range(round(seconds / 10)):
        node.tick(10.0)
        if node.gpu().verdict is GOOD:
            return 10.0 * (tick + 1)
    return None


@pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])
def test_fault_is_found_in_its_time_and_recovers(row: Row) -> None:
    node = JudgedNode(model=row.model)
    node.run(120.0)
    assert node.gpu().faults == ()
    found_after = strike(node, row, row.within)
    assert found_after is not None
    assert found_after > row.not_before
    health = node.gpu()
    assert [(each.check, each.code) for each in health.faults] == [(row.check, row.code)]
    assert (health.verdict, health.action) == (row.verdict, row.action)
    assert health.reason == row.reason
    assert node.gpu(1).verdict is GOOD
    assert mend(node, row.over_within) is not None
    assert node.gpu().faults == ()


@pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])
def test_check_that_is_off_finds_nothing(row: Row) -> None:
    policy = policy_of(HealthConfig(disabled=(row.check,)))
    node = JudgedNode(model=row.model, policy=policy)
    strike(node, row, row.within)
    assert node.gpu().faults == ()
    assert node.history.faults == {}


@pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])
def test_fault_outlives_a_restart_and_recovers_after_it(row: Row) -> None:
    node = JudgedNode(model=row.model)
    node.run(120.0)
    strike(node, row, row.within)
    before = node.judge.gpus()
    node.restart()
    assert node.judge.gpus() == before
    row.strike(node.cards[0], row.within + 10.0)
    node.tick(10.0)
    assert node.gpu().verdict is row.verdict
    assert mend(node, row.over_within) is not None


HEALTHY: list[tuple[str, Row]] = [
    (
        "an idle link may be slow",
        Row(
            "",
            {Fact.PCIE_LINK_GENERATION: 1.0, Fact.UTILIZATION_RATIO: 0.0},
            Check.PCIE_LINK,
            GOOD,
            NONE,
            "",
        ),
    ),
    (
        "links that were never up, of a card of which nothing else is known",
        Row(
            "",
            {},
            Check.NVLINK_DOWN,
            GOOD,
            NONE,
            "",
            labels={Fact.NVLINK_UP: {str(link): 0.0 for link in range(18)}},
        ),
    ),
    (
        "capped by the power limit",
        Row("", {}, Check.POWER_BRAKE, GOOD, NONE, "", reasons=("sw_power_cap",)),
    ),
    (
        "one degree below its limit",
        Row("", {Fact.TEMPERATURE_CELSIUS: 88.0}, Check.THERMAL, GOOD, NONE, ""),
    ),
    (
        "replays below the limit of its link",
        Row("", {Fact.PCIE_REPLAYS: per_minute(15)}, Check.PCIE_REPLAYS, GOOD, NONE, ""),
    ),
    (
        "corrected memory errors below the limit",
        Row(
            "",
            {Fact.ECC_CORRECTED_VOLATILE_ERRORS: per_minute(9)},
            Check.ECC_CORRECTED,
            GOOD,
            NONE,
            "",
        ),
    ),
]


@pytest.mark.parametrize("row", [r[1] for r in HEALTHY], ids=[r[0] for r in HEALTHY])
def test_what_is_usual_is_no_fault(row: Row) -> None:
    node = JudgedNode()
    assert strike(node, row, 1800.0) is None
    assert node.gpu().faults == ()


def test_link_that_was_up_is_missed_on_a_board_that_is_not_known() -> None:
    node = JudgedNode(model=MODELS["A100-40GB"])
    card = node.cards[0]
    card.driver_name = "NVIDIA A100-PCIE-40GB"
    node.look()
    card.by_label = {Fact.NVLINK_UP: {str(link): float(link < 4) for link in range(12)}}
    node.run(120.0)  # a bridge of four links, the others lead nowhere
    assert node.gpu().faults == ()
    card.by_label[Fact.NVLINK_UP]["2"] = 0.0
    node.run(120.0)
    assert [(each.check, each.code) for each in node.gpu().faults] == [(Check.NVLINK_DOWN, "2")]


def test_verdicts_are_the_same_object_while_nothing_changes() -> None:
    node = JudgedNode()
    node.run(60.0)
    told = node.judge.gpus()
    node.cards[0].facts[Fact.REMAPPED_ROWS_PENDING] = 1.0
    node.run(20.0)
    assert node.judge.gpus() is not told
    told = node.judge.gpus()
    node.run(1800.0)
    assert node.judge.gpus() is told


def test_link_is_judged_by_a_stretch_of_load_not_by_two_moments_of_it() -> None:
    node = JudgedNode()
    card = node.cards[0]
    for load in (0.9, 0.0, 0.0, 0.9, 0.0):
        card.facts = {Fact.PCIE_LINK_GENERATION: 1.0, Fact.UTILIZATION_RATIO: load}
        node.run(50.0)
        assert node.gpu().faults == ()


def test_checks_are_judged_by_limits_that_can_be_set() -> None:
    policy = policy_of(HealthConfig(ecc_uncorrected_errors_max=3))
    node = JudgedNode(policy=policy)
    node.cards[0].facts[Fact.ECC_UNCORRECTED_VOLATILE_ERRORS] = 3.0
    node.run(20.0)
    assert node.gpu().verdict is GOOD
    node.cards[0].facts[Fact.ECC_UNCORRECTED_VOLATILE_ERRORS] = 4.0
    node.run(20.0)
    assert node.gpu().verdict is BAD
    assert Policy() == policy_of(HealthConfig())
