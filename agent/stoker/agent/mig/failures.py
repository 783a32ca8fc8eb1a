"""What can go wrong with a step: a closed set of kinds, each with a sentence for people."""

from enum import StrEnum

from stoker.core.errors import StokerError


class FailureKind(StrEnum):
    """Why a step was not done; whoever decides what is next looks at nothing else."""

    BUSY = "busy"  # somebody uses it, or another operation is under way on the GPU
    NO_PERMISSION = "no_permission"  # it takes root
    NO_ROOM = "no_room"  # the place is taken, or it would be one too many
    NOT_FOUND = "not_found"  # it is not there, or it is not any more what was meant
    NOT_SUPPORTED = "not_supported"  # this card, or its driver, cannot do that
    GPU_LOST = "gpu_lost"  # it fell off the bus, or has to be reset first
    DRIVER_GONE = "driver_gone"  # there is no driver to talk to
    INTERRUPTED = "interrupted"  # whoever did it ended, or did not end in time: it may be done
    UNKNOWN = "unknown"  # any other word of the driver


class StepFailed(StokerError):
    """A step was not done, or a GPU was not read; the text names the GPU, the step, and why."""

    def __init__(self, kind: FailureKind, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class StepsUnavailable(StokerError):
    """Nobody here may read or change partitions; the text says what to do about it."""
