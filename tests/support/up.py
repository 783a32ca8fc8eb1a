"""`stoker up` in a test: a fleet of one command, with ports and a folder of its own."""

import re
from collections.abc import Mapping
from pathlib import Path

from tests.support.daemons import Daemon, Stage, python_module
from tests.support.waiting import until_true

_READY = re.compile(r"\bready\b")


class Up:
    """A running `stoker up`."""

    def __init__(self, daemon: Daemon, address: str) -> None:
        self.daemon = daemon
        self.address = address

    @property
    def lines(self) -> list[str]:
        """What it has printed, daemons' logs included."""
        return self.daemon.log.splitlines()

    async def ready(self) -> None:
        """Return once it has printed that it is ready."""

        def is_ready() -> bool:
            assert self.daemon.is_running, self.daemon.log
            return _READY.search(self.daemon.log) is not None

        await until_true("`stoker up` to say that it is ready", is_ready)


def stoker_up(stage: Stage, *options: str, environment: Mapping[str, str] | None = None) -> Up:
    """Start `stoker up` with these options at the address of the stage; it ends with the stage."""
    folder: Path = stage.folder / "up"
    command = [
        *python_module("stoker.cli"),
        *("up", "--data-dir", str(folder), "--listen", stage.address),
        *("--metrics-listen", "127.0.0.1:0"),
        *("--aggregator-metrics-listen", "127.0.0.1:0"),
        *options,
    ]
    daemon = stage.other(Daemon("up", command, stage.folder, "nowhere", environment))
    daemon.spawn()
    return Up(daemon, stage.address)
