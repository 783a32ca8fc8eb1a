"""Partitions that several processes share in one file: what they see of each other, and crashes."""

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Generator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.mig_cards import MigCard
from tests.support.simulated_nodes import NVML, World, node, outcome, refused

from stoker.agent.driver_host.frames import SimulatedDriver, arguments_of
from stoker.agent.simulated.nvml import SimulatedNvml
from stoker.agent.simulated.scenario import (
    Scenario,
    ScenarioFile,
    ScriptedProcess,
    ScriptedReset,
)
from stoker.agent.simulated.workloads import DEVICES, WORKLOAD
from stoker.core.errors import BadInput
from stoker.core.gpu_models import MODELS

HOPPER = "H100-80GB"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "simulated-mig.json"


def opened(path: Path, world: World | None = None, model: str = HOPPER, **options: Any) -> MigCard:
    """Return the first GPU of a node, as a process of its own would see it."""
    options = {"is_root": True, **options}
    return MigCard(node(world or World(), 2, model, mig_state=path, **options))


# Two tables in one process are two clients of the driver --------------------------------------


def test_what_one_makes_the_other_sees(path: Path) -> None:
    one = opened(path)
    assert one.enable() == NVML.NVML_SUCCESS
    two = opened(path)
    assert two.mode == [1, 1]
    uuid = one.device("3g.40gb", 4)
    assert two.uuids == [uuid]
    handle = two.nvml.nvmlDeviceGetMigDeviceHandleByIndex(two.gpu, 0)
    made = two.create("2g.20gb", 0)
    assert one.places == two.places == {2: (4, 9), 3: (0, 14)}
    with refused("INSUFFICIENT_RESOURCES"):
        one.create("2g.20gb", 0)
    # A handle leads to the same instance in every process, and to none once it is gone.
    one.nvml.nvmlGpuInstanceDestroy(made)
    with refused("INVALID_ARGUMENT"):
        two.nvml.nvmlGpuInstanceGetInfo(made)
    assert two.nvml.nvmlDeviceGetUUID(handle) == uuid
    assert opened(path).uuids == [uuid]


def test_a_session_elsewhere_keeps_the_gpu_in_use(path: Path) -> None:
    one, two = opened(path), opened(path)
    assert one.enable() == NVML.NVML_ERROR_IN_USE
    assert one.mode == [0, 0]
    assert two.enable() == NVML.NVML_ERROR_IN_USE  # each is in the other's way
    two.nvml.nvmlShutdown()
    assert one.enable() == NVML.NVML_SUCCESS
    two.nvml.nvmlInit()
    assert one.disable() == NVML.NVML_ERROR_IN_USE
    # Only the mode wants the GPU for itself.
    assert one.create("1g.10gb", 0)


def test_a_session_is_counted_once_however_often_it_was_begun(path: Path) -> None:
    one, two = opened(path), opened(path)
    two.nvml.nvmlInit()
    two.nvml.nvmlShutdown()
    assert one.enable() == NVML.NVML_ERROR_IN_USE
    two.nvml.nvmlShutdown()
    assert one.enable() == NVML.NVML_SUCCESS


def test_the_session_of_a_table_that_nobody_has_any_more_is_over(path: Path) -> None:
    one = opened(path)
    for _ in range(2):
        opened(path)
    assert one.enable() == NVML.NVML_SUCCESS


def act(on: MigCard, what: str, name: str, number: int) -> Any:
    """Make one call; return its outcome, without handles."""
    nvml, is_on = on.nvml, on.mode[0]
    instances = sorted(on.places) if is_on else []
    if what in ("enable", "disable"):
        return outcome(getattr(on, what))
    if what == "create":
        made = outcome(on.create, name, number)
        return made if isinstance(made, str) else "made"
    if not instances:
        return "nothing there"
    instance = nvml.nvmlDeviceGetGpuInstanceById(on.gpu, instances[number % len(instances)])
    if what == "split":
        made = outcome(nvml.nvmlGpuInstanceCreateComputeInstance, instance, number)
        return made if isinstance(made, str) else "made"
    if what == "end instance":
        return outcome(nvml.nvmlGpuInstanceDestroy, instance)
    part = outcome(nvml.nvmlGpuInstanceGetComputeInstanceById, instance, number % 2)
    return part if isinstance(part, str) else outcome(nvml.nvmlComputeInstanceDestroy, part)


CALLS = ("enable", "disable", "create", "create", "split", "end part", "end instance")
PROFILES = ("1g.10gb", "2g.20gb", "3g.40gb", "1g.10gb+me")


@settings(max_examples=25, deadline=None)
@given(
    calls=st.lists(
        st.tuples(
            st.booleans(), st.sampled_from(CALLS), st.sampled_from(PROFILES), st.integers(0, 7)
        ),
        max_size=25,
    )
)
def test_in_a_file_all_is_as_in_one_process(calls: list[tuple[bool, str, str, int]]) -> None:
    """By turns through one table or another, each call has the outcome that it has in one."""
    with TemporaryDirectory() as folder:
        alone = MigCard(node(World(), 2, HOPPER, is_root=True))
        tables = [opened(Path(folder) / "mig.json") for _ in range(2)]
        for table in tables:
            table.nvml.nvmlShutdown()
        alone.enable()
        tables[0].nvml.nvmlInit()
        tables[0].enable()
        tables[0].nvml.nvmlShutdown()
        for is_first, what, name, number in calls:
            turn = tables[is_first]
            turn.nvml.nvmlInit()
            assert act(turn, what, name, number) == act(alone, what, name, number)
            assert turn.mode == alone.mode
            assert turn.uuids == alone.uuids
            if alone.mode[0]:
                assert turn.places == alone.places
            turn.nvml.nvmlShutdown()


def test_who_did_not_make_a_change_hears_of_it(path: Path) -> None:
    one = opened(path)
    one.enable()
    two = opened(path)
    events = two.nvml.nvmlEventSetCreate()
    two.nvml.nvmlDeviceRegisterEvents(two.gpu, NVML.nvmlEventMigConfigChange, events)
    with refused("TIMEOUT"):
        two.nvml.nvmlEventSetWait(events, 0)
    one.create("2g.20gb", 2)
    assert two.nvml.nvmlEventSetWait(events, 0).device is two.gpu
    with refused("TIMEOUT"):
        two.nvml.nvmlEventSetWait(events, 0)
    MigCard(one.nvml, 1)  # a look changes nothing
    with refused("TIMEOUT"):
        two.nvml.nvmlEventSetWait(events, 0)


def test_an_unloaded_driver_is_unloaded_once_for_all(path: Path, tmp_path: Path) -> None:
    script = tmp_path / "scenario.json"
    one = opened(path, scenario=ScenarioFile(script))
    one.enable()
    two = opened(path, scenario=ScenarioFile(script))
    one.device("1g.10gb", 0)
    script.write_text('{"driver_loaded": false}')
    with refused("DRIVER_NOT_LOADED"):
        _ = one.mode
    script.unlink()
    assert one.mode == [0, 0]
    two.nvml.nvmlShutdown()
    assert one.enable() == NVML.NVML_SUCCESS
    one.create("1g.10gb", 0)
    script.write_text('{"driver_loaded": false}')
    # It was not there when the driver went, and comes when that is back.
    script.unlink()
    assert len(opened(path, scenario=ScenarioFile(script)).places) == 1


def test_who_comes_while_the_driver_is_away_unloads_nothing_anew(path: Path) -> None:
    world = World()
    one = opened(path, world)
    one.enable()
    away = Scenario(driver_loaded=False)
    world.now += 1
    two = SimulatedNvml([MODELS[HOPPER]] * 2, node="n1", now=lambda: world.now, mig_state=path)
    two.play(away)
    assert one.mode == [0, 0]
    one.enable()
    SimulatedNvml(
        [MODELS[HOPPER]] * 2, node="n1", now=lambda: world.now, mig_state=path, scenario=away
    )
    assert one.mode == [1, 1]


def test_a_reset_happens_once_for_all(path: Path) -> None:
    world = World()
    scenario = Scenario(resets=(ScriptedReset(gpu=0, at_seconds=5),))
    one, two = (opened(path, world, scenario=scenario) for _ in range(2))
    two.nvml.nvmlShutdown()
    one.enable()
    one.device("1g.10gb", 0)
    world.now += 6
    assert one.places == {}
    uuid = one.device("2g.20gb", 0)
    two.nvml.nvmlInit()
    assert two.uuids == one.uuids == [uuid]


def test_a_card_of_another_model_is_another_card(path: Path) -> None:
    one = opened(path)
    one.enable()
    one.device("7g.80gb")
    other = opened(path, model="A100-40GB")
    assert other.mode == [0, 0]
    other.nvml.nvmlShutdown()
    assert len(opened(path).uuids) == 1  # and it is put back as it was


def test_without_the_file_nothing_is_partitioned(path: Path) -> None:
    one = opened(path)
    one.enable()
    path.unlink()
    assert one.mode == [0, 0]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "truncated"),
        ('{"format": "stoker-simulated-mig", "cards": {"GPU', "truncated"),
        ('{"cards": []}', "Expected `object`"),
        ('{"format": "something else"}', "Invalid enum value"),
        ('{"version": 2}', "Invalid enum value"),
        ('{"processes": []}', "unknown field `processes`"),
    ],
)
def test_a_file_that_is_something_else_is_refused_by_name(path: Path, text: str, said: str) -> None:
    path.write_text(text)
    with pytest.raises(BadInput, match=f"{path}: .*{said}"):
        opened(path)
    assert path.read_text() == text


def records_of(path: Path) -> Any:
    one = opened(path)
    one.enable()
    one.device("3g.40gb", 4)
    one.nvml.nvmlShutdown()
    return json.loads(path.read_text())


SPOILT: dict[str, tuple[Callable[[Any, Any], object], str]] = {
    "another profile": (
        lambda card, instance: instance.update(profile_id=77),
        "no GPU instance profile 77",
    ),
    "another place": (lambda card, instance: instance.update(start=2), "can be no 3g.40gb at 2"),
    "another number": (lambda card, instance: instance.update(id=9), "can be no 3g.40gb at 4"),
    "one upon the other": (
        lambda card, instance: card["instances"].append({**instance, "number": 9}),
        "can be no 3g.40gb at 4",
    ),
    "instances without the mode": (
        lambda card, instance: card.update(is_enabled=False),
        "MIG mode is off",
    ),
    "another part": (
        lambda card, instance: instance["compute"][0].update(profile_id=3),
        "3g.40gb has no compute instance profile 3 there",
    ),
    "parts that overlap": (
        lambda card, instance: instance["compute"].append({**instance["compute"][0], "id": 1}),
        "compute instances of 3g.40gb at 4 overlap",
    ),
    "numbers that were never given": (
        lambda card, instance: card.update(made=1),
        "not numbered as they were made",
    ),
}


@pytest.mark.parametrize(("spoil", "said"), SPOILT.values(), ids=SPOILT.keys())
def test_partitions_that_cannot_be_are_refused_by_name(
    path: Path, spoil: Callable[[Any, Any], object], said: str
) -> None:
    records = records_of(path)
    (card,) = records["cards"].values()
    spoil(card, card["instances"][0])
    path.write_text(json.dumps(records))
    with pytest.raises(BadInput, match=rf"{path}: GPU 0 \(H100-80GB, GPU-.*\): .*{said}"):
        opened(path)


def test_a_file_that_is_spoilt_later_is_complained_of_and_left_alone(path: Path) -> None:
    said: list[str] = []
    one = opened(path, complain=said.append)
    one.enable()
    uuid = one.device("2g.20gb", 0)
    path.write_text("nonsense")
    assert one.uuids == [uuid]
    assert one.uuids == [uuid]
    assert len(said) == 1
    assert said[0].startswith(f"{path}: ")
    assert said[0].endswith("the partitions stay as they were")
    with refused("UNKNOWN"):
        one.create("1g.10gb", 4)
    assert path.read_text() == "nonsense"


def test_a_folder_that_is_not_there_has_no_file_and_takes_none(tmp_path: Path) -> None:
    said: list[str] = []
    nvml = SimulatedNvml(
        [MODELS[HOPPER]], node="n1", mig_state=tmp_path / "no" / "mig.json", complain=said.append
    )
    with refused("UNKNOWN"):
        nvml.nvmlInit()
    assert said == [f"{tmp_path}/no/mig.json.sessions: No such file or directory"]


def test_scripted_processes_are_in_the_way_in_every_process(path: Path) -> None:
    user = ScriptedProcess(gpu=0, pid=5_000_001, memory="1GiB", mig_start=4)
    one = opened(path)
    one.enable()
    part = one.split(one.create("3g.40gb", 4), "3g.40gb")
    two = opened(path, scenario=Scenario(processes=(user,)))
    with refused("IN_USE"):
        two.nvml.nvmlComputeInstanceDestroy(part)


def test_the_driver_host_is_told_of_the_file(path: Path) -> None:
    source = SimulatedDriver(("1xH100-80GB",), "n1", mig_state_path=str(path))
    assert f"--mig-state={path}" in arguments_of(source)
    assert not any("mig" in flag for flag in arguments_of(SimulatedDriver(("T4",), "n1")))


# Processes of their own -----------------------------------------------------------------------

CHILD = """
import sys
from pathlib import Path
from tests.support.mig_cards import MigCard
from stoker.agent.driver_host.frames import SimulatedDriver, arguments_of
from stoker.agent.simulated.nvml import SimulatedNvml
from stoker.core.gpu_models import MODELS

def say(word):
    print(word, flush=True)
    sys.stdin.readline()

path = Path(sys.argv[1])
nvml = SimulatedNvml([MODELS["H100-80GB"]] * 2, node="n1", mig_state=path, is_root=True)
nvml.nvmlInit()
card = MigCard(nvml)
"""

Start = Callable[[str], subprocess.Popen[str]]


@pytest.fixture
def start(path: Path) -> Generator[Start]:
    """Run a script in a process of its own until it says its first word."""
    children: list[subprocess.Popen[str]] = []

    def run(script: str) -> subprocess.Popen[str]:
        child = subprocess.Popen(
            [sys.executable, "-c", CHILD + script, str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        children.append(child)
        assert child.stdout is not None
        assert child.stdout.readline().strip() == "there"
        return child

    yield run
    for child in children:
        child.kill()
        child.communicate()


def kill(child: subprocess.Popen[str]) -> None:
    child.send_signal(signal.SIGKILL)
    child.wait()


def test_a_process_killed_between_two_calls_leaves_a_gpu_instance_without_a_device(
    path: Path, start: Start
) -> None:
    child = start("card.enable(); card.create('3g.40gb', 4); say('there'); card.split(...)")
    one = opened(path)
    assert one.places == {2: (4, 9)}
    assert one.uuids == []
    assert one.disable() == NVML.NVML_ERROR_IN_USE
    kill(child)
    assert one.places == {2: (4, 9)}
    (instance,) = one.instances
    one.split(instance, "3g.40gb")
    assert len(one.uuids) == 1
    assert opened(path).uuids == one.uuids


def test_the_session_of_a_process_that_was_killed_is_over(path: Path, start: Start) -> None:
    child = start("say('there')")
    one = opened(path)
    assert one.enable() == NVML.NVML_ERROR_IN_USE
    kill(child)
    assert one.enable() == NVML.NVML_SUCCESS


@pytest.mark.parametrize("point", ["write_bytes", "replace"])
def test_a_process_killed_within_a_change_leaves_things_as_they_were(
    path: Path, start: Start, point: str
) -> None:
    one = opened(path)
    one.enable()
    one.nvml.nvmlShutdown()
    child = start(f"Path.{point} = lambda *_: say('there')\ncard.create('3g.40gb', 4)")
    kill(child)
    one.nvml.nvmlInit()
    assert one.places == {}
    one.device("3g.40gb", 4)
    assert len(opened(path).uuids) == 1
    assert sorted(each.name for each in path.parent.iterdir()) == [
        path.name,
        f"{path.name}.lock",
        f"{path.name}.sessions",
    ]


def test_two_processes_that_change_at_once_take_turns(path: Path, start: Start) -> None:
    """Each makes and destroys one profile over and over; none loses what the other made."""
    one = opened(path)
    one.enable()
    script = """
say('there')
for _ in range(50):
    instance = card.create({profile!r}, {start})
    nvml.nvmlComputeInstanceDestroy(card.split(instance, {profile!r}))
    nvml.nvmlGpuInstanceDestroy(instance)
card.split(card.create({profile!r}, {start}), {profile!r})
say('made')
"""
    wanted = {"1g.10gb": 0, "3g.40gb": 4}
    children = [
        start(script.format(profile=profile, start=place)) for profile, place in wanted.items()
    ]
    for child in children:
        assert child.stdin is not None
        child.stdin.write("\n")
        child.stdin.flush()
    for child in children:
        assert child.stdout is not None
        assert child.stdout.readline().strip() == "made"
    assert len(one.uuids) == 2
    assert one.places == {7: (0, 19), 2: (4, 9)}


def test_a_real_process_keeps_its_device(path: Path) -> None:
    nvml = SimulatedNvml([MODELS[HOPPER]], node="n1", mig_state=path, is_root=True)
    nvml.nvmlInit()
    card = MigCard(nvml)
    card.enable()
    part = card.split(card.create("2g.20gb", 0), "2g.20gb")
    (uuid,) = card.uuids
    workload = subprocess.Popen(
        [sys.executable, "-c", "print(flush=True); input()"],
        env={WORKLOAD: "memory=1GiB", DEVICES: uuid},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with workload:
        assert workload.stdout is not None
        workload.stdout.readline()
        with refused("IN_USE"):
            nvml.nvmlComputeInstanceDestroy(part)
        listed = nvml.nvmlDeviceGetComputeRunningProcesses(card.gpu)
        assert [(each.pid, each.gpuInstanceId) for each in listed] == [(workload.pid, 3)]
        workload.kill()
    assert outcome(nvml.nvmlComputeInstanceDestroy, part) == NVML.NVML_SUCCESS
