"""Answers local callers: what the agent knows for everybody, what it does for those who may ask."""

import asyncio
import math
import os
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import assert_never

import msgspec

from stoker.agent.driver import DriverError, HostStuck
from stoker.agent.driver_host.link import DriverHost
from stoker.agent.driver_host.states import Unreaped
from stoker.agent.events import Event, FaultsForgiven, ReleaseAsked, ResumeAsked
from stoker.agent.local import Caller
from stoker.agent.model import NodeView, ProcessTable
from stoker.agent.owners import DeviceHolder
from stoker.agent.sampler import Sampler, host_pid
from stoker.agent.words import list_blind, list_gpus, summarize
from stoker.core.clock import Clock
from stoker.core.errors import ExitCode, StokerError
from stoker.core.local import (
    Answer,
    AskMig,
    AskProfilingPause,
    AskProfilingResume,
    AskRelease,
    AskResume,
    AskSetHealthy,
    AskStatus,
    AssignmentFacts,
    DriverCall,
    DriverFacts,
    GpuFacts,
    GpuName,
    HeldFacts,
    HolderFacts,
    LinkFacts,
    Mig,
    ProcessFacts,
    Profiling,
    Refusal,
    Released,
    ReleaseFacts,
    Request,
    Resumed,
    SetHealthy,
    Status,
    UsersFacts,
)
from stoker.core.mig.reports import MigAsk, MigReport

# How long an answer waits for the disk; then it says that it is being noted down.
SAVE_SECONDS_MAX = 5.0
ROOT = 0

_VERBS: Mapping[type[Request], str] = {
    AskRelease: "release",
    AskResume: "resume",
    AskProfilingPause: "profiling pause",
    AskProfilingResume: "profiling resume",
    AskSetHealthy: "set-healthy",
}
# What of MIG is for everybody: it changes nothing.
_MIG_LOOKS = frozenset({"plan", "status"})


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
        holders: Callable[[], Awaitable[tuple[DeviceHolder, ...]]],
        ask_mig: Callable[[MigAsk], Awaitable[MigReport]],
        clock: Clock,
    ) -> None:
        """`user`: the name of the agent's own; `let_go` waits until the driver is released, and
        `saved` until what has happened is on disk, or known not to get there; `holders` tells who
        else has the driver's files open, or raises StokerError; so does `ask_mig` answer what is
        asked about partitions.
        """
        self._host = host
        self._sampler = sampler
        self._aggregators = tuple(aggregators)
        self._names = {os.geteuid(): user, ROOT: "root"}
        self._view = view
        self._happen = happen
        self._let_go = let_go
        self._saved = saved
        self._holders = holders
        self._ask_mig = ask_mig
        self._clock = clock

    async def answer(self, request: Request, caller: Caller) -> Answer:
        """Answer one request."""
        verb = _restricted(request)
        if verb and caller.uid not in self._names:
            return self._refusal(verb, caller)
        match request:
            case AskStatus():
                return await self._status()
            case AskSetHealthy(gpu=gpu):
                return await self._set_healthy(gpu, self._names[caller.uid])
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
            case AskMig(ask=ask):
                return Mig(await self._ask_mig(ask))
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
        users = await self._with_holders(users)
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
        await self._until_saved()  # where it has not, the view says that it is under way
        return self._view().release_unsaved

    async def _until_saved(self) -> bool:
        """Wait until the disk has answered; return whether it has."""
        try:
            async with asyncio.timeout(SAVE_SECONDS_MAX):
                await self._saved()
        except TimeoutError:
            return False
        return True

    def _profiling(self) -> Profiling:
        seconds = self._sampler.profiling_pause_seconds
        return Profiling(
            is_paused=seconds > 0,
            until=self._clock.now() + seconds if math.isfinite(seconds) and seconds else None,
        )

    # --- health

    async def _set_healthy(self, name: str, by: str) -> Answer:
        view = self._view()
        gpus = [gpu for gpu in list_gpus(view) if gpu.uuid and name in (gpu.uuid, str(gpu.index))]
        named = {each.uuid for each in gpus} | {each.uuid for each in view.health} & {name}
        if len(named) != 1:
            known = ", ".join(f"{gpu.index} ({gpu.uuid})" for gpu in list_gpus(view)) or "none"
            found = f"{len(named)} GPUs are" if named else "no GPU is"
            return Refusal(f"{found} called {name!r} here; there are {known}", ExitCode.NOT_FOUND)
        (uuid,) = named
        assert uuid is not None
        lasting = next((each.faults for each in view.health if each.uuid == uuid), ())
        self._happen(FaultsForgiven(self._clock.now(), uuid, by))
        is_answered = await self._until_saved()
        forgotten = tuple(fault.reason for fault in lasting)
        unsaved = self._view().health_unsaved if is_answered else "it is being noted down"
        return SetHealthy(uuid, forgotten, unsaved)

    # --- what is known

    async def _status(self) -> Status:
        view = self._view()
        users, blind = self._users(), list_blind(view)
        if not view.identity.simulated:
            users = await self._with_holders(users)
            if users.holders_unknown:
                blind = (*blind, users.holders_unknown)
                users = msgspec.structs.replace(users, holders_unknown="")
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
            users=users,
            blind=blind,
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

    async def _with_holders(self, users: UsersFacts) -> UsersFacts:
        """Return the users with everybody else who has device files of the driver open."""
        try:
            found = await self._holders()
        except StokerError as error:
            return msgspec.structs.replace(users, holders_unknown=str(error))
        ours = {os.getpid(), host_pid(self._host.state)}
        holders = tuple(_holder(each) for each in found if each.pid not in ours)
        return msgspec.structs.replace(users, holders=holders)

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
                    mig_device_uuids=each.mig_device_uuids,
                    compute_milli=each.compute_milli,
                    cpu_milli=each.cpu_milli,
                    host_memory_bytes=each.host_memory_bytes,
                    gang_nodes=each.gang_nodes,
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
            assignments=_assignments(table, gpus) if table else (),
            assignments_unknown=table.assignments_unknown if table else "",
        )


def _restricted(request: Request) -> str:
    """Return what is asked that is not for everybody; empty: it is."""
    if isinstance(request, AskStatus):
        return ""
    if isinstance(request, AskMig):
        return "" if request.ask.verb in _MIG_LOOKS else f"mig {request.ask.verb}"
    return _VERBS[type(request)]


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
            memory_used_bytes=each.process.memory_used_bytes,
            owner=each.process.owner.described(),
        )
        for each in table.processes
    )


def _assignments(table: ProcessTable, gpus: Sequence[GpuFacts]) -> tuple[AssignmentFacts, ...]:
    indices = {gpu.uuid: gpu.index for gpu in gpus}
    return tuple(
        AssignmentFacts(each.gpu_uuid, indices.get(each.gpu_uuid), each.by, each.holder)
        for each in table.assignments
    )


def _holder(holder: DeviceHolder) -> HolderFacts:
    return HolderFacts(
        pid=holder.pid,
        user=holder.user,
        command=holder.command,
        devices=holder.devices,
        owner=holder.owner.described(),
    )
