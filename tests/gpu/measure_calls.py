"""Times every call that the agent's reader makes into the driver: python -m tests.gpu.measure_calls

Prints a table for docs/gpu-verification.md, dearest first. Reads only; changes nothing on a card.
"""

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, cast

from stoker.agent.facts import Rate
from stoker.agent.nvml.driver import NvmlDriver, nvidia_ml_py
from stoker.agent.nvml.table import NvmlTable

SWEEPS = 50
# Some facts tell only what happened since the last call.
PAUSE_SECONDS = 0.12


class TimedTable:
    """The functions of nvidia-ml-py, each with the seconds that its calls took."""

    def __init__(self, table: NvmlTable) -> None:
        self._table = table
        self.seconds: dict[str, list[float]] = {}

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._table, name)
        if name == "_nvmlGetFunctionPointer":

            def find(function: str) -> Callable[..., Any]:
                return self._timed(function, found(function))

            return find
        if not (name.startswith("nvml") and callable(found)) or isinstance(found, type):
            return found
        timed = self._timed(name, found)
        setattr(self, name, timed)
        return timed

    def forget(self) -> None:
        """Begin anew; functions that were handed out go on telling."""
        for taken in self.seconds.values():
            taken.clear()

    def _timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        taken = self.seconds.setdefault(name, [])

        def call(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                taken.append(time.perf_counter() - began)

        return call


def main() -> int:
    """Sweep and print."""
    table = TimedTable(nvidia_ml_py())
    driver = NvmlDriver(cast("NvmlTable", table))
    driver.open()
    inventory = driver.inventory()
    table.forget()
    for number in range(SWEEPS):
        driver.sample((Rate.FAST, Rate.SLOW) if number % 10 == 0 else (Rate.FAST,))
        if number % 5 == 0:
            driver.processes()
        time.sleep(PAUSE_SECONDS)
    driver.close()
    sys.stdout.write(
        f"{len(inventory.gpus)} x {inventory.gpus[0].model}, driver {inventory.driver_version}, "
        f"{SWEEPS} sweeps\n\n"
        "| call | calls | median us | most us | ms in all |\n|---|---|---|---|---|\n"
    )
    for name, taken in sorted(table.seconds.items(), key=lambda row: -sum(row[1])):
        if taken:
            sys.stdout.write(
                f"| {name} | {len(taken)} | {statistics.median(taken) * 1e6:.1f} "
                f"| {max(taken) * 1e6:.1f} | {sum(taken) * 1e3:.2f} |\n"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
