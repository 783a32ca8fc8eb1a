"""An asyncio event loop on virtual time: production coroutines run in a simulated world, step by
step.

Every step of every task is an event of the world's scheduler, so that a process can be killed
between any two of them and the same seed takes the same steps. There are no sockets, threads or
signals here. When its process dies, the loop is disposed of: its tasks are cancelled and run to
their end, out of the world's sight, since a task that is merely dropped would be ended by the
garbage collector at a moment of its own.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine
from contextvars import Context
from typing import Any, TypeVarTuple

from stoker.testing.process import Killed, Process

Ts = TypeVarTuple("Ts")

# Steps that a disposed loop may take before the tasks that are left count as stuck.
LAST_STEPS_MAX = 10_000


class VirtualLoop(asyncio.BaseEventLoop):
    """The loop of one life of one process; `on_error` is told what no task took care of."""

    def __init__(self, process: Process, on_error: Callable[[BaseException], None]) -> None:
        super().__init__()
        factory: Any = self._make_task  # its type is asyncio's own affair
        self.set_task_factory(factory)
        self._process = process
        self._on_error = on_error
        self._tasks: dict[asyncio.Task[Any], None] = {}
        self._due: dict[asyncio.Handle, None] = {}  # steps that no timer holds back
        self._last_steps: deque[asyncio.Handle] | None = None  # once it is disposed of

    def time(self) -> float:
        """Return virtual seconds."""
        return self._process.now

    def spawn(self, coroutine: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        """Run a task that should only end by being cancelled, or after its work: its errors are
        told.
        """
        task = self.create_task(coroutine, name=name)
        task.add_done_callback(self._look)
        return task

    def call_soon(
        self,
        callback: Callable[[*Ts], object],
        *args: *Ts,
        context: Context | None = None,
    ) -> asyncio.Handle:
        """Have the callback run as the next event but those that are due already."""
        handle = asyncio.Handle(callback, args, self, context)
        if self._last_steps is None:
            self._due[handle] = None
            self._process.after(0.0, lambda: self._step(handle))
        else:
            self._last_steps.append(handle)
        return handle

    def call_at(
        self,
        when: float,
        callback: Callable[[*Ts], object],
        *args: *Ts,
        context: Context | None = None,
    ) -> asyncio.TimerHandle:
        """Have the callback run at a virtual time."""
        handle = asyncio.TimerHandle(when, callback, args, self, context)
        if self._last_steps is None:
            self._process.after(when - self.time(), lambda: self._step(handle))
        return handle

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        """Tell an error of a callback or of a forgotten task."""
        error = context.get("exception")
        if self._last_steps is None:
            self._on_error(error or RuntimeError(str(context.get("message"))))

    def dispose(self) -> None:
        """End every task, without the world, and close."""
        self._last_steps = deque(self._due)
        for _ in range(LAST_STEPS_MAX):
            if not self._last_steps:
                if not self._tasks:
                    break
                for task in list(self._tasks):
                    task.cancel()
                continue
            self._run(self._last_steps.popleft())
        assert not self._tasks, f"tasks that do not end: {list(self._tasks)}"
        self.close()

    def _make_task(
        self,
        loop: asyncio.AbstractEventLoop,
        coroutine: Coroutine[Any, Any, Any],
        context: Context | None = None,
    ) -> asyncio.Task[Any]:
        task = asyncio.Task(coroutine, loop=loop, context=context)
        self._tasks[task] = None
        task.add_done_callback(lambda done: self._tasks.pop(done, None))
        return task

    def _step(self, handle: asyncio.Handle) -> None:
        if not handle.cancelled():
            if self._process.around.is_fatal_step():
                raise Killed("between two steps")
            self._due.pop(handle, None)
            self._run(handle)

    def _run(self, handle: asyncio.Handle) -> None:
        # Documented for makers of loops, and for them alone.
        before = asyncio._get_running_loop()  # noqa: SLF001
        asyncio._set_running_loop(self)  # noqa: SLF001
        try:
            handle._run()  # noqa: SLF001
        finally:
            asyncio._set_running_loop(before)  # noqa: SLF001

    def _look(self, task: "asyncio.Task[None]") -> None:
        error = None if task.cancelled() else task.exception()
        if error is not None and self._last_steps is None:
            self._on_error(error)
