"""What is handed out, by what the kubelet and Slurm say."""

import pytest

from stoker.agent.attribution.assignments import (
    Assigned,
    JobGpus,
    PodClaim,
    PodDevices,
    PodHolding,
    join,
    of_jobs,
    of_pods,
)
from stoker.agent.attribution.devices import MigDevice, NodeGpu
from stoker.agent.owners import AssignedBy, Assignment, Owner

A = "GPU-aaaaaaaa-0000-4000-8000-000000000000"
B = "GPU-bbbbbbbb-0000-4000-8000-000000000000"
AWAY = "GPU-cccccccc-0000-4000-8000-000000000000"
M3 = "MIG-33333333-0000-4000-8000-000000000000"
CLAIM = "0f0f0f0f-1111-4222-8333-444444444444"
WHOLE = (NodeGpu(A, 0, 0, "00000000:53:00.0"), NodeGpu(B, 1, 1, "00000000:54:00.0"))
PARTED = (WHOLE[0], NodeGpu(B, 1, 1, "00000000:54:00.0", True, (MigDevice(M3, 3),)))
DOMAIN = "compute-domain.nvidia.com"
TRAINER = "pod ml/train-0 (container trainer)"
TRAINERS = Owner(pod_namespace="ml", pod_name="train-0", container_name="trainer")


def devices(resource: str, *ids: str) -> PodDevices:
    return PodDevices("ml", "train-0", "trainer", resource, ids)


def claim(*cdi: str, driver: str = "gpu.nvidia.com", device: str = "") -> PodClaim:
    return PodClaim("ml", "train-0", "trainer", driver, device, cdi)


def by_kubelet(uuid: str, mig: str = "") -> Assignment:
    return Assignment(uuid, AssignedBy.KUBELET, TRAINER, mig, TRAINERS)


@pytest.mark.parametrize(
    ("what", "holding", "expected"),
    [
        ("two GPUs", devices("nvidia.com/gpu", A, B), {by_kubelet(A), by_kubelet(B)}),
        ("replicas of one GPU", devices("nvidia.com/gpu.shared", f"{A}::0"), {by_kubelet(A)}),
        ("a MIG device", devices("nvidia.com/mig-1g.10gb", M3), {by_kubelet(B, M3)}),
        ("a MIG device as a GPU", devices("nvidia.com/gpu", M3), {by_kubelet(B, M3)}),
        ("GKE's plugin", devices("nvidia.com/gpu", "nvidia1/gi3"), {by_kubelet(B, M3)}),
        ("an index", devices("nvidia.com/gpu", "0"), {by_kubelet(A)}),
        ("another plugin's share", devices("volcano.sh/vgpu-number", f"{A}-2"), {by_kubelet(A)}),
        ("a GPU that cannot be read", devices("nvidia.com/gpu", AWAY), {by_kubelet(AWAY)}),
        ("a GPU by its PCI address", devices("nvidia.com/GH100", "0000:53:00.0"), {by_kubelet(A)}),
        ("a NIC of NVIDIA's", devices("nvidia.com/hostdev", "0000:3b:00.2"), set[Assignment]()),
        ("another device", devices("rdma/hca", "mlx5_0", "0"), set[Assignment]()),
        ("no device", devices("nvidia.com/gpu"), set[Assignment]()),
        ("a claim", claim("k8s.gpu.nvidia.com/device=gpu-0", device="gpu-0"), {by_kubelet(A)}),
        ("a claim, by CDI alone", claim("k8s.gpu.nvidia.com/device=gpu-1"), {by_kubelet(B)}),
        (
            "a claim, by its own CDI device alone",
            claim(f"k8s.gpu.nvidia.com/claim={CLAIM}-gpu-1"),
            {by_kubelet(B)},
        ),
        ("a claim of a part", claim(device="gpu-1-mig-19-4-1"), {by_kubelet(B)}),
        ("a claim by UUID", claim(f"runtime.nvidia.com/gpu={A}", driver=""), {by_kubelet(A)}),
        ("a claim of all", claim("nvidia.com/gpu=all", driver=""), {by_kubelet(A), by_kubelet(B)}),
        (
            "a claim of a channel between nodes",
            claim(f"k8s.{DOMAIN}/device=channel-0", driver=DOMAIN, device="channel-0"),
            set[Assignment](),
        ),
    ],
)  # fmt: skip
def test_what_the_kubelet_has_handed_out(
    what: str, holding: PodHolding, expected: set[Assignment]
) -> None:
    told = of_pods([holding], PARTED)
    assert (set(told.assignments), told.unknown) == (expected, ""), what


@pytest.mark.parametrize(
    ("holding", "named"),
    [
        (devices("nvidia.com/mig-1g.10gb", M3), f"{TRAINER} has {M3} (nvidia.com/mig-1g.10gb)"),
        (devices("nvidia.com/gpu", "7"), f"{TRAINER} has 7 (nvidia.com/gpu)"),
        (devices("nvidia.com/GH100", "12"), f"{TRAINER} has 12 (nvidia.com/GH100)"),
        (claim(device="gpu-vfio-0"), f"{TRAINER} has gpu-vfio-0"),
        (claim(), f"{TRAINER} has a device of gpu.nvidia.com"),
        (claim("k8s.gpu.nvidia.com/device=gpu-9", driver=""), "device=gpu-9"),
    ],
)
def test_what_cannot_be_found_here_is_named(holding: PodHolding, named: str) -> None:
    told = of_pods([devices("nvidia.com/gpu", A), holding], WHOLE)
    assert told.assignments == (by_kubelet(A),)  # what is known is still told
    assert "the kubelet has handed out what is no GPU that this node knows: " in told.unknown
    assert named in told.unknown


def test_of_much_that_cannot_be_found_the_first_is_named() -> None:
    told = of_pods([devices("nvidia.com/gpu", "7", "8", "9")], WHOLE)
    assert told.unknown.endswith(f"{TRAINER} has 7 (nvidia.com/gpu) and 2 more")


def by_slurm(uuid: str, mig: str = "") -> Assignment:
    return Assignment(uuid, AssignedBy.SLURM, "Slurm job 17", mig, Owner(slurm_job="17"))


def test_slurm_numbers_gpus_as_they_stand_on_the_bus() -> None:
    turned = (NodeGpu(A, 0, 1), NodeGpu(B, 1, 0))
    assert of_jobs([JobGpus("17", ("1",))], turned) == Assigned((by_slurm(B),))


def test_slurm_may_name_gpus_and_mig_devices_by_uuid() -> None:
    told = of_jobs([JobGpus("17", (A, M3))], PARTED)
    assert told == Assigned((by_slurm(A), by_slurm(B, M3)))


def test_where_a_gpu_is_parted_a_number_of_slurm_may_be_any_part() -> None:
    told = of_jobs([JobGpus("17", ("0",))], PARTED)
    assert told.assignments == ()
    assert told.unknown == (
        "Slurm has handed out what is no GPU that this node knows: Slurm job 17 has GPU 0"
    )


def test_a_job_of_which_it_is_not_known_is_named_beside_those_that_are() -> None:
    told = of_jobs([JobGpus("16", unknown="nobody tells"), JobGpus("17", ("0",))], WHOLE)
    assert told.assignments == (by_slurm(A),)
    assert told.unknown == "which GPUs Slurm job 16 has is not known: nobody tells"


def test_a_gpu_that_has_no_name_is_not_told() -> None:
    gpus = (*WHOLE, NodeGpu("", 2))
    assert join(of_jobs([JobGpus("17", ("0", "2"))], gpus)) == Assigned((by_slurm(A),))


def test_what_is_told_twice_is_one() -> None:
    told = of_pods([devices("nvidia.com/gpu", f"{A}::0", f"{A}::1")], WHOLE)
    assert join(told, told) == Assigned((by_kubelet(A),))
