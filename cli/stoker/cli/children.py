"""The daemons that `stoker up` starts: begun, watched, begun anew when they crash, ended."""

import json
import math
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from stoker.agent.processes import end, start, wait
from stoker.core.clock import Clock
from stoker.core.errors import ExitCode, StokerError

# A daemon with its Python and its store; a machine that swaps takes long.
START_SECONDS_MAX = 60.0
# Then it is killed.
STOP_SECONDS_MAX = 10.0
RESTART_SECONDS_MIN = 1.0
RESTART_SECONDS_MAX = 30.0
# A daemon that ran so long has not crashed at its start: pauses begin anew.
STEADY_SECONDS = 60.0
_LOOK_SECONDS = 0.05


class ChildFailed(StokerError):
    """A daemon ended before it did its work; its own words stand above."""

    def __init__(self, name: str, code: int) -> None:
        if code in set(ExitCode):
            self.exit_code = ExitCode(code)
        super().__init__(f"{name} {how_it_ended(code)} before it was ready")


def how_it_ended(code: int) -> str:
    """Return in words what an exit code of subprocess says."""
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        return f"was ended by {signal.Signals(-code).name}"
    except ValueError:  # a real-time signal
        return f"was ended by signal {-code}"


def restart_pause_seconds(crashes: int) -> float:
    """Return the wait before a daemon is begun anew after so many crashes in a row."""
    return min(RESTART_SECONDS_MAX, RESTART_SECONDS_MIN * 2.0 ** min(crashes - 1, 30))


class Child:
    """One daemon. It ends with this process, whatever happens to it."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        running_file: Path,
        *,
        clock: Clock,
        say: Callable[[str], None],
    ) -> None:
        """`running_file` is where the daemon says how to reach it."""
        self.name = name
        self.command = command  # may be changed for the next start
        self._running_file = running_file
        self._clock = clock
        self._say = say
        self._process: subprocess.Popen[bytes] | None = None

    async def begin(self) -> dict[str, Any]:
        """Start it; returns what it says of itself once it serves. Raises ChildFailed."""
        process = self._start()
        deadline = self._clock.monotonic() + START_SECONDS_MAX
        while self._clock.monotonic() < deadline:
            self.check()
            said = self._said()
            # A file of an earlier run is another process' word.
            if said.get("pid") == process.pid:
                return said
            await self._clock.sleep(_LOOK_SECONDS)
        raise StokerError(f"{self.name} does not serve after {START_SECONDS_MAX:g} s")

    def check(self) -> None:
        """Raise ChildFailed when it has ended."""
        code = None if self._process is None else self._process.poll()
        if code is not None:
            raise ChildFailed(self.name, code)

    async def keep_running(self) -> None:
        """Begin it anew whenever it ends; runs until cancelled."""
        crashes = 0
        while True:
            assert self._process is not None
            since = self._clock.monotonic()
            code = await wait(self._process, math.inf, self._clock)
            assert code is not None
            is_steady = self._clock.monotonic() - since >= STEADY_SECONDS
            crashes = 1 if is_steady else crashes + 1
            pause = restart_pause_seconds(crashes)
            self._say(f"{self.name} {how_it_ended(code)}; starting it again in {pause:g} s")
            await self._clock.sleep(pause)
            self._start()

    async def stop(self) -> None:
        """Ask it to end, and kill it when it does not."""
        if self._process is None or self._process.poll() is not None:
            return
        if await end(self._process, grace_seconds=STOP_SECONDS_MAX, clock=self._clock) is None:
            self._say(f"{self.name} (PID {self._process.pid}) cannot be ended: the kernel holds it")

    def _start(self) -> subprocess.Popen[bytes]:
        # In a session of its own: Ctrl-C is for us, who end the daemons in their order.
        self._process = start(
            self.command, stdout=sys.stderr.fileno(), new_session=True, die_with_parent=True
        )
        return self._process

    def _said(self) -> dict[str, Any]:
        try:
            said: dict[str, Any] = json.loads(self._running_file.read_bytes())
        except FileNotFoundError:
            return {}
        return said
