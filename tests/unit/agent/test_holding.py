"""Whose a process is."""

from dataclasses import replace
from typing import Any

import pytest

from stoker.agent.holding import HELD_MAX, attribute, attribute_all, find_obstacle, gpu_instances
from stoker.agent.model import (
    HeldAllocation,
    Host,
    NumberedGpu,
    NumberedInventory,
    ProcessSeen,
)
from stoker.agent.partitions import GpuMigStatus
from stoker.agent.readings import GpuIdentity, MigDeviceIdentity
from stoker.core.mig.geometry import MigState

WHOLE = HeldAllocation("whole", ("GPU-0", "GPU-1"), None, "ann", 60.0, held_since=1000.0)
SHARE = HeldAllocation("share", ("GPU-2",), 2**30, "bob", 60.0, held_since=1000.0)
HELD = (WHOLE, SHARE)


def seen(gpu: str, claims: str | None = None, started: float | None = None) -> ProcessSeen:
    return ProcessSeen(gpu, 42, claimed_allocation_id=claims, started_at=started)


@pytest.mark.parametrize(
    ("process", "expected"),
    [
        (seen("GPU-0", claims="whole"), "whole"),
        (seen("GPU-2", claims="share"), "share"),
        (seen("GPU-2", claims="whole", started=2000.0), ""),
        (seen("GPU-0", claims="gone", started=2000.0), ""),
        (seen("GPU-9", claims="whole"), ""),
        (seen("GPU-1", started=1000.5), "whole"),
        (seen("GPU-1", started=999.5), "whole"),
        (seen("GPU-1", started=998.0), ""),
        (seen("GPU-1"), ""),
        (seen("GPU-2", started=1000.5), ""),
        (seen("GPU-9", started=1000.5), ""),
    ],
    ids=[
        "its environment names the tenant of the whole GPU",
        "its environment names the owner of a share",
        "it names an allocation that holds another GPU",
        "it names an earlier tenant, and started during this one's time",
        "it is on a GPU that the named allocation does not hold",
        "it started under the only tenant",
        "it started within the error of the kernel's clock",
        "it was there before the tenant",
        "nobody knows when it started",
        "it is on a shared GPU and names nobody",
        "nobody holds the GPU",
    ],
)
def test_attribution(process: ProcessSeen, expected: str) -> None:
    assert attribute(process, HELD, {}) == expected


def test_a_node_holds_no_more_than_its_limit() -> None:
    inventory = NumberedInventory("", "", (NumberedGpu(1, GpuIdentity(0, "GPU-0", "T4", 2**40)),))
    held = [HeldAllocation(f"a{i}", ("GPU-0",), 1, "ann", 60.0, 0.0) for i in range(HELD_MAX)]
    wanted = HeldAllocation("more", ("GPU-0",), 1, "ann", 60.0, 0.0)
    assert find_obstacle(wanted, held[:-1], inventory) is None
    assert find_obstacle(wanted, held, inventory) == (
        f"the node holds {HELD_MAX} allocations, at most {HELD_MAX} are allowed"
    )


# MIG, compute, and the host ---------------------------------------------------------------------

GIB = 2**30
HALF = MigDeviceIdentity("MIG-half", "3g.40gb", 40 * GIB, gpu_instance_id=1, compute_instance_id=0)
# Two compute instances in one GPU instance.
LEFT = MigDeviceIdentity("MIG-left", "1c.2g.20gb", 20 * GIB, 3, 0)
RIGHT = MigDeviceIdentity("MIG-right", "1c.2g.20gb", 20 * GIB, 3, 1)
CARDS = (
    GpuIdentity(0, "GPU-0", "H100", 80 * GIB, mig_enabled=True, mig_devices=(HALF, LEFT, RIGHT)),
    GpuIdentity(1, "GPU-1", "H100", 80 * GIB, mig_enabled=True),
    GpuIdentity(2, "GPU-2", "H100", 80 * GIB, mig_enabled=False),
)
NODE = NumberedInventory(
    None,
    None,
    tuple(NumberedGpu(card.index + 1, card) for card in CARDS),
    host=Host(cpu_milli=16_000, memory_bytes=128 * GIB),
)


def mig(id_: str, *devices: str, gpus: tuple[str, ...] = ("GPU-0",)) -> HeldAllocation:
    return HeldAllocation(id_, gpus, 20 * GIB, "ann", 60.0, 1000.0, mig_device_uuids=devices)


def on_instance(
    instance: int | None, claims: str | None = None, started: float = 1000.5
) -> ProcessSeen:
    return ProcessSeen(
        "GPU-0", 42, claimed_allocation_id=claims, started_at=started, gpu_instance_id=instance
    )


PARTED = (mig("half", "MIG-half"), mig("left", "MIG-left"), mig("right", "MIG-right"))


@pytest.mark.parametrize(
    ("process", "tenants", "expected"),
    [
        (on_instance(1), PARTED, "half"),
        (on_instance(1, claims="half", started=1.0), PARTED, "half"),
        (on_instance(1, claims="left"), PARTED, ""),
        (on_instance(3, claims="right"), PARTED, "right"),
        (on_instance(3), PARTED, ""),
        (on_instance(3), PARTED[:2], "left"),
        (on_instance(9), PARTED, ""),
        (on_instance(9, claims="half"), PARTED, ""),
        (on_instance(None), PARTED[:1], ""),
        (on_instance(None, claims="half"), PARTED, ""),
        (on_instance(1, started=990.0), PARTED, ""),
        (on_instance(1), (mig("gone", "MIG-of-another-layout"),), ""),
        (on_instance(1), (), ""),
    ],
    ids=[
        "it runs in the GPU instance of the only tenant there",
        "its environment names the tenant of that instance",
        "it names the tenant of another instance of the same GPU",
        "two tenants share its GPU instance, and it names one of them",
        "two tenants share its GPU instance, and it names nobody",
        "one of two compute instances is held, by one tenant",
        "it runs in an instance that nobody holds",
        "it names a tenant that does not hold the instance",
        "the driver does not tell its instance",
        "the driver does not tell its instance, and it names a tenant",
        "it was there before the tenant",
        "the device that is held is not there any more",
        "nobody holds anything",
    ],
)
def test_attribution_on_a_partitioned_gpu(
    process: ProcessSeen, tenants: tuple[HeldAllocation, ...], expected: str
) -> None:
    assert attribute(process, tenants, gpu_instances(NODE)) == expected
    (found,) = attribute_all([process], tenants, NODE)
    assert (found.process, found.allocation_id) == (process, expected)


def test_without_an_inventory_nobody_holds_a_part_of_a_gpu() -> None:
    (found,) = attribute_all([on_instance(1)], PARTED, None)
    assert found.allocation_id == ""


WHOLE_2 = HeldAllocation("whole", ("GPU-2",), None, "bob", 60.0, 0.0)
SHARE_2 = HeldAllocation("share", ("GPU-2",), 20 * GIB, "bob", 60.0, 0.0, compute_milli=700)
SHARE_0 = HeldAllocation("old", ("GPU-0",), 20 * GIB, "bob", 60.0, 0.0)
HAS = "it has MIG-half (3g.40gb), MIG-left (1c.2g.20gb), MIG-right (1c.2g.20gb)"
NEXT = replace(SHARE_2, id="next")


@pytest.mark.parametrize(
    ("wanted", "held", "obstacle"),
    [
        (mig("a", "MIG-half"), (), None),
        (mig("a", "MIG-half"), PARTED[1:], None),
        (mig("a", "MIG-left"), PARTED[2:], None),
        (
            mig("a", "MIG-half"),
            PARTED,
            "MIG-half (3g.40gb of GPU-0) is held by allocation half of 'ann'",
        ),
        (mig("a", "MIG-x"), (), f"GPU-0 does not have MIG-x; {HAS}"),
        (
            mig("a", "MIG-half", gpus=("GPU-1",)),
            (),
            "GPU-1 does not have MIG-half; it has no MIG devices",
        ),
        (
            mig("a", "MIG-half", gpus=("GPU-2",)),
            (),
            "GPU-2 is not in MIG mode, so it does not have MIG-half",
        ),
        (mig("a", "MIG-half", "MIG-half"), (), "it names a MIG device twice: MIG-half, MIG-half"),
        (
            replace(mig("a", "MIG-half", gpus=("GPU-0", "GPU-1")), memory_bytes=None),
            (),
            "GPU-1 is in MIG mode, and it names no MIG device of it; it has no MIG devices",
        ),
        (
            replace(WHOLE_2, gpu_uuids=("GPU-0",)),
            (),
            f"GPU-0 is in MIG mode: only a MIG device of it can be held; {HAS}",
        ),
        (SHARE_0, (), f"GPU-0 is in MIG mode: only a MIG device of it can be held; {HAS}"),
        (
            replace(WHOLE_2, gpu_uuids=("GPU-0",)),
            PARTED[:1],
            "GPU-0 is held in part by allocation half of 'ann'",
        ),
        (
            mig("a", "MIG-half"),
            (replace(WHOLE_2, gpu_uuids=("GPU-0",)),),
            "GPU-0 is held exclusively by allocation whole of 'bob'",
        ),
        (mig("a", "MIG-half"), (SHARE_0,), "GPU-0 is held in part by allocation old of 'bob'"),
        (
            SHARE_2,
            (mig("part", "MIG-gone", gpus=("GPU-2",)),),
            "GPU-2 is held in part by allocation part, a MIG device of it",
        ),
        (NEXT, (replace(SHARE_2, compute_milli=300),), None),
        (NEXT, (replace(SHARE_2, compute_milli=None),), None),
        (NEXT, (SHARE_2,), "GPU-2: wanted 70 % of its compute, 30 % left"),
        (
            replace(WHOLE_2, compute_milli=500),
            (),
            "a share of a GPU's compute comes with one of its memory, and it names none",
        ),
        (replace(WHOLE_2, cpu_milli=16_000, host_memory_bytes=128 * GIB), (), None),
        (
            replace(WHOLE_2, cpu_milli=12_500),
            (replace(PARTED[0], cpu_milli=4_000),),
            "the host: wanted 12.5 CPUs, 12 of 16 left",
        ),
        (
            replace(WHOLE_2, host_memory_bytes=65 * GIB),
            (replace(PARTED[0], host_memory_bytes=64 * GIB),),
            "the host: wanted 65 GiB of memory, 64 GiB of 128 GiB left",
        ),
        # What is held may be more than there is, after the host has lost some of it.
        (WHOLE_2, (replace(PARTED[0], cpu_milli=99_000, host_memory_bytes=999 * GIB),), None),
        (
            replace(WHOLE_2, cpu_milli=1),
            (replace(PARTED[0], cpu_milli=99_000),),
            "the host: wanted 0.001 CPUs, 0 of 16 left",
        ),
    ],
)
def test_what_a_node_can_hold_of_parts(
    wanted: HeldAllocation, held: tuple[HeldAllocation, ...], obstacle: str | None
) -> None:
    assert find_obstacle(wanted, held, NODE) == obstacle


def test_of_a_host_that_is_not_known_nothing_is_refused() -> None:
    wanted = replace(WHOLE_2, cpu_milli=10**9, host_memory_bytes=2**60)
    assert find_obstacle(wanted, (), replace(NODE, host=None)) is None


@pytest.mark.parametrize(
    ("change", "is_same"),
    [
        ({}, True),
        ({"held_since": 5.0, "gang_nodes": 2}, True),
        ({"gpu_uuids": ("GPU-1", "GPU-0")}, True),
        ({"mig_device_uuids": ("MIG-2", "MIG-1")}, True),
        ({"mig_device_uuids": ("MIG-1",)}, False),
        ({"gpu_uuids": ("GPU-0",)}, False),
        ({"memory_bytes": 1}, False),
        ({"compute_milli": None}, False),
        ({"cpu_milli": 1}, False),
        ({"host_memory_bytes": 1}, False),
    ],
)
def test_a_claim_is_the_same_on_the_same_devices(change: dict[str, Any], is_same: bool) -> None:
    held = HeldAllocation(
        id="a",
        gpu_uuids=("GPU-0", "GPU-1"),
        memory_bytes=None,
        holder="ann",
        ttl_seconds=60.0,
        held_since=0.0,
        mig_device_uuids=("MIG-1", "MIG-2"),
        compute_milli=500,
    )
    assert held.is_same_as(replace(held, **change)) is is_same


@pytest.mark.parametrize(
    ("status", "obstacle"),
    [
        (GpuMigStatus("GPU-2"), None),
        (GpuMigStatus("GPU-2", MigState.SUCCESS, "as declared"), None),
        (GpuMigStatus("GPU-3", MigState.APPLYING, is_withheld=True), None),
        (
            GpuMigStatus("GPU-2", MigState.PENDING, "allocation a is there", is_withheld=True),
            "GPU-2 takes nothing new while its partitions (MIG) are pending: allocation a is there",
        ),
        (
            GpuMigStatus("GPU-2", MigState.REBOOT_REQUIRED, is_withheld=True),
            "GPU-2 takes nothing new while its partitions (MIG) are reboot-required",
        ),
        (
            GpuMigStatus("GPU-2", is_withheld=True),
            "GPU-2 takes nothing new while its partitions (MIG) are not known",
        ),
    ],
)
def test_a_gpu_that_is_being_partitioned_takes_nothing_new(
    status: GpuMigStatus, obstacle: str | None
) -> None:
    assert find_obstacle(WHOLE_2, (), NODE, (status,)) == obstacle
