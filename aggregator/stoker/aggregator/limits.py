"""What may be said at the aggregator's doors: the largest sizes, and checks of single fields."""

import math
import re
from collections.abc import Mapping

from stoker.core.errors import shown
from stoker.core.gpu_models import GPUS_PER_NODE_MAX
from stoker.core.units import BYTES_MAX

NAME_BYTES_MAX = 253
TEXT_BYTES_MAX = 256
ID_BYTES_MAX = 128
REASON_BYTES_MAX = 1024
LABELS_MAX = 64
LABEL_KEY_BYTES_MAX = 63
TTL_SECONDS_MAX = 31_536_000.0  # a year
WAIT_SECONDS_MAX = 2_592_000.0  # 30 days
RELEASE_WAIT_SECONDS_MAX = 60.0
PRIORITY_MAX = 1_000_000
GPUS_MAX = 1024
GANG_NODES_MAX = 1024
MODELS_MAX = 32
CPU_MILLI_MAX = 1_000_000_000
INTERVAL_SECONDS_MAX = 3600.0
DRAIN_SECONDS_MAX = 2_592_000.0  # 30 days
NUMA_NODE_MAX = 1023  # the kernel's own
NVLINKS_PER_GPU_MAX = 1024
MIG_DEVICES_PER_GPU_MAX = 64
MIG_DEVICES_PER_REQUEST_MAX = 64  # as many as a node can be told to hold
MIG_SLICES_MAX = 64  # of one board: of its memory, and of its compute
MIG_PROFILES_MAX = 64  # of one board
LEAVING_MAX = 1024  # allocations on one GPU: shares of it
MIG_ENTRIES_MAX = 256  # of one configuration
MIG_REPORT_BYTES_MAX = 1 << 20
# Of one node: those that are there, and those that once were and are missed.
JUDGED_GPUS_MAX = 2 * GPUS_PER_NODE_MAX
# As many as agents tell: where every link of an NVLink card is down there is a fault for each, and
# a frame that is refused is sent again with every new stream.
FAULTS_PER_GPU_MAX = 64
ASSIGNMENTS_MAX = 4096

# With underscores, which the names of hosts have although DNS forbids them.
_DNS_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?", re.ASCII)


class Malformed(Exception):
    """A field that cannot be; `field` is its path in the message, `problem` a sentence about it."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.field = field
        self.problem = problem


def text(value: str, field: str, bytes_max: int = TEXT_BYTES_MAX, *, required: bool = False) -> str:
    """Return `value` when it is short enough, printable, and there when `required`."""
    if required and not value:
        raise Malformed(field, "must not be empty")
    if len(value) * 4 > bytes_max and len(value.encode()) > bytes_max:
        raise Malformed(field, f"at most {bytes_max} bytes, found {len(value.encode())}")
    if not value.isprintable():
        raise Malformed(field, f"must be printable text, found {shown(value)}")
    return value


def dns_name(value: str, field: str) -> str:
    """Return `value` when it is a host's name: letters, digits, dots, underscores and hyphens."""
    text(value, field, NAME_BYTES_MAX, required=True)
    if _DNS_NAME.fullmatch(value) is None:
        raise Malformed(field, f"must be letters, digits, '.', '_' and '-', found {shown(value)}")
    return value


def number(value: float, field: str, low: float, high: float) -> float:
    """Return `value` when it is a number from `low` to `high`."""
    if not low <= value <= high:  # also where it is not a number at all
        raise Malformed(field, f"must be from {low:,.10g} to {high:,.10g}, found {value:,.10g}")
    return value


def finite(value: float, field: str) -> float:
    """Return `value` when it is neither infinite nor "not a number"."""
    if not math.isfinite(value):
        raise Malformed(field, f"must be a finite number, found {value}")
    return value


def size(value: int, field: str) -> int:
    """Return `value` when it is a number of bytes above zero that fits a signed field."""
    if not 0 < value <= BYTES_MAX:
        raise Malformed(field, f"must be from 1 to {BYTES_MAX} bytes, found {value}")
    return value


def labels(value: Mapping[str, str], field: str) -> dict[str, str] | None:
    """Return a copy when they are few and short enough; None when there are none."""
    if not value:
        return None
    if len(value) > LABELS_MAX:
        raise Malformed(field, f"at most {LABELS_MAX} entries, found {len(value)}")
    for key, each in value.items():
        text(key, f"{field} key", LABEL_KEY_BYTES_MAX, required=True)
        text(each, f"{field}[{shown(key)}]", TEXT_BYTES_MAX)
    return dict(value)


def few(count: int, most: int, field: str) -> None:
    """Refuse more than `most` of something."""
    if count > most:
        raise Malformed(field, f"at most {most}, found {count}")


def unique(values: list[str], field: str) -> None:
    """Refuse a value that is there twice."""
    if len(set(values)) < len(values):
        twice = next(value for value in values if values.count(value) > 1)
        raise Malformed(field, f"{shown(twice)} is there twice")
