"""A load generator of agents: many of them in one process, each on a TCP connection of its own.

Run as `python -m stoker.testing.load_agents PLAN`. Samples are due evenly over the interval, on a
beat that all generators of a machine share, and whether or not earlier ones were taken in time.
"""

import asyncio
import gc
import itertools
import logging
import sys

import msgspec
import uvloop

from stoker.core.clock import Clock, SystemClock
from stoker.core.daemons import COLLECTOR_THRESHOLDS
from stoker.testing.load import (
    AgentsPlan,
    AgentsReport,
    Connected,
    Failed,
    Measure,
    instructions,
    say,
)
from stoker.testing.load_agent import LoadAgent, Tally
from stoker.testing.load_sockets import count_traffic

# A listening socket holds only so many connections that it has not accepted yet.
CONNECTING_AT_ONCE = 50
CONNECT_SECONDS_MAX = 30.0  # for so many
# How long a report waits for acknowledgements of what was sent at the end of its window.
DRAIN_SECONDS_MAX = 10.0
DRAIN_LOOK_SECONDS = 0.05


class Agents:
    """The agents of this process, and the beat at which they sample."""

    def __init__(self, plan: AgentsPlan, clock: Clock) -> None:
        self._plan = plan
        self._clock = clock
        numbers = range(plan.first, plan.first + plan.nodes)
        self._agents = [LoadAgent(plan, number, clock) for number in numbers]

    async def run(self) -> None:
        """Connect all, then sample and report what the parent asks for, until it goes."""
        running: list[asyncio.Task[None]] = []
        async with asyncio.TaskGroup() as group:
            for first in range(0, len(self._agents), CONNECTING_AT_ONCE):
                batch = self._agents[first : first + CONNECTING_AT_ONCE]
                running += [group.create_task(agent.run()) for agent in batch]
                if not await self._are_welcomed(batch):
                    break
                say(Connected(first + len(batch)))
            else:
                # A look for cycles through a thousand agents' states stops all of them for 0.4 s,
                # which an agent with a process of its own never does.
                gc.collect()
                gc.freeze()
                running.append(group.create_task(self._beat()))
                async for window in instructions():
                    say(await self._measure(window))
            for task in running:
                task.cancel()

    async def _are_welcomed(self, batch: list[LoadAgent]) -> bool:
        try:
            async with asyncio.timeout(CONNECT_SECONDS_MAX):
                for agent in batch:
                    await agent.welcomed.wait()
        except TimeoutError:
            late = [agent for agent in batch if not agent.welcomed.is_set()]
            reason = late[0].disconnect_reason or "nothing answers"
            say(Failed(f"{len(late)} agents were not welcomed at {self._plan.target}: {reason}"))
            return False
        return True

    async def _beat(self) -> None:
        """Take every sample when it is due, or as soon after it as this process can."""
        interval_seconds = 1 / self._plan.hz
        # A whole number of intervals, so that every generator of this machine beats alike.
        first = self._clock.monotonic() // interval_seconds + 1
        for beat in itertools.count(first):
            for agent in self._agents:
                due = beat * interval_seconds + agent.phase_seconds
                await self._clock.sleep(due - self._clock.monotonic())
                agent.sample(due)

    async def _measure(self, window: Measure) -> AgentsReport:
        tally = Tally(window)
        disconnects = sum(agent.disconnects for agent in self._agents)
        dropped = sum(agent.frames_dropped for agent in self._agents)
        for agent in self._agents:
            agent.tally = tally
        await self._clock.sleep(window.begins_at - self._clock.monotonic())
        before = count_traffic(self._plan.target)
        await self._clock.sleep(window.ends_at - self._clock.monotonic())
        after = count_traffic(self._plan.target)
        await self._drain(tally)
        for agent in self._agents:
            agent.tally = None
        return AgentsReport(
            connections=after.connections,
            frames_sent=tally.frames_sent,
            frames_acked=tally.frames_acked,
            frames_dropped=sum(agent.frames_dropped for agent in self._agents) - dropped,
            acks=tally.acks,
            disconnects=sum(agent.disconnects for agent in self._agents) - disconnects,
            message_bytes=tally.message_bytes,
            stream_bytes=after.stream_bytes - before.stream_bytes,
            ack_micros=tally.ack_micros,
            lag_micros=tally.lag_micros,
            sampled_at={
                agent.name: agent.sampled_at
                for agent in self._agents
                if agent.sampled_at is not None
            },
            sends=tally.sends,
        )

    async def _drain(self, tally: Tally) -> None:
        deadline = self._clock.monotonic() + DRAIN_SECONDS_MAX
        while any(agent.awaits_ack(tally) for agent in self._agents):
            if self._clock.monotonic() >= deadline:
                return  # what is missing is counted as sent and not acknowledged
            await self._clock.sleep(DRAIN_LOOK_SECONDS)


if __name__ == "__main__":
    gc.set_threshold(*COLLECTOR_THRESHOLDS)
    logging.basicConfig(level=logging.ERROR, format="%(name)s: %(message)s")
    uvloop.run(Agents(msgspec.json.decode(sys.argv[1], type=AgentsPlan), SystemClock()).run())
