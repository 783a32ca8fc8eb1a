"""On this board this call answers that: what each simulated board has, and what it refuses."""

from typing import Any

import pytest
from tests.support.simulated_nodes import GIB, MIB, NVML, World, fields_of, node, outcome, refused

from stoker.agent.facts import Fact
from stoker.agent.simulated.scenario import Answer, Scenario, ScriptedFact, ScriptedProcess
from stoker.core.gpu_models import MODELS

NOT_SUPPORTED = "NOT_SUPPORTED"
# The columns of every table below.
BOARDS = ("A100-40GB", "A100-80GB", "H100-80GB", "H200-141GB", "B200", "L40S", "T4")
TEMPERATURE = NVML.NVML_TEMPERATURE_THRESHOLD_SHUTDOWN
SLOWDOWN = NVML.NVML_TEMPERATURE_THRESHOLD_SLOWDOWN
MEMORY = NVML.NVML_TEMPERATURE_THRESHOLD_MEM_MAX
HIGHEST = NVML.NVML_TEMPERATURE_THRESHOLD_GPU_MAX
ACOUSTIC = NVML.NVML_TEMPERATURE_THRESHOLD_ACOUSTIC_MAX

# Function, arguments, and by board what an idle card answers.
TABLE: list[tuple[str, tuple[Any, ...], tuple[Any, ...]]] = [
    ("nvmlDeviceGetArchitecture", (), (7, 7, 9, 9, 10, 8, 6)),
    ("nvmlDeviceGetClockInfo", (0,), (210, 210, 345, 345, 120, 210, 300)),
    ("nvmlDeviceGetClockInfo", (1,), (210, 210, 345, 345, 120, 210, 300)),
    ("nvmlDeviceGetClockInfo", (2,), (1215, 1593, 2619, 3201, 3996, 405, 405)),
    ("nvmlDeviceGetClockInfo", (3,), (585, 585, 765, 765, 600, 555, 540)),
    ("nvmlDeviceGetMaxClockInfo", (1,), (1410, 1410, 1980, 1980, 1965, 2520, 1590)),
    ("nvmlDeviceGetMaxClockInfo", (2,), (1215, 1593, 2619, 3201, 3996, 9001, 5001)),
    ("nvmlDeviceGetMaxClockInfo", (3,), (1290, 1290, 1545, 1545, 1965, 1965, 1470)),
    ("nvmlDeviceGetMaxClockInfo", (9,), ("INVALID_ARGUMENT",) * 7),
    ("nvmlDeviceGetPerformanceState", (), (0, 0, 0, 0, 0, 8, 8)),
    ("nvmlDeviceGetCurrentClocksEventReasons", (), (1,) * 7),
    ("nvmlDeviceGetCurrentClocksThrottleReasons", (), (1,) * 7),
    ("nvmlDeviceGetEnforcedPowerLimit", (), (400e3, 400e3, 700e3, 700e3, 1000e3, 350e3, 70e3)),
    (
        "nvmlDeviceGetPowerManagementDefaultLimit",
        (),
        (400e3, 400e3, 700e3, 700e3, 1000e3, 350e3, 70e3),
    ),
    (
        "nvmlDeviceGetPowerManagementLimitConstraints",
        (),
        (
            *([100e3, 400e3], [100e3, 400e3], [200e3, 700e3], [200e3, 700e3]),
            *([200e3, 1000e3], [100e3, 350e3], [60e3, 70e3]),
        ),
    ),
    ("nvmlDeviceGetTemperatureThreshold", (TEMPERATURE,), (92, 92, 95, 95, 93, 93, 96)),
    ("nvmlDeviceGetTemperatureThreshold", (SLOWDOWN,), (89, 89, 89, 89, 91, 90, 93)),
    ("nvmlDeviceGetTemperatureThreshold", (HIGHEST,), (85, 85, 87, 87, 88, 88, 85)),
    (
        "nvmlDeviceGetTemperatureThreshold",
        (MEMORY,),
        (95, 95, 95, 95, 95, NOT_SUPPORTED, NOT_SUPPORTED),
    ),
    ("nvmlDeviceGetTemperatureThreshold", (ACOUSTIC,), (NOT_SUPPORTED,) * 7),
    ("nvmlDeviceGetTemperatureThreshold", (8,), ("INVALID_ARGUMENT",) * 7),
    ("nvmlDeviceGetNumFans", (), (NOT_SUPPORTED,) * 7),
    ("nvmlDeviceGetFanSpeed", (), (NOT_SUPPORTED,) * 7),
    ("nvmlDeviceGetFanSpeed_v2", (0,), (NOT_SUPPORTED,) * 7),
    ("nvmlDeviceGetCurrPcieLinkGeneration", (), (4, 4, 5, 5, 5, 4, 3)),
    ("nvmlDeviceGetMaxPcieLinkGeneration", (), (4, 4, 5, 5, 5, 4, 3)),
    ("nvmlDeviceGetCurrPcieLinkWidth", (), (16,) * 7),
    ("nvmlDeviceGetMaxPcieLinkWidth", (), (16,) * 7),
    ("nvmlDeviceGetPcieReplayCounter", (), (0,) * 7),
    ("nvmlDeviceGetEccMode", (), ([1, 1],) * 7),
    ("nvmlDeviceGetTotalEccErrors", (1, 0), (0,) * 7),
    ("nvmlDeviceGetMemoryErrorCounter", (1, 0, 2), (0,) * 7),
    ("nvmlDeviceGetMemoryErrorCounter", (1, 0, 7), (0,) * 7),
    ("nvmlDeviceGetMemoryErrorCounter", (1, 0, 4), (NOT_SUPPORTED,) * 7),
    ("nvmlDeviceGetMemoryErrorCounter", (1, 0, 8), ("INVALID_ARGUMENT",) * 7),
    ("nvmlDeviceGetRemappedRows", (), (*((0, 0, 0, 0),) * 6, NOT_SUPPORTED)),
    ("nvmlDeviceGetRetiredPages", (0,), (*(NOT_SUPPORTED,) * 6, [])),
    ("nvmlDeviceGetRetiredPages_v2", (1,), (*(NOT_SUPPORTED,) * 6, [])),
    ("nvmlDeviceGetRetiredPagesPendingStatus", (), (*(NOT_SUPPORTED,) * 6, 0)),
    ("nvmlDeviceGetNvLinkState", (0,), (*(1,) * 5, NOT_SUPPORTED, NOT_SUPPORTED)),
    ("nvmlDeviceGetNvLinkState", (11,), (*(1,) * 5, NOT_SUPPORTED, NOT_SUPPORTED)),
    (
        "nvmlDeviceGetNvLinkState",
        (12,),
        ("INVALID_ARGUMENT", "INVALID_ARGUMENT", 1, 1, 1, NOT_SUPPORTED, NOT_SUPPORTED),
    ),
    (
        "nvmlDeviceGetNvLinkRemoteDeviceType",
        (0,),
        (*(NVML.NVML_NVLINK_DEVICE_TYPE_SWITCH,) * 5, NOT_SUPPORTED, NOT_SUPPORTED),
    ),
    (
        "nvmlDeviceGetNvLinkRemoteDeviceType",
        (18,),
        (*("INVALID_ARGUMENT",) * 5, *(NOT_SUPPORTED,) * 2),
    ),
    ("nvmlDeviceGetNvLinkVersion", (0,), (4, 4, 6, 6, 7, NOT_SUPPORTED, NOT_SUPPORTED)),
    (
        "nvmlDeviceGetNvLinkErrorCounter",
        (0, NVML.NVML_NVLINK_ERROR_DL_CRC_FLIT),
        (0, 0, 0, 0, NOT_SUPPORTED, NOT_SUPPORTED, NOT_SUPPORTED),
    ),
    ("nvmlDeviceGetPersistenceMode", (), (1,) * 7),
    ("nvmlDeviceGetComputeMode", (), (0,) * 7),
    ("nvmlDeviceGetMigMode", (), (*([0, 0],) * 5, NOT_SUPPORTED, NOT_SUPPORTED)),
    ("nvmlDeviceGetMaxMigDeviceCount", (), (0,) * 7),  # not before it is partitioned
    ("nvmlDeviceGetSupportedEventTypes", (), (*(0x11F,) * 5, 0x1F, 0x1F)),
    ("nvmlDeviceGetMPSComputeRunningProcesses", (), ([],) * 7),
    *((f"nvmlDeviceGet{e}Utilization", (), ([0, 100_000],) * 7) for e in ("Encoder", "Decoder")),
    *((f"nvmlDeviceGet{e}Utilization", (), ([0, 100_000],) * 7) for e in ("Jpg", "Ofa")),
]


@pytest.mark.parametrize(("function", "arguments", "answers"), TABLE)
def test_an_idle_board(function: str, arguments: tuple[Any, ...], answers: tuple[Any, ...]) -> None:
    found: list[Any] = []
    for model in BOARDS:
        nvml = node(World(), 1, model)
        gpu = nvml.nvmlDeviceGetHandleByIndex(0)
        found.append(outcome(getattr(nvml, function), gpu, *arguments))
    assert dict(zip(BOARDS, found, strict=True)) == dict(zip(BOARDS, answers, strict=True))


# A newer board answers as its relative does, but for these.
_MAX_CLOCK, _LIMITS = "nvmlDeviceGetMaxClockInfo", "nvmlDeviceGetPowerManagementLimitConstraints"
_LIMIT, _DEFAULT = "nvmlDeviceGetEnforcedPowerLimit", "nvmlDeviceGetPowerManagementDefaultLimit"
_THRESHOLD = "nvmlDeviceGetTemperatureThreshold"
_NO_LINKS = {row[:2]: NOT_SUPPORTED for row in TABLE if row[0].startswith("nvmlDeviceGetNvLink")}
NEWER: dict[str, tuple[str, dict[tuple[str, tuple[Any, ...]], Any]]] = {
    "A30-24GB": (
        "A100-40GB",
        {
            (_MAX_CLOCK, (1,)): 1440,
            (_LIMIT, ()): 165e3,
            (_DEFAULT, ()): 165e3,
            (_LIMITS, ()): [100e3, 165e3],
            **_NO_LINKS,
        },
    ),
    "H100-94GB": (
        "H100-80GB",
        {
            (_MAX_CLOCK, (1,)): 1785,
            (_MAX_CLOCK, (3,)): 1410,
            (_LIMIT, ()): 400e3,
            (_DEFAULT, ()): 400e3,
            (_LIMITS, ()): [200e3, 400e3],
            **_NO_LINKS,
        },
    ),
    "GB200": (
        "B200",
        {
            (_MAX_CLOCK, (1,)): 2062,
            (_MAX_CLOCK, (3,)): 1890,
            (_LIMIT, ()): 1200e3,
            (_DEFAULT, ()): 1200e3,
            (_LIMITS, ()): [200e3, 1200e3],
            (_THRESHOLD, (TEMPERATURE,)): 92,
            (_THRESHOLD, (SLOWDOWN,)): 89,
            (_THRESHOLD, (HIGHEST,)): 87,
        },
    ),
    "RTX-PRO-6000": (
        "L40S",
        {
            ("nvmlDeviceGetArchitecture", ()): 10,
            ("nvmlDeviceGetClockInfo", (0,)): 180,
            ("nvmlDeviceGetClockInfo", (1,)): 180,
            ("nvmlDeviceGetClockInfo", (3,)): 600,
            (_MAX_CLOCK, (1,)): 2430,
            (_MAX_CLOCK, (2,)): 12481,
            (_MAX_CLOCK, (3,)): 2130,
            (_LIMIT, ()): 600e3,
            (_DEFAULT, ()): 600e3,
            (_LIMITS, ()): [300e3, 600e3],
            ("nvmlDeviceGetCurrPcieLinkGeneration", ()): 5,
            ("nvmlDeviceGetMaxPcieLinkGeneration", ()): 5,
            ("nvmlDeviceGetMigMode", ()): [0, 0],
            ("nvmlDeviceGetSupportedEventTypes", ()): 0x11F,
        },
    ),
}


@pytest.mark.parametrize("model", NEWER)
def test_a_newer_board_answers_as_its_relative_but_for_its_own_figures(model: str) -> None:
    nvml = node(World(), 1, model)
    gpu = nvml.nvmlDeviceGetHandleByIndex(0)
    relative, own = NEWER[model]
    column = BOARDS.index(relative)
    expected = {(name, asked): answers[column] for name, asked, answers in TABLE} | own
    found = {(name, asked): outcome(getattr(nvml, name), gpu, *asked) for name, asked, _ in TABLE}
    assert found == expected


def test_the_tables_name_every_board() -> None:
    assert {*BOARDS, *NEWER} == MODELS.keys()


def test_links_lead_to_the_switches_of_the_board_and_to_no_gpu() -> None:
    nvml = node(World(), 8)
    gpus = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(8)]
    remote = {
        nvml.nvmlDeviceGetNvLinkRemotePciInfo(gpu, link).busId for gpu in gpus for link in range(18)
    }
    assert remote == {f"00000000:{bus:02X}:00.0" for bus in (5, 6, 7, 8)}
    assert not remote & {nvml.nvmlDeviceGetPciInfo(gpu).busId for gpu in gpus}
    with refused("INVALID_ARGUMENT"):
        nvml.nvmlDeviceGetNvLinkRemotePciInfo(gpus[0], 18)


@pytest.mark.parametrize(
    ("model", "bar1_mib", "banks"),
    [("A100-40GB", 65536, 640), ("H100-80GB", 131072, 2560), ("L40S", 65536, 192)],
)
def test_windows_and_spare_rows(model: str, bar1_mib: int, banks: int) -> None:
    nvml = node(World(), 1, model)
    gpu = nvml.nvmlDeviceGetHandleByIndex(0)
    window = nvml.nvmlDeviceGetBAR1MemoryInfo(gpu)
    assert (window.bar1Total, window.bar1Used) == (bar1_mib * MIB, MIB)
    assert window.bar1Free == window.bar1Total - window.bar1Used
    histogram = fields_of(nvml.nvmlDeviceGetRowRemapperHistogram(gpu))
    assert histogram == {"max": banks, "high": 0, "partial": 0, "low": 0, "none": 0}


@pytest.mark.parametrize(("model", "margin"), [("H100-80GB", 58), ("B200", 49), ("L40S", 59)])
def test_degrees_left_are_those_of_the_idle_boards_that_were_seen(model: str, margin: int) -> None:
    nvml = node(World(), 1, model)
    gpu = nvml.nvmlDeviceGetHandleByIndex(0)
    left = nvml.nvmlDeviceGetMarginTemperature(gpu)
    highest = nvml.nvmlDeviceGetTemperatureThreshold(gpu, HIGHEST)
    assert left == pytest.approx(margin, abs=2)
    assert left == pytest.approx(highest - nvml.nvmlDeviceGetTemperatureV(gpu, 0), abs=1)


@pytest.mark.parametrize("model", ["A100-40GB", "T4"])
def test_older_boards_do_not_tell_degrees_left(model: str) -> None:
    nvml = node(World(), 1, model)
    with refused(NOT_SUPPORTED):
        nvml.nvmlDeviceGetMarginTemperature(nvml.nvmlDeviceGetHandleByIndex(0))


def test_a_board_at_work() -> None:
    world = World()
    work = ScriptedProcess(
        gpu=0, pid=5_000_001, memory="8GiB", utilization=0.8, encoder=0.25, decoder=0.5
    )
    nvml = node(world, 1, "L40S", scenario=Scenario(processes=(work,)))
    gpu = nvml.nvmlDeviceGetHandleByIndex(0)
    world.now += 10
    assert nvml.nvmlDeviceGetEncoderUtilization(gpu)[0] == 25
    assert nvml.nvmlDeviceGetDecoderUtilization(gpu)[0] == 50
    assert nvml.nvmlDeviceGetPerformanceState(gpu) == 0
    assert nvml.nvmlDeviceGetClockInfo(gpu, NVML.NVML_CLOCK_VIDEO) == 1965
    assert nvml.nvmlDeviceGetClockInfo(gpu, NVML.NVML_CLOCK_MEM) == 9001
    assert not nvml.nvmlDeviceGetCurrentClocksEventReasons(gpu) & 0x1
    assert nvml.nvmlDeviceGetMemoryInfo(gpu, NVML.nvmlMemory_v2).used == 8 * GIB


def test_at_the_power_limit_the_clocks_are_held_down_now_and_then() -> None:
    world = World()
    work = ScriptedProcess(gpu=0, pid=5_000_001, utilization=1.0)
    nvml = node(world, 1, scenario=Scenario(processes=(work,)))
    gpu = nvml.nvmlDeviceGetHandleByIndex(0)
    seen: set[int] = set()
    for _ in range(200):
        world.now += 1
        seen.add(nvml.nvmlDeviceGetCurrentClocksEventReasons(gpu))
    assert seen == {0x0, 0x4}


# What a scenario says of a board's health: fact, label, value, board, function, arguments, answer.
SCRIPTED: list[tuple[str, str, float, str, str, tuple[Any, ...], Any]] = [
    ("ecc_corrected_volatile_errors", "", 7, "T4", "nvmlDeviceGetTotalEccErrors", (0, 0), 7),
    ("ecc_uncorrected_volatile_errors", "", 3, "T4", "nvmlDeviceGetTotalEccErrors", (1, 0), 3),
    ("ecc_corrected_aggregate_errors", "", 9, "T4", "nvmlDeviceGetTotalEccErrors", (0, 1), 9),
    (
        "ecc_uncorrected_aggregate_errors",
        "",
        2,
        "H100-80GB",
        "nvmlDeviceGetMemoryErrorCounter",
        (1, 1, 2),
        2,
    ),
    ("remapped_rows", "correctable", 4, "B200", "nvmlDeviceGetRemappedRows", (), (4, 0, 0, 0)),
    ("remapped_rows", "uncorrectable", 1, "B200", "nvmlDeviceGetRemappedRows", (), (0, 1, 0, 0)),
    ("remapped_rows_pending", "", 1, "B200", "nvmlDeviceGetRemappedRows", (), (0, 0, 1, 0)),
    ("remapped_rows_failed", "", 1, "B200", "nvmlDeviceGetRemappedRows", (), (0, 0, 0, 1)),
    (
        "retired_pages",
        "uncorrectable",
        2,
        "T4",
        "nvmlDeviceGetRetiredPages",
        (1,),
        [0x10000, 0x20000],
    ),
    ("retired_pages_pending", "", 1, "T4", "nvmlDeviceGetRetiredPagesPendingStatus", (), 1),
    ("pcie_replays", "", 150, "H100-80GB", "nvmlDeviceGetPcieReplayCounter", (), 150),
    ("pcie_link_generation", "", 1, "L40S", "nvmlDeviceGetCurrPcieLinkGeneration", (), 1),
    ("pcie_link_width", "", 8, "L40S", "nvmlDeviceGetCurrPcieLinkWidth", (), 8),
    ("nvlink_up", "4", 0, "A100-40GB", "nvmlDeviceGetNvLinkState", (4,), 0),
    (
        "nvlink_replay_errors",
        "3",
        5,
        "A100-40GB",
        "nvmlDeviceGetNvLinkErrorCounter",
        (3, NVML.NVML_NVLINK_ERROR_DL_REPLAY),
        5,
    ),
    (
        "clock_event_active",
        "hw_thermal_slowdown",
        1,
        "T4",
        "nvmlDeviceGetCurrentClocksEventReasons",
        (),
        0x41,
    ),
    ("persistence_mode", "", 0, "T4", "nvmlDeviceGetPersistenceMode", (), 0),
    ("compute_mode", "", 3, "T4", "nvmlDeviceGetComputeMode", (), 3),
    ("mig_mode_pending", "", 1, "A100-40GB", "nvmlDeviceGetMigMode", (), [0, 1]),
]


@pytest.mark.parametrize(
    ("fact", "label", "value", "model", "function", "arguments", "answer"), SCRIPTED
)
def test_a_scripted_fact_is_told_while_it_lasts(
    fact: str,
    label: str,
    value: float,
    model: str,
    function: str,
    arguments: tuple[Any, ...],
    answer: Any,
) -> None:
    world = World()
    told = ScriptedFact(
        gpu=1, fact=Fact(fact), label=label, value=value, from_seconds=5, until_seconds=9
    )
    nvml = node(world, 2, model, scenario=Scenario(counters=(told,)))
    gpus = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(2)]

    def answers() -> list[Any]:
        return [getattr(nvml, function)(gpu, *arguments) for gpu in gpus]

    before = answers()
    assert before[1] != answer
    world.now += 6
    assert answers() == [before[0], answer]
    world.now += 6
    assert answers() == before


def test_a_scenario_can_make_a_board_with_fans() -> None:
    faults = (
        Answer(function="nvmlDeviceGetNumFans", value=2),
        Answer(function="nvmlDeviceGetFanSpeed_v2", value=41),
    )
    nvml = node(World(), 1, "L40S", scenario=Scenario(faults=faults))
    gpu = nvml.nvmlDeviceGetHandleByIndex(0)
    assert nvml.nvmlDeviceGetNumFans(gpu) == 2
    assert nvml.nvmlDeviceGetFanSpeed_v2(gpu, 1) == 41
