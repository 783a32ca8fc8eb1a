"""kill -9 of an agent: what was granted stays, and the agent goes on where it was."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import psutil
from tests.support.daemons import Stage, free_nodes
from tests.support.pages import Page, fetch_metrics, read_page, total
from tests.support.tap import Talk, Tap
from tests.support.waiting import until, until_true

from stoker.client import Allocation, AllocationState, AsyncFleet, Node, NodeState, Refused
from stoker.v1 import agent_pb2

# With every sign that a name may have.
NODE = "gpu_01.rack-3"
# Of several frames each.
ACKS_BEFORE = 2


async def take_some(fleet: AsyncFleet) -> list[Allocation]:
    """A whole GPU, a share, and a gang."""
    return [
        await fleet.request(gpus=1, holder="whole"),
        await fleet.request(memory="4GiB", holder="share"),
        await fleet.request(gpus=3, holder="gang"),
    ]


def places(allocations: Sequence[Allocation]) -> dict[str, tuple[str, tuple[str, ...]]]:
    return {each.id: (each.node, each.uuids) for each in allocations}


async def all_confirmed(fleet: AsyncFleet) -> Sequence[Allocation]:
    """Every allocation, once the node says of each that it holds it."""

    async def look() -> Sequence[Allocation] | None:
        found = (await fleet.allocations()).allocations
        return found if found and all(each.held_by_node for each in found) else None

    return await until("the node to hold every allocation", look)


async def node_in(fleet: AsyncFleet, state: NodeState) -> Node:
    async def look() -> Node | None:
        (node,) = (await fleet.nodes()).nodes
        return node if node.state is state else None

    return await until(f"{NODE} to be {state}", look)


def check_numbering(talk: Talk) -> None:
    """Within a stream, numbers rise by one from what the aggregator had taken in."""
    numbers = [frame.sequence for frame in talk.frames]
    assert all(later == earlier + 1 for earlier, later in pairwise(numbers)), numbers
    assert min(numbers) > talk.welcome.acked_sequence
    assert talk.acks == sorted(set(talk.acks))


def are_gone(processes: Sequence[psutil.Process]) -> bool:
    """Whether all have ended; those that only wait to be reaped have."""
    _, alive = psutil.wait_procs(processes, timeout=0)
    return all(process.status() == psutil.STATUS_ZOMBIE for process in alive)


async def page_of(told: dict[str, str]) -> Page:
    return read_page(await fetch_metrics(told["metrics"]))


async def test_killed_agent_goes_on_where_it_was(tmp_path: Path) -> None:
    async with Stage(tmp_path) as stage, Tap(stage.address) as tap:
        told_by_aggregator = await stage.aggregator().start()
        agent = stage.agent(NODE, "8xT4", "--interval", "200ms", aggregator=tap.address)
        await agent.start()
        async with stage.fleet() as fleet:
            await free_nodes(fleet, 1)
            await take_some(fleet)
            before = await all_confirmed(fleet)
            first = tap.talks[0]
            await until_true("acks", lambda: len(first.acks) >= ACKS_BEFORE)

            children = psutil.Process(agent.process.pid).children(recursive=True)
            agent.kill()
            # Nobody holds the driver for an agent that is gone.
            assert children
            await until_true("its driver host to end", lambda: are_gone(children))
            down = await node_in(fleet, NodeState.DISCONNECTED)
            assert down.state_reason
            assert places((await fleet.allocations()).allocations) == places(before)
            try:
                refused = None
                await fleet.request(gpus=1, holder="late")
            except Refused as error:
                refused = error.refusals
            assert refused is not None
            assert [each.filter for each in refused.nodes] == ["disconnected"]

            told_by_agent = await agent.start()
            await node_in(fleet, NodeState.READY)
            second = tap.talks[-1]
            await until_true("acks", lambda: len(second.acks) >= ACKS_BEFORE)
            after = await all_confirmed(fleet)
            assert places(after) == places(before)
            assert {each.state for each in after} == {AllocationState.GRANTED}

            # The same journal's life, in another process, numbered on.
            assert first.hello.incarnation == second.hello.incarnation
            assert first.hello.process_id != second.hello.process_id
            last_number = first.frames[-1].sequence
            assert second.hello.first_sequence > last_number
            assert second.frames[0].sequence > last_number
            assert second.welcome.acked_sequence >= first.acks[-1]
            for talk in (first, second):
                check_numbering(talk)
            # It knew from its journal what it holds before anybody told it.
            assert held_ids(second.hello) == set(places(before))
            page = await page_of(told_by_agent)
            assert total(page, "stoker_gpu_allocations") == 1 + 1 + 3
            page = await page_of(told_by_aggregator)
            assert total(page, "stoker_frames_repeated_total") == 0

            # And it is not only for show: what it holds again can be given back.
            for each in after:
                ended = await fleet.release(each.id)
                assert ended.state is AllocationState.ENDED
            page = await page_of(told_by_agent)
            assert total(page, "stoker_gpu_allocations") == 0


async def test_frames_of_an_outage_come_once_and_in_order(tmp_path: Path) -> None:
    async with Stage(tmp_path) as stage, Tap(stage.address) as tap:
        aggregator = stage.aggregator()
        await aggregator.start()
        agent = stage.agent(NODE, "2xT4", "--interval", "100ms", aggregator=tap.address)
        told_by_agent = await agent.start()
        async with stage.fleet() as fleet:
            await free_nodes(fleet, 1)
            first = tap.talks[0]
            await until_true("acks", lambda: len(first.acks) >= ACKS_BEFORE)
            aggregator.kill()

            async def has_waiting_frames() -> bool:
                return total(await page_of(told_by_agent), "stoker_agent_outbox_frames") >= 5

            await until("frames to wait", has_waiting_frames)
            told_by_aggregator = await aggregator.start()
            await node_in(fleet, NodeState.READY)
            second = tap.talks[-1]
            await until_true("acks", lambda: len(second.acks) >= ACKS_BEFORE)
            assert first.hello.incarnation == second.hello.incarnation
            assert first.hello.process_id == second.hello.process_id
            check_numbering(first)
            numbers = [frame.sequence for frame in second.frames]
            assert all(later == earlier + 1 for earlier, later in pairwise(numbers)), numbers
            # Nothing between the last frame that was acknowledged and the first of the new stream.
            assert numbers[0] <= first.acks[-1] + 1
            # What is sent again is what was sent before.
            sent = {frame.sequence: frame.SerializeToString() for frame in first.frames}
            again = [frame for frame in second.frames if frame.sequence in sent]
            assert [f.SerializeToString() for f in again] == [sent[f.sequence] for f in again]
            page = await page_of(told_by_aggregator)
            assert total(page, "stoker_frames_gap_total") == 0
            assert total(await page_of(told_by_agent), "stoker_agent_frames_dropped_total") == 0


def held_ids(hello: agent_pb2.Hello) -> set[str]:
    return {each.id for each in hello.held.allocations}
