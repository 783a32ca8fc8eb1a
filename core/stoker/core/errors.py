"""The errors a person can act on, and the exit codes that carry them out of a process.

StokerError             what stoker itself explains; its text is complete without a traceback
├── BadInput            what was given cannot be understood or is out of range
├── Missing             something this machine must have is not there (driver, library)
├── InUse               a port, a data folder or a device is held by somebody else
└── StoreError          the durable state cannot be opened or written
    ├── StoreCorrupt    the file is not a healthy database
    ├── StoreTooNew     the file was written by a newer stoker
    └── StoreFull       there is no room to write
"""

from enum import IntEnum


class ExitCode(IntEnum):
    """What a stoker command returns to its caller."""

    OK = 0
    FAILED = 1  # an unexpected failure: a bug or a broken machine
    USAGE = 2  # the input cannot be understood (the same code as the option parser uses)
    REFUSED = 3  # understood, and refused now with a reason
    MISSING = 4  # a driver or a library is not there
    UNREACHABLE = 5  # the aggregator cannot be reached or did not answer in time
    NOT_FOUND = 6  # the named allocation, node or GPU does not exist
    STORE = 7  # the durable state is corrupt, too new, or cannot be written
    IN_USE = 8  # a port or a data folder is held by another process
    PENDING = 9  # under way: the kernel holds a process, or a GPU waits for a reset or a reboot


class StokerError(Exception):
    """An error whose text tells a person what to do; commands print it without a traceback."""

    exit_code = ExitCode.FAILED


class BadInput(StokerError):
    """What was given cannot be understood: the text names it, what was asked and what was found."""

    exit_code = ExitCode.USAGE


class Missing(StokerError):
    """Something that this machine must have is not there."""

    exit_code = ExitCode.MISSING


class InUse(StokerError):
    """A port, a folder or a device is held by somebody else."""

    exit_code = ExitCode.IN_USE


class StoreError(StokerError):
    """The durable state cannot be opened or written."""

    exit_code = ExitCode.STORE


class StoreCorrupt(StoreError):
    """The file is not a healthy database."""


class StoreTooNew(StoreError):
    """The file was written by a newer stoker than this one."""


class StoreFull(StoreError):
    """There is no room to write; nothing of the refused write was kept."""


def shown(text: str) -> str:
    """Return a text from outside quoted and cut, so that a hostile value cannot flood a log."""
    return repr(text if len(text) <= 60 else text[:57] + "...")
