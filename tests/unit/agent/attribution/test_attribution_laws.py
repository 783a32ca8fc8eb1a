"""Whatever text comes: it is read without an error, and nobody is named who is not named in it."""

import string

from hypothesis import example, given
from hypothesis import strategies as st

from stoker.agent.attribution.assignments import (
    ASSIGNMENTS_MAX,
    Assigned,
    JobGpus,
    PodClaim,
    PodDevices,
    join,
    of_jobs,
    of_pods,
)
from stoker.agent.attribution.cgroups import NOWHERE, parse_cgroup
from stoker.agent.attribution.devices import MigDevice, NodeGpu, find_device, is_elsewhere
from stoker.agent.attribution.pod_names import parse_container_link, parse_pod_folder
from stoker.agent.attribution.slurm_variables import gpus_of_job, job_of, parse_gpu_list
from stoker.agent.owners import AssignedBy, Assignment

GPU = "GPU-11111111-2222-3333-4444-555555555555"
MIG = "MIG-aaaaaaaa-2222-3333-4444-555555555555"
GPUS = (
    NodeGpu(GPU, 0, 1, "00000000:53:00.0"),
    NodeGpu("GPU-99999999-2222-3333-4444-555555555555", 1, 0, None, True, (MigDevice(MIG, 3),)),
    NodeGpu("", 2),
)
# Words that cgroups, device plugins and Slurm use, and pieces of them.
WORDS = st.sampled_from(
    [
        *("/", "..", ":", "-", "_", "=", ",", ".slice", ".scope", ".service", "docker", "default"),
        *("kubepods", "pod", "-pod", "1a2b3c4d-0001-4002-8003-a1b2c3d4e5f6", "a" * 64, "a" * 32),
        *("libpod-", "cri-containerd", "crio-", "lxc", "lxc.payload.", "slurm", "slurmstepd.scope"),
        *("uid_1", "job_1", "step_0", "user@1.service", "0::", "name=systemd", "\n", "\0", "12"),
        *("GPU-", "MIG-", "MIG-GPU-", GPU, MIG, "nvidia0", "/gi3", "gpu-0", "-mig-19-4-1", "::2"),
        *("0000:53:00.0", "9" * 5000, "٣", "²"),
    ]
)
TEXT = st.text() | st.lists(WORDS | st.text(max_size=3), max_size=12).map("".join)


@given(TEXT)
@example("0::/" + "a" * 64)
def test_any_text_of_a_cgroup_is_read(text: str) -> None:
    place = parse_cgroup(text)
    told = [place.unit, place.pod_uid.replace("-", "_"), place.slurm_job, place.slurm_step]
    told += [each.id for each in place.containers]
    # What is told stands in the text, but that a pod's UID may be written with "_".
    assert all(each in text or each in text.replace("-", "_") for each in told)


@given(st.lists(st.text(string.ascii_letters + string.digits + "-_ \\@:", max_size=40), max_size=8))
def test_names_without_a_known_mark_say_nothing(names: list[str]) -> None:
    """A mark is an id of 64 hexadecimal digits, `pod` with a UID, a unit's ending, Slurm's or
    LXC's folder: the alphabet has no dot, and the rest is taken out.
    """
    marks = ("slurm", "lxc", "pod")
    path = "/".join(each for each in names if not each.startswith(marks) and len(each) != 64)
    assert parse_cgroup(f"0::/{path}\n4:memory:/{path}\n") == NOWHERE


@given(TEXT)
def test_any_device_is_found_or_not(text: str) -> None:
    found = find_device(text, GPUS)
    if found is not None and found.gpu_uuid not in {gpu.uuid for gpu in GPUS}:
        assert found.gpu_uuid in text  # a GPU that is not here is named by its UUID
    is_elsewhere(text, GPUS)


@given(TEXT)
def test_any_list_of_gpus_is_read(text: str) -> None:
    for each in parse_gpu_list(text) or ():
        assert each.isdigit() or each in text


@given(TEXT)
def test_any_name_of_a_log_is_read(name: str) -> None:
    for found in (parse_pod_folder(name), parse_container_link(name)):
        assert found is None or found[0] in name


@given(st.dictionaries(st.sampled_from(["SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_JOB_GPUS"]), TEXT))
def test_any_environment_is_read(variables: dict[str, str]) -> None:
    job, step = job_of(variables)
    assert all(each == "" or each.isalnum() for each in (job, step))
    gpus = gpus_of_job("1", {"batch": variables}, ["batch"])
    assert not (gpus.ids and gpus.unknown)


@given(st.text(max_size=10), st.sampled_from(["nvidia.com/gpu", "nvidia.com/nic", "cpu"]), TEXT)
def test_what_a_plugin_has_handed_out_is_told_or_said_to_be_unknown(
    pod: str, resource: str, id_: str
) -> None:
    told = of_pods([PodDevices("ns", pod, "c", resource, (id_,))], GPUS)
    assert len(told.assignments) <= 1
    if resource == "nvidia.com/gpu":
        assert bool(told.assignments) != bool(told.unknown)


@given(TEXT, TEXT)
def test_what_a_claim_has_handed_out_is_told_or_said_to_be_unknown(device: str, cdi: str) -> None:
    told = of_pods([PodClaim("ns", "pod", "c", "gpu.nvidia.com", device, (cdi,))], GPUS)
    assert bool(told.assignments) != bool(told.unknown)


@given(TEXT)
def test_what_slurm_has_handed_out_is_told_or_said_to_be_unknown(id_: str) -> None:
    told = of_jobs([JobGpus("17", (id_,))], GPUS[:1])
    assert bool(told.assignments) != bool(told.unknown)


@given(st.lists(st.sampled_from("abc"), max_size=6))
def test_the_order_in_which_it_was_told_does_not_matter(names: list[str]) -> None:
    found = [Assignment(f"GPU-{each}", AssignedBy.KUBELET, f"pod {each}") for each in names]
    assert join(Assigned(tuple(found))) == join(*(Assigned((each,)) for each in reversed(found)))


def test_more_assignments_than_a_node_can_have_are_unknown() -> None:
    many = tuple(
        Assignment(GPU, AssignedBy.KUBELET, f"pod {n}") for n in range(ASSIGNMENTS_MAX + 1)
    )
    told = join(Assigned(many))
    assert told.assignments == ()
    assert f"{ASSIGNMENTS_MAX + 1} assignments" in told.unknown
