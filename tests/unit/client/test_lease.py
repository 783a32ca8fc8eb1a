"""Requirements on leases: how often they are kept alive, what ends them, what is said then."""

import pytest

from stoker.client import (
    Allocation,
    AllocationEnded,
    AllocationState,
    KeptAlive,
    Lease,
    Request,
    Unreachable,
)
from stoker.client.keepalive import pause_seconds, still_granted
from stoker.client.lease import granted, on_this_host, settle
from stoker.core.errors import ExitCode


def allocation(state: AllocationState = AllocationState.GRANTED, reason: str = "") -> Allocation:
    return Allocation(
        id="a1",
        state=state,
        node="n1",
        devices=(),
        env={},
        expires_at=None,
        request=Request(1, "me", 60.0),
        requested_at=1.0,
        granted_at=2.0,
        ended_at=None,
        ended_reason=reason,
        queue_position=None,
        resource_version=3,
        held_by_node=True,
    )


# TTL, whether the last one arrived -> the time to the next
PAUSES = {
    "a third of the TTL": (30.0, True, 10.0),
    "a loss is learnt of in time, however long the TTL": (86_400.0, True, 20.0),
    "soon after one that was lost": (30.0, False, 1.0),
    "never later than on time": (0.3, False, 0.1),
}


@pytest.mark.parametrize("name", PAUSES)
def test_time_between_keep_alives(name: str) -> None:
    ttl_seconds, arrived, expected = PAUSES[name]
    assert pause_seconds(ttl_seconds, arrived=arrived) == pytest.approx(expected)


def test_answer_of_a_keep_alive() -> None:
    kept = KeptAlive("a1", AllocationState.GRANTED, 60.0, "")
    assert still_granted(kept) is kept
    with pytest.raises(AllocationEnded, match="a1 is ended: expired") as caught:
        still_granted(KeptAlive("a1", AllocationState.ENDED, None, "expired: no keep-alive"))
    assert caught.value.exit_code is ExitCode.REFUSED
    assert caught.value.reason == "expired: no keep-alive"


def test_late_retry_finds_its_allocation_over() -> None:
    assert granted(allocation()) == allocation()
    with pytest.raises(AllocationEnded, match="releasing: expired"):
        granted(allocation(AllocationState.RELEASING, "expired"))


def ended(reason: str = "expired") -> AllocationEnded:
    return AllocationEnded("a1", AllocationState.ENDED, reason)


def test_end_is_told_once() -> None:
    told: list[AllocationEnded] = []
    lease = Lease(allocation(), told.append)
    assert lease.ended is None
    first = ended("expired")
    lease.end(first)
    lease.end(ended("again"))
    assert told == [first]
    assert lease.ended is first
    assert "expired" in repr(lease)


def test_failing_callback_leaves_the_end_known(caplog: pytest.LogCaptureFixture) -> None:
    def fail(_: AllocationEnded) -> None:
        raise ValueError("the caller's own bug")

    lease = Lease(allocation(), fail)
    lease.end(ended())
    assert lease.ended is not None
    assert "the caller's own bug" in caplog.text


def test_release_that_came_too_late_is_an_end() -> None:
    lease = Lease(allocation())
    lease.released(allocation(AllocationState.ENDED, "released"))
    assert lease.ended is None
    lease.released(allocation(AllocationState.ENDED, "expired: no keep-alive for 60s"))
    assert lease.ended is not None


def test_end_of_a_context() -> None:
    settle(Lease(allocation()), None, None)
    lost = Lease(allocation())
    lost.end(ended())
    with pytest.raises(AllocationEnded):
        settle(lost, None, Unreachable("nobody there"))
    with pytest.raises(Unreachable):
        settle(Lease(allocation()), None, Unreachable("nobody there"))


def test_error_of_the_body_comes_first() -> None:
    lost = Lease(allocation())
    lost.end(ended())
    error = ValueError("of the body")
    settle(lost, error, Unreachable("nobody there"))
    assert error.__notes__ == ["stoker: allocation a1 is ended: expired", "stoker: nobody there"]


def test_request_is_restricted_to_this_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stoker.client.lease.host_boot_id", lambda: "this-boot")
    assert on_this_host(Request(1, "me", 60.0)).host_boot_id == "this-boot"
    assert on_this_host(Request(1, "me", 60.0, host_boot_id="other")).host_boot_id == "other"
