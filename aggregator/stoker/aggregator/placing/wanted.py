"""What a request wants of one node, in words for a refusal."""

from stoker.aggregator.model import COMPUTE_MILLI, GpuTopology, Request


def each_node(request: Request) -> str:
    """Return what one node shall give; of a gang its part."""
    if not request.is_whole:
        return request.described()
    return f"{request.gpus} x {' or '.join(request.models) or 'GPU'}"


def on_one_node(request: Request) -> str:
    """Return the same; of whole GPUs, that they shall be together."""
    return f"{each_node(request)} on one node" if request.is_whole else each_node(request)


def lying(request: Request) -> str:
    """Return how its GPUs shall lie to each other."""
    if request.gpu_topology is GpuTopology.NUMA:
        return "on one memory node of the host"
    return "each joined to each by NVLink"


def mig_device(request: Request) -> str:
    """Return the profile, and how many or how much memory and compute where that was asked for."""
    count = f"{request.gpus} x " if request.gpus > 1 else ""
    least = f" of {request.memory_bytes}" if request.memory_bytes else ""
    compute = f" with {percent(request.compute_milli)}" if request.compute_milli else ""
    return f"{count}{request.mig_profile}{least}{compute}"


def percent(milli: int) -> str:
    """Return a part of a GPU's compute."""
    return f"{milli * 100 / COMPUTE_MILLI:g} %"
