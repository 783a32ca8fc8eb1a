"""The bench of placement decides what the aggregator decides: a real one, asked over gRPC."""

import contextlib
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from random import Random

import grpc
from grpc import aio
from tests.integration.aggregator_stage import LOCAL, READING, TinyAgent
from tests.support.daemons import Stage as Daemons
from tests.support.waiting import until_true

from stoker.aggregator.placing.placer import Placer
from stoker.testing.workloads.generated import Kinds, generate
from stoker.testing.workloads.stage import GPU_MEMORY_BYTES, Stage
from stoker.testing.workloads.tasks import Host, Task, Workload
from stoker.v1 import agent_pb2, fleet_pb2, fleet_pb2_grpc, types_pb2

# Few enough hosts that the fleet fills up and refuses; enough tasks that what is learned counts.
# (The service takes no request for CPU alone: only workloads have such tasks.)
EVERY_HOST = 2
TASKS = 250
KINDS = Kinds(cpu_alone=0, multiples=600, constrained_ratio=0.3)

# Node and GPUs; None: refused.
Place = tuple[str, frozenset[str]] | None


def workload() -> Workload:
    made = generate(Random(7), KINDS)
    hosts = made.hosts[::EVERY_HOST]
    models = {host.model for host in hosts}
    known = [task for task in made.tasks if models.issuperset(task.models)]
    return Workload(hosts, tuple(known[:TASKS]))


def decided_by_the_bench(played: Workload) -> list[Place]:
    stage = Stage(played.hosts, Placer())
    places: list[Place] = []
    for number, task in enumerate(played.tasks):
        placements = stage.ask(task, str(number))
        if placements is None:
            places.append(None)
        else:
            (only,) = placements
            places.append((only.node, frozenset(device.uuid for device in only.devices)))
    return places


class HostAgent(TinyAgent):
    """An agent of one of the workload's hosts."""

    def __init__(self, host: Host) -> None:
        super().__init__(host.name, host.gpus)
        self._host = host
        for gpu in self.gpus:
            gpu.model = host.model
            gpu.memory_total_bytes = GPU_MEMORY_BYTES

    def hello(self) -> agent_pb2.Hello:
        hello = super().hello()
        hello.inventory.host.cpu_milli = self._host.cpu_milli
        hello.inventory.host.memory_bytes = self._host.memory_bytes
        return hello


@contextlib.asynccontextmanager
async def ready(agent: HostAgent, channel: aio.Channel) -> AsyncGenerator[None]:
    """The agent is connected, and has told that all is well."""
    async with agent.connected(channel):
        await agent.say(driver=READING, processes=[], samples=True, held=True)
        await until_true("an acknowledgement", lambda: agent.acked > 0)
        yield


async def decided_by_the_service(
    fleet: "fleet_pb2_grpc.FleetAsyncStub", tasks: Sequence[Task]
) -> list[Place]:
    places: list[Place] = []
    for task in tasks:
        try:
            answer = await fleet.Allocate(fleet_pb2.AllocateRequest(request=message_of(task)))
        except aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED:
                raise
            places.append(None)
        else:
            granted = answer.allocation
            uuids = frozenset(device.uuid for device in granted.devices)
            places.append((granted.node, uuids))
    return places


def message_of(task: Task) -> types_pb2.Request:
    request = task.request()
    return types_pb2.Request(
        gpus=request.gpus,
        compute_milli=request.compute_milli,
        cpu_milli=request.cpu_milli,
        host_memory_bytes=request.host_memory_bytes,
        models=request.models,
        holder=request.holder,
        ttl_seconds=600.0,
    )


async def test_the_same_requests_get_the_same_nodes_and_gpus(tmp_path: Path) -> None:
    played = workload()
    expected = decided_by_the_bench(played)
    refused = expected.count(None)
    assert 10 < refused < TASKS / 2, "a workload on which little is decided"
    assert len({place[0] for place in expected if place is not None}) == len(played.hosts)
    async with Daemons(tmp_path) as daemons, contextlib.AsyncExitStack() as agents:
        told = await daemons.aggregator().start()
        channel = await agents.enter_async_context(
            aio.insecure_channel(told["listen"], options=LOCAL)
        )
        for host in played.hosts:
            await agents.enter_async_context(ready(HostAgent(host), channel))
        found = await decided_by_the_service(fleet_pb2_grpc.FleetStub(channel), played.tasks)
    assert found == expected
