"""A driver of MIG in memory, and a stage on which the keeper of partitions acts upon such GPUs.

The driver keeps to the rules that matter here: places do not overlap, what is in use cannot be
taken away, a mode that cannot be changed now is pending. The stage can fail a step, before or after
it took effect, and lose everything but what was written down, as a crash does.
"""

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

import msgspec

from stoker.agent.mig import actions as do
from stoker.agent.mig import events as on
from stoker.agent.mig.comparing import target_of
from stoker.agent.mig.in_the_way import NOBODY_THERE, GpuUsers, ProcessToEnd
from stoker.agent.mig.keeping import Keeper
from stoker.agent.mig.operations import Book, Declared
from stoker.agent.partitions import (
    Activation,
    ComputeInstance,
    CreateComputeInstance,
    CreateGpuInstance,
    DestroyComputeInstance,
    DestroyGpuInstance,
    GpuInstance,
    GpuMigStatus,
    GpuPartitions,
    SetMode,
    Step,
    Target,
)
from stoker.core.mig.boards import Board
from stoker.core.mig.geometry import Layout, Placed, Wanted
from stoker.core.mig.layouts import objection
from stoker.core.mig.reports import InTheWay

NOW = 1_800_000_000.0


class Refused(Exception):
    """The driver would not."""


def partitions(
    board: Board, layout: Layout = (), *, is_enabled: bool = True, index: int = 0
) -> GpuPartitions:
    """Return a GPU that is partitioned so, every compute instance at the lowest place."""
    driver = MemoryDriver(board, index=index, is_enabled=is_enabled)
    for placed in layout:
        profile = board.geometry.profile(placed.profile)
        assert profile is not None
        driver.do(CreateGpuInstance(profile.profile_id, profile.name, placed.start, placed.size))
        for slices in sorted(placed.compute or (profile.compute_slices,), reverse=True):
            driver.do(CreateComputeInstance(placed.start, 0, slices))
    return driver.gpu


class MemoryDriver:
    """One GPU. `busy`: the IDs of the GPU instances that somebody uses."""

    def __init__(
        self,
        board: Board,
        layout: Layout = (),
        *,
        index: int = 0,
        is_enabled: bool = True,
        is_open: bool = False,
    ) -> None:
        self.busy: set[int] = set()
        self.is_open = is_open  # by somebody, so that a change of mode is pending
        self.gpu = GpuPartitions(
            uuid=f"GPU-{index}",
            index=index,
            model=board.driver_name,
            pci_device_id=board.pci_device_ids[0],
            is_enabled=is_enabled,
            is_pending=is_enabled,
            toggles_at_once=board.is_toggled_at_once,
            geometry=board.geometry,
            instances=partitions(board, layout, index=index).instances if layout else (),
        )
        self.made = sum(len(each.compute_instances) for each in self.gpu.instances)

    def do(self, step: Step) -> Activation | None:
        """Do a step, or raise Refused."""
        instances = {each.id: each for each in self.gpu.instances}
        match step:
            case SetMode(is_enabled):
                return self._set_mode(is_enabled)
            case DestroyComputeInstance(id_, compute_id):
                if id_ in self.busy:
                    raise Refused("in use by another client")
                left = tuple(
                    each for each in instances[id_].compute_instances if each.id != compute_id
                )
                assert len(left) < len(instances[id_].compute_instances)
                instances[id_] = replace(instances[id_], compute_instances=left)
            case DestroyGpuInstance(id_):
                if instances[id_].compute_instances:
                    raise Refused("it has compute instances")
                del instances[id_]
            case CreateGpuInstance(profile_id, profile, start, size):
                assert self.gpu.is_enabled
                assert self.gpu.is_pending
                id_ = min(set(range(1, 20)) - instances.keys())
                instances[id_] = GpuInstance(id_, profile_id, profile, start, size, ())
            case CreateComputeInstance(start, profile_id, slices):
                (inside,) = [each for each in instances.values() if each.start == start]
                made = self._compute_instance(inside, profile_id, slices)
                parts = (*inside.compute_instances, made)
                instances[inside.id] = replace(inside, compute_instances=parts)
        told = tuple(sorted(instances.values(), key=lambda each: each.start))
        gpu = replace(self.gpu, instances=told)
        if (wrong := objection(gpu.geometry, places(gpu))) is not None:
            raise Refused(wrong)
        self.gpu = gpu
        return None

    def reset(self) -> None:
        """Reset the GPU, as a reboot does: instances are gone, the pending mode is in force."""
        self.gpu = replace(self.gpu, is_enabled=self.gpu.is_pending, instances=())

    def _set_mode(self, is_enabled: bool) -> Activation:
        if is_enabled == self.gpu.is_enabled:
            self.gpu = replace(self.gpu, is_pending=is_enabled)
        elif self.is_open:
            if not self.gpu.toggles_at_once:
                self.gpu = replace(self.gpu, is_pending=is_enabled)
            return Activation.IN_USE
        else:
            if self.gpu.instances:
                raise Refused("it has GPU instances")
            self.gpu = replace(self.gpu, is_enabled=is_enabled, is_pending=is_enabled)
        return Activation.DONE

    def _compute_instance(
        self, inside: GpuInstance, profile_id: int, slices: int
    ) -> ComputeInstance:
        profile = self.gpu.geometry.profile(inside.profile)
        assert profile is not None
        taken = {
            each.start + place
            for each in inside.compute_instances
            for place in range(each.compute_slices)
        }
        stride = slices if slices < 3 else 4
        for start in range(0, profile.compute_slices - slices + 1, stride):
            if not taken & set(range(start, start + slices)):
                break
        else:
            raise Refused("no room for a compute instance")
        self.made += 1
        id_ = min(set(range(8)) - {each.id for each in inside.compute_instances})
        uuid = f"MIG-{self.gpu.index}-{self.made}"
        return ComputeInstance(id_, profile_id, slices, start, uuid)


def places(gpu: GpuPartitions) -> Layout:
    """Return where the GPU instances are, whatever is in them."""
    return tuple(Placed(each.start, each.size, each.profile) for each in gpu.instances)


class Crashed(Exception):
    """The agent was killed: only what is on disk, and on the card, is left."""


def a_user(gpu: GpuPartitions, name: str = "process 7 (python, bob)") -> InTheWay:
    """Return somebody who uses a GPU."""
    return InTheWay("process", name, (gpu.uuid,), pid=7)


# Whether the step of this number, from zero, fails: "before" or "after" its effect; "": not.
Fails = Callable[[int, Step], str]


def never(_number: int, _step: Step) -> str:
    """No step fails."""
    return ""


@dataclass
class Stage:
    """GPUs, the book on disk, and an agent that may be killed and started again."""

    drivers: list[MemoryDriver]
    users: dict[str, GpuUsers] = field(default_factory=dict[str, GpuUsers])
    disk: bytes = b""
    declared: Mapping[str, Declared] = field(default_factory=dict[str, Declared])
    now: float = NOW
    fails: Fails = never
    crash_after: int | None = None  # so many actions
    saving_fails: str = ""
    starts: int = 0
    actions: list[do.MigAction] = field(default_factory=list[do.MigAction])
    ended: list[ProcessToEnd] = field(default_factory=list[ProcessToEnd])
    letting_go_fails: str = ""
    has_let_go: bool = False

    def start(self) -> "Stage":
        """Start the agent, with what is on disk, and let it do all that it has to do."""
        self.starts += 1
        self.keeper = Keeper(f"start-{self.starts}")
        self.has_let_go = False
        book = msgspec.json.decode(self.disk, type=Book) if self.disk else Book()
        read = on.PartitionsRead(tuple(each.gpu for each in self.drivers))
        self.send(on.Loaded(book), read, on.Configured(self.declared))
        return self

    def send(self, *events: on.MigEvent) -> list[do.MigAction]:
        """Let these happen, and all that follows from them; return what was done."""
        queue = deque(events)
        begun = len(self.actions)
        while queue:
            for action in self.keeper.handle(queue.popleft(), self.now):
                self.actions.append(action)
                queue.extend(self._act(action))
                if self.crash_after is not None:
                    self.crash_after -= 1
                    if self.crash_after < 0:
                        self.crash_after = None
                        raise Crashed
        return self.actions[begun:]

    def apply(
        self,
        wanted: Wanted | Mapping[str, Wanted],
        operation_id: str = "op",
        *,
        drain_seconds: float = 0.0,
        evict: bool = False,
    ) -> list[do.MigAction]:
        """Ask for it, of the first GPU when none is named."""
        if isinstance(wanted, Wanted):
            wanted = {self.gpu.uuid: wanted}
        declared = {uuid: Declared(each, "wish") for uuid, each in wanted.items()}
        return self.send(on.ApplyAsked(1, operation_id, declared, drain_seconds, evict))

    def undo(self, operation_id: str = "undo") -> list[do.MigAction]:
        """Ask for the layout before."""
        return self.send(on.UndoAsked(1, operation_id, ()))

    def pass_time(self, seconds: float) -> None:
        """Let time pass, with a tick whenever one is wanted."""
        until = self.now + seconds
        while (due := self.keeper.due) is not None and due <= until:
            self.now = max(self.now, due)
            self.send(on.Ticked())
            assert self.keeper.due is None or self.keeper.due > self.now, "a loop without end"
        self.now = until

    def see(self, gpu_uuid: str, users: GpuUsers = NOBODY_THERE) -> None:
        """Let somebody use a GPU, and the agent see it."""
        self.users[gpu_uuid] = users
        self.send(on.UsersSeen(dict(self.users)))

    @property
    def gpu(self) -> GpuPartitions:
        """The first GPU, as it is."""
        return self.drivers[0].gpu

    def status(self, index: int = 0) -> GpuMigStatus:
        """Return what is told of a GPU."""
        uuid = self.drivers[index].gpu.uuid
        return next(each for each in self.keeper.statuses() if each.gpu_uuid == uuid)

    @property
    def steps(self) -> list[Step]:
        """All steps that were asked for, with those that failed."""
        return [each.step for each in self.actions if isinstance(each, do.DoStep)]

    def answers(self) -> Iterable[str]:
        """Return what was answered, "" for yes."""
        return [each.refusal for each in self.actions if isinstance(each, do.Answer)]

    def _act(self, action: do.MigAction) -> list[on.MigEvent]:
        match action:
            case do.Save(ticket, book):
                if self.saving_fails:
                    return [on.SavingFailed(ticket, self.saving_fails)]
                self.disk = msgspec.json.encode(book)
                return [on.Saved(ticket)]
            case do.ReadPartitions(uuid):
                return [on.PartitionsRead((self._driver(uuid).gpu,), is_all=False)]
            case do.LookForUsers(ticket, uuid):
                return [on.UsersSeen({uuid: self.users.get(uuid, NOBODY_THERE)}, ticket)]
            case do.DoStep(uuid, step):
                return [self._step(uuid, step)]
            case do.LetGoOfDriver():
                self.has_let_go = not self.letting_go_fails
                if self.letting_go_fails:
                    return [on.LettingGoFailed(self.letting_go_fails)]
                return [on.DriverLetGo()]
            case do.TakeDriver():
                self.has_let_go = False
                return [on.DriverTaken()]
            case do.EndProcesses(uuid, processes):
                self.ended += processes
                return [on.ProcessesEnded(uuid)]
            case do.Answer() | do.Report():
                return []

    def _step(self, uuid: str, step: Step) -> on.MigEvent:
        assert self.has_let_go == isinstance(step, SetMode)
        failing = self.fails(len(self.steps) - 1, step)
        if failing == "before":
            return on.StepFailed(uuid, "busy", "in use by another client")
        try:
            activation = self._driver(uuid).do(step)
        except Refused as error:
            return on.StepFailed(uuid, "busy", str(error))
        if failing:
            return on.StepFailed(uuid, "unknown", "the helper went away")
        return on.StepDone(uuid, activation)

    def _driver(self, uuid: str) -> MemoryDriver:
        return next(each for each in self.drivers if each.gpu.uuid == uuid)


def as_target(gpu: GpuPartitions) -> Target:
    """Return how a GPU is; it must be whole: no instance half made, no mode pending."""
    assert all(each.compute_instances for each in gpu.instances), gpu
    assert gpu.is_enabled == gpu.is_pending, gpu
    return target_of(gpu)
