"""Answers local callers: what the agent knows for everybody, what it does for those who may ask."""

import asyncio
import contextlib
import math
import os
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import assert_never

from stoker.agent.driver import DriverError, HostStuck
from stoker.agent.driver_host.link import DriverHost
from stoker.agent.driver_host.states import Unreaped
from stoker.agent.events import Event, ReleaseAsked, ResumeAsked
from stoker.agent.local import Caller
from stoker.agent.model import NodeView, ProcessTable
from stoker.agent.sampler import Sampler, host_pid
from stoker.agent.words import list_gpus, summarize
from stoker.core.clock import Clock
from stoker.core.local import (
    Answer,
    AskProfilingPause,
    AskProfilingResume,
    AskRelease,
    AskResume,
    AskStatus,
    DriverCall,
    DriverFacts,
    GpuFacts,
    GpuName,
    HeldFacts,
    LinkFacts,
    ProcessFacts,
    Profiling,
    Refusal,
    Released,
    ReleaseFacts,
    Request,
    Resumed,
    Status,
    UsersFacts,
)

# How long an answer waits for the disk; then it says that it is being noted down.
SAVE_SECONDS_MAX = 5.0
ROOT = 0

_VERBS: Mapping[type[Request], str] = {
    AskRelease: "release",
    AskResume: "resume",
    AskProfilingPause: "profiling pause",
    AskProfilingResume: "profiling resume",
}


class LocalDesk:
    """What is behind the agent's local socket."""

    def __init__(
        self,
        host: DriverHost,
        sampler: Sampler,
        *,
        aggregators: Sequence[str],
        user: str,
        view: Callable[[], NodeView],
        happen: Callable[[Event], None],
        let_go: Callable[[], Awaitable[DriverError | None]],
        saved: Callable[[], Awaitable[None]],
        clock: Clock,
    ) -> None:
        """`user`: the name of the agent's own; `let_go` waits until the driver is released, and
        `saved` until what has happened is on disk, or known not to get there.
        """
        self._host = host
        self._sampler = sampler
        self._aggregators = tuple(aggregators)
        self._names = {os.geteuid(): user, ROOT: "root"}
        self._view = view
        self._happen = happen
        self._let_go = let_go
        self._saved = saved
        self._clock = clock

    async def answer(self, request: Request, caller: Caller) -> Answer:
        """Answer one request."""
        if not isinstance(request, AskStatus) and caller.uid not in self._names:
            return self._refusal(_VERBS[type(request)], caller)
        match request:
            case AskStatus():
                return self._status()
            case AskRelease(for_seconds=seconds):
                return await self._release(seconds, self._names[caller.uid])
            case AskResume():
                return await self._resume(self._names[caller.uid])
            case AskProfilingPause(for_seconds=seconds):
                self._sampler.pause_profiling(seconds)
                return self._profiling()
            case AskProfilingResume():
                self._sampler.resume_profiling()
                return self._profiling()
            case _:
                assert_never(request)

    def _refusal(self, verb: str, caller: Caller) -> Refusal:
        allowed = " and ".join(f"{name} (uid {uid})" for uid, name in sorted(self._names.items()))
        return Refusal(f"{verb} is for {allowed}; this is uid {caller.uid}")

    # --- the driver

    async def _release(self, seconds: float | None, by: str) -> Answer:
        users = self._users()
        began, now = self._clock.monotonic(), self._clock.now()
        until = None if seconds is None else now + seconds
        self._happen(ReleaseAsked(now, until, by))
        error = await self._let_go()
        took = self._clock.monotonic() - began
        if error is not None and not isinstance(error, HostStuck):
            return Refusal(str(error))
        self._sampler.note_driver()
        unsaved = await self._unsaved()
        state = self._host.state
        return Released(
            release=ReleaseFacts(now, until, by),
            unsaved=unsaved,
            took_seconds=took,
            pending=state.reason if isinstance(state, Unreaped) else "",
            users=users,
        )

    async def _resume(self, by: str) -> Answer:
        was_released = self._view().release is not None
        self._happen(ResumeAsked(self._clock.now(), by))
        return Resumed(was_released=was_released, unsaved=await self._unsaved())

    async def _unsaved(self) -> str:
        """Return why a restart of the agent would undo it; empty: it would not."""
        with contextlib.suppress(TimeoutError):  # then the view says that it is under way
            async with asyncio.timeout(SAVE_SECONDS_MAX):
                await self._saved()
        return self._view().release_unsaved

    def _profiling(self) -> Profiling:
        seconds = self._sampler.profiling_pause_seconds
        return Profiling(
            is_paused=seconds > 0,
            until=self._clock.now() + seconds if math.isfinite(seconds) and seconds else None,
        )

    # --- what is known

    def _status(self) -> Status:
        view = self._view()
        release = view.release
        since = view.last_success_monotonic_seconds
        return Status(
            at=self._clock.now(),
            node=view.identity.node,
            pid=os.getpid(),
            version=view.identity.agent_version,
            simulated=view.identity.simulated,
            driver_version=None if view.inventory is None else view.inventory.driver_version,
            summary=summarize(view),
            driver=self._driver(view),
            release=ReleaseFacts(release.at, release.until, release.by) if release else None,
            release_unsaved=view.release_unsaved,
            profiling=self._profiling(),
            gpus=list_gpus(view),
            last_success_age_seconds=None if since is None else self._clock.monotonic() - since,
            samples=view.samples_total,
            sample_failures=dict(view.sample_failures),
            users=self._users(),
            link=LinkFacts(
                aggregators=self._aggregators,
                is_connected=view.connected,
                outbox_frames=view.outbox_frames,
                frames_dropped=view.frames_dropped,
            ),
        )

    def _driver(self, view: NodeView) -> DriverFacts:
        call, counters = self._host.call, self._host.counters
        return DriverFacts(
            state=view.driver.state,
            reason=view.driver.reason,
            since=self._sampler.driver_since,
            host_pid=host_pid(self._host.state),
            call=None if call is None else DriverCall(call.function, call.gpu_index),
            host_starts=counters.starts_total,
            host_restarts=counters.restarts_total,
            timeouts=counters.timeouts_total,
            kills=counters.kills_total,
        )

    def _users(self) -> UsersFacts:
        view = self._view()
        gpus = list_gpus(view)
        table = view.processes
        read_at = view.processes_monotonic_seconds
        return UsersFacts(
            held=tuple(
                HeldFacts(
                    id=each.id,
                    holder=each.holder,
                    gpu_uuids=each.gpu_uuids,
                    memory_bytes=each.memory_bytes,
                    is_leaving=each.id in view.ending,
                )
                for each in view.held
            ),
            processes=_processes(table, gpus) if table else (),
            processes_age_seconds=None if read_at is None else self._clock.monotonic() - read_at,
            unread_gpus=tuple(
                GpuName(gpu.uuid, gpu.index)
                for gpu in gpus
                if gpu.uuid and (table is None or gpu.uuid in table.unread_gpu_uuids)
            ),
        )


def _processes(table: ProcessTable, gpus: Sequence[GpuFacts]) -> tuple[ProcessFacts, ...]:
    indices = {gpu.uuid: gpu.index for gpu in gpus}
    return tuple(
        ProcessFacts(
            pid=each.process.pid,
            user=each.process.user,
            command=each.process.command,
            gpu_uuid=each.process.gpu_uuid,
            gpu_index=indices.get(each.process.gpu_uuid),
            allocation_id=each.allocation_id,
        )
        for each in table.processes
    )
