"""What was acknowledged is there after a restart, however the last life ended."""

import asyncio
import sqlite3
from collections.abc import Sequence
from pathlib import Path

import grpc
import pytest
from grpc import aio
from tests.integration.aggregator_stage import Stage, TinyAgent, failure_of, serving, wish
from tests.support.waiting import until_true

from stoker.aggregator.store import OnCommit, Outcome, Store
from stoker.core.errors import InUse, StoreCorrupt
from stoker.v1 import fleet_pb2, fleet_pb2_grpc, types_pb2

GRANTED = types_pb2.ALLOCATION_STATE_GRANTED
WAITING = types_pb2.ALLOCATION_STATE_WAITING
ENDED = types_pb2.ALLOCATION_STATE_ENDED


class Forgetful(Store):
    """A store that keeps what it is told and does not say so: as if the process had died then."""

    is_mute = False

    def deliver(self, outcomes: Sequence[Outcome]) -> None:
        if not self.is_mute:
            super().deliver(outcomes)


async def test_grants_survive_and_live_for_their_ttl_from_the_restart(tmp_path: Path) -> None:
    async with serving(tmp_path) as stage:
        async with stage.agent() as agent:
            granted = await stage.allocate(ttl_seconds=100.0)
            await until_true("the node to hold it", lambda: granted.id in agent.held)
        held, sequence = dict(agent.held), agent.sequence
    async with serving(tmp_path) as stage:
        found = (await stage.allocations())[granted.id]
        assert (found.state, found.held_by_node) == (GRANTED, False)
        assert dict(found.env) == dict(granted.env)
        assert found.expires_at >= granted.expires_at
        await stage.clock.elapse(99)
        async with stage.agent(held=held, sequence=sequence) as agent:
            assert (await stage.allocations())[granted.id].held_by_node
            assert agent.commands == []
            await stage.clock.elapse(1)
            await stage.becomes(granted.id, ENDED)


async def test_node_that_lost_its_journal_is_told_to_hold_again(tmp_path: Path) -> None:
    async with serving(tmp_path) as stage, stage.agent():
        granted = await stage.allocate(ttl_seconds=3600.0)
    async with serving(tmp_path) as stage, stage.agent(incarnation="new") as agent:
        await until_true("the node to hold it", lambda: granted.id in agent.held)


async def test_queue_survives_and_its_clients_find_their_place_by_their_key(tmp_path: Path) -> None:
    async with serving(tmp_path) as stage, stage.agent(gpus=1):
        held = await stage.allocate(ttl_seconds=3600.0)
        waiting = await stage.queue("k1")
    async with serving(tmp_path) as stage, stage.agent(gpus=1):
        assert (await stage.allocations())[waiting.id].state == WAITING
        again = await stage.queue("k1")
        assert again.id == waiting.id
        await stage.release(held.id)
        assert (await again.answer()).id == waiting.id


async def test_retry_after_a_death_between_commit_and_reply_is_the_same_grant(
    tmp_path: Path,
) -> None:
    stores: list[Forgetful] = []

    def open_store(folder: Path, on_commit: OnCommit) -> Store:
        stores.append(Forgetful(folder, on_commit))
        return stores[-1]

    async with serving(tmp_path, open_store=open_store) as stage, stage.agent(gpus=2):
        stores[0].is_mute = True
        call = stage.fleet.Allocate(wish(key="k1", ttl_seconds=3600.0))
        with pytest.raises(asyncio.TimeoutError):
            async with asyncio.timeout(0.5):
                await call
        # An orderly end of this life is impossible now: its loop waits for an answer for ever.
        await abandon(stage, stores[0])
    async with serving(tmp_path) as stage, stage.agent(gpus=2):
        (kept,) = (await stage.allocations()).values()
        assert kept.state == GRANTED
        retried = await stage.allocate(key="k1", ttl_seconds=3600.0)
        assert retried.id == kept.id
        assert len(await stage.allocations()) == 1


async def abandon(stage: Stage, store: Forgetful) -> None:
    """Let the aggregator end without the answers that it waits for."""
    store.is_mute = False
    stage.aggregator.stop()


async def test_cordon_survives(tmp_path: Path) -> None:
    async with serving(tmp_path) as stage, stage.agent():
        await stage.fleet.Cordon(fleet_pb2.CordonRequest(node="n1", reason="fans"))
    async with serving(tmp_path) as stage:
        assert (await stage.nodes())["n1"].cordoned == "fans"
        assert (
            "not connected since the aggregator started" in (await stage.nodes())["n1"].state_reason
        )


async def test_two_aggregators_never_share_a_folder(tmp_path: Path) -> None:
    async with serving(tmp_path) as stage:
        with pytest.raises(InUse, match="another aggregator"):
            async with serving(tmp_path):
                pass
        assert await stage.allocations() == {}


async def test_impossible_history_is_refused_by_the_number_of_its_event(tmp_path: Path) -> None:
    async with serving(tmp_path) as stage, stage.agent():
        pass
    database = sqlite3.connect(tmp_path / "ledger.sqlite3")
    with database:
        database.execute(
            "INSERT INTO events (at, kind, payload) VALUES (1, 'NodeUncordoned', ?)",
            ('{"at": 1, "node": "nobody"}',),
        )
    database.close()
    with pytest.raises(StoreCorrupt, match=r"ledger\.sqlite3: event 2 cannot be.*nobody"):
        async with serving(tmp_path):
            pass


async def test_old_stream_of_a_killed_agent_does_not_keep_the_new_one_out(tmp_path: Path) -> None:
    async with serving(tmp_path) as stage:
        async with stage.agent():
            pass
        restarted = TinyAgent(process_id="another", sequence=10)
        async with restarted.connected(stage.channel):
            assert restarted.welcome is not None


async def test_answers_stop_with_the_aggregator(tmp_path: Path) -> None:
    async with serving(tmp_path) as stage:
        address = stage.address
    async with aio.insecure_channel(address) as channel:
        fleet = fleet_pb2_grpc.FleetStub(channel)
        failure = await failure_of(fleet.ListNodes(fleet_pb2.ListNodesRequest()))
        assert failure.code is grpc.StatusCode.UNAVAILABLE
