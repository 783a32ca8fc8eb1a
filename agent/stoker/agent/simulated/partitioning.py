"""Which partitions the cards of a node have: those that the scenario says, or those that were made.

A card that the scenario partitions at some time is the scenario's: calls change nothing on it. All
others are as the calls of this process and of others left them (`simulated.mig_state`), and as
resets and unloaded drivers did.
"""

from collections.abc import Callable, Iterator, Sequence
from random import Random
from typing import TypeVar
from weakref import WeakMethod

import msgspec

from stoker.agent.simulated.card import SimulatedCard
from stoker.agent.simulated.instances import MigDevice, Place, lay_out, random_uuid
from stoker.agent.simulated.mig_state import MigState
from stoker.agent.simulated.partitions import (
    NUMBER_BITS,
    CardRecord,
    ComputeRecord,
    InstanceRecord,
    after_reset,
    after_unload,
    fault,
)
from stoker.agent.simulated.scenario import NOTHING_HAPPENS, Scenario, ScriptedMig, is_due
from stoker.core.errors import BadInput
from stoker.core.gpu_models import GpuModel

T = TypeVar("T")

# A change of a card's partitions: what it is after that, and what the call returns.
Change = Callable[[CardRecord], tuple[CardRecord, T]]

_UNPARTITIONED = CardRecord()
# Cards before these are reset when their MIG mode changes, and keep it (Hopper).
_TOGGLED_AT_ONCE = (9, 0)


def is_toggled_at_once(model: GpuModel) -> bool:
    """Whether MIG mode needs no reset, and does not outlast the driver."""
    return model.compute_capability >= _TOGGLED_AT_ONCE


class Partitioning:
    """The partitions of a node's cards; hears of every change, whoever made it."""

    def __init__(
        self,
        cards: Sequence[SimulatedCard],
        state: MigState,
        heard: Callable[[SimulatedCard, float], None],
    ) -> None:
        """Take the cards, and where their partitions are kept; `heard`, a method, hears of changes.

        Raises BadInput when what is kept cannot be.
        """
        # Weakly: a node that nobody has any more is gone at once, and its session with the driver.
        self._cards, self._heard = cards, WeakMethod(heard)
        self.state = state
        self._records = [_UNPARTITIONED for _ in cards]
        self._scenario, self._began_at = NOTHING_HAPPENS, 0.0
        self._scripted: frozenset[int] = frozenset()
        self._due: dict[int, ScriptedMig | None] = {}  # by index, as it was last seen
        self._check()
        self._take(None)

    def record(self, card: SimulatedCard) -> CardRecord:
        """Return how a card is partitioned."""
        return self._records[card.index]

    def is_scripted(self, card: SimulatedCard) -> bool:
        """Whether its partitions are the scenario's, and no call changes them."""
        return card.index in self._scripted

    def play(self, scenario: Scenario, began_at: float, now: float) -> None:
        """Go by this scenario from now on; raises BadInput when what is kept cannot be."""
        before = self._scripted
        self._scenario, self._began_at = scenario, began_at
        self._scripted = frozenset(mig.gpu for mig in scenario.mig)
        for index in before - self._scripted:
            self._due.pop(index, None)
            self._adopt(self._cards[index], self._kept(self._cards[index]), now)
        if not scenario.driver_loaded:
            self._unload(now)

    def settle(self, seconds: float) -> None:
        """Bring the cards so far into the scenario: what it partitions, and what it resets.

        Raises BadInput when what is kept cannot be.
        """
        for index in self._scripted:
            self._script(self._cards[index], seconds)
        for reset in self._scenario.resets:
            card, at = self._cards[reset.gpu], self._began_at + reset.at_seconds
            is_ours = not self.is_scripted(card)
            if reset.at_seconds <= seconds and is_ours and _is_outstanding(self.record(card), at):
                self._reset(card, at, self._began_at + seconds)

    def refresh(self, now: float) -> None:
        """Take what other processes changed; raises BadInput when what is kept cannot be."""
        if self.state.refresh():
            self._check()
            self._take(now)

    def change(self, card: SimulatedCard, now: float, change: Change[T]) -> T:
        """Change the partitions of a card, and return what `change` returns beside them.

        Raises BadInput when what is kept cannot be, and what `change` raises.
        """
        with self.state.changing():
            self._catch_up(now)
            before = self._records[card.index]
            after, answer = change(before)
            if after != before:
                self._keep(card, msgspec.structs.replace(after, changed_at=now), now)
        return answer

    # What is kept -----------------------------------------------------------------------------

    def _catch_up(self, now: float) -> None:
        if self.state.is_shared:
            self._check()
            self._take(now)

    def _check(self) -> None:
        """Raise BadInput when a card is said to be partitioned as it cannot be."""
        for card in self._cards:
            if (wrong := fault(card.model.mig, self._kept(card))) is not None:
                raise BadInput(
                    f"{self.state.name}: GPU {card.index} ({card.model.name}, {card.uuid}): {wrong}"
                )

    def _take(self, now: float | None) -> None:
        for card in self._cards:
            if not self.is_scripted(card):
                self._adopt(card, self._kept(card), now)

    def _kept(self, card: SimulatedCard) -> CardRecord:
        return self.state.cards.get(_key(card), _UNPARTITIONED)

    def _keep(self, card: SimulatedCard, record: CardRecord, now: float) -> None:
        self.state.keep({**self.state.cards, _key(card): record}, self.state.unloaded_at)
        self._adopt(card, record, now)

    def _adopt(self, card: SimulatedCard, record: CardRecord, now: float | None) -> None:
        """Let a card be partitioned so; when the node is made (None) nobody hears of it."""
        before = self._records[card.index]
        if record is before:
            return
        self._records[card.index] = record
        if now is not None and record.resets != before.resets:
            card.reload()
        if (record.is_enabled, record.instances) == (before.is_enabled, before.instances):
            return
        known = {device.uuid: device for device in card.mig_devices}
        card.mig_enabled = record.is_enabled
        card.mig_devices = tuple(
            known.get(uuid) or MigDevice(card, place, uuid)
            for place, uuid in _devices(card, record)
        )
        if now is not None and (heard := self._heard()) is not None:
            heard(card, now)

    # What the scenario does -------------------------------------------------------------------

    def _script(self, card: SimulatedCard, seconds: float) -> None:
        due: ScriptedMig | None = None
        for mig in self._scenario.mig:
            if mig.gpu == card.index and is_due(mig, seconds):
                due = mig
        if card.index not in self._due or self._due[card.index] is not due:
            self._due[card.index] = due
            record = _scripted(card, due, resets=self.record(card).resets)
            self._adopt(card, record, self._began_at + seconds)

    def _reset(self, card: SimulatedCard, at: float, now: float) -> None:
        with self.state.changing():
            self._catch_up(now)
            record = self.record(card)
            if _is_outstanding(record, at):
                self._keep(card, after_reset(record, at), now)

    def _unload(self, now: float) -> None:
        """Let every card be as after an unloading, once for all processes."""
        state, at = self.state, self._began_at
        with state.changing():
            self._check()
            if not state.is_shared or state.unloaded_at is None or state.unloaded_at < at:
                unloaded = {
                    _key(card): after_unload(
                        state.cards[_key(card)], is_toggled_at_once=is_toggled_at_once(card.model)
                    )
                    for card in self._cards
                    if _key(card) in state.cards
                }
                state.keep({**state.cards, **unloaded}, at)
            self._take(now)


def _key(card: SimulatedCard) -> str:
    # A card of another model in the same place is another card.
    return f"{card.uuid} {card.model.name}"


def _is_outstanding(record: CardRecord, at: float) -> bool:
    """Whether a reset at this time was not yet done: what was made since then was made after."""
    return record.reset_at < at and record.changed_at <= at


def _scripted(card: SimulatedCard, due: ScriptedMig | None, *, resets: int) -> CardRecord:
    """Return the partitions that the scenario says of a card that was reset so often."""
    if due is None:
        return CardRecord(resets=resets)
    instances: dict[int, InstanceRecord] = {}
    for at in lay_out(card.model, due.devices):
        # The same again whenever the driver is opened; another one once it was recreated.
        key = f"{card.uuid}/{at.name}/{at.start}/{at.compute_instance_id}"
        chance = Random(f"{key}/{due.from_seconds}")
        uuid, number = random_uuid("MIG", chance), chance.getrandbits(NUMBER_BITS)
        instance = instances.get(at.gpu_instance_id) or InstanceRecord(
            id=at.gpu_instance_id,
            number=number,
            profile_id=at.profile.profile_id,
            start=at.start,
            size=at.profile.memory_slices,
        )
        made = ComputeRecord(
            id=at.compute_instance_id,
            number=number,
            profile_id=at.compute_profile.profile_id,
            start=sum(each.size for each in instance.compute),
            size=at.compute_slices,
            uuid=uuid,
        )
        instances[instance.id] = msgspec.structs.replace(
            instance, compute=(*instance.compute, made)
        )
    return CardRecord(
        is_enabled=True, is_pending=True, instances=tuple(instances.values()), resets=resets
    )


def _devices(card: SimulatedCard, record: CardRecord) -> Iterator[tuple[Place, str]]:
    """Yield where each MIG device is, and its UUID, in the driver's order."""
    profiles = {each.profile_id: each for each in card.model.mig_profiles}
    for instance in record.instances:
        profile = profiles[instance.profile_id]
        for part in instance.compute:
            is_whole = part.size == profile.compute_slices
            name = profile.name if is_whole else f"{part.size}c.{profile.name}"
            yield Place(name, profile, instance.start, part.size, instance.id, part.id), part.uuid
