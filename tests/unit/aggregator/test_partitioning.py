"""What is proposed to be cut up for what waits: nobody is disturbed, nothing goes to and fro."""

from dataclasses import dataclass, replace
from itertools import pairwise
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stoker.aggregator.partitioning import (
    CutGpu,
    Demand,
    InstanceUse,
    PartitioningOptions,
    Proposal,
    ProposalKind,
    profile_for,
    propose,
)
from stoker.core.mig.boards import A30_24GB, H100_80GB
from stoker.core.mig.geometry import Geometry, Layout, Placed
from stoker.core.mig.layouts import layouts, objection

GIB = 2**30
NOW = 10_000.0
H100 = H100_80GB.geometry
SIZES = {each.name: each.memory_slices for each in H100.profiles}
OPTIONS = PartitioningOptions(is_automatic=True, dwell_seconds=600.0, hysteresis_seconds=30.0)


def at(text: str) -> Layout:
    """Return the instances of "1g.10gb@0 2g.20gb@2"."""
    parts = [each.split("@") for each in text.split()]
    return tuple(sorted(Placed(int(start), SIZES[name], name) for name, start in parts))


def gpu(
    index: int = 0,
    busy: str = "",
    idle: str = "",
    *,
    cut: bool = True,
    node: str = "a",
    pool: str = "",
    foreign: str = "",
    changed: float | None = None,
    free: bool = True,
    at_once: bool = True,
) -> CutGpu:
    uses = [InstanceUse(each, (f"{index}@{each.start}",)) for each in at(busy)]
    uses += [InstanceUse(each, (), is_foreign=True) for each in at(foreign)]
    uses += [InstanceUse(each) for each in at(idle)]
    return CutGpu(
        node=node,
        uuid=f"{node}-{index}",
        index=index,
        pool=pool,
        geometry=H100,
        is_enabled=cut,
        toggles_at_once=at_once,
        instances=tuple(sorted(uses, key=lambda each: each.placed)),
        is_free=free,
        changed_at=None if changed is None else NOW - changed,
    )


def whole(index: int, **more: object) -> CutGpu:
    return gpu(index, cut=False, **more)  # type: ignore[arg-type]


def wants(
    profile: str = "1g.10gb",
    *,
    name: str = "w",
    waited: float = 60.0,
    gpus: int = 0,
    count: int = 1,
    nodes: frozenset[str] | None = None,
) -> Demand:
    profile = "" if gpus else profile
    return Demand(name, "alice", NOW - waited, gpus, profile, count=count, nodes=nodes)


def layout_of(proposal: Proposal) -> str:
    return " ".join(f"{each.profile}@{each.start}" for each in proposal.layout)


def asked(
    gpus: list[CutGpu], *waiting: Demand, options: PartitioningOptions = OPTIONS
) -> list[tuple[str, str, str]]:
    """Return kind, GPU and layout of what is proposed."""
    found = propose(gpus, waiting, {"": options}, NOW)
    return [(each.kind, each.gpu_uuid, layout_of(each)) for each in found]


@pytest.mark.parametrize(
    ("gpus", "waiting", "expected"),
    [
        pytest.param([gpu(idle="1g.10gb@0")], [wants()], [], id="what is there is not made"),
        pytest.param(
            [gpu(0, "2g.20gb@0"), whole(1)],
            [wants()],
            [("cut", "a-0", "2g.20gb@0 1g.10gb@6")],
            id="beside others before a fresh GPU",
        ),
        pytest.param(
            [gpu(0, "2g.20gb@0", changed=1.0)],
            [wants()],
            [("cut", "a-0", "2g.20gb@0 1g.10gb@6")],
            id="beside others though it was just changed",
        ),
        pytest.param(
            [gpu(0, "4g.40gb@0", "3g.40gb@4"), whole(1)],
            [wants()],
            [("cut", "a-1", "1g.10gb@6")],
            id="a fresh GPU before an idle one goes",
        ),
        pytest.param(
            [gpu(0, "4g.40gb@0", "3g.40gb@4"), whole(1, at_once=False)],
            [wants()],
            [("cut", "a-0", "4g.40gb@0 1g.10gb@6")],
            id="in place of an idle one before a reset",
        ),
        pytest.param(
            [gpu(0, "4g.40gb@0", "3g.40gb@4", changed=100.0)],
            [wants()],
            [],
            id="not in place of an idle one before the dwell is over",
        ),
        pytest.param(
            [gpu(0, "4g.40gb@0 3g.40gb@4"), whole(1)],
            [wants("7g.80gb")],
            [("cut", "a-1", "7g.80gb@0")],
            id="a fresh GPU",
        ),
        pytest.param([whole(0, changed=100.0)], [wants()], [], id="which rests too"),
        pytest.param([whole(0, free=False)], [wants()], [], id="which nobody has"),
        pytest.param([whole(0, pool="other")], [wants()], [], id="of a pool that is cut by demand"),
        pytest.param([whole(0)], [wants(waited=10.0)], [], id="once it has waited"),
        pytest.param([whole(0)], [wants(nodes=frozenset("b"))], [], id="where it could go"),
        pytest.param([whole(0)], [wants("1g.5gb")], [], id="of a board that has the profile"),
        pytest.param(
            [whole(0), whole(1)],
            [wants(name="x"), wants("2g.20gb", name="y")],
            [("cut", "a-0", "2g.20gb@4 1g.10gb@6")],
            id="two of them on one GPU",
        ),
        pytest.param(
            [whole(0), whole(1, node="b"), gpu(2, "3g.40gb@4", node="b")],
            [wants("4g.40gb", count=2)],
            [("cut", "b-1", "4g.40gb@0"), ("cut", "b-2", "4g.40gb@0 3g.40gb@4")],
            id="several on one node",
        ),
        pytest.param(
            [gpu(0, idle="1g.10gb@0 2g.20gb@4")],
            [wants("", gpus=1)],
            [("make-whole", "a-0", "")],
            id="an idle cut GPU is made whole",
        ),
        pytest.param(
            [gpu(0, "1g.10gb@0"), gpu(1, foreign="1g.10gb@0"), gpu(2, changed=10.0)],
            [wants("", gpus=1)],
            [],
            id="no busy one, and none that was just changed",
        ),
        pytest.param(
            [gpu(0), whole(1)], [wants("", gpus=1)], [], id="none where a whole one is free"
        ),
        pytest.param(
            [gpu(0), gpu(1, "1g.10gb@6"), whole(2), gpu(3, node="b"), whole(4, node="b")],
            [wants("", gpus=2)],
            [("make-whole", "a-0", "")],
            id="as many as lack on one node",
        ),
        pytest.param(
            [gpu(0), whole(1)],
            [wants("", gpus=3)],
            [],
            id="none where that would not do",
        ),
        pytest.param(
            [gpu(0, idle="7g.80gb@0")],
            [wants(name="x"), wants("", gpus=1, name="y")],
            [("cut", "a-0", "1g.10gb@6")],
            id="who is first in the queue is served",
        ),
        pytest.param(
            [gpu(0, idle="7g.80gb@0")],
            [wants("", gpus=1, name="y"), wants(name="x")],
            [("make-whole", "a-0", "")],
            id="and keeps what it gets",
        ),
        pytest.param(
            [whole(0), whole(1)],
            [wants("", gpus=8, name="y"), wants(name="x")],
            [],
            id="GPUs are kept for who is ahead and lacks some still",
        ),
    ],
)
def test_what_is_proposed(
    gpus: list[CutGpu], waiting: list[Demand], expected: list[tuple[str, str, str]]
) -> None:
    assert asked(gpus, *waiting) == expected


def test_whole_gpus_are_kept() -> None:
    options = replace(OPTIONS, whole_gpus_kept=2)
    gpus = [whole(index) for index in range(4)]
    big = [wants("7g.80gb", name=str(number)) for number in range(4)]
    assert [uuid for _, uuid, _ in asked(gpus, *big, options=options)] == ["a-0", "a-1"]
    # Of one node at once, too.
    both = wants("7g.80gb", count=3)
    assert asked(gpus, both, options=options) == []


def test_a_proposal_tells_all() -> None:
    (found,) = propose(
        [gpu(3, "3g.40gb@4", "4g.40gb@0")], [wants("2g.20gb", name="w1")], {"": OPTIONS}, NOW
    )
    assert found.kind is ProposalKind.CUT
    assert (found.node, found.gpu_index, found.for_allocations) == ("a", 3, ("w1",))
    assert (found.wanted.is_enabled, found.wanted.devices) == (
        True,
        (("2g.20gb", 1), ("3g.40gb", 1)),
    )
    assert found.destroys == at("4g.40gb@0")
    assert (found.blast_radius, found.needs_reset, found.is_automatic) == ((), False, True)
    assert found.why == (
        "2g.20gb@0 for allocation w1 (alice, waits for 1m); 3g.40gb@4 stays; "
        "4g.40gb@0, which nobody uses, goes"
    )


def test_nothing_happens_by_itself_unless_the_pool_says_so_or_where_a_reset_is_needed() -> None:
    careful = {"": replace(OPTIONS, is_automatic=False)}
    (asking,) = propose([whole(0)], [wants()], careful, NOW)
    assert not asking.is_automatic
    (ampere,) = propose([whole(0, at_once=False)], [wants()], {"": OPTIONS}, NOW)
    assert (ampere.needs_reset, ampere.is_automatic) == (True, False)
    assert ampere.why.endswith("MIG mode changes with a reset of the GPU or a reboot")
    # A card that needs none goes before one that does.
    both = [whole(0, at_once=False), whole(1)]
    assert [each.gpu_uuid for each in propose(both, [wants()], {"": OPTIONS}, NOW)] == ["a-1"]


def test_holders_who_would_have_to_move_are_named() -> None:
    gpus = [gpu(0, "2g.20gb@0", foreign="1g.10gb@4"), gpu(1, "1g.10gb@0 3g.40gb@4")]
    found = propose(gpus, [wants("4g.40gb")], {"": OPTIONS}, NOW)
    assert sorted(each.kind for each in found) == [ProposalKind.CUT, ProposalKind.DEFRAGMENT]
    by_kind = {each.kind: each for each in found}
    cleared = by_kind[ProposalKind.DEFRAGMENT]
    (move,) = cleared.blast_radius
    assert not cleared.is_automatic
    assert move.allocation_id in cleared.why
    room = by_kind[ProposalKind.CUT]
    assert (room.gpu_uuid, room.for_allocations) == (move.to_uuid, (move.allocation_id,))
    assert not room.is_automatic
    assert move.to_placed in room.layout


def test_nobody_else_is_asked_to_move() -> None:
    assert asked([gpu(0, foreign="1g.10gb@0"), gpu(1, foreign="1g.10gb@0")], wants("7g.80gb")) == []
    assert asked([gpu(0, "1g.10gb@0")], wants("7g.80gb")) == []  # where to?


@pytest.mark.parametrize(
    ("geometry", "demand", "profile"),
    [
        (H100, wants("3g.40gb"), "3g.40gb"),
        (H100, wants("1g.10gb+me"), "1g.10gb+me"),
        (H100, wants("9g.1gb"), None),
        (H100, wants("1c.2g.20gb"), None),
        (H100, Demand("w", "", 0.0, memory_bytes_min=5 * GIB), "1g.10gb"),
        (H100, Demand("w", "", 0.0, memory_bytes_min=15 * GIB), "1g.20gb"),
        (H100, Demand("w", "", 0.0, compute_slices_min=2), "2g.20gb"),
        (H100, Demand("w", "", 0.0, memory_bytes_min=30 * GIB, compute_slices_min=4), "4g.40gb"),
        (H100, Demand("w", "", 0.0, memory_bytes_min=200 * GIB), None),
        (A30_24GB.geometry, Demand("w", "", 0.0, memory_bytes_min=5 * GIB), "1g.6gb"),
    ],
)
def test_smallest_profile(geometry: Geometry, demand: Demand, profile: str | None) -> None:
    found = profile_for(demand, geometry)
    assert (found.name if found is not None else None) == profile


# --- as time passes


@dataclass
class Tenant:
    demand: Demand
    ends_at: float
    uuid: str = ""
    placed: Placed | None = None  # None with a UUID: the whole GPU


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32), kept=st.integers(0, 2))
def test_no_flip_flop_and_nobody_is_disturbed(seed: int, kept: int) -> None:
    """A pool that is cut by demand for an hour, by whoever comes."""
    rng = Random(seed)
    options = replace(OPTIONS, whole_gpus_kept=kept)
    pool = {each.uuid: each for each in (whole(index) for index in range(5))}
    waiting: list[Tenant] = []
    there: list[Tenant] = []
    destructive: dict[str, list[float]] = {uuid: [] for uuid in pool}
    served = 0
    for step in range(120):
        now = NOW + 30.0 * step
        there = [each for each in there if each.ends_at > now]
        waiting = [each for each in waiting if now - each.demand.since < 600.0]
        if rng.random() < 0.4:
            name = rng.choice(["1g.10gb", "1g.10gb+me", "2g.20gb", "3g.40gb", "7g.80gb", ""])
            demand = Demand(str(step), "alice", now, 0 if name else 1, name)
            waiting.append(Tenant(demand, now + rng.uniform(60.0, 1500.0)))
        for each in list(waiting):
            if serve(each, pool, there):
                waiting.remove(each)
                there.append(each)
                served += 1
        shown = [used(each, there) for each in pool.values()]
        found = propose(shown, [each.demand for each in waiting], {"": options}, now)
        opened = sum(not pool[p.gpu_uuid].is_enabled and p.wanted.is_enabled for p in found)
        free = sum(not each.is_enabled and each.is_free for each in shown)
        assert not opened or free - opened >= kept
        for proposal in found:
            before = next(each for each in shown if each.uuid == proposal.gpu_uuid)
            busy = {each.placed for each in before.instances if each.is_busy}
            assert before.is_free
            if proposal.kind is ProposalKind.DEFRAGMENT or not proposal.is_automatic:
                continue
            assert objection(H100, proposal.layout) is None
            assert busy <= set(proposal.layout)
            is_destructive = proposal.destroys or proposal.wanted.is_enabled != before.is_enabled
            if is_destructive:
                destructive[before.uuid].append(now)
            pool[before.uuid] = replace(
                before,
                is_enabled=proposal.wanted.is_enabled,
                instances=tuple(InstanceUse(each) for each in proposal.layout),
                changed_at=now,
            )
    assert served
    for times in destructive.values():
        gaps = [later - sooner for sooner, later in pairwise(times)]
        assert all(gap >= options.dwell_seconds for gap in gaps)


def used(before: CutGpu, there: list[Tenant]) -> CutGpu:
    here = [each for each in there if each.uuid == before.uuid]
    by_place = {each.placed: each.demand.allocation_id for each in here}
    return replace(
        before,
        is_free=None not in by_place,
        instances=tuple(
            InstanceUse(each.placed, (by_place[each.placed],) if each.placed in by_place else ())
            for each in before.instances
        ),
    )


def serve(tenant: Tenant, pool: dict[str, CutGpu], there: list[Tenant]) -> bool:
    """Give a tenant the first device that will do, as placement would."""
    for before in pool.values():
        now = used(before, there)
        if tenant.demand.whole_gpus:
            if not now.is_enabled and now.is_free:
                tenant.uuid = now.uuid
                return True
            continue
        for each in now.instances:
            if now.is_enabled and not each.is_busy and each.placed.profile == tenant.demand.profile:
                tenant.uuid, tenant.placed = now.uuid, each.placed
                return True
    return False


def test_two_kinds_of_request_in_turn_come_to_rest() -> None:
    """Each finds what was made for it the last time; in the end nothing changes any more."""
    gpus = {"a-0": gpu(0), "a-1": whole(1)}
    changes: list[float] = []
    for turn in range(40):
        now = NOW + 1000.0 * turn
        demand = Demand(str(turn), "alice", now - 60, profile=("4g.40gb", "7g.80gb")[turn % 2])
        for each in propose(list(gpus.values()), [demand], {"": OPTIONS}, now):
            gpus[each.gpu_uuid] = replace(
                gpus[each.gpu_uuid],
                is_enabled=each.wanted.is_enabled,
                instances=tuple(InstanceUse(placed) for placed in each.layout),
                changed_at=now,
            )
            changes.append(now)
    assert len(changes) <= 2


@st.composite
def pools(draw: st.DrawFn) -> list[CutGpu]:
    """Cut GPUs in any state, some of them not cut, on two nodes."""
    legal = list(layouts(H100))
    found: list[CutGpu] = []
    for index in range(draw(st.integers(1, 6))):
        is_cut = draw(st.booleans())
        layout = draw(st.sampled_from(legal)) if is_cut else ()
        uses = [
            InstanceUse(
                placed,
                (f"{index}@{placed.start}",) if use == 1 else (),
                is_foreign=use == 2,
            )
            for placed in layout
            for use in [draw(st.integers(0, 2))]
        ]
        found.append(
            CutGpu(
                node=draw(st.sampled_from("ab")),
                uuid=str(index),
                index=index,
                pool="",
                geometry=H100,
                is_enabled=is_cut,
                toggles_at_once=draw(st.booleans()),
                instances=tuple(uses),
                is_free=draw(st.integers(0, 4)) > 0,
                changed_at=draw(st.sampled_from([None, NOW - 100.0, NOW - 1000.0])),
            )
        )
    return found


@settings(max_examples=150, deadline=None)
@given(
    gpus=pools(),
    kinds=st.lists(
        st.tuples(
            st.sampled_from([*SIZES, "", ""]), st.integers(1, 3), st.sampled_from([10.0, 60.0])
        ),
        max_size=6,
    ),
    kept=st.integers(0, 2),
)
def test_whatever_is_proposed_is_legal_and_disturbs_nobody(
    gpus: list[CutGpu], kinds: list[tuple[str, int, float]], kept: int
) -> None:
    waiting = [
        wants(name, name=str(number), waited=waited, gpus=0 if name else count, count=count)
        for number, (name, count, waited) in enumerate(kinds)
    ]
    options = replace(OPTIONS, whole_gpus_kept=kept)
    found = propose(gpus, waiting, {"": options}, NOW)
    by_uuid = {each.uuid: each for each in gpus}
    waited = {each.allocation_id for each in waiting if NOW - each.since >= 30.0}
    movers = {move.allocation_id for each in found for move in each.blast_radius}
    assert len({each.gpu_uuid for each in found}) == len(found)
    opened = 0
    for each in found:
        before = by_uuid[each.gpu_uuid]
        assert before.is_free
        assert objection(H100, each.layout) is None
        assert set(each.for_allocations) <= waited | movers
        kept_places = {use.placed for use in before.instances if use.is_busy}
        kept_places -= {move.from_placed for move in each.blast_radius}
        assert kept_places <= set(each.layout)
        assert all(use.placed in each.layout for use in before.instances if use.is_foreign)
        assert {use.placed for use in before.instances if not use.is_busy} >= set(each.destroys)
        if each.wanted.is_enabled is not before.is_enabled:
            assert each.needs_reset is not before.toggles_at_once
            assert before.changed_at != NOW - 100.0
            opened += each.wanted.is_enabled
        if each.is_automatic:
            assert not each.blast_radius
            assert not each.needs_reset
            assert not each.destroys or before.changed_at != NOW - 100.0
    free = sum(not each.is_enabled and each.is_free for each in gpus)
    assert not opened or free - opened >= kept


def test_cards_that_are_alike_are_looked_at_once() -> None:
    """A pool of thousands of GPUs takes no longer than it takes to read it."""
    many = [gpu(index, "7g.80gb@0", node=f"n{node}") for node in range(250) for index in range(4)]
    looked_at: list[str] = []

    class Listening(str):
        """A profile's name that tells when it is compared with those of a board."""

        __slots__ = ()

        def __eq__(self, other: object) -> bool:
            looked_at.append(str(other))
            return str.__eq__(self, other)

        __hash__ = str.__hash__

    assert propose(many, [wants(Listening("9g.90gb"))], {"": OPTIONS}, NOW) == ()
    assert len(looked_at) <= 10 * len(H100.profiles)
