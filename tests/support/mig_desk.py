"""An agent of few words at a real local socket: answers what is asked of partitions by a script."""

import asyncio
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from stoker.agent.local import Caller, LocalDoor
from stoker.core.clock import SystemClock
from stoker.core.local import Answer, AskMig, Mig, Refusal, Request
from stoker.core.mig.reports import GpuMigFacts, GpuPlan, MigAsk, MigReport

replace = msgspec.structs.replace


@dataclass
class Desk:
    """Plans the same for everybody; what it applies goes through `ways`, a look for each."""

    plans: tuple[GpuPlan, ...]
    gpus: tuple[GpuMigFacts, ...]  # before anything is applied
    ways: list[tuple[GpuMigFacts, ...]] = field(default_factory=list[tuple[GpuMigFacts, ...]])
    refusal: Refusal | None = None  # of what would change something
    asked: list[MigAsk] = field(default_factory=list[MigAsk])
    applied: str = ""  # the operation

    async def answer(self, request: Request, _caller: Caller) -> Answer:
        assert isinstance(request, AskMig), f"asked for {request}"
        ask = request.ask
        self.asked.append(ask)
        if ask.verb in ("apply", "undo"):
            if self.refusal is not None:
                return self.refusal
            self.applied = ask.operation_id
        elif ask.verb == "status" and self.applied and self.ways:
            self.gpus = self.ways[0] if len(self.ways) == 1 else self.ways.pop(0)
        plans = () if ask.verb == "status" else self.plans
        gpus = tuple(self._named(each) for each in self.gpus)
        return Mig(MigReport("host-a", ask.verb, ask.config, ask.operation_id, plans, gpus))

    def of(self, verb: str) -> list[MigAsk]:
        """Return what was asked with that verb."""
        return [each for each in self.asked if each.verb == verb]

    def _named(self, gpu: GpuMigFacts) -> GpuMigFacts:
        return replace(gpu, operation_id=self.applied) if self.applied else gpu


@contextmanager
def served(path: Path, desk: Desk) -> Generator[None]:
    """Serve the desk at a socket, from a thread of its own."""
    ready, stop = threading.Event(), list[Callable[[], object]]()

    async def serve() -> None:
        door = LocalDoor.open(path)
        serving = asyncio.create_task(door.serve(desk.answer, clock=SystemClock()))
        loop = asyncio.get_running_loop()
        stop.append(lambda: loop.call_soon_threadsafe(serving.cancel))
        ready.set()
        try:
            await asyncio.gather(serving, return_exceptions=True)
        finally:
            door.close()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    try:
        assert ready.wait(30.0)
        yield
    finally:
        stop[0]()
        thread.join()
