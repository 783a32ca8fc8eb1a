"""A simulated GPU driver: the functions of nvidia-ml-py, with its structs and errors, on no GPU.

It behaves like the real thing where that matters: nothing works before `nvmlInit`, a lost GPU
stays lost on every call, counters restart with the driver, values have the driver's units, and
each board answers what that board has and refuses what it lacks. What happens on it is either
scripted (`simulated_scenario`) or done by real processes of this machine that say they use it
(`simulated_workloads`). How values move is told by `simulated_card`; what stands between a call and
its answer by `simulated_session`; what an older driver lacks by `simulated_drivers`.
"""

from types import FunctionType
from typing import Any, cast

from stoker.agent.nvml_table import NvmlTable
from stoker.agent.simulated_events import EventFunctions
from stoker.agent.simulated_fields import FieldFunctions
from stoker.agent.simulated_gauges import GaugeFunctions
from stoker.agent.simulated_gpm import GpmFunctions
from stoker.agent.simulated_health import HealthFunctions
from stoker.agent.simulated_identity import IdentityFunctions
from stoker.agent.simulated_library import NVML
from stoker.agent.simulated_links import LinkFunctions
from stoker.agent.simulated_mig import MigFunctions
from stoker.agent.simulated_processes import ProcessFunctions
from stoker.agent.simulated_samples import SampleFunctions

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
