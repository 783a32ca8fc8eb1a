"""What is stored can be read again, by this stoker and by every later one."""

import json

import pytest
from tests.conftest import Golden

from stoker.aggregator import codec
from stoker.aggregator import events as e
from stoker.aggregator.fleet import Snapshot
from stoker.aggregator.lemons import Failure
from stoker.aggregator.model import (
    Allocation,
    AllocationState,
    Device,
    Gpu,
    Node,
    NodeFacts,
    Placement,
    Request,
)
from stoker.aggregator.verdicts import (
    Condition,
    GpuCordon,
    GpuHealth,
    HealthFault,
    RepairAction,
    Verdict,
)

SHARE = Request(1, "ann", 60.0, memory_bytes=5 << 30, models=("H100",), labels={"job": "träin"})
GANG = Request(2, "bob", 90.5, pool="p", node="n", host_boot_id="b", labels={}, priority=-3)
DEVICES = (Device("GPU-1", "NVIDIA H100", 0, 80 << 30, exclusive=True),)
PLACES = (Placement("n1", DEVICES),)
FACTS = NodeFacts(
    name="n1",
    incarnation="i",
    boot_id="b",
    agent_version="1",
    simulated=True,
    labels={"rack": "r1"},
    gpus=(
        Gpu(
            "GPU-1",
            "NVIDIA H100",
            0,
            80 << 30,
            number=1,
            power_limit_watts=700.0,
            mig_enabled=False,
        ),
        Gpu("GPU-2", "Tesla T4", 1, 15 << 30, number=2, minor_number=1),
    ),
)
ILL = GpuHealth(
    *("GPU-1", Verdict.UNHEALTHY, RepairAction.REBOOT, "xid", "Xid 79: lost", 3.0),
    faults=(
        HealthFault(
            *("xid", "79", Verdict.UNHEALTHY, RepairAction.REBOOT, "Xid 79: lost", 3.0, 3.125, 2)
        ),
    ),
)
# Before there were gangs.
OLD_GRANT = (
    '{"at":5.25,"id":"a1","request":{"gpus":1,"holder":"ann","ttl_seconds":60.0,'
    '"memory_bytes":null,"model":"H100","pool":null,"node":null,"host_boot_id":null,'
    '"labels":{"\\"models\\":[":"x","models":"models"},"priority":0},"idempotency_key":"key",'
    '"requested_at":4.0,"node":"n1","devices":[{"uuid":"GPU-1","model":"NVIDIA H100",'
    '"index":0,"memory_bytes":85899345920,"exclusive":true}]}'
)
OLD_REQUEST = (
    '{"at":5.0,"id":"a1","request":{"gpus":1,"holder":"ann","ttl_seconds":60.0,'
    '"memory_bytes":null,"model":null,"pool":null,"node":null,"host_boot_id":null,'
    '"labels":null,"priority":0},"idempotency_key":"","wait_until":9.0}'
)
# As stokers wrote them before; their ledgers are read for ever.
OLD_EVENTS: tuple[tuple[str, str, e.DurableEvent], ...] = (
    (
        *("NodeCordoned", '{"at":2.0,"node":"n1","reason":"Xid 79"}'),
        e.NodeCordoned(2.0, "n1", "Xid 79"),
    ),
    (
        "AllocationGranted",
        OLD_GRANT,
        e.AllocationGranted(
            5.25,
            "a1",
            Request(
                1, "ann", 60.0, models=("H100",), labels={'"models":[': "x", "models": "models"}
            ),
            "key",
            4.0,
            PLACES,
        ),
    ),
    (
        "AllocationRequested",
        OLD_REQUEST,
        e.AllocationRequested(5.0, "a1", Request(1, "ann", 60.0), "", 9.0),
    ),
)
OLD_SNAPSHOT = (
    '{"version":7,"nodes":[{"facts":{"name":"n1","incarnation":"i","boot_id":"b",'
    '"agent_version":"1","simulated":true},"registered_at":1.0,"version":1,"cordoned":"fans"}],'
    '"allocations":[{"id":"a","state":"granted","request":{"gpus":1,"holder":"ann",'
    '"ttl_seconds":60.0,"memory_bytes":null,"model":"H100","pool":null,"node":null,'
    '"host_boot_id":null,"labels":null,"priority":0},"requested_at":1.0,"version":2,'
    '"idempotency_key":"","wait_until":null,"node":"n1","devices":[{"uuid":"GPU-1",'
    '"model":"NVIDIA H100","index":0,"memory_bytes":85899345920,"exclusive":true}],'
    '"granted_at":1.0,"ended_at":null,"reason":""},{"id":"b","state":"waiting",'
    '"request":{"gpus":1,"holder":"ann","ttl_seconds":60.0},"requested_at":1.0,"version":3,'
    '"node":"","devices":[]}]}'
)
# One of every kind, with what is optional given and not given.
EVENTS: tuple[e.DurableEvent, ...] = (
    e.NodeRegistered(1.5, FACTS),
    e.NodeCordoned(2.0, "n1", "Xid 79", drain_at=62.0),
    e.NodeUncordoned(3.0, "n1"),
    e.GpuHealthChanged(3.25, "n1", "GPU-1", "00000000:1B:00.0", ILL),
    e.GpuForgotten(3.5, "n1", "GPU-2"),
    e.GpuCordoned(3.5, "n1", "GPU-1", "Xid 79: lost", by_health=True, fault=("xid", 3.0)),
    e.GpuUncordoned(3.75, "n1", "GPU-1", by_health=False, acknowledged=("xid", 3.0)),
    e.AllocationRequested(4.0, "a1", SHARE, "key", 604.0),
    e.AllocationGranted(5.25, "a1", SHARE, "key", 4.0, PLACES),
    e.AllocationAdopted(6.0, "a2", GANG, PLACES),
    e.AllocationReleasing(7.0, "a1", "released"),
    e.AllocationEnded(8.0, "a1", "released"),
    e.AllocationsForgotten(9.0, ("a1", "a2")),
)


def test_there_is_an_example_of_every_kind() -> None:
    assert [type(event).__name__ for event in EVENTS] == list(e.KINDS)


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: type(event).__name__)
def test_event_is_read_as_it_was_written(event: e.DurableEvent) -> None:
    kind, payload = codec.encode_event(event)
    assert kind == type(event).__name__
    assert codec.decode_event(kind, payload) == event


def test_stored_form_stays_as_it_is(golden: Golden) -> None:
    """A change here needs a migration, or a reader of both forms: ledgers outlive versions."""
    lines = ["\t".join(codec.encode_event(event)) for event in EVENTS]
    golden("ledger_events.txt", "\n".join(lines) + "\n")


@pytest.mark.parametrize(("kind", "payload", "event"), OLD_EVENTS)
def test_event_of_an_older_stoker_is_read(kind: str, payload: str, event: e.DurableEvent) -> None:
    assert codec.decode_event(kind, payload) == event


def test_snapshot_of_an_older_stoker_is_read() -> None:
    snapshot = codec.decode_snapshot(7, [OLD_SNAPSHOT])
    (node,) = snapshot.nodes
    assert (node.cordoned, node.drain_at) == ("fans", None)
    assert (snapshot.conditions, snapshot.failures) == ((), ())
    granted, waiting = snapshot.allocations
    assert (granted.placements, granted.request.models) == (PLACES, ("H100",))
    assert (waiting.placements, waiting.node, waiting.devices) == ((), "", ())


def test_field_that_a_later_version_adds_is_left_out() -> None:
    kind, payload = codec.encode_event(EVENTS[1])
    later = json.dumps({**json.loads(payload), "by": "carol"})
    assert codec.decode_event(kind, later) == EVENTS[1]


@pytest.mark.parametrize(
    ("kind", "payload", "word"),
    [
        ("GpuMelted", "{}", "'GpuMelted' is no kind of event"),
        ("NodeCordoned", '{"at": 1.0}', "missing required field `node`"),
        ("NodeCordoned", '{"at": "soon", "node": "n", "reason": ""}', "Expected `float`"),
        ("NodeCordoned", '{"at": 1.0', "truncated"),
    ],
)
def test_text_that_is_no_event_is_explained(kind: str, payload: str, word: str) -> None:
    with pytest.raises(codec.Undecodable, match=word):
        codec.decode_event(kind, payload)


@pytest.mark.parametrize(
    ("nodes", "allocations", "conditions", "failures"),
    [(0, 0, 0, 0), (1, 0, 0, 1), (0, 1, 1, 0), (1001, 500, 501, 499), (3, 1501, 1, 1)],
)
def test_snapshot_is_read_as_it_was_written(
    nodes: int, allocations: int, conditions: int, failures: int
) -> None:
    allocation = Allocation("a", AllocationState.GRANTED, SHARE, 1.0, 2, placements=PLACES)
    cordon = GpuCordon(2.0, "Xid 79", by_health=True, drain_at=None, fault=("xid", 3.0))
    condition = Condition("GPU-1", "n1", "s", ILL, 2.0, cordon, ("xid", None), ("xid", 3.0))
    snapshot = Snapshot(
        7,
        (Node(FACTS, registered_at=1.0, version=1, cordoned="fans", drain_at=9.0),) * nodes,
        (allocation,) * allocations,
        (condition,) * conditions,
        (Failure(2.0, "GPU-1", "n1", "s", "xid 79"),) * failures,
    )
    parts = list(codec.encode_snapshot(snapshot))
    assert len(parts) == codec.count_parts(snapshot)
    assert codec.decode_snapshot(7, parts) == snapshot


def test_damaged_snapshot_is_explained() -> None:
    with pytest.raises(codec.Undecodable, match="snapshot"):
        codec.decode_snapshot(7, ['{"version": 7}'])
