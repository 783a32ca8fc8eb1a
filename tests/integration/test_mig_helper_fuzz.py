"""Whatever is said about partitions: it is done, refused, or fails by name, and never half."""

import json
from collections.abc import Generator
from random import Random

import psutil
import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from tests.support.mig_steps import Node, fill, make, turned_on
from tests.support.root_helper import RunningHelper, open_folder, running

from stoker.agent.helper.partitions import CHANGING, GPU_VERBS
from stoker.agent.helper.requests import SMALL_MAX
from stoker.agent.mig.failures import FailureKind
from stoker.agent.partitions import GpuPartitions
from stoker.core.mig.geometry import Placed
from stoker.core.mig.layouts import objection

REQUESTS_MAX = 12
KINDS = {kind.value for kind in FailureKind}
LAWS = settings(
    max_examples=6,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture(scope="module")
def node() -> Generator[Node]:
    with open_folder() as folder:
        yield Node(folder)


@pytest.fixture(scope="module")
def found(node: Node) -> Generator[RunningHelper]:
    with running(node.folder, *node.options) as found:
        yield found


def right_requests(now: GpuPartitions) -> list[dict[str, object]]:
    """Return all that could be asked for of a GPU like this, whether or not there is room."""
    gpu = {"gpu": now.uuid}
    found: list[dict[str, object]] = [
        {"verb": "mig_read", **gpu},
        {"verb": "mig_set_mode", **gpu, "is_enabled": True},
        {"verb": "mig_set_mode", **gpu, "is_enabled": False},
        {"verb": "end_holder", **gpu, "pid": 4_194_304, "started_ticks": 1, "signal": "TERM"},
    ]
    for profile in now.geometry.profiles:
        of = {"profile": profile.name, "profile_id": profile.profile_id}
        place = {"start": profile.starts[-1], "size": profile.memory_slices}
        found.append({"verb": "mig_create_gpu_instance", **gpu, **of, **place})
    for instance in now.instances:
        offered = now.geometry.profile(instance.profile)
        assert offered is not None
        within: dict[str, object] = {
            **gpu,
            "gpu_instance_id": instance.id,
            "profile": instance.profile,
            "start": instance.start,
        }
        found.append({"verb": "mig_destroy_gpu_instance", **within})
        inside = {"beside": [each.id for each in instance.compute_instances]}
        found += [
            {"verb": "mig_create_compute_instance", **within, **inside}
            | {"profile_id": each.profile_id, "compute_slices": each.compute_slices}
            for each in offered.compute_profiles
        ]
        found += [
            {"verb": "mig_destroy_compute_instance", **within}
            | {"compute_instance_id": each.id, "uuid": each.uuid}
            for each in instance.compute_instances
        ]
    return found


ANYTHING: tuple[object, ...] = (
    *(*range(5), 9, 14, 19, -1, SMALL_MAX, 1.5, None, True),
    *("", "TERM", "3g.40gb", "1g.10gb", [], [0], {}),
)


def nearly_right(now: GpuPartitions, chance: Random) -> dict[str, object]:
    """Return a request, in which an argument or two may be changed, lacking or too many."""
    verb = chance.choice(sorted(GPU_VERBS))
    right = [each for each in right_requests(now) if each["verb"] == verb]
    wish = dict(chance.choice(right or right_requests(now)))
    for _ in range(chance.choice([0, 0, 0, 1, 1, 2])):
        name = chance.choice([*wish, "path"])
        wish[name] = chance.choice(ANYTHING)
        if not chance.randrange(5):
            del wish[name]
    return wish


def assert_legal(now: GpuPartitions) -> None:
    layout = tuple(Placed(each.start, each.size, each.profile) for each in now.instances)
    assert objection(now.geometry, layout) is None
    assert now.is_enabled or not layout


@LAWS
@given(st.integers(0, 1 << 32))
def test_what_is_said_is_done_or_refused_or_fails(
    node: Node, found: RunningHelper, seed: int
) -> None:
    chance = Random(seed)
    node.state.unlink(missing_ok=True)
    before = node.do(turned_on, lambda now: make(now, "3g.40gb", 4), lambda now: fill(now, 4))
    for _ in range(REQUESTS_MAX):
        wish = nearly_right(before, chance)
        (told,) = found.ask(json.dumps(wish).encode() + b"\n")
        after = node.now()
        (outcome,) = {"ok", "refused", "failed"} & told.keys()
        event(f"{wish.get('verb')}: {outcome}")
        if outcome == "failed":
            assert told["failed"] in KINDS
            assert told["message"]
        if outcome != "ok" or wish["verb"] not in CHANGING:
            assert after == before
        assert_legal(after)
        before = after
    assert found.process.poll() is None


def test_nothing_is_left_of_all_that(found: RunningHelper) -> None:
    process = psutil.Process(found.process.pid)
    descriptors, rss = process.num_fds(), process.memory_info().rss
    for _ in range(30):
        found.ask(b'{"verb": "mig_set_mode", "gpu": "GPU-1", "is_enabled": true}\n')
        found.ask(b'{"verb": "mig_read", "gpu"')
    assert found.ask(b'{"verb": "list_holders"}\n')[0]["ok"]
    assert process.num_fds() == descriptors
    assert process.memory_info().rss - rss < 2 << 20
