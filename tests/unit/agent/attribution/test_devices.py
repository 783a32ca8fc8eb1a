"""Which GPU of this node a name means."""

import pytest

from stoker.agent.attribution.devices import (
    Device,
    MigDevice,
    NodeGpu,
    find_device,
    is_elsewhere,
    node_gpus,
)
from stoker.agent.model import NumberedGpu, NumberedInventory
from stoker.agent.readings import GpuFault, GpuIdentity, MigDeviceReading
from stoker.agent.telemetry import GpuTelemetry

A = "GPU-aaaaaaaa-0000-4000-8000-000000000000"
B = "GPU-bbbbbbbb-0000-4000-8000-000000000000"
AWAY = "GPU-cccccccc-0000-4000-8000-000000000000"
M3 = "MIG-33333333-0000-4000-8000-000000000000"
M5 = "MIG-55555555-0000-4000-8000-000000000000"
M6 = "MIG-66666666-0000-4000-8000-000000000000"
MIG_DEVICES = (MigDevice(M3, 3), MigDevice(M5, 5), MigDevice(M6, 5))
# The device files are not in the order of the PCI bus.
GPUS = (
    NodeGpu(A, 0, 1, "00000000:53:00.0"),
    NodeGpu(B, 1, 0, "00000001:04:00.0", True, MIG_DEVICES),
    NodeGpu("", 2),
)


@pytest.mark.parametrize(
    ("what", "name", "device"),
    [
        ("a UUID", A, Device(A)),
        ("a UUID of a GPU that this node cannot read", AWAY, Device(AWAY)),
        ("a replica of a shared GPU", f"{A}::3", Device(A)),
        ("a share of a GPU, as HAMi counts them", f"{A}-7", Device(A)),
        ("a share of a GPU, as gpushare counts them", f"{A}-_-7", Device(A)),
        ("a MIG device", M3, Device(B, M3)),
        ("a replica of a MIG device", f"{M3}::0", Device(B, M3)),
        ("a MIG device that no GPU has", M3.replace("3", "4"), None),
        ("a MIG device by its old name", f"MIG-{B}/3/0", Device(B, M3)),
        ("the same, of several compute instances", f"MIG-{B}/5/0", Device(B)),
        ("the same, of a GPU that this node cannot read", f"MIG-{AWAY}/3/0", Device(AWAY)),
        ("a device file", "nvidia0", Device(B)),
        ("a share of a device file", "nvidia1/vgpu2", Device(A)),
        ("a GPU instance of a device file", "nvidia0/gi3", Device(B, M3)),
        ("a share of a GPU instance", "nvidia0/gi3/vgpu1", Device(B, M3)),
        ("a device file that no GPU has", "nvidia7", None),
        ("no device file of a GPU", "nvidia-uvm", None),
        ("an index", "1", Device(B)),
        ("a replica by index", "0::1", Device(A)),
        ("a MIG device by index", "1:0", Device(B)),
        ("an index that no GPU has", "7", None),
        ("an index of a GPU that cannot be read", "2", Device("")),
        ("DRA", "gpu-0", Device(B)),
        ("DRA, a MIG device", "gpu-0-mig-19-4-1", Device(B)),
        ("DRA, a GPU given to a virtual machine", "gpu-vfio-0", None),
        ("DRA, a GPU that is not there", "gpu-7", None),
        ("a UUID cut off", A[:-1], None),
        ("nothing", "", None),
        ("an index of too many digits", "1" * 30, None),
    ],
)
def test_device(what: str, name: str, device: Device | None) -> None:
    assert find_device(name, GPUS) == device, what


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("0000:3b:00.2", True),
        ("0000:53:00.0", False),
        ("0001:04:00.0", False),
        ("01:00.0", True),
        ("12", False),
        ("mlx5_0", False),
        ("", False),
    ],
)
def test_a_pci_address_of_no_gpu_is_elsewhere(name: str, expected: bool) -> None:
    assert is_elsewhere(name, GPUS) == expected


def identity(index: int, uuid: str, *, mig: bool = False) -> NumberedGpu:
    return NumberedGpu(
        index, GpuIdentity(index, uuid, "H100", 80 << 30, minor_number=index, mig_enabled=mig)
    )


def telemetry(uuid: str, *mig: MigDeviceReading) -> GpuTelemetry:
    return GpuTelemetry(uuid, 0.0, {}, {}, mig, {})


def test_the_gpus_of_a_node_are_those_read_and_those_missing() -> None:
    inventory = NumberedInventory(
        None,
        None,
        gpus=(identity(0, A), identity(1, B, mig=True)),
        missing=(GpuFault(2, AWAY, "gpu_lost", ""), GpuFault(3, None, "gpu_lost", "")),
    )
    told = (telemetry(B, MigDeviceReading(M3, 3, 0, "1g.10gb")), telemetry(A))
    assert node_gpus(inventory, told, {}) == (
        NodeGpu(AWAY, 2),
        NodeGpu("", 3),
        NodeGpu(A, 0, 0),
        NodeGpu(B, 1, 1, None, True, (MigDevice(M3, 3),)),
    )
    assert node_gpus(None, told, {}) == ()


def test_a_gpu_that_is_not_read_now_keeps_its_mig_devices() -> None:
    inventory = NumberedInventory(None, None, gpus=(identity(1, B, mig=True),))
    before = {B: (MigDevice(M3, 3),)}
    (gpu,) = node_gpus(inventory, (), before)
    assert gpu.mig_devices == before[B]
    (gpu,) = node_gpus(inventory, (telemetry(B),), before)
    assert gpu.mig_devices == ()
