"""What the daemons do alike as they start: options, log, the folder of their state, their reach."""

import argparse
import logging
import os
import sys
from collections.abc import Mapping
from enum import StrEnum
from importlib.metadata import version
from pathlib import Path
from typing import NoReturn

from stoker.core.addresses import Address
from stoker.core.errors import BadInput, ExitCode

# What lives in a process that knows many nodes is values without cycles, which go when nothing
# refers to them. To look for cycles stops the loop (a look through a fleet of 1,000 nodes for 20 to
# 40 ms), so it is done seldom.
COLLECTOR_THRESHOLDS = (10_000, 20, 100)


class LogLevel(StrEnum):
    """What is worth a line."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


class DaemonParser(argparse.ArgumentParser):
    """The options that every daemon has; what it complains of is one line."""

    def __init__(self, prog: str, description: str, environment_prefix: str) -> None:
        super().__init__(
            prog=prog,
            description=description,
            epilog=f"Every option can also be given in the file and as {environment_prefix}NAME; "
            "flags win over the environment, which wins over the file.",
            allow_abbrev=False,
        )
        add = self.add_argument
        add("--config", type=Path, metavar="FILE", help="YAML file of options")
        add("--data-dir", metavar="FOLDER", help="where its state is kept")
        add("--metrics-listen", dest="metrics.listen", metavar="HOST:PORT", help="port 0: any free")
        add(
            "--insecure",
            action="store_true",
            default=None,
            help="talk beyond this machine without encryption",
        )
        add("--log-level", metavar="LEVEL", help=", ".join(LogLevel))
        add("--print-defaults", action="store_true", help="print a file with every option and exit")
        add("--version", action="version", version=f"{prog} {version('stoker')}")

    def error(self, message: str) -> NoReturn:
        """Say what is wrong and exit with 2."""
        self.exit(ExitCode.USAGE, f"{self.prog}: {message}; --help lists the options\n")


def flags_of(options: argparse.Namespace) -> Mapping[str, object]:
    """Return the parsed options that are part of the configuration, by their names in it."""
    flags: dict[str, object] = vars(options)
    return {name: flags[name] for name in flags if name not in {"config", "print_defaults"}}


def set_up_logging(level: LogLevel) -> None:
    """Log to the standard error stream."""
    # The journal of systemd keeps the time itself.
    time = "" if "JOURNAL_STREAM" in os.environ else "%(asctime)s "
    logging.basicConfig(format=f"{time}%(levelname)s %(message)s", stream=sys.stderr)
    logging.getLogger("stoker").setLevel(level.upper())  # the libraries' own talk stays out


def default_data_dir(part: str, environ: Mapping[str, str], *, is_root: bool) -> Path:
    """Return where `part` ("agent", "aggregator") keeps its state unless it is told."""
    if given := environ.get("STATE_DIRECTORY"):  # systemd's; with several, ours is the first
        return Path(given.split(":")[0])
    if is_root:
        return Path("/var/lib/stoker", part)
    state = environ.get("XDG_STATE_HOME") or Path(environ.get("HOME") or ".", ".local", "state")
    return Path(state, "stoker", part)


def check_reach(address: Address, what: str, *, is_insecure: bool) -> None:
    """Raise BadInput, naming `what`, for an address beyond this machine without --insecure."""
    if not (address.is_loopback or is_insecure):
        raise BadInput(
            f"{what}: {address} is beyond this machine and the connection is not encrypted; "
            "--insecure allows it"
        )
