"""A load generator of calls to replicas: by the SDK's router, or to each replica in its turn.

Run as `python -m stoker.testing.load_calls PLAN`. The loop is open: a slow answer delays no later
call, and a latency counts from the instant at which its call was due.
"""

import asyncio
import itertools
import sys
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from random import Random

import grpc
import msgspec

from stoker.client import AsyncRouter, ClientError, Endpoint, NoEndpoint, connect_async
from stoker.core.clock import Clock, SystemClock
from stoker.testing.load import Connected, Failed, Measure, instructions, say, to_micros
from stoker.testing.replica_messages import CallsPlan, CallsReport
from stoker.testing.replicas import Channels

CALL_SECONDS_MAX = 10.0

Choose = Callable[[], AbstractAsyncContextManager[Endpoint]]


def in_turn(router: AsyncRouter) -> Choose:
    """Return a policy that calls each endpoint in its turn, whatever its weight."""
    turn = itertools.count()

    @asynccontextmanager
    async def choose() -> AsyncGenerator[Endpoint]:
        endpoints = router.endpoints
        if not endpoints:
            raise NoEndpoint("there is none whose turn it could be")
        yield endpoints[next(turn) % len(endpoints)]

    return choose


def by_router(router: AsyncRouter) -> Choose:
    """Return the policy of the SDK."""
    return router.call


# How calls are dealt out, by name.
POLICIES: Mapping[str, Callable[[AsyncRouter], Choose]] = {
    "round_robin": in_turn,
    "stoker": by_router,
}


def due_times(plan: CallsPlan, window: Measure) -> Iterator[float]:
    """Yield when calls are due in a window: the same for a seed, as seen from its beginning."""
    rng = Random(plan.seed)
    due = window.begins_at
    while (due := due + rng.expovariate(plan.rate)) < window.ends_at:
        yield due


class Calls:
    """Callers of one service."""

    def __init__(self, plan: CallsPlan, router: AsyncRouter, clock: Clock) -> None:
        self._plan = plan
        self._choose = POLICIES[plan.policy](router)
        self._clock = clock
        self._channels = Channels()

    async def run(self) -> None:
        """Load and report as the parent asks for, until it goes."""
        try:
            async for window in instructions():
                # Weights and connections are to be those of the load that is measured.
                await self._load(Measure(self._clock.monotonic(), window.begins_at))
                say(await self._load(window))
        finally:
            await self._channels.close()

    async def _load(self, window: Measure) -> CallsReport:
        report = CallsReport(0, Counter(), Counter(), [], [])
        async with asyncio.TaskGroup() as calls:
            for due in due_times(self._plan, window):
                await self._clock.sleep(due - self._clock.monotonic())
                calls.create_task(self._call(report, due))
        return msgspec.structs.replace(report, calls=len(report.lag_micros))

    async def _call(self, report: CallsReport, due: float) -> None:
        report.lag_micros.append(to_micros(self._clock.monotonic() - due))
        try:
            async with self._choose() as endpoint:
                report.by_address[endpoint.address] += 1
                await self._channels.call(endpoint.address, CALL_SECONDS_MAX)
        except (ClientError, grpc.RpcError) as error:
            what = type(error).__name__
            report.errors[what] = report.errors.get(what, 0) + 1
            return
        report.call_micros.append(to_micros(self._clock.monotonic() - due))


async def run(plan: CallsPlan) -> None:
    """Connect, then do what the parent asks for, until it goes."""
    async with connect_async(plan.target) as fleet:
        try:
            async with fleet.router(plan.service) as router:
                say(Connected(len(router.endpoints)))
                await Calls(plan, router, SystemClock()).run()
        except ClientError as error:
            say(Failed(str(error)))


if __name__ == "__main__":
    import uvloop

    uvloop.run(run(msgspec.json.decode(sys.argv[1], type=CallsPlan)))
