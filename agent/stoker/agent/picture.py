"""What the last sampling tick told, and how ticks went: nothing of it outlives a failed one."""

from collections.abc import Mapping, Sequence

from stoker.agent.readings import WHOLE_GPU, GpuReading, GpuSample
from stoker.agent.telemetry import GpuTelemetry, Telemetry

# The kind of failure of a tick that was answered without a fact about any GPU.
NO_GPU_READ = "no_gpu_read"


class Picture:
    """The newest picture of the node's GPUs. Times are monotonic seconds, `at` is Unix seconds."""

    def __init__(self, telemetry: Telemetry) -> None:
        self.telemetry = telemetry
        self.samples: tuple[GpuSample, ...] = ()
        self.gpus: tuple[GpuTelemetry, ...] = ()
        self.unread: Mapping[str, str] = {}  # GPUs that told nothing, by UUID: why
        self.ticks = 0
        self.failures: Mapping[str, int] = {}  # failed ticks by kind
        self.last_success_at: float | None = None
        self.last_success: float | None = None

    def take(self, at: float, now: float, readings: Sequence[GpuReading]) -> bool:
        """Take in an answered tick; return whether it told anything. No GPU at all is an answer."""
        samples = self.telemetry.take(readings, now)
        if readings and not samples:
            self.fail(NO_GPU_READ)
            self.unread = _unread(readings, samples)
            return False
        self.samples, self.gpus = samples, self.telemetry.gpus(now)
        self.unread = _unread(readings, samples)
        self.ticks += 1
        self.last_success_at, self.last_success = at, now
        return True

    def fail(self, kind: str) -> None:
        """Note a tick that told nothing."""
        self.forget()
        self.failures = {**self.failures, kind: self.failures.get(kind, 0) + 1}

    def forget(self) -> None:
        """Know nothing of the GPUs any more."""
        self.telemetry.forget()
        self.samples, self.gpus, self.unread = (), (), {}


def _unread(readings: Sequence[GpuReading], samples: Sequence[GpuSample]) -> dict[str, str]:
    told = {sample.uuid for sample in samples}
    return {each.uuid: _reason(each) for each in readings if each.uuid not in told}


def _reason(reading: GpuReading) -> str:
    """Return why a GPU told nothing; a failure of the whole GPU says more than one of a fact."""
    failures = sorted(reading.failures, key=lambda failure: failure.fact != WHOLE_GPU)
    return failures[0].message if failures else "it told nothing"
