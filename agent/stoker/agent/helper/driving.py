"""The verbs about partitions with NVML loaded; imported only by a process that answers one of them.

What the driver refuses is told as a kind of failure and a sentence. What is told of a simulated
driver says so, so that nobody takes it for the real one.
"""

from collections.abc import Callable
from dataclasses import asdict
from typing import TypeVar

from stoker.agent.helper.requests import Refused, Told, are_small
from stoker.agent.mig.failures import FailureKind, StepFailed
from stoker.agent.mig.library import Library, Within
from stoker.agent.nvml.driver import nvidia_ml_py
from stoker.agent.nvml.table import NvmlTable
from stoker.agent.partitions import (
    CreateComputeInstance,
    CreateGpuInstance,
    DestroyComputeInstance,
    DestroyGpuInstance,
)
from stoker.core.errors import StokerError

T = TypeVar("T")

Standin = tuple[str, ...]  # options of the simulated driver; empty: the real one


def read(standin: Standin, wish: Told) -> Told:
    """Tell how one GPU is partitioned."""
    gpu = _of(wish, "gpu", str)
    return _told(standin, lambda library: {"gpus": [asdict(library.read(gpu))]})


def read_all(standin: Standin, under_way: str) -> Told:
    """Tell how every GPU that has MIG is partitioned; `under_way` is told with what is lacking."""

    def act(library: Library) -> Told:
        listing = library.read_all()
        shortfall = "; ".join(filter(None, (under_way, listing.shortfall)))
        return {"gpus": [asdict(each) for each in listing.gpus], "shortfall": shortfall}

    return _told(standin, act)


def _set_mode(library: Library, wish: Told) -> Told:
    is_enabled = _of(wish, "is_enabled", bool)
    activation = library.set_mode(_of(wish, "gpu", str), is_enabled=is_enabled)
    return {"activation": activation.value}


def _create_gpu_instance(library: Library, wish: Told) -> Told:
    step = CreateGpuInstance(
        profile_id=_of(wish, "profile_id", int),
        profile=_of(wish, "profile", str),
        start=_of(wish, "start", int),
        size=_of(wish, "size", int),
    )
    library.create_gpu_instance(_of(wish, "gpu", str), step)
    return {}


def _create_compute_instance(library: Library, wish: Told) -> Told:
    step = CreateComputeInstance(
        start=_of(wish, "start", int),
        profile_id=_of(wish, "profile_id", int),
        compute_slices=_of(wish, "compute_slices", int),
    )
    library.create_compute_instance(_of(wish, "gpu", str), step, _within(wish))
    return {}


def _destroy_compute_instance(library: Library, wish: Told) -> Told:
    step = DestroyComputeInstance(
        gpu_instance_id=_of(wish, "gpu_instance_id", int),
        compute_instance_id=_of(wish, "compute_instance_id", int),
        uuid=_of(wish, "uuid", str),
    )
    library.destroy_compute_instance(_of(wish, "gpu", str), step, _within(wish))
    return {}


def _destroy_gpu_instance(library: Library, wish: Told) -> Told:
    step = DestroyGpuInstance(
        gpu_instance_id=_of(wish, "gpu_instance_id", int),
        profile=_of(wish, "profile", str),
        start=_of(wish, "start", int),
    )
    library.destroy_gpu_instance(_of(wish, "gpu", str), step)
    return {}


_STEPS: dict[str, Callable[[Library, Told], Told]] = {
    "mig_set_mode": _set_mode,
    "mig_create_gpu_instance": _create_gpu_instance,
    "mig_create_compute_instance": _create_compute_instance,
    "mig_destroy_compute_instance": _destroy_compute_instance,
    "mig_destroy_gpu_instance": _destroy_gpu_instance,
}


def step(verb: str, standin: Standin, wish: Told) -> Told:
    """Do a step by its verb, and tell what became of it."""
    return _told(standin, lambda library: _STEPS[verb](library, wish))


def has_user(standin: Standin, gpu: str, pid: int) -> bool:
    """Whether a process uses a simulated GPU; raises Refused."""
    from stoker.agent.helper.standin import users_of  # noqa: PLC0415 (for simulated GPUs only)

    try:
        return pid in users_of(standin, gpu)
    except StokerError as error:
        raise Refused(str(error)) from error


def _told(standin: Standin, act: Callable[[Library], Told]) -> Told:
    try:
        with Library(_table(standin)) as library:
            told = {"ok": True, **act(library)}
    except StepFailed as failure:
        told = {"failed": failure.kind.value, "message": str(failure)}
    except StokerError as error:  # the simulated driver finds its files spoilt
        told = {"failed": FailureKind.UNKNOWN.value, "message": str(error)}
    return {**told, "is_simulated": bool(standin)}


def _table(standin: Standin) -> NvmlTable:
    try:
        if not standin:
            return nvidia_ml_py()
        from stoker.agent.helper.standin import simulated  # noqa: PLC0415 (for simulated GPUs only)

        return simulated(standin)
    except StokerError as error:  # no nvidia-ml-py, or a simulation that cannot be made as asked
        raise StepFailed(FailureKind.DRIVER_GONE, str(error)) from error


def _within(wish: Told) -> Within:
    beside = wish.get("beside", [])
    assert are_small(beside)
    return Within(
        gpu_instance_id=_of(wish, "gpu_instance_id", int),
        profile=_of(wish, "profile", str),
        start=_of(wish, "start", int),
        compute_instances=tuple(sorted(beside)),
    )


def _of(wish: Told, name: str, kind: type[T]) -> T:
    """Return an argument, which was checked before."""
    value = wish[name]
    assert isinstance(value, kind)
    return value
