"""Fields come in one call; each may fail or be missing for itself, and has something instead."""

import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pynvml  # type: ignore[import-untyped]
import pytest
from tests.support.nvml_rig import FAST, SLOW, Rig, failed, told

from stoker.agent.driver import DriverNotLoaded, DriverUnavailable, LibraryMismatch
from stoker.agent.facts import Fact, Rate
from stoker.agent.nvml.fields import fields_at, value_of
from stoker.agent.nvml.table import FIELD_VALUE
from stoker.agent.nvml.units import release_of
from stoker.agent.simulated.scenario import Fail, Fault, Field, Missing, ScriptedDriver

NVML: Any = pynvml

FIELD_VALUES = "nvmlDeviceGetFieldValues"


def raw_of(layout: str, value: float) -> int:
    packed = struct.pack(f"={layout}", value)
    return int.from_bytes(packed.ljust(8, b"\xaa"), "little")  # what is beyond means nothing


@pytest.mark.parametrize(
    ("value_type", "raw", "value"),
    [
        (NVML.NVML_VALUE_TYPE_DOUBLE, raw_of("d", 1.5), 1.5),
        (NVML.NVML_VALUE_TYPE_UNSIGNED_INT, raw_of("I", 7), 7),
        (NVML.NVML_VALUE_TYPE_UNSIGNED_INT, raw_of("I", 2**32 - 1), None),
        (NVML.NVML_VALUE_TYPE_UNSIGNED_LONG, raw_of("Q", 2**40), 2**40),
        (NVML.NVML_VALUE_TYPE_UNSIGNED_LONG_LONG, raw_of("Q", 2**40), 2**40),
        (NVML.NVML_VALUE_TYPE_UNSIGNED_LONG_LONG, raw_of("Q", 2**64 - 1), None),
        (NVML.NVML_VALUE_TYPE_SIGNED_LONG_LONG, raw_of("q", -5), -5),
        (NVML.NVML_VALUE_TYPE_SIGNED_INT, raw_of("i", -5), -5),
        (NVML.NVML_VALUE_TYPE_SIGNED_INT, raw_of("i", 5), 5),
        (NVML.NVML_VALUE_TYPE_UNSIGNED_SHORT, raw_of("H", 5), 5),
        (99, 5, None),
    ],
)
def test_the_union_is_read_by_its_type(value_type: int, raw: int, value: float | None) -> None:
    assert value_of(value_type, raw) == value


@pytest.mark.parametrize(
    ("version", "first"),
    [
        ("570.86.10", None),  # has none of them
        ("575.57.08", 251),
        ("580.65.06", 251),
        ("580.82.07", 269),  # and from here on they have other numbers
        ("580.105.08", 269),
        ("what is this", None),  # better nothing than power smoothing taken for seconds
    ],
)
def test_fields_that_moved_are_asked_for_where_they_are(version: str, first: int | None) -> None:
    asked = {field.number for field in fields_at(Rate.SLOW, release_of(version))}
    moved = set(range(251, 254)) | set(range(269, 272))
    assert asked & moved == (set() if first is None else set(range(first, first + 3)))


@pytest.mark.parametrize(("version", "are_told"), [("575.57.08", True), ("570.86.10", False)])
def test_slowdowns_are_told_by_drivers_that_have_them(version: str, are_told: bool) -> None:
    rig = Rig(driver=ScriptedDriver(version=version)).opened()
    assert rig.inventory.driver_version == version
    reasons = rig.sample(SLOW)[0].by_label[Fact.CLOCK_EVENT_SECONDS]
    assert ("hw_thermal_slowdown" in reasons) is are_told
    assert "sw_power_cap" in reasons


@pytest.mark.parametrize(("rates", "calls"), [(FAST, 1), (SLOW, 3)])
def test_one_call_for_each_rate_and_one_for_the_links(rates: Sequence[Any], calls: int) -> None:
    rig = Rig().opened()
    rig.sample(rates)  # what is missing is found out once
    rig.sample(rates)
    assert rig.count(0)[FIELD_VALUES] == calls


@pytest.mark.parametrize(
    "error",
    # An old driver does not know the number; a card does not have what it names.
    ["INVALID_ARGUMENT", "NOT_SUPPORTED", "FUNCTION_NOT_FOUND", "DEPRECATED"],
)
@pytest.mark.parametrize(
    ("field", "fact", "instead"),
    [
        (83, Fact.ENERGY_JOULES, "nvmlDeviceGetTotalEnergyConsumption"),
        (185, Fact.POWER_WATTS, "nvmlDeviceGetPowerUsage"),
        (82, Fact.MEMORY_TEMPERATURE_CELSIUS, None),
        (1, Fact.ECC_ENABLED, "nvmlDeviceGetEccMode"),
        (4, Fact.ECC_UNCORRECTED_VOLATILE_ERRORS, "nvmlDeviceGetTotalEccErrors"),
        (94, Fact.PCIE_REPLAYS, "nvmlDeviceGetPcieReplayCounter"),
        (144, Fact.REMAPPED_ROWS_PENDING, "nvmlDeviceGetRemappedRows"),
        (187, Fact.POWER_LIMIT_MIN_WATTS, "nvmlDeviceGetPowerManagementLimitConstraints"),
        (189, Fact.POWER_LIMIT_DEFAULT_WATTS, "nvmlDeviceGetPowerManagementDefaultLimit"),
        (190, Fact.POWER_LIMIT_WATTS, "nvmlDeviceGetEnforcedPowerLimit"),
        (230, Fact.RECOVERY_ACTION, None),
    ],
)
def test_a_field_that_is_not_there_is_asked_for_otherwise(
    field: int, fact: Fact, instead: str | None, error: str
) -> None:
    usual = Rig().opened().sample(SLOW)[2]
    rig = Rig(Field(gpu=2, field=field, error=error)).opened()
    for _ in range(2):
        reading = rig.sample(SLOW)[2]
        assert reading.failures == ()
        assert (fact in reading.facts) is (instead is not None)
        if instead is not None:
            assert reading.facts[fact] == pytest.approx(usual.facts[fact], rel=0.1, abs=300)
            assert instead in rig.asked(2)
            assert instead not in rig.asked(1)
    rig.play()
    assert (fact in rig.sample(SLOW)[2].facts) is (instead is not None)  # not asked again
    rig.driver.inventory()
    assert fact in rig.sample(SLOW)[2].facts
    assert instead not in rig.asked(2)


@pytest.mark.parametrize("error", ["TIMEOUT", "UNKNOWN", "NO_PERMISSION"])
def test_a_field_that_fails_leaves_the_others_and_is_asked_again(error: str) -> None:
    rig = Rig(Field(gpu=2, field=83, error=error)).opened()
    reading = rig.sample()[2]
    assert reading.facts.keys() & {Fact.ENERGY_JOULES, Fact.POWER_WATTS} == {Fact.POWER_WATTS}
    (failure,) = reading.failures
    assert failure.fact == Fact.ENERGY_JOULES
    assert failure.message.startswith(f"{reading.uuid}: {FIELD_VALUES}: ")
    rig.play()
    assert Fact.ENERGY_JOULES in rig.sample()[2].facts


@pytest.mark.parametrize(
    ("error", "kind"), [("GPU_IS_LOST", "gpu_lost"), ("RESET_REQUIRED", "reset_required")]
)
def test_a_field_that_tells_that_the_gpu_is_gone(error: str, kind: str) -> None:
    readings = Rig(Field(gpu=2, field=83, error=error)).opened().sample()
    assert [failed(reading) for reading in readings] == [{}, {}, {"gpu": kind}, {}]
    assert readings[2].facts == {}


@pytest.mark.parametrize(
    ("error", "kind"),
    [("LIB_RM_VERSION_MISMATCH", LibraryMismatch), ("DRIVER_NOT_LOADED", DriverNotLoaded)],
)
def test_a_field_that_tells_that_the_driver_is_gone(
    error: str, kind: type[DriverUnavailable]
) -> None:
    rig = Rig(Field(gpu=2, field=83, error=error)).opened()
    with pytest.raises(kind):
        rig.sample()


@pytest.mark.parametrize(
    "fault",
    [Missing(function=FIELD_VALUES), Fail(function=FIELD_VALUES, error="NOT_SUPPORTED")],
)
def test_a_driver_without_the_call_tells_what_its_functions_tell(fault: Fault) -> None:
    with_fields = Rig().opened().sample(SLOW)[0]
    rig = Rig(fault).opened()
    rig.sample(SLOW)
    reading = rig.sample(SLOW)[0]
    assert reading.failures == ()
    assert told(with_fields) - told(reading) == {
        Fact.MEMORY_TEMPERATURE_CELSIUS,
        Fact.POWER_INSTANT_WATTS,
        Fact.CLOCK_EVENT_SECONDS,
        Fact.RECOVERY_ACTION,
        Fact.PCIE_TRANSMIT_BYTES,
        Fact.PCIE_RECEIVE_BYTES,
        Fact.NVLINK_BANDWIDTH_BYTES_PER_SECOND,
        Fact.NVLINK_TRANSMIT_BYTES,
        Fact.NVLINK_RECEIVE_BYTES,
    }
    assert FIELD_VALUES not in rig.asked(0)
    links = reading.by_label[Fact.NVLINK_UP].keys()
    assert links == with_fields.by_label[Fact.NVLINK_UP].keys()


def spoiled_by(number: int, ask: Callable[..., Any]) -> Callable[..., Any]:
    """Return a call that fails as a whole when a field is among those asked for."""

    def asked(handle: Any, fields: Sequence[tuple[int, int]]) -> Any:
        if any(field == number for field, _ in fields):
            raise NVML.NVMLError(NVML.NVML_ERROR_INVALID_ARGUMENT)
        return ask(handle, fields)

    return asked


def test_a_field_that_spoils_the_whole_call_is_found_and_left_out() -> None:
    usual = told(Rig().opened().sample(SLOW)[0])
    rig = Rig()
    rig.nvml.nvmlDeviceGetFieldValues = spoiled_by(  # type: ignore[method-assign]
        230, rig.nvml.nvmlDeviceGetFieldValues
    )
    rig.opened()
    for _ in range(2):
        reading = rig.sample(SLOW)[0]
        assert told(reading) == usual - {Fact.RECOVERY_ACTION}
        assert reading.failures == ()
    assert rig.count(0)[FIELD_VALUES] == 3


IN_ONE_CALL = (
    *(Fact.MEMORY_TEMPERATURE_CELSIUS, Fact.ENERGY_JOULES),
    *(Fact.POWER_WATTS, Fact.POWER_INSTANT_WATTS),
)


def test_a_call_that_fails_fails_for_every_fact_in_it() -> None:
    rig = Rig(Fail(gpu=2, function=FIELD_VALUES, error="TIMEOUT")).opened()
    assert failed(rig.sample()[2]) == dict.fromkeys(IN_ONE_CALL, "driver_timeout")


# NVLink -----------------------------------------------------------------------------------------


LINKS_18 = {str(link) for link in range(18)}
ERRORS = {
    Fact.NVLINK_CRC_FLIT_ERRORS: 163,
    Fact.NVLINK_REPLAY_ERRORS: 161,
    Fact.NVLINK_RECOVERY_ERRORS: 162,
}


def missing_links(fields: Sequence[int]) -> Iterator[Field]:
    for number in fields:
        yield Field(field=number, error="NOT_SUPPORTED")


@pytest.mark.parametrize(
    "lacking",
    [
        (),  # one field for all links, the link as its scope
        tuple(ERRORS.values()),  # links to the twelfth by numbers of their own, then functions
        (*ERRORS.values(), *range(32, 60), *range(96, 120)),  # functions
    ],
)
def test_errors_of_links_in_every_layout(lacking: tuple[int, ...]) -> None:
    rig = Rig(*missing_links(lacking)).opened()
    for _ in range(2):
        reading = rig.sample(SLOW)[0]
        for fact in (*ERRORS, Fact.NVLINK_CRC_DATA_ERRORS):
            assert reading.by_label[fact].keys() == LINKS_18, fact
        assert reading.failures == ()


def test_links_in_base_units() -> None:
    rig = Rig().opened()
    labels = rig.sample(SLOW)[0].by_label
    assert labels[Fact.NVLINK_UP] == dict.fromkeys(LINKS_18, 1)
    speeds = set(labels[Fact.NVLINK_BANDWIDTH_BYTES_PER_SECOND].values())
    assert speeds == {26_562e6}
    assert all(sent % 1024 == 0 for sent in labels[Fact.NVLINK_TRANSMIT_BYTES].values())


def test_bytes_of_links_fall_back_to_the_newest_counters() -> None:
    rig = Rig(*missing_links((138, 139))).opened()
    labels = rig.sample(SLOW)[0].by_label
    assert labels[Fact.NVLINK_TRANSMIT_BYTES].keys() == LINKS_18
    assert labels[Fact.NVLINK_RECEIVE_BYTES].keys() == LINKS_18


@pytest.mark.parametrize(
    ("faults", "links"),
    [
        ((Field(field=91, error="NOT_SUPPORTED"),), 18),  # counted by asking for their state
        ((Field(field=91, value=2**32 - 1),), 18),
        ((Field(field=91, value=1000),), 18),
        ((Field(field=91, value=4),), 4),
        ((Field(field=91, value=0),), 0),
    ],
)
def test_links_are_counted(faults: tuple[Field, ...], links: int) -> None:
    reading = Rig(*faults).opened().sample(SLOW)[0]
    assert len(reading.by_label.get(Fact.NVLINK_UP, {})) == links


def test_a_card_without_links_is_asked_about_none() -> None:
    rig = Rig(model="T4").opened()
    rig.driver.inventory()
    assert rig.count(0)["nvmlDeviceGetNvLinkState"] <= 1
    reading = rig.sample(SLOW)[0]
    assert not {fact for fact in told(reading) if fact.startswith("nvlink")}
    assert rig.count(0)["nvmlDeviceGetNvLinkState"] == 0


def open_the_straight_way(rig: Rig, passed_over: int) -> list[int]:
    """Let the table show its library, which leaves one field as it was; count the calls."""
    sizes: list[int] = []

    def library(handle: Any, count: int, values: Any) -> int:
        sizes.append(count)
        asked = list(FIELD_VALUE.iter_unpack(values.raw))
        numbers = [(number, scope) for number, scope, *_ in asked]
        answers = FIELD_VALUE.iter_unpack(bytes(rig.nvml.nvmlDeviceGetFieldValues(handle, numbers)))
        told = [
            before if before[0] == passed_over else after
            for before, after in zip(asked, answers, strict=True)
        ]
        values.raw = b"".join(FIELD_VALUE.pack(*each) for each in told)
        return 0

    rig.nvml.__dict__["_nvmlGetFunctionPointer"] = {FIELD_VALUES: library}.__getitem__
    return sizes


def test_the_straight_way_to_the_library_tells_the_same() -> None:
    usual, straight = Rig(), Rig()
    sizes = open_the_straight_way(straight, passed_over=0)
    usual.opened()
    straight.opened()
    for rates in (FAST, SLOW, SLOW):
        assert straight.sample(rates) == usual.sample(rates)
    assert sizes, "the library was asked"


def test_a_field_that_the_library_passes_over_is_not_zero() -> None:
    rig = Rig()
    open_the_straight_way(rig, passed_over=82)
    reading = rig.opened().sample()[0]
    assert Fact.MEMORY_TEMPERATURE_CELSIUS not in reading.facts
    assert failed(reading) == {"memory_temperature_celsius": "unknown"}
    assert Fact.ENERGY_JOULES in reading.facts


def test_a_failing_call_on_the_straight_way_is_the_driver_s_error() -> None:
    rig = Rig(model="T4")  # without links, whose state would be asked for before

    def library(handle: Any, count: int, values: Any) -> int:
        return int(NVML.NVML_ERROR_GPU_IS_LOST)

    rig.opened()
    rig.nvml.__dict__["_nvmlGetFunctionPointer"] = {FIELD_VALUES: library}.__getitem__
    rig.driver.inventory()
    assert failed(rig.sample()[0]) == {"gpu": "gpu_lost"}
