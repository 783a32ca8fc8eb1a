"""Requirements on messages: nothing is lost or invented on the way, and errors say what to do."""

from typing import Any

import grpc
import pytest
from google.protobuf.message import Message
from google.rpc import (  # type: ignore[import-untyped]
    error_details_pb2,
    status_pb2,
)
from hypothesis import given
from hypothesis import strategies as st

from stoker.client import (
    AggregatorFailed,
    AllocationEnded,
    AllocationState,
    ClientError,
    GpuTopology,
    InvalidRequest,
    KeyReused,
    MissingGpu,
    NodeState,
    NotFound,
    Refused,
    Request,
    StoreUnavailable,
    Unreachable,
    VersionTooOld,
    wire,
)
from stoker.core.errors import ExitCode
from stoker.v1 import fleet_pb2, types_pb2

words = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
requests = st.builds(
    Request,
    gpus=st.integers(0, 2**32 - 1),
    holder=words,
    ttl_seconds=st.floats(allow_nan=False),
    memory_bytes=st.none() | st.integers(0, 2**64 - 1),
    compute_milli=st.none() | st.integers(0, 2**32 - 1),
    mig_profile=words,
    nodes=st.integers(1, 2**32 - 1),
    cpu_milli=st.integers(0, 2**64 - 1),
    host_memory_bytes=st.integers(0, 2**64 - 1),
    models=st.lists(words, max_size=3).map(tuple),
    gpu_memory_min_bytes=st.integers(0, 2**64 - 1),
    compute_capability_min=words,
    driver_version_min=words,
    node_labels=st.none() | st.dictionaries(words, words, min_size=1, max_size=3),
    gpu_topology=st.sampled_from([GpuTopology.ANY, GpuTopology.NUMA, GpuTopology.NVLINK]),
    gpu_topology_required=st.booleans(),
    same_label=words,
    same_label_required=st.booleans(),
    service=words,
    anti_affinity=words,
    spread=words,
    near_service=words,
    preferred_gpu_uuid=words,
    duration_seconds=st.none() | st.floats(allow_nan=False),
    movable=st.booleans(),
    pool=words,
    node=words,
    host_boot_id=words,
    labels=st.none() | st.dictionaries(words, words, min_size=1, max_size=3),
    priority=st.integers(-(2**31), 2**31 - 1),
)


@given(requests)
def test_request_comes_back_as_it_was_sent(request: Request) -> None:
    sent = wire.allocate(request, "key", 5.0).message
    allocation = types_pb2.Allocation(id="a", request=sent.request)
    answer = fleet_pb2.ReleaseResponse(allocation=allocation)
    received = fleet_pb2.ReleaseResponse.FromString(answer.SerializeToString())
    assert wire.release("a", "", 0.0).read(received).request == request


def test_what_was_not_read_is_absent_and_not_zero() -> None:
    node = fleet_pb2.Node(name="n", gpus=[fleet_pb2.NodeGpu(uuid="GPU-1", memory_total_bytes=5)])
    answer = fleet_pb2.ListNodesResponse(nodes=[node], resource_version=3, aggregator_version="1")
    (found,) = wire.list_nodes().read(answer).nodes
    (gpu,) = found.gpus
    readings = (
        *(gpu.memory_used_bytes, gpu.utilization_ratio, gpu.temperature_celsius, gpu.power_watts),
        *(gpu.energy_joules, gpu.sm_clock_hertz, gpu.last_sample_at),
    )
    assert set(readings) == {None}
    assert (found.cordoned, found.last_sample_at) == (None, None)


def test_zero_that_was_read_is_zero() -> None:
    gpu = fleet_pb2.NodeGpu(uuid="GPU-1", memory_used_bytes=0, utilization_ratio=0.0)
    node = fleet_pb2.Node(name="n", gpus=[gpu], cordoned="")
    (found,) = wire.list_nodes().read(fleet_pb2.ListNodesResponse(nodes=[node])).nodes
    assert (found.gpus[0].memory_used_bytes, found.gpus[0].utilization_ratio) == (0, 0.0)
    assert found.cordoned == ""


def test_state_of_a_newer_aggregator_is_unknown() -> None:
    newer = types_pb2.Allocation(id="a")
    newer.MergeFromString(b"\x10\x63")  # state = 99
    answer = fleet_pb2.AllocateResponse(allocation=newer)
    assert wire.allocate(Request(1, "me", 1.0), "k", 0.0).read([answer]).state is (
        AllocationState.UNKNOWN
    )
    node = fleet_pb2.CordonResponse(node=fleet_pb2.Node(name="n"))
    assert wire.cordon("n", "r").read(node).state is NodeState.UNKNOWN


def test_gpus_that_are_out_of_use_are_told_with_the_reason() -> None:
    out = types_pb2.MissingGpu(index=3, error_kind="gpu_lost", reason="it fell off the bus")
    node = fleet_pb2.Node(name="n", missing_gpus=[out])
    (read,) = wire.list_nodes().read(fleet_pb2.ListNodesResponse(nodes=[node])).nodes
    assert read.missing_gpus == (MissingGpu(3, "", "gpu_lost", "it fell off the bus"),)


def test_change_of_a_kind_that_is_not_known() -> None:
    answer = fleet_pb2.WatchResponse(resource_version=5, at=1.5, event="QuotaChanged")
    change = wire.watch(0).read(answer)
    assert (change.resource_version, change.event, change.object) == (5, "QuotaChanged", None)


def test_id_of_what_waits_comes_in_the_metadata() -> None:
    metadata = (("other", "x"), ("stoker-allocation-id", "a1"))
    assert wire.allocation_id(metadata) == "a1"
    assert wire.allocation_id((("other", "x"),)) is None
    assert wire.allocation_id(None) is None


@pytest.mark.parametrize(
    ("request_", "text"),
    [
        (Request(1, "me\udcff", 60.0), "holder: wanted UTF-8"),
        (Request(1, "me", 60.0, node="\udc80"), "node: wanted UTF-8"),
        (Request(1, "me", 60.0, labels={"a": "\udc80"}), "labels: wanted UTF-8"),
        (Request(2**32, "me", 60.0), "4294967296"),
        (Request(1, "me", 60.0, memory_bytes=-1), "-1"),
        (Request(1, "me", 60.0, priority=2**31), "2147483648"),
    ],
)
def test_what_cannot_be_sent_is_named(request_: Request, text: str) -> None:
    with pytest.raises(InvalidRequest, match=text):
        wire.allocate(request_, "key", 0.0)


def test_ids_that_are_no_text_are_named() -> None:
    for call in (
        lambda: wire.release("\udcff", "", 0.0),
        lambda: wire.explain("\udcff"),
        lambda: wire.keep_alive("\udcff"),
    ):
        with pytest.raises(InvalidRequest, match="allocation_id: wanted UTF-8"):
            call()
    with pytest.raises(InvalidRequest, match="node: wanted UTF-8"):
        wire.cordon("\udcff", "reason")


# --- errors


class Failed(grpc.RpcError):
    """An error as gRPC raises it."""

    def __init__(self, status: str, text: str, *trailers: tuple[str, bytes]) -> None:
        super().__init__()
        self._found = (grpc.StatusCode[status], text, trailers)

    def code(self) -> grpc.StatusCode:
        return self._found[0]

    def details(self) -> str:
        return self._found[1]

    def trailing_metadata(self) -> Any:
        return self._found[2]


def details(reason: str, *more: Message, domain: str = "stoker") -> tuple[str, bytes]:
    status = status_pb2.Status(code=1, message="m")
    for each in (error_details_pb2.ErrorInfo(domain=domain, reason=reason), *more):
        status.details.add().Pack(each)
    return "grpc-status-details-bin", status.SerializeToString()


CALL = wire.release("a1", "", 0.0)


def error_of(failed: Failed) -> ClientError:
    return wire.error_of(wire.failure(failed), CALL, "head:7070")


ERRORS = {
    "not found": ("NOT_FOUND", "NOT_FOUND", NotFound, ExitCode.NOT_FOUND),
    "key reused": ("ALREADY_EXISTS", "KEY_REUSED", KeyReused, ExitCode.USAGE),
    "left the queue": ("ABORTED", "NOT_GRANTED", AllocationEnded, ExitCode.REFUSED),
    "too old": ("OUT_OF_RANGE", "VERSION_TOO_OLD", VersionTooOld, ExitCode.FAILED),
    "store": ("UNAVAILABLE", "STORE_UNAVAILABLE", StoreUnavailable, ExitCode.STORE),
    "stopping": ("UNAVAILABLE", "STOPPING", Unreachable, ExitCode.UNREACHABLE),
    "refused": ("RESOURCE_EXHAUSTED", "CANNOT_PLACE", Refused, ExitCode.REFUSED),
    "a reason of the future": ("INTERNAL", "NEWER", AggregatorFailed, ExitCode.FAILED),
}


@pytest.mark.parametrize("name", ERRORS)
def test_reason_decides_the_error(name: str) -> None:
    status, reason, kind, exit_code = ERRORS[name]
    error = error_of(Failed(status, "what happened", details(reason)))
    assert type(error) is kind
    assert error.exit_code is exit_code
    assert "what happened" in str(error)


BARE = {
    "nobody there": ("UNAVAILABLE", "x", Unreachable, "aggregator at head:7070 cannot be reached"),
    "cut off": ("CANCELLED", "x", Unreachable, "cannot be reached"),
    "late": ("DEADLINE_EXCEEDED", "x", Unreachable, "head:7070 did not answer in time"),
    "another program": ("UNIMPLEMENTED", "x", AggregatorFailed, "has no Release"),
    "malformed": ("INVALID_ARGUMENT", "field f", InvalidRequest, "field f"),
    "too large": (
        *("RESOURCE_EXHAUSTED", "Received message larger than max (9 vs. 4)"),
        *(InvalidRequest, "too large"),
    ),
    "a bug": ("INTERNAL", "boom", AggregatorFailed, "Release failed with INTERNAL: boom"),
}


@pytest.mark.parametrize("name", BARE)
def test_status_decides_where_no_reason_is_given(name: str) -> None:
    status, text, kind, expected = BARE[name]
    error = error_of(Failed(status, text))
    assert type(error) is kind
    assert expected in str(error)


def test_reason_of_another_system_is_not_ours() -> None:
    proxy = Failed("UNAVAILABLE", "x", details("NOT_FOUND", domain="proxy.example"))
    assert type(error_of(proxy)) is Unreachable


def test_refusals_come_whole() -> None:
    refusal = types_pb2.Refusal(node="n1", filter="cordoned", reason="r", wanted="w", found="f")
    refusals = types_pb2.Refusals(summary="s", nodes=[refusal], nodes_total=9, ahead=2)
    error = error_of(Failed("RESOURCE_EXHAUSTED", "s", details("CANNOT_PLACE", refusals)))
    assert isinstance(error, Refused)
    (found,) = error.refusals.nodes
    assert (found.node, found.filter, found.reason) == ("n1", "cordoned", "r")
    assert (found.wanted, found.found) == ("w", "f")
    assert (error.refusals.nodes_total, error.refusals.ahead) == (9, 2)


def test_fields_are_named() -> None:
    wrong = error_details_pb2.BadRequest.FieldViolation(
        field="request.gpus", description="too many"
    )
    bad = error_details_pb2.BadRequest(field_violations=[wrong])
    error = error_of(Failed("INVALID_ARGUMENT", "refused", details("INVALID_REQUEST", bad)))
    assert str(error) == "refused; request.gpus: too many"


def test_details_that_cannot_be_read_leave_the_status() -> None:
    garbage = ("grpc-status-details-bin", b"\xff\xff\xff")
    assert type(error_of(Failed("UNAVAILABLE", "x", garbage))) is Unreachable


def test_cause_is_the_end_of_grpcs_chain() -> None:
    text = (
        "failed to connect to all addresses; last error: UNKNOWN: ipv4:127.0.0.1:1: "
        "Failed to connect to remote host: connect: Connection refused (111)"
    )
    shown = str(error_of(Failed("UNAVAILABLE", text)))
    assert shown.endswith("cannot be reached: Connection refused (111)")
