"""The GPU models that stoker can simulate: what their drivers tell of them.

Figures are those of one idle card as `nvidia-smi -q` shows them (SXM boards where there are any),
so that what a simulated node promises is what a real one has: a "80GB" H100 has 81559 MiB, of
which the driver keeps 480. Marked figures were not seen on a card: they follow the nearest
relative of the same family. Of the A100-80GB and the H200 no such listing was at hand: what they
have beyond memory, clocks and power follows the A100-40GB and the H100. Of the A30 and the RTX PRO
6000 only memory, SMs, IDs and the power limits were seen; what else they have follows the A100-40GB
and the L40S. What a host has beside its GPUs is, where nothing else is said, an eighth of a public
cloud's machine with eight of them (p4d, p4de, p5, p5e, p6-b200, g6e.48xlarge, g7e.48xlarge,
g4dn.metal).
"""

from dataclasses import dataclass
from typing import Final

from stoker.core.mig import boards
from stoker.core.mig.geometry import Geometry, MigProfile

MIB = 2**20
GIB = 2**30
MHZ = 1_000_000.0
MB = 1_000_000.0


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
    video_clock_idle_hertz: float
    video_clock_busy_hertz: float
    power_limit_min_watts: float  # the highest that can be set is the default, `power_limit_watts`
    # The chip throttles below its base clock, slows down, turns itself off.
    temperature_max_celsius: float
    temperature_slowdown_celsius: float
    temperature_shutdown_celsius: float
    memory_temperature_max_celsius: float | None  # None: no sensor that the driver shows
    bar1_bytes: int
    pcie_generation: int
    nvlink_count: int
    nvlink_bytes_per_second: float  # of one link in one direction
    row_remap_banks: int | None  # None: a chip that takes pages out of use instead of rows
    sm_count: int
    host_cpus: int  # its part of the host that it is commonly rented in, eight at a time
    host_memory_bytes: int
    mig: Geometry | None = None  # None: it cannot be partitioned
    pcie_lanes: int = 16

    @property
    def has_mig(self) -> bool:
        """Whether it can be partitioned."""
        return self.mig is not None

    @property
    def mig_profiles(self) -> tuple[MigProfile, ...]:
        """The kinds of GPU instances that it offers."""
        return self.mig.profiles if self.mig is not None else ()

    @property
    def has_gpm(self) -> bool:
        """Whether the driver reads its hardware counters (GPM): Hopper and later."""
        return self.compute_capability >= _HOPPER

    @property
    def has_temperature_margin(self) -> bool:
        """Whether it tells degrees left until it throttles (T.Limit): Ada and later."""
        return self.compute_capability >= _ADA

    @property
    def has_average_power(self) -> bool:
        """Whether the driver tells a one-second mean: Ampere and later, but not GA100."""
        return self.compute_capability > _GA100


_GA100: Final = (8, 0)
_ADA: Final = (8, 9)
_HOPPER: Final = (9, 0)

CATALOGUE: Final = (
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
        video_clock_idle_hertz=585 * MHZ,
        video_clock_busy_hertz=1290 * MHZ,
        power_limit_min_watts=100.0,
        temperature_max_celsius=85.0,
        temperature_slowdown_celsius=89.0,
        temperature_shutdown_celsius=92.0,
        memory_temperature_max_celsius=95.0,
        bar1_bytes=65536 * MIB,
        pcie_generation=4,
        nvlink_count=12,
        nvlink_bytes_per_second=25781 * MB,
        row_remap_banks=640,
        sm_count=108,
        host_cpus=12,
        host_memory_bytes=144 * GIB,
        mig=boards.A100_40GB.geometry,
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
        video_clock_idle_hertz=585 * MHZ,
        video_clock_busy_hertz=1290 * MHZ,
        power_limit_min_watts=100.0,
        temperature_max_celsius=85.0,
        temperature_slowdown_celsius=89.0,
        temperature_shutdown_celsius=92.0,
        memory_temperature_max_celsius=95.0,
        bar1_bytes=131072 * MIB,
        pcie_generation=4,
        nvlink_count=12,
        nvlink_bytes_per_second=25781 * MB,
        row_remap_banks=640,
        sm_count=108,
        host_cpus=12,
        host_memory_bytes=144 * GIB,
        mig=boards.A100_80GB.geometry,
    ),
    GpuModel(
        name="A30-24GB",
        driver_name="NVIDIA A30",
        compute_capability=(8, 0),
        memory_total_bytes=24576 * MIB,
        memory_reserved_bytes=518 * MIB,  # as the A100-40GB, which has the same chip
        power_limit_watts=165.0,
        power_idle_watts=28.0,
        temperature_idle_celsius=33.0,
        temperature_busy_celsius=66.0,
        sm_clock_idle_hertz=210 * MHZ,
        sm_clock_busy_hertz=1440 * MHZ,
        memory_clock_idle_hertz=1215 * MHZ,
        memory_clock_busy_hertz=1215 * MHZ,
        pci_device_id=0x20B710DE,
        pci_subsystem_id=0x153210DE,
        board_part_number="900-21001-0040-100",
        vbios_version="92.00.66.00.05",
        video_clock_idle_hertz=585 * MHZ,
        video_clock_busy_hertz=1290 * MHZ,
        power_limit_min_watts=100.0,
        temperature_max_celsius=85.0,
        temperature_slowdown_celsius=89.0,
        temperature_shutdown_celsius=92.0,
        memory_temperature_max_celsius=95.0,
        bar1_bytes=32768 * MIB,
        pcie_generation=4,
        nvlink_count=0,  # without a bridge to its neighbour
        nvlink_bytes_per_second=0.0,
        row_remap_banks=384,  # three stacks of memory where the A100-40GB has five
        sm_count=56,
        host_cpus=16,  # a quarter of a server with four
        host_memory_bytes=64 * GIB,
        mig=boards.A30_24GB.geometry,
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
        video_clock_idle_hertz=765 * MHZ,
        video_clock_busy_hertz=1545 * MHZ,
        power_limit_min_watts=200.0,
        temperature_max_celsius=87.0,
        temperature_slowdown_celsius=89.0,
        temperature_shutdown_celsius=95.0,
        memory_temperature_max_celsius=95.0,  # only its distance is shown
        bar1_bytes=131072 * MIB,
        pcie_generation=5,
        nvlink_count=18,
        nvlink_bytes_per_second=26562 * MB,
        row_remap_banks=2560,
        sm_count=132,
        host_cpus=24,
        host_memory_bytes=256 * GIB,
        mig=boards.H100_80GB.geometry,
    ),
    GpuModel(
        name="H100-94GB",
        driver_name="NVIDIA H100 NVL",
        compute_capability=(9, 0),
        memory_total_bytes=95830 * MIB,
        memory_reserved_bytes=594 * MIB,
        power_limit_watts=400.0,
        power_idle_watts=61.6,
        temperature_idle_celsius=32.0,
        temperature_busy_celsius=66.0,
        sm_clock_idle_hertz=345 * MHZ,
        sm_clock_busy_hertz=1785 * MHZ,
        memory_clock_idle_hertz=2619 * MHZ,
        memory_clock_busy_hertz=2619 * MHZ,
        pci_device_id=0x232110DE,
        pci_subsystem_id=0x183910DE,
        board_part_number="900-21010-0020-000",
        vbios_version="96.00.74.00.11",
        video_clock_idle_hertz=765 * MHZ,
        video_clock_busy_hertz=1410 * MHZ,
        power_limit_min_watts=200.0,
        temperature_max_celsius=87.0,
        temperature_slowdown_celsius=89.0,
        temperature_shutdown_celsius=95.0,
        memory_temperature_max_celsius=95.0,  # only its distance is shown
        bar1_bytes=131072 * MIB,
        pcie_generation=5,
        nvlink_count=0,  # without a bridge to its neighbour
        nvlink_bytes_per_second=0.0,
        row_remap_banks=3072,
        sm_count=132,
        host_cpus=40,  # a public cloud's machine with one (NC40ads_H100_v5)
        host_memory_bytes=320 * GIB,
        mig=boards.H100_94GB.geometry,
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
        video_clock_idle_hertz=765 * MHZ,
        video_clock_busy_hertz=1545 * MHZ,
        power_limit_min_watts=200.0,
        temperature_max_celsius=87.0,
        temperature_slowdown_celsius=89.0,
        temperature_shutdown_celsius=95.0,
        memory_temperature_max_celsius=95.0,
        bar1_bytes=262144 * MIB,
        pcie_generation=5,
        nvlink_count=18,
        nvlink_bytes_per_second=26562 * MB,
        row_remap_banks=3072,  # six stacks of memory where the H100 has five
        sm_count=132,
        host_cpus=24,
        host_memory_bytes=256 * GIB,
        mig=boards.H200_141GB.geometry,
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
        video_clock_idle_hertz=600 * MHZ,
        video_clock_busy_hertz=1965 * MHZ,
        power_limit_min_watts=200.0,
        temperature_max_celsius=88.0,
        temperature_slowdown_celsius=91.0,
        temperature_shutdown_celsius=93.0,
        memory_temperature_max_celsius=95.0,  # only its distance is shown
        bar1_bytes=262144 * MIB,
        pcie_generation=5,
        nvlink_count=18,
        nvlink_bytes_per_second=53125 * MB,
        row_remap_banks=3840,
        sm_count=148,
        host_cpus=24,
        host_memory_bytes=256 * GIB,
        mig=boards.B200_180GB.geometry,
    ),
    GpuModel(
        name="GB200",
        driver_name="NVIDIA GB200",
        compute_capability=(10, 0),
        memory_total_bytes=189471 * MIB,
        memory_reserved_bytes=742 * MIB,
        power_limit_watts=1200.0,
        power_idle_watts=165.9,
        temperature_idle_celsius=27.0,
        temperature_busy_celsius=68.0,
        sm_clock_idle_hertz=120 * MHZ,
        sm_clock_busy_hertz=2062 * MHZ,
        memory_clock_idle_hertz=3996 * MHZ,
        memory_clock_busy_hertz=3996 * MHZ,
        pci_device_id=0x294110DE,
        pci_subsystem_id=0x204610DE,
        board_part_number="900-2G548-A801-000",
        vbios_version="97.00.B9.00.69",
        video_clock_idle_hertz=600 * MHZ,
        video_clock_busy_hertz=1890 * MHZ,
        power_limit_min_watts=200.0,
        temperature_max_celsius=87.0,
        temperature_slowdown_celsius=89.0,
        temperature_shutdown_celsius=92.0,
        memory_temperature_max_celsius=95.0,  # only its distance is shown
        bar1_bytes=262144 * MIB,
        pcie_generation=5,
        nvlink_count=18,
        nvlink_bytes_per_second=53125 * MB,
        row_remap_banks=3968,
        sm_count=152,
        host_cpus=36,  # a quarter of a public cloud's machine with four (p6e-gb200.36xlarge)
        host_memory_bytes=240 * GIB,
        mig=boards.GB200_186GB.geometry,
    ),
    GpuModel(
        name="RTX-PRO-6000",
        driver_name="NVIDIA RTX PRO 6000 Blackwell Server Edition",
        compute_capability=(12, 0),
        memory_total_bytes=97887 * MIB,
        memory_reserved_bytes=636 * MIB,
        power_limit_watts=600.0,
        power_idle_watts=34.0,
        temperature_idle_celsius=30.0,
        temperature_busy_celsius=70.0,
        sm_clock_idle_hertz=180 * MHZ,
        sm_clock_busy_hertz=2430 * MHZ,
        memory_clock_idle_hertz=405 * MHZ,
        memory_clock_busy_hertz=12481 * MHZ,
        pci_device_id=0x2BB510DE,
        pci_subsystem_id=0x204E10DE,  # not seen
        board_part_number="900-2G153-0000-000",
        vbios_version="98.02.8D.00.01",
        video_clock_idle_hertz=600 * MHZ,
        video_clock_busy_hertz=2130 * MHZ,
        power_limit_min_watts=300.0,  # not seen
        temperature_max_celsius=88.0,
        temperature_slowdown_celsius=90.0,
        temperature_shutdown_celsius=93.0,
        memory_temperature_max_celsius=None,
        bar1_bytes=131072 * MIB,
        pcie_generation=5,
        nvlink_count=0,
        nvlink_bytes_per_second=0.0,
        row_remap_banks=256,  # scaled from the L40S by the width of the memory
        sm_count=188,
        host_cpus=24,
        host_memory_bytes=256 * GIB,
        mig=boards.RTX_PRO_6000.geometry,
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
        video_clock_idle_hertz=555 * MHZ,  # as smaller chips of its family in their lowest state
        video_clock_busy_hertz=1965 * MHZ,
        power_limit_min_watts=100.0,
        temperature_max_celsius=88.0,
        temperature_slowdown_celsius=90.0,
        temperature_shutdown_celsius=93.0,
        memory_temperature_max_celsius=None,
        bar1_bytes=65536 * MIB,
        pcie_generation=4,
        nvlink_count=0,
        nvlink_bytes_per_second=0.0,
        row_remap_banks=192,
        sm_count=142,
        host_cpus=24,
        host_memory_bytes=192 * GIB,
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
        video_clock_idle_hertz=540 * MHZ,  # in the lowest state
        video_clock_busy_hertz=1470 * MHZ,
        power_limit_min_watts=60.0,
        temperature_max_celsius=85.0,
        temperature_slowdown_celsius=93.0,
        temperature_shutdown_celsius=96.0,
        memory_temperature_max_celsius=None,
        bar1_bytes=256 * MIB,
        pcie_generation=3,
        nvlink_count=0,
        nvlink_bytes_per_second=0.0,
        row_remap_banks=None,
        sm_count=40,
        host_cpus=12,
        host_memory_bytes=48 * GIB,
    ),
)
