"""What a driver really tells is what the checks look at: faults of simulated cards are found."""

import pytest
from tests.support.simulated_nodes import World, node

from stoker.agent.driver import DriverError
from stoker.agent.facts import CORRECTABLE, UNCORRECTABLE, Fact, Rate
from stoker.agent.health.judge import Judge
from stoker.agent.health.policy import Policy
from stoker.agent.numbering import number_gpus
from stoker.agent.nvml.driver import NvmlDriver
from stoker.agent.records import Durable
from stoker.agent.simulated.scenario import (
    Lose,
    Scenario,
    ScriptedEvent,
    ScriptedFact,
    ScriptedProcess,
    Vanish,
)
from stoker.agent.telemetry import Telemetry
from stoker.agent.verdicts import Check, GpuHealth, History, Verdict

BUSY = (ScriptedProcess(gpu=0, pid=5_000_001, utilization=1.0),)
SECONDS = 900


def told(fact: Fact, value: float, label: str = "") -> Scenario:
    scripted = ScriptedFact(gpu=0, fact=fact, value=value, label=label, from_seconds=400.0)
    return Scenario(processes=BUSY, counters=(scripted,))


def judged(scenario: Scenario, model: str) -> tuple[GpuHealth, ...]:
    """Return the verdicts after a quarter of an hour, as the agent would come to them."""
    world = World()
    driver = NvmlDriver(
        node(world, 2, model, scenario=scenario), simulated=True, now=lambda: world.now
    )
    driver.open()
    judge, telemetry = Judge(Policy(), "boot", History()), Telemetry()
    inventory, _ = number_gpus(driver.inventory(), Durable(), None, None)
    judge.take_inventory(world.now, inventory)
    for second in range(0, SECONDS, 5):
        world.now += 5.0
        rates = (Rate.FAST, Rate.SLOW) if second % 10 == 0 else (Rate.FAST,)
        try:
            readings = driver.sample(rates)
        except DriverError:  # GPUs went: they are looked for anew
            driver.open()
            inventory, _ = number_gpus(driver.inventory(), Durable(), inventory, None)
            judge.take_inventory(world.now, inventory)
            continue
        telemetry.take(readings, world.now)
        judge.take_readings(world.now, world.now, readings, telemetry.gpus(world.now))
    return judge.gpus()


# what happens, on which model, what is found of it
ROWS: list[tuple[str, Scenario, str, Check, str]] = [
    (
        "uncorrected memory error",
        told(Fact.ECC_UNCORRECTED_VOLATILE_ERRORS, 1),
        "H100-80GB",
        Check.ECC_UNCORRECTED,
        "",
    ),
    (
        "corrected memory errors",
        told(Fact.ECC_CORRECTED_VOLATILE_ERRORS, 1000),
        "H100-80GB",
        Check.ECC_CORRECTED,
        "",
    ),
    ("row pending", told(Fact.REMAPPED_ROWS_PENDING, 1), "H100-80GB", Check.ROW_REMAP_PENDING, ""),
    ("row failed", told(Fact.REMAPPED_ROWS_FAILED, 1), "A100-40GB", Check.ROW_REMAP_FAILED, ""),
    ("page pending", told(Fact.RETIRED_PAGES_PENDING, 1), "T4", Check.RETIRED_PAGES, "pending"),
    (
        "no room for pages",
        told(Fact.RETIRED_PAGES, 64, CORRECTABLE),
        "T4",
        Check.RETIRED_PAGES,
        "full",
    ),
    (
        "bad pages",
        told(Fact.RETIRED_PAGES, 20, UNCORRECTABLE),
        "T4",
        Check.RETIRED_PAGES,
        "uncorrected",
    ),
    ("link down", told(Fact.NVLINK_UP, 0, "3"), "H100-80GB", Check.NVLINK_DOWN, "3"),
    (
        "link recovers",
        told(Fact.NVLINK_RECOVERY_ERRORS, 1, "3"),
        "H100-80GB",
        Check.NVLINK_ERRORS,
        "3",
    ),
    ("replays", told(Fact.PCIE_REPLAYS, 10_000), "L40S", Check.PCIE_REPLAYS, ""),
    ("narrow", told(Fact.PCIE_LINK_WIDTH, 4), "H100-80GB", Check.PCIE_LINK, ""),
    (
        "slowed down by heat",
        told(Fact.CLOCK_EVENT_ACTIVE, 1, "hw_thermal_slowdown"),
        "B200",
        Check.THERMAL,
        "",
    ),
    (
        "slowed down by hardware",
        told(Fact.CLOCK_EVENT_ACTIVE, 1, "hw_slowdown"),
        "H100-80GB",
        Check.HW_SLOWDOWN,
        "",
    ),
    (
        "power brake",
        told(Fact.CLOCK_EVENT_ACTIVE, 1, "hw_power_brake_slowdown"),
        "H100-80GB",
        Check.POWER_BRAKE,
        "",
    ),
    (
        "asks for a reboot",
        told(Fact.RECOVERY_ACTION, 2),
        "H100-80GB",
        Check.RECOVERY_ACTION,
        "reboot",
    ),
    ("no persistence", told(Fact.PERSISTENCE_MODE, 0), "H100-80GB", Check.PERSISTENCE, ""),
    (
        "event",
        Scenario(events=(ScriptedEvent(gpu=0, xid=79, at_seconds=60.0),)),
        "H100-80GB",
        Check.XID,
        "79",
    ),
    (
        "lost",
        Scenario(faults=(Lose(gpu=0, from_seconds=60.0),)),
        "H100-80GB",
        Check.GPU_LOST,
        "gpu_lost",
    ),
    (
        "vanished",
        Scenario(faults=(Vanish(gpu=0, from_seconds=60.0),)),
        "H100-80GB",
        Check.GPU_MISSING,
        "",
    ),
]


@pytest.mark.parametrize(
    ("scenario", "model", "check", "code"), [row[1:] for row in ROWS], ids=[row[0] for row in ROWS]
)
def test_fault_of_a_card_is_found(scenario: Scenario, model: str, check: Check, code: str) -> None:
    first, second = judged(scenario, model)
    assert (check, code) in [(fault.check, fault.code) for fault in first.faults]
    assert first.verdict is not Verdict.HEALTHY
    assert second.verdict is Verdict.HEALTHY


@pytest.mark.parametrize("model", ["A100-80GB", "H200-141GB", "B200", "L40S", "T4"])
def test_sound_cards_of_every_model_are_healthy(model: str) -> None:
    assert [
        (health.verdict, health.faults) for health in judged(Scenario(processes=BUSY), model)
    ] == [(Verdict.HEALTHY, ())] * 2
