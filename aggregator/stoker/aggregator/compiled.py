"""The loops of placement, compiled by numba: once per machine and version, kept on disk.

Compiling takes seconds of CPU, and a thread that compiles keeps the loop waiting for the
interpreter's lock. So another process compiles into the folder, and this one only loads what is
there. Without numba, or where that fails, placement runs interpreted: it decides the same, slower.
"""

import asyncio
import importlib.util
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import FunctionType
from typing import Any

from stoker.aggregator.placing import kernels
from stoker.aggregator.placing.kernels import Kernels
from stoker.core.clock import Clock

# How often it is looked whether the fleet has become large enough.
LOOK_SECONDS = 5.0
# Compiling takes three seconds on an idle machine; a process that takes so long hangs.
COMPILE_SECONDS_MAX = 300.0
_NICENESS = 19

_log = logging.getLogger(__name__)


def is_available() -> bool:
    """Whether numba is installed."""
    return importlib.util.find_spec("numba") is not None


def load(folder: Path) -> Kernels:
    """Return the loops compiled, from `folder` or else made there; takes seconds.

    Raises ImportError without numba.
    """
    numba: Any = importlib.import_module("numba")
    numba.config.CACHE_DIR = str(folder)
    i, f = numba.int64, numba.float64
    ints, rows, planes = i[::1], i[:, ::1], i[:, :, ::1]
    floats, tables = f[::1], f[:, ::1]
    flags, keys, slots = numba.uint8[::1], numba.int32[::1], numba.int8[::1]

    def compiled(function: Callable[..., Any], signature: Any, **helpers: Any) -> Any:
        code, names = function.__code__, {**vars(kernels), **helpers}
        return numba.njit(signature, cache=True)(FunctionType(code, names, function.__name__))

    worth_of = compiled(kernels.worth_of, f(i, i, i, f, i, tables, floats, rows, tables))
    refresh = compiled(
        kernels.refresh,
        i(
            *(rows, planes, rows, flags, rows, ints, ints, ints, planes, planes, ints, ints),
            *(tables, tables, floats, rows, tables, floats, tables, ints, ints, ints, i, i),
            *(keys, slots),
        ),
        worth_of=worth_of,
    )
    pick = compiled(kernels.pick, i(keys, ints, flags))
    return Kernels(refresh, pick, is_compiled=True)


async def run_when_worth_it(
    use: Callable[[Kernels], None],
    count_gpus: Callable[[], int],
    gpus_min: int,
    folder: Path,
    clock: Clock,
) -> None:
    """Have the compiled loops used from when the fleet has `gpus_min` GPUs on."""
    if not is_available():
        return
    while count_gpus() < gpus_min:
        await clock.sleep(LOOK_SECONDS)
    started = clock.monotonic()
    error = await _compile_elsewhere(folder)
    if error:
        _log.warning("placement runs interpreted, it cannot be compiled: %s", error)
        return
    use(await asyncio.to_thread(load, folder))
    _log.info("placement runs compiled, after %.1f s", clock.monotonic() - started)


async def _compile_elsewhere(folder: Path) -> str:
    """Compile into the folder in a process of its own; return what went wrong, if anything."""
    command = [sys.executable, "-m", __name__, str(folder)]
    try:
        process = await asyncio.create_subprocess_exec(
            *command, stdin=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE
        )
    except OSError as error:
        return f"{folder}: {error.strerror}"
    try:
        async with asyncio.timeout(COMPILE_SECONDS_MAX):
            _, told = await process.communicate()
    except TimeoutError:
        return f"not done after {COMPILE_SECONDS_MAX:.0f} s"
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    lines = told.decode(errors="replace").strip().splitlines()
    if process.returncode != 0:
        return lines[-1] if lines else f"its process ended with {process.returncode}"
    return ""


if __name__ == "__main__":
    os.nice(_NICENESS)  # requests that come meanwhile are placed all the same
    load(Path(sys.argv[1]))
