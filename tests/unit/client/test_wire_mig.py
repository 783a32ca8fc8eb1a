"""Requirements on what of a wish about partitions gets onto the wire, and what comes back."""

import msgspec
import pytest

from stoker.client import (
    AggregatorFailed,
    GpuMig,
    InvalidRequest,
    MigAsk,
    MigEntry,
    MigInstance,
    MigReport,
    errors,
    wire,
)
from stoker.client.retrying import Method, is_retried
from stoker.client.wire_answers import kept_alive
from stoker.client.wire_mig import RELAY_SECONDS, mig
from stoker.client.wire_partitions import mig_of
from stoker.core.errors import ExitCode
from stoker.core.mig.geometry import MigState
from stoker.core.mig.reports import GpuMigFacts
from stoker.v1 import fleet_pb2, mig_pb2

ENTRIES = (
    MigEntry(True, ("0x233010DE",), (0, 2), {"1g.10gb": 3, "1c.3g.40gb": 1}),
    MigEntry(False),
)
ASK = MigAsk("apply", "op-1", "mixed", ENTRIES, ("0", "GPU-1"), 60.0, evict=True)


def test_wish() -> None:
    call = mig("host-a", ASK)
    assert (call.method, call.about, call.wait_seconds) == (Method.MIG, "host-a", RELAY_SECONDS)
    assert call.message == mig_pb2.MigRequest(
        node="host-a",
        ask=mig_pb2.MigAsk(
            verb=mig_pb2.MIG_VERB_APPLY,
            operation_id="op-1",
            config="mixed",
            entries=[
                mig_pb2.MigEntry(
                    device_filter=["0x233010DE"],
                    devices=[0, 2],
                    mig_enabled=True,
                    mig_devices={"1g.10gb": 3, "1c.3g.40gb": 1},
                ),
                mig_pb2.MigEntry(),
            ],
            gpus=["0", "GPU-1"],
            drain_seconds=60.0,
            evict=True,
        ),
    )


@pytest.mark.parametrize("verb", ["apply", "undo"])
def test_a_change_that_is_sent_again_is_the_same_wish(verb: str) -> None:
    call, other = (mig("n", MigAsk(verb)) for _ in range(2))  # type: ignore[arg-type]
    assert call.message.ask.operation_id
    assert call.message.ask.operation_id != other.message.ask.operation_id
    assert is_retried(call.method, "UNAVAILABLE", "", has_key=False)


@pytest.mark.parametrize("verb", ["plan", "status"])
def test_a_question_is_no_operation(verb: str) -> None:
    call = mig("n", MigAsk(verb))  # type: ignore[arg-type]
    assert call.message.ask.operation_id == ""


def test_an_entry_about_no_gpu_does_not_become_one_about_all() -> None:
    nobody = MigEntry(True, devices=(), mig_devices={"1g.10gb": 7})
    call = mig("n", MigAsk("apply", entries=(nobody, MigEntry(False, devices=(1,)))))
    (sent,) = call.message.ask.entries
    assert list(sent.devices) == [1]
    with pytest.raises(InvalidRequest, match="'tiny' are about no GPU"):
        mig("n", MigAsk("apply", config="tiny", entries=(nobody,)))


@pytest.mark.parametrize("count", [-1, 2**32])
def test_a_count_that_no_field_carries(count: int) -> None:
    with pytest.raises(InvalidRequest):
        mig("n", MigAsk("plan", entries=(MigEntry(True, mig_devices={"1g.10gb": count}),)))


REPORT = MigReport(
    *("host-a", "status", "", "", ()),
    (GpuMigFacts("GPU-0", 0, "NVIDIA H100", "0x233010DE", True, None, (), state="success"),),
)


def test_report_comes_back_as_it_was() -> None:
    text = msgspec.json.encode(REPORT).decode()
    assert mig("n", MigAsk("status")).read(mig_pb2.MigResponse(report_json=text)) == REPORT


@pytest.mark.parametrize("text", ["", "{}", "[[[", "null"])
def test_report_that_is_none(text: str) -> None:
    with pytest.raises(AggregatorFailed, match="cannot be understood"):
        mig("n", MigAsk("status")).read(mig_pb2.MigResponse(report_json=text))


# status, the aggregator's word for it -> the error, its exit code
FAILURES: dict[str, tuple[str, str, type[errors.ClientError], ExitCode]] = {
    "the agent refuses": ("FAILED_PRECONDITION", "X", errors.MigRefused, ExitCode.REFUSED),
    "the agent is asked too much": (
        "RESOURCE_EXHAUSTED",
        "TOO_MANY",
        errors.MigRefused,
        ExitCode.REFUSED,
    ),
    "no such node": ("NOT_FOUND", "NOT_FOUND", errors.NotFound, ExitCode.NOT_FOUND),
    "the node is away": ("UNAVAILABLE", "X", errors.Unreachable, ExitCode.UNREACHABLE),
    "its agent is slow": ("DEADLINE_EXCEEDED", "X", errors.Unreachable, ExitCode.UNREACHABLE),
    "no aggregator": ("UNAVAILABLE", "", errors.Unreachable, ExitCode.UNREACHABLE),
    "no answer": ("DEADLINE_EXCEEDED", "", errors.Unreachable, ExitCode.UNREACHABLE),
    "no sense": ("INVALID_ARGUMENT", "INVALID_REQUEST", InvalidRequest, ExitCode.USAGE),
}


@pytest.mark.parametrize("name", FAILURES)
def test_failures(name: str) -> None:
    status, reason, kind, code = FAILURES[name]
    failed = wire.Failure(status, "it is so", reason)
    found = wire.error_of(failed, mig("host-a", MigAsk("status")), "127.0.0.1:7070")
    assert type(found) is kind
    assert found.exit_code is code


def test_request_to_leave() -> None:
    message = fleet_pb2.KeepAliveResponse(allocation_id="a1")
    assert kept_alive(message).leave is None
    message.leave.CopyFrom(mig_pb2.LeaveRequest(reason="why", leave_by=5.0, is_evicting=True))
    leave = kept_alive(message).leave
    assert leave is not None
    assert (leave.reason, leave.leave_by, leave.is_evicting) == ("why", 5.0, True)


def test_partitions_of_a_node() -> None:
    message = fleet_pb2.NodeGpu()
    assert mig_of(message) is None
    message.mig.CopyFrom(
        mig_pb2.GpuMig(
            state=mig_pb2.MIG_STATE_ROLLING_BACK,
            reason="no room",
            config="mixed",
            operation_id="op-1",
            is_withheld=True,
            changed_at=5.0,
            layout=mig_pb2.MigLayout(
                instances=[mig_pb2.MigInstance(profile="3g.40gb", start=4, size=4, compute=[1, 2])]
            ),
        )
    )
    assert mig_of(message) == GpuMig(
        state="rolling-back",
        reason="no room",
        config="mixed",
        operation_id="op-1",
        is_withheld=True,
        leave_by=None,
        is_evicting=False,
        changed_at=5.0,
        instances=(MigInstance("3g.40gb", 4, 4, (1, 2)),),
    )


def test_what_a_node_cannot_tell_of_its_partitions_is_absent() -> None:
    message = fleet_pb2.NodeGpu()
    message.mig.SetInParent()
    found = mig_of(message)
    assert found is not None
    assert (found.state, found.instances, found.changed_at) == ("", None, None)


def test_every_state_has_its_word() -> None:
    words: set[str] = set()
    for number in mig_pb2.MigState.values():
        message = fleet_pb2.NodeGpu()
        message.mig.state = number
        found = mig_of(message)
        assert found is not None
        words.add(found.state)
    assert words == {"", *map(str, MigState)}
