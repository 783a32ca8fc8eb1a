"""The table of the agent's own metrics (`stoker_*`): what each series is called, means and costs.

The page is written from this table and docs/metrics.md is generated from it, so neither can tell
what the other does not. Names carry base units; what changes with time or place stands in an
`_info` series, to be joined by `uuid`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from stoker.agent.driver_host.states import HUNG_FUNCTIONS_MAX
from stoker.agent.facts import FACTS, Fact, Kind
from stoker.agent.metrics.exposition import FamilyKind
from stoker.agent.telemetry import WINDOWED, XIDS_MAX

GPU_LABELS = ("node", "gpu", "uuid", "model")
MIG_LABELS = (
    *("node", "gpu", "uuid", "mig_uuid"),
    *("profile", "gpu_instance", "compute_instance"),
)
INFO_LABELS = (
    *GPU_LABELS,
    *("pci_bus_id", "serial", "vbios_version", "board_part_number"),
    *("compute_capability", "minor_number", "numa_node"),
)
DRIVER_INFO_LABELS = ("node", "driver_version", "cuda_version", "nvml_version")
XID_LABELS = (*GPU_LABELS, "xid")
MISSING_LABELS = ("node", "gpu", "uuid", "error_kind")

# Nobody's series has more labels: some stores refuse more than 30.
LABELS_MAX = 20

# What bounds the number of values of a label.
LABEL_BOUNDS: Mapping[str, str] = MappingProxyType(
    {
        "node": "one",
        "gpu": "the GPUs of the node",
        "uuid": "one for each GPU",
        "model": "one for each GPU",
        "reason": "of clocks about a dozen, of failures the kinds of driver errors (about 20)",
        "fan": "the fans of the card",
        "link": "the NVLink links of the card (18 on Hopper)",
        "cause": "two",
        "availability": "five",
        "mig_uuid": "the MIG devices that exist now: with their compute instances 7 at most a GPU",
        "profile": "one for each MIG device",
        "gpu_instance": "one for each MIG device",
        "compute_instance": "one for each MIG device",
        "xid": f"the Xids seen since the agent started, {XIDS_MAX} at most a GPU",
        "error_kind": "one for each GPU that is missing",
        "pci_bus_id": "one for each GPU",
        "serial": "one for each GPU",
        "vbios_version": "one for each GPU",
        "board_part_number": "one for each GPU",
        "compute_capability": "one for each GPU",
        "minor_number": "one for each GPU",
        "numa_node": "one for each GPU",
        "driver_version": "one",
        "cuda_version": "one",
        "nvml_version": "one",
        "version": "one",
        "state": "the states of the driver, five",
        "collector": "four: fast, slow, processes, inventory",
        "function": f"the driver's functions that hung, {HUNG_FUNCTIONS_MAX} at most and `other`",
        "fact": "the facts of the table above, and `gpu`",
        "le": "the bounds of the histogram, ten",
    }
)

# What a byte counter tells, no rate tells again: these two are told only where the counter of the
# same direction is not. GPM and DCGM give rates, NVML counters; a GPU with both has one series.
RATE_OF: Mapping[Fact, Fact] = MappingProxyType(
    {
        Fact.PCIE_TRANSMIT_BYTES_PER_SECOND: Fact.PCIE_TRANSMIT_BYTES,
        Fact.PCIE_RECEIVE_BYTES_PER_SECOND: Fact.PCIE_RECEIVE_BYTES,
        Fact.NVLINK_TRANSMIT_BYTES_PER_SECOND: Fact.NVLINK_TRANSMIT_BYTES,
        Fact.NVLINK_RECEIVE_BYTES_PER_SECOND: Fact.NVLINK_RECEIVE_BYTES,
    }
)


@dataclass(frozen=True, slots=True)
class Metric:
    """A row of the table: one family of series."""

    name: str
    kind: FamilyKind
    labels: tuple[str, ...]
    doc: str
    source: str = "agent"  # who knows it
    rate: str = "scrape"  # how often it is made anew

    @property
    def unit(self) -> str:
        """What a value counts, by the end of the name."""
        bare = self.name.removesuffix("_total")
        for end, unit in _UNITS.items():
            if bare.endswith(end):
                return unit
        return "0 or 1" if self.doc.startswith("Whether") else "number"


_UNITS: Mapping[str, str] = MappingProxyType(
    {
        "_bytes_per_second": "bytes/s",
        "_bytes": "bytes",
        "_ratio": "0 to 1",
        "_hertz": "Hz",
        "_watts": "W",
        "_joules": "J",
        "_celsius": "°C",
        "_timestamp_seconds": "Unix seconds",
        "_time_seconds": "Unix seconds",
        "_seconds": "s",
        "_info": "always 1",
    }
)


def gpu_metric_name(fact: Fact) -> str:
    """Return the name of a fact's series for a GPU."""
    return f"stoker_gpu_{_fact_name(fact)}"


def mig_metric_name(fact: Fact) -> str:
    """Return the name of a fact's series for a MIG device."""
    return f"stoker_mig_{_fact_name(fact)}"


def extent_metric_name(fact: Fact, which: str) -> str:
    """Return the name for the `min`, `max` or `mean` of a fact; the unit stays at its end."""
    what, _, unit = fact.rpartition("_")
    return f"stoker_gpu_{what}_{which}_{unit}"


def _fact_name(fact: Fact) -> str:
    return f"{fact}_total" if FACTS[fact].kind is Kind.COUNTER else str(fact)


def _family_kind(fact: Fact) -> FamilyKind:
    return FamilyKind.COUNTER if FACTS[fact].kind is Kind.COUNTER else FamilyKind.GAUGE


# What hardware counters tell, and what a MIG device can tell: its memory and its engines.
PROFILING = (
    *(Fact.GRAPHICS_ENGINE_ACTIVE_RATIO, Fact.SM_ACTIVE_RATIO, Fact.SM_OCCUPANCY_RATIO),
    *(Fact.TENSOR_ACTIVE_RATIO, Fact.TENSOR_HALF_ACTIVE_RATIO, Fact.TENSOR_DOUBLE_ACTIVE_RATIO),
    *(Fact.TENSOR_INTEGER_ACTIVE_RATIO, Fact.FP64_ACTIVE_RATIO, Fact.FP32_ACTIVE_RATIO),
    *(Fact.FP16_ACTIVE_RATIO, Fact.INTEGER_ACTIVE_RATIO, Fact.MEMORY_BANDWIDTH_RATIO),
    *RATE_OF,
)
MIG_FACTS = (
    *(Fact.MEMORY_TOTAL_BYTES, Fact.MEMORY_USED_BYTES, Fact.MEMORY_FREE_BYTES),
    Fact.MEMORY_RESERVED_BYTES,
    *PROFILING,
)
EXTENTS: Mapping[str, str] = MappingProxyType(
    {"min": "Least", "max": "Most", "mean": "Mean"}  # the word in the name, the word in the doc
)


def _source(fact: Fact) -> str:
    return "GPM, else DCGM" if fact in PROFILING else "NVML"


def _of_facts() -> Iterator[Metric]:
    for fact, spec in FACTS.items():
        own = () if spec.label is None else (spec.label,)
        doc = spec.doc
        if fact in RATE_OF:
            doc += f" Only where `{gpu_metric_name(RATE_OF[fact])}` is not told."
        name, kind = gpu_metric_name(fact), _family_kind(fact)
        yield Metric(name, kind, (*GPU_LABELS, *own), doc, _source(fact), spec.rate)


def _of_extents() -> Iterator[Metric]:
    for fact in WINDOWED:
        for which, word in EXTENTS.items():
            doc = (
                f"{word} of `{gpu_metric_name(fact)}` over `metrics.window_seconds`, by the "
                "driver's own samples where it keeps them."
            )
            name = extent_metric_name(fact, which)
            yield Metric(name, FamilyKind.GAUGE, GPU_LABELS, doc, "NVML", FACTS[fact].rate)


def _of_mig() -> Iterator[Metric]:
    for fact in MIG_FACTS:
        spec = FACTS[fact]
        name, kind = mig_metric_name(fact), _family_kind(fact)
        doc = spec.doc.removesuffix(" of the GPU.").removesuffix(".") + ", of the MIG device."
        yield Metric(name, kind, MIG_LABELS, doc, _source(fact), spec.rate)


_GAUGE, _COUNTER = FamilyKind.GAUGE, FamilyKind.COUNTER

_WRITTEN: tuple[Metric, ...] = (
    Metric(
        "stoker_gpu_up",
        _GAUGE,
        GPU_LABELS,
        "Whether the GPU was read within the last three intervals.",
    ),
    Metric(
        "stoker_gpu_info",
        _GAUGE,
        INFO_LABELS,
        "What the GPU is; an empty label was not told.",
        source="NVML",
        rate="inventory",
    ),
    Metric(
        "stoker_gpu_driver_info",
        _GAUGE,
        DRIVER_INFO_LABELS,
        "The versions of the driver, of the CUDA it brings, and of its library.",
        source="NVML",
        rate="inventory",
    ),
    Metric(
        "stoker_gpu_missing",
        _GAUGE,
        MISSING_LABELS,
        "1 for every GPU that the driver counts and that cannot be read; `error_kind` says why.",
        source="NVML",
        rate="inventory",
    ),
    Metric(
        "stoker_gpu_xid_errors_total",
        _COUNTER,
        XID_LABELS,
        "Errors that the driver reported (Xids), since the agent started; only those seen.",
        source="NVML's events",
        rate="as they come",
    ),
    Metric(
        "stoker_gpu_xid_last_timestamp_seconds",
        _GAUGE,
        XID_LABELS,
        "When the Xid was seen last.",
        source="NVML's events",
        rate="as they come",
    ),
    Metric(
        "stoker_gpu_allocations",
        _GAUGE,
        GPU_LABELS,
        "Allocations that hold the GPU or a share of it.",
    ),
    Metric(
        "stoker_gpu_allocated_memory_bytes",
        _GAUGE,
        GPU_LABELS,
        "Memory of the GPU that is granted to somebody.",
    ),
    Metric(
        "stoker_gpu_processes",
        _GAUGE,
        GPU_LABELS,
        "Processes with a context on the GPU.",
        source="NVML and /proc",
        rate="processes",
    ),
    Metric(
        "stoker_gpu_foreign_processes",
        _GAUGE,
        GPU_LABELS,
        "Those of them that belong to no allocation.",
        source="NVML and /proc",
        rate="processes",
    ),
    Metric(
        "stoker_agent_build_info",
        _GAUGE,
        ("version",),
        "The label tells the version.",
    ),
    Metric(
        "stoker_agent_simulated",
        _GAUGE,
        (),
        "Whether the GPUs are simulated.",
    ),
    Metric(
        "stoker_agent_connected",
        _GAUGE,
        (),
        "Whether the aggregator has welcomed this agent.",
    ),
    Metric(
        "stoker_agent_outbox_frames",
        _GAUGE,
        (),
        "Frames that are not acknowledged yet.",
    ),
    Metric(
        "stoker_agent_frames_dropped_total",
        _COUNTER,
        (),
        "Frames that the full outbox dropped.",
    ),
    Metric(
        "stoker_agent_samples_total",
        _COUNTER,
        (),
        "Sampling ticks that were answered.",
    ),
    Metric(
        "stoker_agent_sample_failures_total",
        _COUNTER,
        ("reason",),
        "Sampling ticks without an answer.",
    ),
    Metric(
        "stoker_agent_read_failures_total",
        _COUNTER,
        ("fact", "reason"),
        "Facts that were asked for and not told; the fact `gpu` is a whole GPU.",
    ),
    Metric(
        "stoker_agent_sample_duration_seconds",
        FamilyKind.HISTOGRAM,
        (),
        "Time that the driver took to answer a sampling tick.",
    ),
    Metric(
        "stoker_agent_last_success_timestamp_seconds",
        _GAUGE,
        (),
        "When a sampling tick was last answered.",
    ),
    Metric(
        "stoker_agent_collector_success",
        _GAUGE,
        ("collector",),
        "Whether the newest run of this reader succeeded.",
    ),
    Metric(
        "stoker_agent_collector_duration_seconds",
        _GAUGE,
        ("collector",),
        "Time that this run took.",
    ),
    Metric(
        "stoker_agent_collector_last_success_timestamp_seconds",
        _GAUGE,
        ("collector",),
        "When a run of this reader last succeeded.",
    ),
    Metric(
        "stoker_agent_driver_state",
        _GAUGE,
        ("state",),
        "1 for the state that the driver is in, 0 for the others.",
    ),
    Metric(
        "stoker_agent_driver_host_restarts_total",
        _COUNTER,
        (),
        "Driver hosts replaced after a failure.",
    ),
    Metric(
        "stoker_agent_driver_host_renewals_total",
        _COUNTER,
        (),
        "Driver hosts replaced to look for GPUs that were lost; no failure.",
    ),
    Metric(
        "stoker_agent_driver_host_timeouts_total",
        _COUNTER,
        (),
        "Questions that the driver did not answer in time.",
    ),
    Metric(
        "stoker_agent_driver_hangs_total",
        _COUNTER,
        ("function",),
        "Of those, the ones in a call, by the driver's function.",
    ),
    Metric(
        "stoker_agent_driver_host_failures_total",
        _COUNTER,
        (),
        "Questions that were answered by an error, or could not be asked.",
    ),
    Metric(
        "stoker_agent_driver_host_kills_total",
        _COUNTER,
        (),
        "Driver hosts that did not end when asked.",
    ),
    Metric(
        "stoker_agent_driver_host_crashes_total",
        _COUNTER,
        (),
        "Driver hosts that stumbled inside of the library.",
    ),
    Metric(
        "stoker_agent_driver_inventory_changes_total",
        _COUNTER,
        (),
        "Times that the GPUs were not those found before.",
    ),
    Metric(
        "stoker_agent_driver_host_unkillable_total",
        _COUNTER,
        (),
        "Driver hosts that did not end when killed.",
    ),
    Metric(
        "stoker_agent_driver_host_unreaped",
        _GAUGE,
        (),
        "Whether the kernel holds a killed driver host, so that none can start.",
    ),
    Metric(
        "stoker_agent_driver_host_unreaped_seconds",
        _GAUGE,
        (),
        "Time for which it has held it.",
    ),
    Metric(
        "stoker_agent_driver_host_resident_memory_bytes",
        _GAUGE,
        (),
        "Resident memory of the driver host.",
        source="/proc",
    ),
    Metric(
        "process_cpu_seconds_total",
        _COUNTER,
        (),
        "Processor time of the agent, its driver host not included.",
        source="/proc",
    ),
    Metric(
        "process_resident_memory_bytes",
        _GAUGE,
        (),
        "Resident memory of the agent.",
        source="/proc",
    ),
    Metric(
        "process_virtual_memory_bytes",
        _GAUGE,
        (),
        "Virtual memory of the agent.",
        source="/proc",
    ),
    Metric(
        "process_start_time_seconds",
        _GAUGE,
        (),
        "When the agent started.",
        source="/proc",
    ),
    Metric(
        "process_open_fds",
        _GAUGE,
        (),
        "Files that the agent has open.",
        source="/proc",
    ),
    Metric(
        "process_max_fds",
        _GAUGE,
        (),
        "Most files that it may have open.",
        source="/proc",
    ),
)

METRICS: Mapping[str, Metric] = MappingProxyType(
    {each.name: each for each in (*_of_facts(), *_of_extents(), *_of_mig(), *_WRITTEN)}
)
