"""Which of DCGM's values of a GPU are facts, and what is said when none is."""

import pytest

from stoker.agent.dcgm.codes import DcgmFailed, status_error
from stoker.agent.dcgm.values import Entity, Judged, Value, judge
from stoker.agent.driver import (
    DriverError,
    DriverTimeout,
    GpuLost,
    LibraryMissing,
    NoPermission,
    NotAvailable,
    NotInitialized,
    NotSupported,
    UnknownDriverError,
)
from stoker.agent.facts import Fact

GPU, INSTANCE, OTHER = Entity(1, 0), Entity(4, 3), Entity(4, 5)
PLACES = {GPU: None, INSTANCE: 3, OTHER: 5}
NOW = 1000.0
DOUBLE_BLANK = 140737488355328.0


def value(
    field: int,
    told: float = 0.5,
    *,
    entity: Entity = GPU,
    status: int = 0,
    at: float = NOW,
) -> Value:
    return Value(entity, field, status, at, told)


def judged(*values: Value) -> Judged:
    return judge(values, PLACES, NOW, 1.0)


def test_facts_by_place() -> None:
    told = judged(
        value(1002, 0.5), value(1009, 7_000), value(1002, 0.25, entity=INSTANCE, at=NOW - 2)
    )
    assert told == Judged(
        {
            None: {Fact.SM_ACTIVE_RATIO: 0.5, Fact.PCIE_TRANSMIT_BYTES_PER_SECOND: 7_000.0},
            3: {Fact.SM_ACTIVE_RATIO: 0.25},
        }
    )


@pytest.mark.parametrize(
    "bad",
    [
        value(1003, DOUBLE_BLANK),
        value(1003, 3.0),
        value(1003, at=NOW - 3.5),
        value(1003, at=0.0),
        value(1003, status=-14),
        value(1003, status=-6),
        Value(GPU, 1003, 0, NOW, "<<<NULL>>>"),
    ],
    ids=["blank", "untrue", "old", "never measured", "no data", "not supported", "text"],
)
def test_what_is_no_value_is_absent_and_takes_nothing_else_along(bad: Value) -> None:
    assert judged(bad, value(1002)) == Judged({None: {Fact.SM_ACTIVE_RATIO: 0.5}})


@pytest.mark.parametrize(
    ("values", "kind", "text"),
    [
        ([value(1002, DOUBLE_BLANK)], NotAvailable, "blanks only"),
        ([value(1002, at=NOW - 60)], NotAvailable, "DCGM's newest value is 60.0 s old"),
        ([value(1002, at=NOW - 9), value(1003, at=NOW - 60)], NotAvailable, "is 9.0 s old"),
        ([value(1002, 4.0)], NotAvailable, "DCGM's field 1002 cannot be 4.0"),
        ([value(1002, status=-14)], NotAvailable, "DCGM has no values"),
        ([value(1002, status=-6)], NotSupported, "(DCGM code -6)"),
        ([value(1002, status=-18), value(1003, DOUBLE_BLANK)], GpuLost, "(DCGM code -18)"),
        ([], NotAvailable, "DCGM has no values"),
    ],
    ids=["blank", "old", "least old", "untrue", "no data", "status", "status first", "nothing"],
)
def test_why_there_is_nothing(values: list[Value], kind: type[DriverError], text: str) -> None:
    told = judged(*values)
    assert told.facts == {}
    assert type(told.error) is kind
    assert text in str(told.error)


@pytest.mark.parametrize("status", [-16, -45])
def test_an_entity_that_is_not_measured_any_more_is_noticed(status: int) -> None:
    gone = [value(field, status=status, entity=INSTANCE) for field in (1002, 1003)]
    assert judged(*gone, value(1002)).is_unwatched
    assert not judged(*gone, value(1005, entity=INSTANCE), value(1002)).is_unwatched
    assert not judged(value(1002)).is_unwatched


@pytest.mark.parametrize(
    ("code", "kind", "advice"),
    [
        (-37, NotAvailable, "one program at a time"),
        (-29, NoPermission, "root"),
        (-33, NotSupported, "no profiling module"),
        (-21, NotInitialized, "is nv-hostengine running"),
        (-25, LibraryMissing, "datacenter-gpu-manager-4-core"),
        (-11, DriverTimeout, ""),
        (-3, UnknownDriverError, ""),
        (-4711, UnknownDriverError, ""),
        (None, UnknownDriverError, ""),
    ],
)
def test_what_a_code_of_dcgm_is_to_the_agent(
    code: int | None, kind: type[DriverError], advice: str
) -> None:
    error = DcgmFailed("dcgmWatchFields", code, "it said").error
    assert type(error) is kind
    assert str(error).startswith("dcgmWatchFields: it said")
    assert advice in str(error)
    assert (f"(DCGM code {code})" in str(error)) is (code is not None)


@pytest.mark.parametrize(("code", "lost"), [(-21, True), (-10, True), (-37, False), (None, False)])
def test_which_codes_end_the_connection(code: int | None, lost: bool) -> None:
    assert DcgmFailed("dcgmWatchFields", code, "").is_connection_lost is lost


def test_a_status_is_an_error_too() -> None:
    assert isinstance(status_error(-36), NotSupported)
