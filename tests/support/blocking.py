"""The async client with the sync client's manners, so that one story tells of both."""

import asyncio
import contextlib
import threading
from collections.abc import Generator, Iterator
from typing import Any

from stoker.client import AsyncFleet, Lease

PATIENCE_SECONDS = 20.0


class Blocking:
    """The async client, on a loop in a thread of its own, with the sync client's manners."""

    def __init__(self, address: str, timeout: float, patience: float) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()

        async def make() -> AsyncFleet:
            return AsyncFleet(address, timeout=timeout, patience=patience)

        self._fleet: Any = self._run(make())

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            return self._run(getattr(self._fleet, name)(*arguments, **options))

        return call

    @contextlib.contextmanager
    def allocate(self, **options: Any) -> Generator[Lease]:
        context = self._fleet.allocate(**options)
        lease = self._run(context.__aenter__())
        try:
            yield lease
        except BaseException as error:
            if not self._run(context.__aexit__(type(error), error, error.__traceback__)):
                raise
        else:
            self._run(context.__aexit__(None, None, None))

    def watch(self, version: int) -> Iterator[Any]:
        changes = self._fleet.watch(version)
        try:
            while True:
                yield self._run(anext(changes))
        finally:
            self._run(changes.aclose())

    def close(self) -> None:
        self._run(self._fleet.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _run(self, work: Any) -> Any:
        async def do() -> Any:
            return await work

        return asyncio.run_coroutine_threadsafe(do(), self._loop).result(PATIENCE_SECONDS)
