"""A load generator of allocations: requests arrive whatever the answers do; leases are given back.

Run as `python -m stoker.testing.load_clients PLAN`. The loop is open: a slow answer delays no later
request, and a latency counts from the instant at which its request was due, so that a stall of the
aggregator is felt by every request that fell into it. The clients are those of the SDK.
"""

import asyncio
import sys
from collections import Counter
from random import Random

import msgspec
import uvloop

from stoker.client import Allocation, AsyncFleet, ClientError, Refused, connect_async
from stoker.core.clock import Clock, SystemClock
from stoker.testing.load import (
    ClientsPlan,
    ClientsReport,
    Connected,
    Failed,
    Measure,
    instructions,
    say,
    to_micros,
)

# Far beyond any lease here: nothing is to expire, so a release that was lost shows.
TTL_SECONDS = 600.0


class Clients:
    """Clients that each ask for one GPU, hold it for a while, and give it back."""

    def __init__(self, plan: ClientsPlan, fleet: AsyncFleet, clock: Clock) -> None:
        self._plan = plan
        self._clock = clock
        self._rng = Random(plan.seed)
        self._fleet = fleet
        self._holders: dict[str, str] = {}  # GPU UUID -> the allocation that was told to have it

    async def run(self) -> None:
        """Load and report as the parent asks for, until it goes."""
        async for window in instructions():
            say(await self._measure(window))

    async def _measure(self, window: Measure) -> ClientsReport:
        tally = _Tally()
        due = window.begins_at
        async with asyncio.TaskGroup() as leases:
            while (due := due + self._rng.expovariate(self._plan.rate)) < window.ends_at:
                await self._clock.sleep(due - self._clock.monotonic())
                leases.create_task(self._lease(tally, due))
        return tally.report()

    async def _lease(self, tally: "_Tally", due: float) -> None:
        tally.requests += 1
        tally.lag_micros.append(self._micros_since(due))
        try:
            allocation = await self._fleet.request(gpus=1, holder="bench", ttl=TTL_SECONDS)
        except Refused:
            tally.refused += 1
            return
        except ClientError as error:
            tally.errors[f"allocate: {type(error).__name__}"] += 1
            return
        tally.grant_micros.append(self._micros_since(due))
        tally.granted_twice += self._take(allocation)
        release_due = self._clock.monotonic() + self._rng.expovariate(1 / self._plan.hold_seconds)
        await self._clock.sleep(release_due - self._clock.monotonic())
        self._give_up(allocation)
        try:
            await self._fleet.release(allocation.id, wait=0.0)
        except ClientError as error:
            tally.errors[f"release: {type(error).__name__}"] += 1
            return
        tally.release_micros.append(self._micros_since(release_due))

    def _micros_since(self, at: float) -> int:
        return to_micros(self._clock.monotonic() - at)

    def _take(self, allocation: Allocation) -> int:
        """Note whose the GPUs are, and return how many of them are another client's."""
        uuids = [device.uuid for device in allocation.devices]
        twice = sum(uuid in self._holders for uuid in uuids)
        self._holders.update((uuid, allocation.id) for uuid in uuids)
        return twice

    def _give_up(self, allocation: Allocation) -> None:
        for device in allocation.devices:
            if self._holders.get(device.uuid) == allocation.id:
                del self._holders[device.uuid]


class _Tally:
    """What is counted in one window."""

    def __init__(self) -> None:
        self.requests = 0
        self.refused = 0
        self.granted_twice = 0
        self.errors: Counter[str] = Counter()
        self.grant_micros: list[int] = []
        self.release_micros: list[int] = []
        self.lag_micros: list[int] = []

    def report(self) -> ClientsReport:
        return ClientsReport(
            requests=self.requests,
            granted=len(self.grant_micros),
            refused=self.refused,
            errors=dict(self.errors),
            granted_twice=self.granted_twice,
            grant_micros=self.grant_micros,
            release_micros=self.release_micros,
            lag_micros=self.lag_micros,
        )


async def run(plan: ClientsPlan) -> None:
    """Connect, then do what the parent asks for, until it goes."""
    async with connect_async(plan.target) as fleet:
        try:
            await fleet.allocations()
        except ClientError as error:
            say(Failed(str(error)))
            return
        say(Connected(1))
        await Clients(plan, fleet, SystemClock()).run()


if __name__ == "__main__":
    uvloop.run(run(msgspec.json.decode(sys.argv[1], type=ClientsPlan)))
