"""The client: typed calls to the aggregator, async and sync.

with stoker.client.connect() as fleet, fleet.allocate(gpus=1, memory="20GiB") as gpu:
    subprocess.run(["python", "train.py"])  # sees exactly that GPU
"""

from stoker.client.aio import AsyncFleet, connect_async
from stoker.client.errors import (
    AggregatorFailed,
    AllocationEnded,
    ClientError,
    InvalidRequest,
    KeyReused,
    NotFound,
    Refused,
    StoreUnavailable,
    Unreachable,
    VersionTooOld,
)
from stoker.client.lease import Lease
from stoker.client.model import (
    Allocation,
    Allocations,
    AllocationState,
    Change,
    Device,
    Explanation,
    Gpu,
    KeptAlive,
    MissingGpu,
    Node,
    Nodes,
    NodeState,
    Process,
    Refusal,
    Refusals,
    Request,
)
from stoker.client.requesting import Wish
from stoker.client.sync import Fleet, connect

__all__ = [
    "AggregatorFailed",
    "Allocation",
    "AllocationEnded",
    "AllocationState",
    "Allocations",
    "AsyncFleet",
    "Change",
    "ClientError",
    "Device",
    "Explanation",
    "Fleet",
    "Gpu",
    "InvalidRequest",
    "KeptAlive",
    "KeyReused",
    "Lease",
    "MissingGpu",
    "Node",
    "NodeState",
    "Nodes",
    "NotFound",
    "Process",
    "Refusal",
    "Refusals",
    "Refused",
    "Request",
    "StoreUnavailable",
    "Unreachable",
    "VersionTooOld",
    "Wish",
    "connect",
    "connect_async",
]
