"""Partitions through the driver: what is read, what a step changes, and what it will not touch."""

from collections.abc import Callable, Generator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.support.mig_steps import NODE, destroy, empty, fill, instance_at, make
from tests.support.simulated_nodes import NO_PROCESSES

from stoker.agent.mig.failures import FailureKind, StepFailed
from stoker.agent.mig.library import Library, within
from stoker.agent.partitions import (
    Activation,
    CreateComputeInstance,
    CreateGpuInstance,
    DestroyComputeInstance,
    DestroyGpuInstance,
    GpuPartitions,
    SetMode,
    Step,
)
from stoker.agent.simulated.nvml import SimulatedNvml
from stoker.agent.simulated.scenario import (
    Answer,
    Fail,
    Fault,
    Lose,
    Missing,
    Scenario,
    ScriptedProcess,
)
from stoker.core.gpu_models import MODELS
from stoker.core.mig.boards import BOARDS

MIG_MODELS = [board.name for board in BOARDS if board.name in MODELS]


class Node:
    """Two cards, and a session with their driver."""

    def __init__(self, model: str = "H100-80GB", *, is_root: bool = True, **options: Any) -> None:
        self.nvml = SimulatedNvml(
            [MODELS[model]] * 2, node=NODE, proc=NO_PROCESSES, is_root=is_root, **options
        )
        self.uuid, self.other = self.nvml.uuids
        self.library = Library(self.nvml)
        self.library.__enter__()

    def now(self) -> GpuPartitions:
        return self.library.read(self.uuid)

    def do(self, of: Callable[[GpuPartitions], Step]) -> GpuPartitions:
        """Do a step, and return what is there afterwards."""
        now = self.now()
        assert self.library.do(self.uuid, of(now), now) is Activation.DONE
        return self.now()

    def made(self, name: str = "3g.40gb", start: int = 4) -> GpuPartitions:
        """Make a MIG device in a GPU that has none."""
        self.do(lambda now: SetMode(is_enabled=True))
        self.do(lambda now: make(now, name, start))
        return self.do(lambda now: fill(now, start))

    def play(self, *faults: Fault, **scenario: Any) -> None:
        self.nvml.play(Scenario(faults=faults, **scenario))


@pytest.fixture
def node() -> Generator[Node]:
    node = Node()
    yield node
    node.library.__exit__(None, None, None)


def failing(kind: FailureKind, *said: str) -> Any:
    """Expect a failure of this kind whose sentence names all this."""

    def is_it(raised: BaseException) -> bool:
        assert isinstance(raised, StepFailed)
        assert raised.kind is kind, str(raised)
        assert [each for each in said if each not in str(raised)] == [], str(raised)
        return True

    return pytest.raises(StepFailed, check=is_it)


# --- reading


@pytest.mark.parametrize("model", MIG_MODELS)
def test_what_the_driver_tells_is_what_is_known_of_the_board(model: str) -> None:
    node = Node(model)
    now = node.now()
    (board,) = [each for each in BOARDS if each.name == model]
    # What the driver tells is no estimate.
    known = {replace(profile, is_estimated=False) for profile in board.geometry.profiles}
    assert set(now.geometry.profiles) == known
    assert now.geometry.compute_slices == board.geometry.compute_slices
    assert now.geometry.memory_slices == board.geometry.memory_slices
    assert now.toggles_at_once is board.is_toggled_at_once
    assert (now.uuid, now.index, now.model) == (node.uuid, 0, board.driver_name)
    assert now.pci_device_id in board.pci_device_ids
    assert (now.is_enabled, now.is_pending, now.instances) == (False, False, ())


@pytest.mark.parametrize("model", MIG_MODELS)
def test_what_compute_instances_there_can_be_is_told_of_an_instance_that_is_there(
    model: str,
) -> None:
    node = Node(model)
    before = node.do(lambda now: SetMode(is_enabled=True))
    for profile in before.geometry.profiles:
        name, start = profile.name, profile.starts[-1]
        step = make(before, name, start)
        node.library.do(node.uuid, step, before)
        now = node.now()
        assert now.geometry == before.geometry
        node.library.do(node.uuid, destroy(now, start), now)


def test_what_the_driver_tells_wins_over_the_table(node: Node) -> None:
    function = "nvmlDeviceGetGpuInstanceProfileInfo"
    node.play(Answer(function=function, value={"memorySizeMB": 20992}))
    assert {profile.memory_mib for profile in node.now().geometry.profiles} == {20992}


@pytest.mark.parametrize("code", [13, 25])  # FUNCTION_NOT_FOUND, ARGUMENT_VERSION_MISMATCH
def test_an_older_library_has_no_names_and_they_are_those_of_the_table(
    code: int, node: Node
) -> None:
    names = {profile.name for profile in node.now().geometry.profiles}
    real = node.nvml.nvmlDeviceGetGpuInstanceProfileInfo

    def without_newer_forms(card: Any, constant: int, version: int = 2) -> Any:
        if version == 2:
            raise node.nvml.NVMLError(code)
        return real(card, constant, version)

    node.nvml.nvmlDeviceGetGpuInstanceProfileInfo = without_newer_forms  # type: ignore[method-assign]
    assert {profile.name for profile in node.now().geometry.profiles} == names


def test_instances_are_told_by_place_with_their_devices(node: Node) -> None:
    node.made("1g.10gb", 2)
    node.do(lambda now: make(now, "3g.40gb", 4))
    node.do(lambda now: fill(now, 4, 1))
    node.do(lambda now: fill(now, 4, 2))
    now = node.do(lambda now: make(now, "2g.20gb", 0))
    assert [(each.profile, each.start, each.size) for each in now.instances] == [
        ("2g.20gb", 0, 2),
        ("1g.10gb", 2, 1),
        ("3g.40gb", 4, 4),
    ]
    found = [
        [(compute.start, compute.compute_slices) for compute in each.compute_instances]
        for each in now.instances
    ]
    assert found == [[], [(0, 1)], [(0, 1), (1, 2)]]
    gpu = node.nvml.nvmlDeviceGetHandleByIndex(0)
    devices = [node.nvml.nvmlDeviceGetMigDeviceHandleByIndex(gpu, place) for place in range(3)]
    told = {compute.uuid for each in now.instances for compute in each.compute_instances}
    assert told == {node.nvml.nvmlDeviceGetUUID(device) for device in devices}


def test_all_are_the_gpus_that_have_mig(node: Node) -> None:
    listing = node.library.read_all()
    assert [gpu.uuid for gpu in listing.gpus] == [node.uuid, node.other]
    assert listing.shortfall == ""
    plain = Node("L40S")
    assert plain.library.read_all().gpus == ()
    with failing(FailureKind.NOT_SUPPORTED, plain.uuid, "no MIG"):
        plain.now()


def test_a_lost_gpu_hides_no_other_and_is_named(node: Node) -> None:
    node.play(Lose(gpu=0, function="nvmlDeviceGetName"))
    listing = node.library.read_all()
    assert [gpu.uuid for gpu in listing.gpus] == [node.other]
    assert node.uuid in listing.shortfall
    with failing(FailureKind.GPU_LOST, node.uuid, "GPU 0 cannot be read", "GPU_IS_LOST"):
        node.now()
    with failing(FailureKind.GPU_LOST, "GPU-nobody was not found; GPU 0"):
        node.library.read("GPU-nobody")
    assert node.library.read(node.other).uuid == node.other


def test_a_gpu_that_is_not_there_is_said_not_to_be(node: Node) -> None:
    with failing(FailureKind.NOT_FOUND, "GPU-nobody: the driver has no such GPU"):
        node.library.read("GPU-nobody")


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        ("DRIVER_NOT_LOADED", FailureKind.DRIVER_GONE),
        ("LIBRARY_NOT_FOUND", FailureKind.DRIVER_GONE),
        ("LIB_RM_VERSION_MISMATCH", FailureKind.DRIVER_GONE),
        ("NO_PERMISSION", FailureKind.NO_PERMISSION),
        ("OPERATING_SYSTEM", FailureKind.NO_PERMISSION),
        ("UNKNOWN", FailureKind.UNKNOWN),
    ],
)
def test_a_session_that_cannot_begin(error: str, kind: FailureKind) -> None:
    scenario = Scenario(faults=(Fail(function="nvmlInit", error=error),))
    nvml = SimulatedNvml([MODELS["H100-80GB"]], node=NODE, scenario=scenario)
    with failing(kind, "the driver cannot be opened", f"NVML_ERROR_{error}"), Library(nvml):
        pass


# --- steps and back


@pytest.mark.parametrize("model", MIG_MODELS)
def test_every_step_and_back(model: str) -> None:
    node = Node(model)
    before = node.now()
    profile = before.geometry.profiles[-1]
    start = profile.starts[0]
    assert node.do(lambda now: SetMode(is_enabled=True)).is_enabled
    node.do(lambda now: make(now, profile.name, start))
    made = node.do(lambda now: fill(now, start))
    (instance,) = made.instances
    assert (instance.profile, instance.start, instance.size) == (
        profile.name,
        start,
        profile.memory_slices,
    )
    (compute,) = instance.compute_instances
    assert compute.compute_slices == profile.compute_slices
    assert compute.uuid.startswith("MIG-")
    node.do(lambda now: empty(now, start))
    node.do(lambda now: destroy(now, start))
    assert node.do(lambda now: SetMode(is_enabled=False)) == before


def test_a_mode_that_is_there_is_not_set_again(node: Node) -> None:
    node.play(Fail(function="nvmlDeviceSetMigMode", error="IN_USE"))
    assert node.library.set_mode(node.uuid, is_enabled=False) is Activation.DONE


@pytest.mark.parametrize(
    ("model", "scenario", "expected", "pending"),
    [
        ("A100-40GB", {}, Activation.IN_USE, True),
        ("H100-80GB", {}, Activation.IN_USE, False),
        ("A100-40GB", {"pass_through": True}, Activation.RESET_REQUIRED, True),
    ],
)
def test_success_of_the_call_is_not_a_mode_in_force(
    model: str, scenario: dict[str, bool], expected: Activation, pending: bool
) -> None:
    node = Node(model)
    in_the_way = ScriptedProcess(gpu=0, pid=5_000_001)
    node.play(processes=(in_the_way,), **scenario)
    assert node.library.set_mode(node.uuid, is_enabled=True) is expected
    now = node.now()
    assert (now.is_enabled, now.is_pending) == (False, pending)


def test_a_pending_mode_can_be_taken_back() -> None:
    node = Node("A100-40GB")
    node.play(processes=(ScriptedProcess(gpu=0, pid=5_000_001),))
    assert node.library.set_mode(node.uuid, is_enabled=True) is Activation.IN_USE
    assert node.library.set_mode(node.uuid, is_enabled=False) is Activation.DONE
    assert not node.now().is_pending


def test_a_mode_said_to_be_in_force_and_pending_all_the_same() -> None:
    node = Node("A100-40GB")
    node.play(Answer(function="nvmlDeviceSetMigMode", value=0))  # SUCCESS, and nothing happens
    assert node.library.set_mode(node.uuid, is_enabled=True) is Activation.RESET_REQUIRED


def test_another_word_about_the_activation_is_a_failure(node: Node) -> None:
    node.play(Answer(function="nvmlDeviceSetMigMode", value=3))
    with failing(FailureKind.NOT_SUPPORTED, node.uuid, "turning MIG mode on", "NOT_SUPPORTED"):
        node.library.set_mode(node.uuid, is_enabled=True)


def test_mode_is_not_turned_off_over_instances(node: Node) -> None:
    node.made()
    with failing(FailureKind.BUSY, node.uuid, "turning MIG mode off: 1 GPU instances are there"):
        node.library.set_mode(node.uuid, is_enabled=False)


# --- what the driver refuses

STEPS: dict[str, tuple[str, Callable[[GpuPartitions], Step], str]] = {
    "mode": ("nvmlDeviceSetMigMode", lambda now: SetMode(is_enabled=True), "turning MIG mode on"),
    "create": (
        "nvmlDeviceCreateGpuInstanceWithPlacement",
        lambda now: make(now, "1g.10gb", 0),
        "making 1g.10gb at 0",
    ),
    "fill": (
        "nvmlGpuInstanceCreateComputeInstance",
        lambda now: fill(now, 2),
        "making a compute instance of 1 slices in 1g.10gb at 2",
    ),
    "empty": (
        "nvmlComputeInstanceDestroy",
        lambda now: empty(now, 4),
        "destroying compute instance 0 (MIG-",
    ),
    "destroy": ("nvmlGpuInstanceDestroy", lambda now: destroy(now, 2), "destroying 1g.10gb at 2"),
}
KINDS = {
    "IN_USE": FailureKind.BUSY,
    "NO_PERMISSION": FailureKind.NO_PERMISSION,
    "INSUFFICIENT_RESOURCES": FailureKind.NO_ROOM,
    "NOT_FOUND": FailureKind.NOT_FOUND,
    "NOT_SUPPORTED": FailureKind.NOT_SUPPORTED,
    "GPU_IS_LOST": FailureKind.GPU_LOST,
    "RESET_REQUIRED": FailureKind.GPU_LOST,
    "DRIVER_NOT_LOADED": FailureKind.DRIVER_GONE,
    "INVALID_ARGUMENT": FailureKind.UNKNOWN,
}


def prepared(name: str, node: Node) -> GpuPartitions:
    """Have a full 3g at 4 and an empty 1g at 2, but for the step that turns the mode on."""
    if name != "mode":
        node.made()
        node.do(lambda now: make(now, "1g.10gb", 2))
    return node.now()


@pytest.mark.parametrize("error", KINDS)
@pytest.mark.parametrize("name", STEPS)
def test_what_the_driver_refuses_is_a_kind_and_a_sentence(
    name: str, error: str, node: Node
) -> None:
    function, step, words = STEPS[name]
    before = prepared(name, node)
    node.play(Fail(function=function, error=error))
    with failing(KINDS[error], node.uuid, words, function, f"NVML_ERROR_{error}"):
        node.library.do(node.uuid, step(before), before)
    node.play()
    assert node.now() == before


@pytest.mark.parametrize("name", STEPS)
def test_a_library_without_the_function(name: str, node: Node) -> None:
    function, step, _ = STEPS[name]
    before = prepared(name, node)
    node.play(Missing(function=function))
    with failing(FailureKind.NOT_SUPPORTED, node.uuid, "FUNCTION_NOT_FOUND"):
        node.library.do(node.uuid, step(before), before)


@pytest.mark.parametrize("name", STEPS)
def test_who_is_not_root_changes_nothing(name: str, tmp_path: Path) -> None:
    state = tmp_path / "mig.json"
    root = Node(mig_state=state)
    before = prepared(name, root)
    root.library.__exit__(None, None, None)
    somebody = Node(is_root=False, mig_state=state)
    with failing(FailureKind.NO_PERMISSION, somebody.uuid, "NO_PERMISSION"):
        somebody.library.do(somebody.uuid, STEPS[name][1](before), before)
    assert Node(mig_state=state).now() == before


def test_without_root_the_places_of_a_gpu_without_mig_mode_are_those_of_the_table() -> None:
    assert Node(is_root=False).now() == Node().now()


def test_a_place_that_is_taken(node: Node) -> None:
    now = node.made()
    with failing(FailureKind.NO_ROOM, "making 3g.40gb at 4", "INSUFFICIENT_RESOURCES"):
        node.library.do(node.uuid, make(now, "3g.40gb", 4), now)


@pytest.mark.parametrize(
    "step",
    [
        CreateGpuInstance(profile_id=9, profile="3g.40gb", start=2, size=4),
        CreateGpuInstance(profile_id=9, profile="3g.40gb", start=4, size=2),
        CreateGpuInstance(profile_id=14, profile="3g.40gb", start=4, size=4),
        CreateGpuInstance(profile_id=9, profile="3g.20gb", start=4, size=4),
    ],
)
def test_what_the_board_does_not_offer_is_not_even_tried(
    step: CreateGpuInstance, node: Node
) -> None:
    now = node.do(lambda now: SetMode(is_enabled=True))
    with failing(FailureKind.NOT_SUPPORTED, node.uuid, f"making {step.profile} at", "not offer"):
        node.library.do(node.uuid, step, now)
    assert node.now() == now


# --- steps that come late

Change = Callable[[Node], object]


def made_anew(node: Node) -> None:
    """Put the same MIG device in its place, with another UUID."""
    node.do(lambda now: empty(now, 4))
    node.do(lambda now: fill(now, 4))


def other_profile(node: Node) -> None:
    """Put a GPU instance of another profile in its place; it may have the same ID."""
    node.do(lambda now: empty(now, 4))
    node.do(lambda now: destroy(now, 4))
    node.do(lambda now: make(now, "2g.20gb", 4))
    node.do(lambda now: fill(now, 4))


def gone(node: Node) -> None:
    node.do(lambda now: empty(now, 4))
    node.do(lambda now: destroy(now, 4))


def emptied(node: Node) -> None:
    node.do(lambda now: empty(now, 4))


LATE: list[tuple[Callable[[GpuPartitions], Step], Change, str]] = [
    (lambda now: empty(now, 4), made_anew, "compute instance 0 is MIG-"),
    (lambda now: empty(now, 4), emptied, "it is not there any more"),
    (lambda now: empty(now, 4), gone, "there is no GPU instance 2 any more"),
    (lambda now: empty(now, 4), other_profile, "there is no GPU instance 2 any more"),
    (lambda now: destroy(now, 4), gone, "there is no GPU instance 2 any more"),
    (lambda now: destroy(now, 4), other_profile, "there is no GPU instance 2 any more"),
    (lambda now: fill(now, 4), made_anew, ""),
    (lambda now: fill(now, 4), emptied, "its compute instances were 0, now none"),
    (lambda now: fill(now, 4), gone, "there is no GPU instance 2 any more"),
]


@pytest.mark.parametrize(("step", "meanwhile", "reason"), LATE)
def test_a_step_that_comes_late_hits_nobody_else(
    step: Callable[[GpuPartitions], Step], meanwhile: Change, reason: str, node: Node
) -> None:
    meant = node.made()
    meanwhile(node)
    before = node.now()
    kind = FailureKind.NOT_FOUND if reason else FailureKind.NO_ROOM
    with failing(kind, node.uuid, reason):
        node.library.do(node.uuid, step(meant), meant)
    assert node.now() == before


def test_an_id_that_is_used_again_is_not_taken_for_the_one_meant(node: Node) -> None:
    now = node.made("1g.10gb", 0)
    (instance,) = now.instances
    for step in (
        DestroyGpuInstance(instance.id, "1g.10gb", 1),
        DestroyGpuInstance(instance.id, "1g.10gb+me", 0),
    ):
        with failing(FailureKind.NOT_FOUND, f"GPU instance {instance.id} is 1g.10gb at 0 by now"):
            node.library.do(node.uuid, step, now)


def test_doing_a_step_twice_is_doing_it_once(node: Node) -> None:
    node.made("3g.40gb", 4)
    now = node.do(lambda now: make(now, "2g.20gb", 0))
    step = fill(now, 0, 1)
    node.library.do(node.uuid, step, now)
    with failing(FailureKind.NOT_FOUND, "its compute instances were none, now 0"):
        node.library.do(node.uuid, step, now)
    assert len(instance_at(node.now(), 0).compute_instances) == 1


@pytest.mark.parametrize(
    "step", [CreateComputeInstance(0, 0, 1), DestroyComputeInstance(7, 0, "MIG-1")]
)
def test_a_step_about_an_instance_that_was_not_read(
    step: CreateComputeInstance | DestroyComputeInstance, node: Node
) -> None:
    with failing(FailureKind.NOT_FOUND, node.uuid, "there is none for"):
        within(step, node.now())


def test_an_instance_that_goes_while_it_is_read_is_not_told(node: Node) -> None:
    now = node.made()
    fault = Fail(function="nvmlGpuInstanceGetInfo", error="NOT_FOUND", calls=1)
    node.play(fault)
    assert node.now() == now
    node.play(Fail(function="nvmlGpuInstanceGetInfo", error="NOT_FOUND"))
    with failing(FailureKind.NOT_FOUND, node.uuid, "its instances cannot be read"):
        node.now()
