"""The GPU models that stoker can simulate, and the text that asks for them (`8xH100-80GB`).

Figures are those of one idle card as `nvidia-smi -q` shows them (SXM boards where there are any),
so that what a simulated node promises is what a real one has: a "80GB" H100 has 81559 MiB, of
which the driver keeps 480. Marked figures were not seen on a card: they follow the nearest
relative of the same family.
"""

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from stoker.core.errors import BadInput, shown

MIB = 2**20
MHZ = 1_000_000.0

# A PCIe root can address more; no server holds more.
GPUS_PER_NODE_MAX = 64

_SPEC = re.compile(r"(?:(\d{1,9})\s*[xX]\s*)?(\S+)", re.ASCII)


@dataclass(frozen=True, slots=True)
class GpuModel:
    """One board, as its driver describes it."""

    name: str  # as a person asks for it
    driver_name: str  # as the driver names it
    compute_capability: tuple[int, int]
    memory_total_bytes: int
    memory_reserved_bytes: int  # what the driver keeps for itself
    power_limit_watts: float
    power_idle_watts: float
    temperature_idle_celsius: float
    temperature_busy_celsius: float  # at the power limit, well-cooled
    sm_clock_idle_hertz: float
    sm_clock_busy_hertz: float
    memory_clock_idle_hertz: float
    memory_clock_busy_hertz: float
    pci_device_id: int  # device and vendor, as the driver packs them: 0x233010DE
    pci_subsystem_id: int
    board_part_number: str
    vbios_version: str
    has_mig: bool


_ALL = (
    GpuModel(
        name="A100-40GB",
        driver_name="NVIDIA A100-SXM4-40GB",
        compute_capability=(8, 0),
        memory_total_bytes=40960 * MIB,
        memory_reserved_bytes=518 * MIB,
        power_limit_watts=400.0,
        power_idle_watts=49.7,
        temperature_idle_celsius=33.0,
        temperature_busy_celsius=65.0,
        sm_clock_idle_hertz=210 * MHZ,
        sm_clock_busy_hertz=1410 * MHZ,
        memory_clock_idle_hertz=1215 * MHZ,
        memory_clock_busy_hertz=1215 * MHZ,
        pci_device_id=0x20B010DE,
        pci_subsystem_id=0x134F10DE,
        board_part_number="692-2G506-0200-003",
        vbios_version="92.00.45.00.03",
        has_mig=True,
    ),
    GpuModel(
        name="A100-80GB",
        driver_name="NVIDIA A100-SXM4-80GB",
        compute_capability=(8, 0),
        memory_total_bytes=81920 * MIB,
        memory_reserved_bytes=518 * MIB,  # as the 40 GB board
        power_limit_watts=400.0,
        power_idle_watts=62.0,  # between the 40 GB board and the H100
        temperature_idle_celsius=33.0,
        temperature_busy_celsius=67.0,
        sm_clock_idle_hertz=210 * MHZ,
        sm_clock_busy_hertz=1410 * MHZ,
        memory_clock_idle_hertz=1593 * MHZ,
        memory_clock_busy_hertz=1593 * MHZ,
        pci_device_id=0x20B210DE,
        pci_subsystem_id=0x147F10DE,
        board_part_number="692-2G506-0212-002",
        vbios_version="92.00.45.00.05",
        has_mig=True,
    ),
    GpuModel(
        name="H100-80GB",
        driver_name="NVIDIA H100 80GB HBM3",
        compute_capability=(9, 0),
        memory_total_bytes=81559 * MIB,
        memory_reserved_bytes=480 * MIB,
        power_limit_watts=700.0,
        power_idle_watts=68.6,
        temperature_idle_celsius=29.0,
        temperature_busy_celsius=64.0,
        sm_clock_idle_hertz=345 * MHZ,
        sm_clock_busy_hertz=1980 * MHZ,
        memory_clock_idle_hertz=2619 * MHZ,
        memory_clock_busy_hertz=2619 * MHZ,
        pci_device_id=0x233010DE,
        pci_subsystem_id=0x16C110DE,
        board_part_number="692-2G520-0200-000",
        vbios_version="96.00.99.00.01",
        has_mig=True,
    ),
    GpuModel(
        name="H200-141GB",
        driver_name="NVIDIA H200",
        compute_capability=(9, 0),
        memory_total_bytes=143771 * MIB,
        memory_reserved_bytes=600 * MIB,  # between the H100 and the B200
        power_limit_watts=700.0,
        power_idle_watts=75.0,
        temperature_idle_celsius=30.0,
        temperature_busy_celsius=64.0,
        sm_clock_idle_hertz=345 * MHZ,
        sm_clock_busy_hertz=1980 * MHZ,
        memory_clock_idle_hertz=3201 * MHZ,
        memory_clock_busy_hertz=3201 * MHZ,
        pci_device_id=0x233510DE,
        pci_subsystem_id=0x18BE10DE,
        board_part_number="692-2G520-0280-000",  # as the H100, another variant
        vbios_version="96.00.BC.00.02",  # as the H100, later
        has_mig=True,
    ),
    GpuModel(
        name="B200",
        driver_name="NVIDIA B200",
        compute_capability=(10, 0),
        memory_total_bytes=183359 * MIB,
        memory_reserved_bytes=728 * MIB,
        power_limit_watts=1000.0,
        power_idle_watts=195.7,
        temperature_idle_celsius=39.0,
        temperature_busy_celsius=70.0,
        sm_clock_idle_hertz=120 * MHZ,
        sm_clock_busy_hertz=1965 * MHZ,
        memory_clock_idle_hertz=3996 * MHZ,
        memory_clock_busy_hertz=3996 * MHZ,
        pci_device_id=0x290110DE,
        pci_subsystem_id=0x199910DE,
        board_part_number="692-2G525-0220-500",
        vbios_version="97.00.FA.00.09",
        has_mig=True,
    ),
    GpuModel(
        name="L40S",
        driver_name="NVIDIA L40S",
        compute_capability=(8, 9),
        memory_total_bytes=46068 * MIB,
        memory_reserved_bytes=609 * MIB,
        power_limit_watts=350.0,
        power_idle_watts=34.0,  # in the lowest state; 66 W were seen with clocks still up
        temperature_idle_celsius=29.0,
        temperature_busy_celsius=68.0,
        sm_clock_idle_hertz=210 * MHZ,
        sm_clock_busy_hertz=2520 * MHZ,
        memory_clock_idle_hertz=405 * MHZ,
        memory_clock_busy_hertz=9001 * MHZ,
        pci_device_id=0x26B910DE,
        pci_subsystem_id=0x185110DE,
        board_part_number="900-2G133-A880-000",
        vbios_version="95.02.66.00.15",
        has_mig=False,
    ),
    GpuModel(
        name="T4",
        driver_name="Tesla T4",
        compute_capability=(7, 5),
        memory_total_bytes=15360 * MIB,
        memory_reserved_bytes=448 * MIB,
        power_limit_watts=70.0,
        power_idle_watts=10.0,  # in the lowest state; 34 W were seen with clocks still up
        temperature_idle_celsius=33.0,
        temperature_busy_celsius=72.0,
        sm_clock_idle_hertz=300 * MHZ,
        sm_clock_busy_hertz=1590 * MHZ,
        memory_clock_idle_hertz=405 * MHZ,
        memory_clock_busy_hertz=5001 * MHZ,
        pci_device_id=0x1EB810DE,
        pci_subsystem_id=0x12A210DE,
        board_part_number="900-2G183-A800-001",
        vbios_version="90.04.96.00.02",
        has_mig=False,
    ),
)

MODELS: Mapping[str, GpuModel] = MappingProxyType({model.name: model for model in _ALL})


def find_model(name: str) -> GpuModel:
    """Return the model called `name` (any case); raises BadInput that names the nearest one."""
    for model in _ALL:
        if model.name.casefold() == name.casefold():
            return model
    raise BadInput(f"GPU model {shown(name)} is not known; {_hint(name)}")


def parse_simulate_spec(text: str) -> tuple[int, GpuModel]:
    """Return how many GPUs of which model `text` asks for: `8xH100-80GB`, or `T4` for one.

    Raises BadInput when it cannot be read, names no known model, or asks for none or too many.
    """
    found = _SPEC.fullmatch(text.strip())
    if found is None:
        raise BadInput(f"simulated GPUs: {shown(text)} is not COUNTxMODEL, such as 8xH100-80GB")
    count = int(found[1]) if found[1] else 1
    model = find_model(found[2])
    if not 1 <= count <= GPUS_PER_NODE_MAX:
        raise BadInput(
            f"simulated GPUs: {shown(text)} asks for {count}; a node has 1 to {GPUS_PER_NODE_MAX}"
        )
    return count, model


def _hint(name: str) -> str:
    known = {model.name.casefold(): model.name for model in _ALL}
    asked = name[:60].casefold()
    # "H100" is far from "H100-80GB" by letters, and near to a person.
    near = [key for key in known if asked and key.startswith(asked)]
    near += difflib.get_close_matches(asked, known, n=1, cutoff=0.5)
    nearest = f"the nearest is {known[near[0]]}; " if near else ""
    return f"{nearest}known are {', '.join(MODELS)}"
