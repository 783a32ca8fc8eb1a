"""Whose a process is."""

import pytest

from stoker.agent.holding import HELD_MAX, attribute, find_obstacle
from stoker.agent.model import HeldAllocation, NumberedGpu, NumberedInventory, ProcessSeen
from stoker.agent.readings import GpuIdentity

WHOLE = HeldAllocation("whole", ("GPU-0", "GPU-1"), None, "ann", 60.0, held_since=1000.0)
SHARE = HeldAllocation("share", ("GPU-2",), 2**30, "bob", 60.0, held_since=1000.0)
HELD = (WHOLE, SHARE)


def seen(gpu: str, claims: str | None = None, started: float | None = None) -> ProcessSeen:
    return ProcessSeen(gpu, 42, claimed_allocation_id=claims, started_at=started)


@pytest.mark.parametrize(
    ("process", "expected"),
    [
        (seen("GPU-0", claims="whole"), "whole"),
        (seen("GPU-2", claims="share"), "share"),
        (seen("GPU-2", claims="whole", started=2000.0), ""),
        (seen("GPU-0", claims="gone", started=2000.0), ""),
        (seen("GPU-9", claims="whole"), ""),
        (seen("GPU-1", started=1000.5), "whole"),
        (seen("GPU-1", started=999.5), "whole"),
        (seen("GPU-1", started=998.0), ""),
        (seen("GPU-1"), ""),
        (seen("GPU-2", started=1000.5), ""),
        (seen("GPU-9", started=1000.5), ""),
    ],
    ids=[
        "its environment names the tenant of the whole GPU",
        "its environment names the owner of a share",
        "it names an allocation that holds another GPU",
        "it names an earlier tenant, and started during this one's time",
        "it is on a GPU that the named allocation does not hold",
        "it started under the only tenant",
        "it started within the error of the kernel's clock",
        "it was there before the tenant",
        "nobody knows when it started",
        "it is on a shared GPU and names nobody",
        "nobody holds the GPU",
    ],
)
def test_attribution(process: ProcessSeen, expected: str) -> None:
    assert attribute(process, HELD) == expected


def test_a_node_holds_no_more_than_its_limit() -> None:
    inventory = NumberedInventory("", "", (NumberedGpu(1, GpuIdentity(0, "GPU-0", "T4", 2**40)),))
    held = [HeldAllocation(f"a{i}", ("GPU-0",), 1, "ann", 60.0, 0.0) for i in range(HELD_MAX)]
    wanted = HeldAllocation("more", ("GPU-0",), 1, "ann", 60.0, 0.0)
    assert find_obstacle(wanted, held[:-1], inventory) is None
    assert find_obstacle(wanted, held, inventory) == (
        f"the node holds {HELD_MAX} allocations, at most {HELD_MAX} are allowed"
    )
