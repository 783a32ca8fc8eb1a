"""Both pages as boards of real life give them: from the simulated driver's calls to the text."""

import re
import subprocess
from dataclasses import dataclass, replace

import pytest
from prometheus_client.parser import text_string_to_metric_families
from tests.conftest import Golden
from tests.support.pages import read_openmetrics
from tests.support.simulated_nodes import World, node
from tests.support.snapshots import dcgm_page, own_page, snapshot

from stoker.agent.driver_host.states import HostCounters
from stoker.agent.events import DriverChanged, InventoryRead, SampleTaken, Started
from stoker.agent.facts import Fact, Rate
from stoker.agent.metrics.exposition import openmetrics_text
from stoker.agent.metrics.own import own_families
from stoker.agent.metrics.row import LABELS_MAX
from stoker.agent.metrics.snapshot import Durations, Snapshot
from stoker.agent.model import DriverState, DriverStatus, NodeIdentity
from stoker.agent.nvml.driver import NvmlDriver
from stoker.agent.simulated.scenario import (
    Scenario,
    ScriptedDriver,
    ScriptedEvent,
    ScriptedFact,
    ScriptedMig,
    ScriptedProcess,
)
from stoker.agent.state import NodeState

TICKS = 25  # seconds of sampling
SLOW_EVERY = 10  # ticks
IDENTITY = NodeIdentity("node-a", "0.1.0", "boot", True, "", {}, 1.0, "process")
# What NVML and DCGM say for "not available"; whatever is as large as DCGM's is one.
SENTINELS = (float(2**31 - 1), float(2**32 - 1), float(2**64 - 1))
BLANK = float(2**63 - 16)
FRACTION = re.compile(r" \d+\.\d{9,}$", re.MULTILINE)

TRAINING = ScriptedProcess(gpu=0, pid=4711, name="train", memory="30GiB", utilization=0.8)
SMALL = ScriptedProcess(gpu=0, pid=4712, name="infer", memory="6GiB", utilization=0.4)


@dataclass(frozen=True, slots=True)
class Shape:
    """A node, and what happens on it."""

    model: str
    scenario: Scenario
    count: int = 1


SHAPES = {
    "h100": Shape(
        "H100-80GB",
        Scenario(
            processes=(TRAINING,),
            events=(ScriptedEvent(gpu=0, xid=94, at_seconds=12.0),),
            counters=(
                ScriptedFact(0, Fact.REMAPPED_ROWS, 1, "uncorrectable"),
                ScriptedFact(0, Fact.NVLINK_REPLAY_ERRORS, 3, "4"),
            ),
        ),
    ),
    "h100-mig": Shape(
        "H100-80GB",
        Scenario(
            processes=(SMALL,),
            mig=(ScriptedMig(gpu=0, devices=("4g.40gb", "1c.2g.20gb", "1c.2g.20gb")),),
        ),
    ),
    "a100-mig": Shape(
        "A100-80GB",
        Scenario(
            processes=(SMALL,),
            mig=(ScriptedMig(gpu=0, devices=("3g.40gb", "2g.20gb", "1g.10gb")),),
        ),
        count=2,  # the other one is whole
    ),
    "l40s": Shape("L40S", Scenario(processes=(TRAINING,))),
    "t4": Shape("T4", Scenario(processes=(SMALL,))),
    "old-driver": Shape(
        "T4", Scenario(processes=(SMALL,), driver=ScriptedDriver(version="450.80.02"))
    ),
}


def sampled(shape: Shape) -> Snapshot:
    """Return what the node shows after some time, by a clock that moves when told."""
    world = World()
    table = node(world, shape.count, shape.model, scenario=shape.scenario, seed=7)
    driver = NvmlDriver(table, simulated=True, now=lambda: world.now)
    driver.open()
    began = world.now
    state = NodeState((), IDENTITY)
    state.handle(Started(began), 0.0)
    state.handle(InventoryRead(began, driver.inventory()), 0.0)
    state.handle(DriverChanged(began, DriverStatus(DriverState.READING)), 0.0)
    for tick in range(TICKS):
        world.now = began + tick
        rates = (Rate.FAST,) if tick % SLOW_EVERY else (Rate.FAST, Rate.SLOW)
        state.handle(SampleTaken(world.now, driver.sample(rates)), float(tick))
    driver.close()
    shown = snapshot(state.view(), monotonic=float(TICKS))
    return replace(shown, host=HostCounters(), sample_durations=Durations())


@pytest.fixture(scope="module", params=SHAPES)
def shape(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def shown(shape: str) -> Snapshot:
    return sampled(SHAPES[shape])


def rounded(page: str) -> str:
    """Leave out the last digits of fractions: how Python adds floats depends on its version."""
    return FRACTION.sub(lambda found: f" {float(found[0]):.9g}", page)


def test_both_pages(shape: str, shown: Snapshot, golden: Golden) -> None:
    golden(f"metrics/{shape}.prom", rounded(own_page(shown)))
    golden(f"metrics/{shape}-dcgm.prom", rounded(dcgm_page(shown)))


def test_a_page_does_not_depend_on_when_it_is_made(shape: str, shown: Snapshot) -> None:
    again = sampled(SHAPES[shape])
    assert (own_page(again), dcgm_page(again)) == (own_page(shown), dcgm_page(shown))


def test_pages_parse_with_every_series_once_few_labels_and_no_sentinel(shown: Snapshot) -> None:
    families = [
        *text_string_to_metric_families(own_page(shown)),
        *text_string_to_metric_families(dcgm_page(shown)),
        *read_openmetrics(openmetrics_text(own_families(shown))),
    ]
    for family in families:
        labels = [tuple(sorted(s.labels.items())) for s in family.samples if s.name != "le"]
        assert len(family.samples) > 0
        assert all(len(each) <= LABELS_MAX for each in labels)
        if family.type != "histogram":
            assert len(labels) == len(set(labels)), family.name
        values = [sample.value for sample in family.samples]
        assert [v for v in values if v in SENTINELS or v >= BLANK or v < -100] == []


@pytest.mark.prometheus
def test_promtool_finds_nothing_to_say_about_the_own_page(shown: Snapshot) -> None:
    done = subprocess.run(
        ["promtool", "check", "metrics"],
        input=own_page(shown),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
