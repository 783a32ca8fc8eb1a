"""A simulated GPU driver: the functions of nvidia-ml-py, with its structs and errors, on no GPU.

It behaves like the real thing where that matters: nothing works before `nvmlInit`, a lost GPU
stays lost on every call, counters restart with the driver, values have the driver's units, and
each board answers what that board has and refuses what it lacks. What happens on it is either
scripted (`simulated.scenario`) or done by real processes of this machine that say they use it
(`simulated.workloads`). How values move is told by `simulated.card`; what stands between a call and
its answer by `simulated.session`; what an older driver lacks by `simulated.drivers`.
"""

from types import FunctionType
from typing import Any, cast

from stoker.agent.nvml.table import NvmlTable
from stoker.agent.simulated.compute_instances import ComputeInstanceFunctions
from stoker.agent.simulated.events import EventFunctions
from stoker.agent.simulated.fields import FieldFunctions
from stoker.agent.simulated.gauges import GaugeFunctions
from stoker.agent.simulated.gpm import GpmFunctions
from stoker.agent.simulated.gpu_instances import GpuInstanceFunctions
from stoker.agent.simulated.health import HealthFunctions
from stoker.agent.simulated.identity import IdentityFunctions
from stoker.agent.simulated.library import NVML
from stoker.agent.simulated.links import LinkFunctions
from stoker.agent.simulated.mig import MigFunctions
from stoker.agent.simulated.processes import ProcessFunctions
from stoker.agent.simulated.samples import SampleFunctions

__all__ = ["SimulatedNvml"]


class SimulatedNvml(
    IdentityFunctions,
    GaugeFunctions,
    HealthFunctions,
    LinkFunctions,
    FieldFunctions,
    SampleFunctions,
    ProcessFunctions,
    EventFunctions,
    GpmFunctions,
    MigFunctions,
    GpuInstanceFunctions,
    ComputeInstanceFunctions,
    NvmlTable,
):
    """The function table of a node with these GPUs; one node, name and seed give the same UUIDs.

    Constants and structs are nvidia-ml-py's own, under its names.
    """

    NVMLError = NVML.NVMLError
    NVMLLibraryMismatchError = NVML.NVMLLibraryMismatchError
    c_nvmlGpmMetricsGet_t = NVML.c_nvmlGpmMetricsGet_t  # noqa: N815 (the name is the driver's own)


def _lend_names() -> None:
    """Give the table everything that nvidia-ml-py has and that is no function."""
    own = dir(SimulatedNvml)
    theirs = cast("dict[str, Any]", vars(NVML))
    for name, value in theirs.items():
        is_theirs = name.startswith(("NVML", "nvml", "c_nvml")) and name not in own
        if is_theirs and not isinstance(value, FunctionType):
            setattr(SimulatedNvml, name, value)


_lend_names()
