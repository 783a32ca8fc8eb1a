"""The table of the agent's own metrics (`stoker_*`): what each series is called, means and costs.

The page is written from this table and docs/metrics.md is generated from it, so neither can tell
what the other does not.
"""

from collections.abc import Iterator, Mapping
from types import MappingProxyType

from stoker.agent.driver_host.states import HUNG_FUNCTIONS_MAX
from stoker.agent.facts import FACTS, Fact, Kind
from stoker.agent.metrics.agent_rows import AGENT_ROWS
from stoker.agent.metrics.exposition import FamilyKind
from stoker.agent.metrics.gpu_rows import ASSIGNMENTS_MAX, GPU_ROWS, PROCESSES_MAX
from stoker.agent.metrics.mig_rows import MIG_ROWS
from stoker.agent.metrics.row import GPU_LABELS, MIG_LABELS, Metric
from stoker.agent.owners import AssignedBy
from stoker.agent.telemetry import WINDOWED, XIDS_MAX
from stoker.agent.verdicts import Check, RepairAction, Verdict
from stoker.core.mig.geometry import MigState

_SHOWN_PROCESS = "one for each process that is told"

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
        "verdict": f"{len(Verdict)}",
        "check": f"the checks, {len(Check)}",
        "code": "one for each fault that lasts: an Xid, a link, or a kind of the check's",
        "action": f"{len(RepairAction)}",
        "by": f"{len(AssignedBy)}",
        "holder": f"one for each assignment that is told, {ASSIGNMENTS_MAX} at most a node",
        "pid": f"{_SHOWN_PROCESS}, {PROCESSES_MAX} at most a node",
        "user": _SHOWN_PROCESS,
        "command": _SHOWN_PROCESS,
        "unit": _SHOWN_PROCESS,
        "pod": _SHOWN_PROCESS,
        "pod_uid": _SHOWN_PROCESS,
        "namespace": _SHOWN_PROCESS,
        "container": _SHOWN_PROCESS,
        "slurm_job": _SHOWN_PROCESS,
        "allocation": _SHOWN_PROCESS,
        "what": "two: processes, assignments",
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
        "state": f"the states of the driver, five; those of partitions, {len(MigState)}",
        "start": "the memory slices of the board, 12 at most",
        "size": "the sizes of instances that the board offers, about five",
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


METRICS: Mapping[str, Metric] = MappingProxyType(
    {
        each.name: each
        for each in (*_of_facts(), *_of_extents(), *_of_mig(), *GPU_ROWS, *MIG_ROWS, *AGENT_ROWS)
    }
)
