"""The verbs about partitions (MIG) and those who use them: each one step, on one GPU.

NVML is loaded only by `helper.driving`, which is imported only to answer such a verb: in a process
that ends afterwards. What hangs in the driver is ended by the kernel's alarm; what not even that
ends keeps the GPU's lock, so that nobody changes the GPU while the driver may still be at it.
Whoever comes while a step is under way waits for it: no reading sees a step half done.
"""

import contextlib
import fcntl
import os
import signal
import time
from collections.abc import Callable, Generator

from stoker.agent.helper.ending import end_holder
from stoker.agent.helper.ground import Ground
from stoker.agent.helper.requests import (
    Arguments,
    Refused,
    Told,
    are_small,
    is_flag,
    is_gpu,
    is_gpu_or_none,
    is_mig_device,
    is_pid,
    is_profile,
    is_signal,
    is_small,
    is_ticks,
)

# After which the kernel ends whoever does it. A change of the mode resets some GPUs, and all those
# of the machine are set up when nobody else has the driver open.
READ_SECONDS_MAX = 60
STEP_SECONDS_MAX = 60
MODE_SECONDS_MAX = 180
# How long whoever comes second waits for a step on the same GPU; within the seconds above.
WAIT_SECONDS_MAX = 10.0
_WAIT_STEP_SECONDS = 0.02
_LOCK, _LOCK_END = "mig-", ".lock"
# Whoever has the driver open holds this one too: a change of the mode finds the GPU in use while
# anybody has, one who only reads another GPU no less.
_SESSIONS = "sessions"


GpuVerb = Callable[[Ground, Told], Told]


def mig_read(ground: Ground, wish: Told) -> Told:
    """Tell how a GPU is partitioned, or each that has MIG: profiles, places, instances, UUIDs."""
    signal.alarm(READ_SECONDS_MAX)
    from stoker.agent.helper import driving  # noqa: PLC0415 (it loads NVML)

    gpu = wish["gpu"]
    if gpu is not None:
        with _locked(ground, (_SESSIONS, fcntl.LOCK_SH), (gpu, fcntl.LOCK_SH)) as busy:
            return busy or driving.read(ground.standin, wish)
    with _locked(ground, (_SESSIONS, fcntl.LOCK_SH)) as busy:
        return busy or driving.read_all(ground.standin, _await_steps(ground))


def _step(verb: str) -> GpuVerb:
    """Return a verb that changes a GPU by one call of the driver, while nobody else does."""

    def run(ground: Ground, wish: Told) -> Told:
        signal.alarm(STEP_SECONDS_MAX)
        from stoker.agent.helper import driving  # noqa: PLC0415 (it loads NVML)

        with _locked(ground, (_SESSIONS, fcntl.LOCK_SH), (wish["gpu"], fcntl.LOCK_EX)) as busy:
            return busy or driving.step(verb, ground.standin, wish)

    return run


def mig_set_mode(ground: Ground, wish: Told) -> Told:
    """Turn MIG mode on or off, while nobody else of us has the driver open."""
    signal.alarm(MODE_SECONDS_MAX)
    from stoker.agent.helper import driving  # noqa: PLC0415 (it loads NVML)

    with _locked(ground, (_SESSIONS, fcntl.LOCK_EX), (wish["gpu"], fcntl.LOCK_EX)) as busy:
        return busy or driving.step("mig_set_mode", ground.standin, wish)


# --- locks


@contextlib.contextmanager
def _locked(ground: Ground, *wanted: tuple[object, int]) -> Generator[Told | None]:
    """Keep others away; gives what to tell when others keep us away."""
    deadline = time.monotonic() + WAIT_SECONDS_MAX
    with contextlib.ExitStack() as opened:
        for of, how in wanted:
            path = _lock_path(ground, of)
            file = _open_lock(path)
            opened.callback(os.close, file)
            if not _lock(file, how, deadline):
                found = f"{of}: another step is still under way ({path} is locked)"
                told: Told = {"failed": "busy", "message": found}
                yield {**told, "is_simulated": bool(ground.standin)}
                return
        yield None


def _await_steps(ground: Ground) -> str:
    """Return when no step is under way; a text: which still are, after all the time there is."""
    deadline = time.monotonic() + WAIT_SECONDS_MAX
    busy: list[str] = []
    for name in sorted(os.listdir(ground.locks)):
        if name.startswith(f"{_LOCK}GPU-") and name.endswith(_LOCK_END):
            file = _open_lock(f"{ground.locks}/{name}")
            try:
                if not _lock(file, fcntl.LOCK_SH, deadline):
                    busy.append(name.removeprefix(_LOCK).removesuffix(_LOCK_END))
            finally:
                os.close(file)
    return f"a step is still under way on {', '.join(busy)}" * bool(busy)


def _lock_path(ground: Ground, of: object) -> str:
    if not ground.locks:
        raise Refused("there is no folder for locks that only root can write to")
    return f"{ground.locks}/{_LOCK}{of}{_LOCK_END}"


def _open_lock(path: str) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise Refused(f"{path}: {error.strerror}") from error


def _lock(file: int, how: int, deadline: float) -> bool:
    while True:
        try:
            fcntl.flock(file, how | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(_WAIT_STEP_SECONDS)


# --- the table

_ON = {"gpu": is_gpu}
_INSTANCE = {"gpu_instance_id": is_small, "profile": is_profile, "start": is_small}

# The verb; what does it; what has to be given, and how that is checked.
GPU_VERBS: dict[str, tuple[GpuVerb, Arguments]] = {
    "mig_read": (mig_read, {"gpu": is_gpu_or_none}),
    "mig_set_mode": (mig_set_mode, {**_ON, "is_enabled": is_flag}),
    "mig_create_gpu_instance": (
        _step("mig_create_gpu_instance"),
        {**_ON, "profile": is_profile, "profile_id": is_small, "start": is_small, "size": is_small},
    ),
    "mig_create_compute_instance": (
        _step("mig_create_compute_instance"),
        {
            **_ON,
            **_INSTANCE,
            "beside": are_small,
            "profile_id": is_small,
            "compute_slices": is_small,
        },
    ),
    "mig_destroy_compute_instance": (
        _step("mig_destroy_compute_instance"),
        {**_ON, **_INSTANCE, "compute_instance_id": is_small, "uuid": is_mig_device},
    ),
    "mig_destroy_gpu_instance": (_step("mig_destroy_gpu_instance"), {**_ON, **_INSTANCE}),
    "end_holder": (
        end_holder,
        {**_ON, "pid": is_pid, "started_ticks": is_ticks, "signal": is_signal},
    ),
}
# All but one of them; a helper that only reads refuses these.
CHANGING = frozenset(GPU_VERBS) - {"mig_read"}
