"""Requirements on what is printed for programs, and about errors."""

import json
from dataclasses import fields

from stoker.cli import documents
from stoker.cli.text import REFUSALS_SHOWN_MAX, as_json, error_lines, one_line
from stoker.client import (
    Allocation,
    AllocationState,
    Device,
    Gpu,
    Node,
    Nodes,
    NodeState,
    Refusal,
    Refusals,
    Refused,
    Request,
    Unreachable,
)
from stoker.core.errors import BadInput, ExitCode

GRANTED = Allocation(
    id="a-1",
    state=AllocationState.GRANTED,
    node="n1",
    devices=(Device("GPU-1", "T4", 0, 5, exclusive=True),),
    env={"CUDA_VISIBLE_DEVICES": "GPU-1"},
    expires_at=60.0,
    request=Request(1, "ada", 60.0),
    requested_at=1.0,
    granted_at=2.0,
    ended_at=None,
    ended_reason="",
    queue_position=None,
    resource_version=3,
    held_by_node=False,
)
UNREAD = Gpu(
    uuid="GPU-1",
    model="T4",
    index=0,
    pci_bus_id="",
    memory_total_bytes=5,
    memory_used_bytes=None,
    utilization_ratio=None,
    memory_utilization_ratio=None,
    temperature_celsius=None,
    power_watts=None,
    energy_joules=None,
    sm_clock_hertz=None,
    memory_clock_hertz=None,
    last_sample_at=None,
    allocation_ids=(),
    processes=(),
)
NODE = Node(
    name="n1",
    state=NodeState.STALE,
    state_reason="late",
    simulated=True,
    cordoned=None,
    pool="",
    labels={},
    boot_id="",
    agent_version="",
    driver_version="",
    cuda_version="",
    interval_seconds=1.0,
    last_sample_at=None,
    gpus=(UNREAD,),
)


def refused(count: int, total: int) -> Refused:
    nodes = tuple(Refusal(f"n{n}", "f", f"reason {n}", "w", "f") for n in range(count))
    return Refused(Refusals("no node fits", nodes, total, 0))


def test_allocation_document_is_what_scripts_read() -> None:
    found = json.loads(as_json(documents.allocation(GRANTED)))
    assert {"id", "node", "devices", "env", "expires_at", "state", "holder"} <= found.keys()
    assert found["devices"][0]["uuid"] == "GPU-1"
    assert (found["holder"], found["state"], found["expires_at"]) == ("ada", "granted", 60.0)


def test_status_document_has_every_field_and_absent_is_null() -> None:
    found = json.loads(as_json(documents.status(Nodes((NODE,), 3, "0.1.0"), (GRANTED,))))
    (node,) = found["nodes"]
    assert node.keys() == {field.name for field in fields(Node)}
    assert (node["state"], node["simulated"], node["cordoned"]) == ("stale", True, None)
    (gpu,) = node["gpus"]
    assert gpu.keys() == {field.name for field in fields(Gpu)}
    assert (gpu["memory_total_bytes"], gpu["memory_used_bytes"]) == (5, None)
    assert found["allocations"] == [json.loads(as_json(documents.allocation(GRANTED)))]


def test_error_document_names_kind_and_code() -> None:
    found = documents.error(BadInput("memory: '20G' is not a size"), ExitCode.USAGE)
    assert found == {
        "error": {"kind": "BadInput", "exit_code": 2, "message": "memory: '20G' is not a size"}
    }


def test_refusal_document_lists_the_nodes() -> None:
    error = documents.error(refused(2, 7), ExitCode.REFUSED)["error"]
    assert [each["node"] for each in error["refusals"]] == ["n0", "n1"]
    assert (error["nodes_total"], error["ahead"], error["exit_code"]) == (7, 0, 3)


def test_error_is_one_line() -> None:
    assert error_lines("a\nb\x1b[2J\udcff") == ["stoker: a b\\x1b[2J\\udcff"]


def test_refusal_of_one_node_is_in_the_summary() -> None:
    assert error_lines(refused(1, 1)) == ["stoker: no node fits"]


def test_refusal_tells_each_node_up_to_a_bound() -> None:
    lines = error_lines(refused(REFUSALS_SHOWN_MAX + 5, 1000))
    assert lines[:2] == ["stoker: no node fits", "  n0: reason 0"]
    assert len(lines) == 1 + REFUSALS_SHOWN_MAX + 1
    assert "980 more nodes" in lines[-1]


def test_unreachable_aggregator_says_what_to_do() -> None:
    (line,) = error_lines(Unreachable("aggregator at x:1 cannot be reached: refused"))
    assert "stoker up" in line


def test_printable_text_stays() -> None:
    assert one_line("GPU 3: 34 °C, späť") == "GPU 3: 34 °C, späť"
