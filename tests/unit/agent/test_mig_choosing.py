"""Which layout a GPU goes to: who uses an instance keeps it if any legal layout allows."""

from collections import Counter
from itertools import combinations
from random import Random

import pytest
from tests.support.mig_memory import a_user, partitions

from stoker.agent.mig.choosing import Refusal, choose
from stoker.agent.mig.comparing import layout_of, wanted_of_target
from stoker.agent.mig.in_the_way import NOBODY_THERE, GpuUsers
from stoker.agent.partitions import GpuPartitions, Target
from stoker.core.mig.boards import A30_24GB, A100_40GB, H100_80GB, RTX_PRO_6000, Board
from stoker.core.mig.geometry import Layout, Placed, Wanted
from stoker.core.mig.layouts import describe, layouts

TWO_3G = (Placed(0, 4, "3g.20gb"), Placed(4, 4, "3g.20gb"))
HALF = (Placed(0, 4, "3g.20gb"),)


def used(gpu: GpuPartitions, *starts: int) -> GpuUsers:
    """Return that the instances at these places are used, each by somebody else."""
    return GpuUsers(
        {
            each.id: (a_user(gpu, f"process {each.start} (python, bob)"),)
            for each in gpu.instances
            if each.start in starts
        }
    )


def wanted(*devices: str) -> Wanted:
    """Return a wish for these."""
    return Wanted(True, tuple(Counter(devices).items()))


@pytest.mark.parametrize(
    ("requirement", "gpu", "busy", "devices", "expected"),
    [
        (
            "a lone 3g goes where it leaves most room",
            (),
            (),
            {"3g.20gb": 1},
            "3g.20gb@4",
        ),
        (
            "an idle instance stays where it is",
            HALF,
            (),
            {"3g.20gb": 1},
            "3g.20gb@0",
        ),
        (
            "idle ones move when nothing else is legal",
            HALF,
            (),
            {"4g.20gb": 1, "3g.20gb": 1},
            "4g.20gb@0 3g.20gb@4",
        ),
        (
            "a busy one stays, and what is new is put beside it",
            HALF,
            (0,),
            {"3g.20gb": 1, "2g.10gb": 1, "1g.5gb": 1},
            "3g.20gb@0 2g.10gb@4 1g.5gb@6",
        ),
        (
            "of two alike the busy one stays",
            TWO_3G,
            (0,),
            {"3g.20gb": 1, "1g.5gb": 3},
            "3g.20gb@0 1g.5gb@4 1g.5gb@5 1g.5gb@6",
        ),
        (
            "a wish that is no device leaves the mode on and nothing made",
            HALF,
            (),
            {},
            "no instances",
        ),
        (
            "a part of an instance that is used is made beside the part that is",
            (Placed(0, 4, "3g.20gb", (1,)),),
            (0,),
            {"1c.3g.20gb": 2},
            "3g.20gb@0(1c+1c)",
        ),
        (
            "parts that are used stay in the instances in which they are",
            (Placed(0, 4, "3g.20gb", (1,)), Placed(4, 4, "3g.20gb", (1,))),
            (0, 4),
            {"1c.3g.20gb": 3},
            "3g.20gb@0(1c) 3g.20gb@4(1c+1c)",
        ),
    ],
)
def test_layout(
    requirement: str,
    gpu: Layout,
    busy: tuple[int, ...],
    devices: dict[str, int],
    expected: str,
) -> None:
    actual = partitions(A100_40GB, gpu)
    found = choose(actual, Wanted(True, tuple(devices.items())), used(actual, *busy))
    assert isinstance(found, Target), found
    assert found.is_enabled
    assert describe(found.layout) == expected


@pytest.mark.parametrize(
    ("requirement", "wish", "reason"),
    [
        ("what the board does not offer", {"3g.40gb": 1}, "MIG device '3g.40gb' is not offered"),
        ("more than the board takes", {"4g.20gb": 2}, "there may be at most 1 4g.20gb, not 2"),
        ("more slices than there are", {"4g.20gb": 1, "2g.10gb": 2}, "8 compute slices of 7"),
        ("less than none", {"1g.5gb": -1}, "less than none"),
        ("parts that there are not", {"5c.7g.40gb": 1}, "no compute instance of 5"),
    ],
)
def test_illegal_is_refused_whoever_uses_the_gpu(
    requirement: str, wish: dict[str, int], reason: str
) -> None:
    gpu = partitions(A100_40GB, TWO_3G)
    for users in (NOBODY_THERE, used(gpu, 0, 4)):
        found = choose(gpu, Wanted(True, tuple(wish.items())), users)
        assert isinstance(found, Refusal)
        assert reason in found.reason
        assert gpu.uuid in found.reason
        assert found.target is None
        assert found.in_the_way == ()


def test_devices_without_the_mode_are_refused() -> None:
    found = choose(partitions(A30_24GB), Wanted(False, (("1g.6gb", 1),)), NOBODY_THERE)
    assert found == Refusal("GPU-0: MIG devices are wanted, and MIG mode off")


def test_who_is_in_the_way_is_named_and_nobody_else() -> None:
    gpu = partitions(A100_40GB, TWO_3G)
    found = choose(gpu, wanted("4g.20gb", "3g.20gb"), used(gpu, 0, 4))
    assert isinstance(found, Refusal)
    assert [each.name for each in found.in_the_way] == ["process 0 (python, bob)"]
    assert found.reason == (
        "GPU-0: 3g.20gb@0 would have to go, and is in use by process 0 (python, bob)"
    )
    assert found.target is not None
    assert describe(found.target.layout) == "4g.20gb@0 3g.20gb@4"


def test_of_what_may_go_that_with_fewer_users_goes() -> None:
    gpu = partitions(A100_40GB, TWO_3G)
    left, right = (each.id for each in gpu.instances)
    users = GpuUsers(
        {left: (a_user(gpu, "one"), a_user(gpu, "two")), right: (a_user(gpu, "lone"),)}
    )
    found = choose(gpu, wanted("3g.20gb", "1g.5gb"), users)
    assert isinstance(found, Refusal)
    assert [each.name for each in found.in_the_way] == ["lone"]


def test_whose_instance_is_not_known_is_in_the_way_of_all_that_goes() -> None:
    gpu = partitions(A100_40GB, HALF)
    somewhere = GpuUsers(everywhere=(a_user(gpu),))
    found = choose(gpu, wanted("2g.10gb"), somewhere)
    assert isinstance(found, Refusal)
    assert found.in_the_way == somewhere.everywhere
    # What takes nothing away hurts nobody.
    assert isinstance(choose(gpu, wanted("3g.20gb", "3g.20gb"), somewhere), Target)
    assert isinstance(choose(gpu, wanted("2g.10gb"), GpuUsers(unknown="nobody tells")), Refusal)
    assert isinstance(
        choose(gpu, wanted("3g.20gb", "3g.20gb"), GpuUsers(unknown="nobody tells")), Target
    )


@pytest.mark.parametrize("is_on", [False, True])
def test_change_of_mode_is_in_the_way_of_everybody_and_of_whoever_has_the_gpu_open(
    is_on: bool,
) -> None:
    gpu = partitions(H100_80GB, is_enabled=is_on)
    daemon = a_user(gpu, "process 9 (dcgm, root), which has the GPU open")
    found = choose(gpu, Wanted(not is_on), GpuUsers(holders=(daemon,)))
    assert isinstance(found, Refusal)
    assert found.in_the_way == (daemon,)
    assert "MIG mode cannot be turned" in found.reason
    assert choose(gpu, Wanted(not is_on), NOBODY_THERE) == Target(not is_on)
    # It is in nobody's way that the mode stays as it is.
    assert choose(gpu, Wanted(is_on), GpuUsers(holders=(daemon,))) == Target(is_on)


def test_what_is_as_wanted_stays_just_as_it_is() -> None:
    """Also where other places, or other groups of parts, would leave more room."""
    layout = (Placed(0, 4, "3g.20gb", (1,)), Placed(4, 4, "3g.20gb", (1, 1)))
    gpu = partitions(A100_40GB, layout)
    wish = Wanted(True, (("1c.3g.20gb", 3),))
    assert choose(gpu, wish, GpuUsers(unknown="nobody tells")) == Target(True, layout)


def may_stay(board: Board, kept: Layout, after: Layout) -> bool:
    """Whether a legal layout with the devices of `after` has these in place: by trying all."""
    names = sorted(each.profile for each in after)
    return any(
        set(kept) <= set(each)
        for each in layouts(board.geometry)
        if sorted(placed.profile for placed in each) == names
    )


@pytest.mark.parametrize(
    ("board", "count"),
    [(A30_24GB, 150), (RTX_PRO_6000, 100), (A100_40GB, 60), (H100_80GB, 20)],
    ids=lambda value: str(getattr(value, "name", value)),
)
def test_the_most_busy_instances_stay_that_can(board: Board, count: int) -> None:
    """Compared with a search through every layout, for sampled layouts and users."""
    every = list(layouts(board.geometry))
    rng = Random(board.name)
    for _ in range(count):
        before, after = rng.choice(every), rng.choice(every)
        gpu = partitions(board, before)
        busy = tuple(each for each in before if rng.random() < 0.4)
        found = choose(
            gpu, wanted_of_target(Target(True, after)), used(gpu, *(each.start for each in busy))
        )
        target = found if isinstance(found, Target) else found.target
        assert target is not None
        stay = set(busy) & set(target.layout)
        assert isinstance(found, Target) == (len(stay) == len(busy))
        more = combinations(busy, len(stay) + 1)
        assert not any(may_stay(board, each, after) for each in more)
        if layout_of(gpu) == after:
            assert target.layout == after
