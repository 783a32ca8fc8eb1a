"""Which GPUs are cordoned for their health, which are let go, and why some are not."""

from dataclasses import dataclass, replace

import pytest
from tests.unit.aggregator.builders import make_health

from stoker.aggregator.cordoning import Case, CordonAt, CordonPolicy, review
from stoker.aggregator.verdicts import (
    Condition,
    FaultId,
    GpuCordon,
    HealthFault,
    RepairAction,
    Verdict,
)

NOW = 1_000.0
POLICY = CordonPolicy()
DEGRADED_TOO = CordonPolicy(cordon_at=CordonAt.DEGRADED)
FAULT = ("xid", 1.0)
BY_HEALTH = GpuCordon(500.0, "xid was found", by_health=True, fault=FAULT)
BY_OPERATOR = GpuCordon(500.0, "fan is loud", by_health=False)


def case(
    uuid: str = "a",
    verdict: Verdict = Verdict.UNHEALTHY,
    action: RepairAction = RepairAction.RESET_GPU,
    *,
    check: str = "xid",
    changed_at: float = 900.0,
    cordon: GpuCordon | None = None,
    acknowledged: FaultId | None = None,
    beside: tuple[str, float] | None = None,  # a lesser fault that lasts
    is_listed: bool = True,
    heard_at: float | None = 800.0,
) -> Case:
    health = make_health(uuid, verdict, check)
    if verdict is not Verdict.HEALTHY:
        health = replace(health, action=action)
    if beside is not None:
        lesser = HealthFault(beside[0], "", verdict, action, "", beside[1], beside[1], 1)
        health = replace(health, faults=(*health.faults, lesser))
    condition = Condition(
        *(uuid, "n1", "slot", health, changed_at), cordon=cordon, acknowledged=acknowledged
    )
    return Case(condition, is_listed, heard_at)


# --- one GPU


@dataclass(frozen=True)
class Row:
    name: str
    case: Case
    cordoned: bool = False
    uncordoned: bool = False
    withheld: str = ""  # a word of the reason
    due_at: float | None = None
    policy: CordonPolicy = POLICY


WELL = Verdict.HEALTHY
UNKNOWN_GPU = replace(case(), condition=Condition("a", "n1"))
ROWS = [
    Row("an unhealthy GPU", case(), cordoned=True),
    Row("a healthy GPU", case(verdict=WELL)),
    Row("a GPU that is not read", case(verdict=Verdict.UNKNOWN)),
    Row("a GPU that nobody judged", UNKNOWN_GPU),
    Row("a degraded GPU", case(verdict=Verdict.DEGRADED, action=RepairAction.RMA)),
    Row(
        "a degraded GPU that is to be drained, where that is the bar",
        case(verdict=Verdict.DEGRADED, action=RepairAction.DRAIN),
        cordoned=True,
        policy=DEGRADED_TOO,
    ),
    Row(
        "a degraded GPU whose program is to be restarted, where degraded is the bar",
        case(verdict=Verdict.DEGRADED, action=RepairAction.RESTART_APP),
        policy=DEGRADED_TOO,
    ),
    Row("an unhealthy GPU, where degraded is the bar", case(), cordoned=True, policy=DEGRADED_TOO),
    Row("a GPU that an operator cordoned", case(cordon=BY_OPERATOR)),
    Row("a well GPU that an operator cordoned", case(verdict=WELL, cordon=BY_OPERATOR)),
    Row("a card that is gone and that an operator cordoned",
        case(cordon=BY_OPERATOR, is_listed=False)),
    Row("a card that is gone", case(is_listed=False)),
    Row("a card that is gone and was cordoned", case(cordon=BY_HEALTH, is_listed=False),
        uncordoned=True),
    Row(
        "a fault that an operator knows of",
        case(acknowledged=FAULT),
        withheld="an operator has un-cordoned it",
    ),
    Row("another fault than an operator knows of", case(acknowledged=("ecc", 1.0)), cordoned=True),
    Row("the fault, at another time than an operator knows of", case(acknowledged=("xid", 0.5)),
        cordoned=True),
    Row("a node that has not judged since it connected", case(heard_at=None),
        withheld="node n1 has not judged"),
    Row("a cordoned GPU that is as it was", case(cordon=BY_HEALTH)),
    Row("a cordoned GPU with another fault", case(cordon=BY_HEALTH, check="ecc"), cordoned=True),
    Row("a cordoned GPU left with a fault that an operator knows of",
        case(cordon=BY_HEALTH, check="ecc", acknowledged=("ecc", 1.0)), uncordoned=True),
    Row("a cordoned GPU that has just been left with a fault that an operator knows of",
        case(cordon=BY_HEALTH, check="ecc", acknowledged=("ecc", 1.0), changed_at=NOW),
        due_at=NOW + 60),
    Row("a cordoned GPU with a fault that an operator knows of beside the one it is cordoned for",
        case(cordon=BY_HEALTH, check="ecc", acknowledged=("ecc", 1.0), beside=FAULT)),
    Row("a cordoned GPU with another fault, of a node not heard",
        case(cordon=BY_HEALTH, check="ecc", heard_at=None)),
    Row("a cordoned GPU that is not read now", case(verdict=Verdict.UNKNOWN, cordon=BY_HEALTH)),
    Row("a cordoned GPU that is well, of a node not heard",
        case(verdict=WELL, cordon=BY_HEALTH, heard_at=None)),
    Row("a cordoned GPU that has just become well",
        case(verdict=WELL, cordon=BY_HEALTH, changed_at=NOW), due_at=NOW + 60),
    Row("a cordoned GPU that was well for almost long enough",
        case(verdict=WELL, cordon=BY_HEALTH, changed_at=NOW - 59.9), due_at=NOW + 0.1),
    Row("a cordoned GPU that was well for long enough",
        case(verdict=WELL, cordon=BY_HEALTH, changed_at=NOW - 60), uncordoned=True),
    Row("a cordoned GPU that was well, of a node that has just come back",
        case(verdict=WELL, cordon=BY_HEALTH, heard_at=NOW - 1), due_at=NOW + 59),
    Row("a cordoned GPU that is degraded now, below the bar",
        case(verdict=Verdict.DEGRADED, cordon=BY_HEALTH, changed_at=NOW - 60), uncordoned=True),
    Row("a cordoned GPU that is degraded now, where that is the bar",
        case(verdict=Verdict.DEGRADED, cordon=BY_HEALTH, changed_at=NOW - 60),
        policy=DEGRADED_TOO),
]  # fmt: skip


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_one_gpu(row: Row) -> None:
    found = review([row.case], 10, row.policy, NOW)
    assert bool(found.cordon) == row.cordoned
    assert bool(found.uncordon) == row.uncordoned
    assert (found.withheld.keys() == {"a"}) == bool(row.withheld)
    assert row.withheld in found.withheld.get("a", "")
    assert found.withheld_for_share == 0, "counted as one that the share has no room for"
    assert found.due_at == (None if row.due_at is None else pytest.approx(row.due_at))


# --- the share


@pytest.mark.parametrize(
    ("share", "least", "total", "limit"),
    [
        (0.2, 1, 0, 1),
        (0.2, 1, 4, 1),
        (0.2, 1, 9, 1),
        (0.2, 1, 10, 2),
        (0.2, 1, 15, 3),  # 0.2 x 15 is a little more or less than 3 as a float
        (0.29, 1, 100, 29),
        (0.2, 0, 4, 0),
        (0.0, 0, 1000, 0),
        (0.0, 5, 1000, 5),
        (1.0, 1, 7, 7),
    ],
)
def test_so_many_may_be_cordoned(share: float, least: int, total: int, limit: int) -> None:
    assert CordonPolicy(share_max=share, gpus_min=least).limit(total) == limit


def test_the_worst_go_first_then_the_oldest() -> None:
    cases = [
        case("reset, young", changed_at=950.0),
        case("reset, old", changed_at=900.0),
        case("rma, youngest", action=RepairAction.RMA, changed_at=999.0),
        case("degraded, oldest", Verdict.DEGRADED, RepairAction.RMA, changed_at=1.0),
    ]
    order = ["rma, youngest", "reset, old", "reset, young", "degraded, oldest"]
    for room in range(5):
        policy = replace(DEGRADED_TOO, share_max=0.0, gpus_min=room)
        found = review(cases, 100, policy, NOW)
        assert [each.uuid for each in found.cordon] == order[:room]
        assert set(found.withheld) == set(order[room:])
        assert found.withheld_for_share == len(order[room:])
    found = review(cases, 100, replace(DEGRADED_TOO, share_max=0.02), NOW)
    assert found.withheld["reset, young"] == (
        "2 of 100 GPUs are cordoned for their health already, and no more may be "
        "(health.cordon_share_max 0.02, health.cordon_gpus_min 1)"
    )


def test_where_none_may_be_cordoned_the_reason_names_the_options() -> None:
    found = review([case()], 100, CordonPolicy(share_max=0.0, gpus_min=0), NOW)
    assert found.cordon == ()
    assert "health.cordon_share_max" in found.withheld["a"]


def test_what_is_cordoned_counts_and_is_not_traded_for_a_worse_one() -> None:
    standing = case("standing", cordon=BY_HEALTH)
    worse = case("worse", action=RepairAction.RMA)
    found = review([worse, standing], 10, replace(POLICY, share_max=0.1), NOW)
    assert (found.cordon, found.uncordon) == ((), ())
    assert list(found.withheld) == ["worse"]


def test_a_place_that_is_free_again_goes_to_the_next() -> None:
    well = case("well", WELL, cordon=BY_HEALTH, changed_at=NOW - 60)
    found = review([case("next"), well], 10, replace(POLICY, share_max=0.1), NOW)
    assert [each.uuid for each in found.uncordon] == ["well"]
    assert [each.uuid for each in found.cordon] == ["next"]


def test_cordons_of_operators_take_nobody_his_place() -> None:
    others = [case(f"o{i}", cordon=BY_OPERATOR) for i in range(5)]
    found = review([*others, case()], 10, replace(POLICY, share_max=0.1), NOW)
    assert [each.uuid for each in found.cordon] == ["a"]


def test_when_the_fleet_shrinks_the_least_bad_are_let_go() -> None:
    cases = [
        case("rma", action=RepairAction.RMA, cordon=BY_HEALTH),
        case("reset, old", cordon=BY_HEALTH, changed_at=1.0),
        case("reset, young", cordon=BY_HEALTH, changed_at=2.0),
        case("well soon", WELL, cordon=BY_HEALTH, changed_at=NOW),
    ]
    found = review(cases, 10, POLICY, NOW)
    assert [each.uuid for each in found.uncordon] == ["reset, young", "well soon"]
    assert found.cordon == ()
