"""What may happen to node n1, of eight GPUs, before it is asked whether it can host a request."""

from collections.abc import Callable
from dataclasses import replace

from tests.unit.aggregator.builders import (
    GIB,
    Scene,
    make_gpus,
    make_process,
    make_samples,
    share,
    whole,
)

from stoker.aggregator import events as e
from stoker.aggregator.model import DriverState, GpuSample, MissingGpu
from stoker.aggregator.processes import Assignment, Owner, ProcessTable
from stoker.aggregator.wishes import Cordon

Change = Callable[[Scene], None]


def nothing(scene: Scene) -> None:
    pass


def cordon(scene: Scene) -> None:
    scene.record(e.NodeCordoned(scene.now, "n1", "Xid 79"))


def uncordon(scene: Scene) -> None:
    cordon(scene)
    scene.record(e.NodeUncordoned(scene.now, "n1"))


def disconnect(scene: Scene) -> None:
    scene.disconnect("n1", "no frame for 30s")


def reconnect(scene: Scene) -> None:
    scene.connect("n1")


def block_driver(scene: Scene) -> None:
    scene.frame("n1", driver=DriverState.BLOCKED, driver_reason="nvmlDeviceGetTemperature")


def go_stale(scene: Scene) -> None:
    scene.now += 4.5


def stay_fresh(scene: Scene) -> None:
    scene.now += 3.0


def take_six(scene: Scene) -> None:
    scene.grant(whole(6))


def take_all(scene: Scene) -> None:
    for _ in range(8):
        scene.grant(whole())


def share_out(scene: Scene) -> None:
    """Every GPU of the node gives 70 of its 80 GiB away."""
    for _ in range(8):
        scene.grant(share(70))


def use_by_others(scene: Scene) -> None:
    process = make_process("n1-7", memory_used_bytes=30 * GIB)
    scene.frame("n1", processes=ProcessTable(scene.now, (process,)))


def use_by_owned(scene: Scene) -> None:
    """Each runs in something else."""
    owners = (
        Owner(pod_namespace="ml", pod_name="train-0", container_id="0123456789abcdef"),
        Owner(slurm_job="7", unit="slurmd.service"),
        Owner(container_id="0123456789abcdef", unit="docker.service"),
        Owner(unit="jupyter.service"),
        Owner(pod_uid="u-1"),
    )
    processes = tuple(make_process(f"n1-{i}", pid=i, owner=owner) for i, owner in enumerate(owners))
    scene.frame("n1", processes=ProcessTable(scene.now, processes))


def use_all_by_others(scene: Scene) -> None:
    processes = tuple(
        make_process(f"n1-{i}", pid=100 + i, memory_used_bytes=30 * GIB) for i in range(8)
    )
    scene.frame("n1", processes=ProcessTable(scene.now, processes))


def use_by_hidden(scene: Scene) -> None:
    """Who runs there cannot be seen, nor how much memory it has."""
    scene.change_facts("n1", gpus=make_gpus("n1", 1))
    process = make_process("n1-0", user="", command="", memory_used_bytes=None)
    scene.frame("n1", processes=ProcessTable(scene.now, (process,)))


def lose_processes(scene: Scene) -> None:
    scene.frame("n1", processes=ProcessTable(scene.now, (), unread_gpu_uuids=("n1-3",)))


def lose_a_card(scene: Scene) -> None:
    samples = make_samples(make_gpus("n1", 8))
    scene.frame("n1", samples={**samples, "n1-3": GpuSample()})


def omit_a_card(scene: Scene) -> None:
    scene.frame("n1", samples=make_samples(make_gpus("n1", 7)))


def add_a_card(scene: Scene) -> None:
    scene.change_facts("n1", gpus=make_gpus("n1", 9))
    scene.frame("n1", samples=make_samples(make_gpus("n1", 9)))


def set_mig(scene: Scene) -> None:
    first, *rest = make_gpus("n1", 8)
    scene.change_facts("n1", gpus=(replace(first, mig_enabled=True), *rest))


def reserve(scene: Scene) -> None:
    scene.frame("n1", samples=make_samples(make_gpus("n1", 8), reserved_bytes=GIB))


def miss_a_card(scene: Scene) -> None:
    found = "nvmlDeviceGetPowerUsage has not returned within 1 s"
    scene.frame("n1", missing=(MissingGpu(3, "n1-3", "driver_timeout", found),))


def miss_cards_that_nobody_read(scene: Scene) -> None:
    found = "it fell off the bus"
    scene.frame("n1", missing=tuple(MissingGpu(i, "", "gpu_lost", found) for i in range(8, 13)))


def take_all_but_the_missing(scene: Scene) -> None:
    miss_a_card(scene)
    scene.grant(whole(7))


def release_driver(scene: Scene) -> None:
    driver = DriverState.RELEASED
    scene.frame("n1", driver=driver, driver_reason="released by root for 10m")


def cordon_gpus(scene: Scene, *indexes: int) -> None:
    for index in indexes:
        scene.decide(Cordon("n1", f"Xid {index}", f"n1-{index}"))


def cordon_a_gpu(scene: Scene) -> None:
    cordon_gpus(scene, 3)
    scene.later(90.0)


def cordon_five_gpus(scene: Scene) -> None:
    cordon_gpus(scene, *range(5))


def cordon_all_gpus(scene: Scene) -> None:
    cordon_gpus(scene, *range(8))


def take_all_but_the_cordoned(scene: Scene) -> None:
    cordon_gpus(scene, 3)
    scene.grant(whole(7))


def assign(scene: Scene) -> None:
    """The kubelet has given GPU 2 to two pods, and nobody computes on it."""
    assignments = tuple(
        Assignment("n1-2", "kubelet", f"pod ml/train-{i} (container c)") for i in range(2)
    )
    table = ProcessTable(scene.now, (), assignments=assignments)
    scene.frame("n1", processes=table)


def assign_all(scene: Scene) -> None:
    assignments = tuple(Assignment(f"n1-{i}", "slurm", f"Slurm job {i}") for i in range(8))
    scene.frame("n1", processes=ProcessTable(scene.now, (), assignments=assignments))


def lose_assignments(scene: Scene) -> None:
    why = "the kubelet does not answer"
    scene.frame("n1", processes=ProcessTable(scene.now, (), assignments_unknown=why))
