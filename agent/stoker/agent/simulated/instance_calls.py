"""What all functions about instances have in common: who may call them, and whom they are about.

Each says by its decorator what its handle leads to: `of_gpu_instance` or `of_compute_instance`. By
the time a method runs, the instance is there, and the faults of its GPU have had their way.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any, Concatenate, NamedTuple, ParamSpec, TypeVar

from stoker.agent.simulated.card import SimulatedCard
from stoker.agent.simulated.handles import Kind, make_handle, parse_handle
from stoker.agent.simulated.instances import MigDevice
from stoker.agent.simulated.library import error
from stoker.agent.simulated.partitioning import Change
from stoker.agent.simulated.partitions import CardRecord, ComputeRecord, InstanceRecord
from stoker.agent.simulated.session import SimulatedSession, device_of, told
from stoker.core.errors import BadInput
from stoker.core.mig.geometry import Geometry, MigProfile

S = TypeVar("S", bound="InstanceCalls")
P = ParamSpec("P")
T = TypeVar("T")


class GpuInstance(NamedTuple):
    """A GPU instance that is there."""

    card: SimulatedCard
    record: InstanceRecord
    profile: MigProfile


class ComputeInstance(NamedTuple):
    """A compute instance that is there."""

    within: GpuInstance
    record: ComputeRecord


class InstanceCalls(SimulatedSession):
    """What the functions about instances share."""

    def _fail_unless_root(self) -> None:
        if not self.is_root:
            raise error("NO_PERMISSION")

    def _fail_unless_in_mig_mode(self, card: SimulatedCard) -> Geometry:
        geometry = geometry_of(card)
        if not card.mig_enabled:
            raise error("NOT_SUPPORTED")
        return geometry

    def _record(self, card: SimulatedCard) -> CardRecord:
        return self._partitions.record(card)

    def _change(self, card: SimulatedCard, change: Change[T]) -> T:
        """Change how a card is partitioned; what the scenario partitions stays as it is."""
        if self._partitions.is_scripted(card):
            raise error("NOT_SUPPORTED")
        now = self._now()
        if self._scenario.resets:
            self._settle(now)
        try:
            return self._partitions.change(card, now, change)
        except BadInput as wrong:
            self._complain_of("partitions", f"{wrong}; nothing was changed")
            raise error("UNKNOWN") from wrong

    def _is_used(self, card: SimulatedCard, device: MigDevice | None = None) -> bool:
        """Whether a process is on the card, or on this one of its devices."""
        if self._partitions.state.is_shared:
            self._scanned_at = float("-inf")  # who began just now is in the way too
        self._scan()
        for process in self._scripted_on(card, self._seconds()):
            on = device_of(card, process) if card.mig_enabled else card
            if on is not None and device in (None, on):
                return True
        if device is not None:
            return any(True for _ in self._working_on(device.uuid))
        uuids = (card.uuid, *(each.uuid for each in card.mig_devices))
        return any(True for uuid in uuids for _ in self._working_on(uuid))

    def _instance_handle(self, card: SimulatedCard, instance: InstanceRecord) -> Any:
        return make_handle(Kind.GPU_INSTANCE, card.index, instance.number)

    def _compute_handle(self, card: SimulatedCard, part: ComputeRecord) -> Any:
        return make_handle(Kind.COMPUTE_INSTANCE, card.index, part.number)

    def card_behind(self, kind: Kind, handle: Any) -> tuple[SimulatedCard | None, int]:
        """Return the card and the number of the instance to which a handle leads, if it does."""
        index, number = parse_handle(kind, handle) or (-1, 0)
        return (self._cards[index] if 0 <= index < len(self._cards) else None), number

    def gpu_instance(self, card: SimulatedCard | None, number: int) -> GpuInstance:
        """Return the GPU instance of this number; raises INVALID_ARGUMENT when it is gone."""
        record = None if card is None else self._record(card).instance(number)
        if card is None or record is None:
            raise error("INVALID_ARGUMENT")
        profiles = geometry_of(card).profiles
        profile = next(each for each in profiles if each.profile_id == record.profile_id)
        return GpuInstance(card, record, profile)

    def compute_instance(self, card: SimulatedCard | None, number: int) -> ComputeInstance:
        """Return the compute instance of this number; raises INVALID_ARGUMENT when it is gone."""
        for instance in () if card is None else self._record(card).instances:
            for part in instance.compute:
                if part.number == number:
                    return ComputeInstance(self.gpu_instance(card, instance.number), part)
        raise error("INVALID_ARGUMENT")


def geometry_of(card: SimulatedCard) -> Geometry:
    """Return what a card can be cut into; raises NOT_SUPPORTED."""
    if card.model.mig is None:
        raise error("NOT_SUPPORTED")
    return card.model.mig


def of_gpu_instance(
    answer: Callable[Concatenate[S, GpuInstance, P], T],
    function: str | None = None,
    symbol: str | None = None,
) -> Callable[Concatenate[S, Any, P], T]:
    """Make a function about a GPU instance, named as `of_card` says."""
    name = function or answer.__name__

    @wraps(answer)
    def call(self: S, handle: Any, /, *arguments: P.args, **_: P.kwargs) -> T:
        card, number = self.card_behind(Kind.GPU_INSTANCE, handle)
        scripted = self.admit(name, card, symbol)
        instance = self.gpu_instance(card, number)
        return told(scripted, lambda: answer(self, instance, *arguments, **_))

    return call


def of_compute_instance(
    answer: Callable[Concatenate[S, ComputeInstance, P], T],
) -> Callable[Concatenate[S, Any, P], T]:
    """Make a function about a compute instance."""
    name = answer.__name__

    @wraps(answer)
    def call(self: S, handle: Any, /, *arguments: P.args, **_: P.kwargs) -> T:
        card, number = self.card_behind(Kind.COMPUTE_INSTANCE, handle)
        scripted = self.admit(name, card)
        part = self.compute_instance(card, number)
        return told(scripted, lambda: answer(self, part, *arguments, **_))

    return call
