"""How a simulated card is partitioned, and which changes its driver admits: values and rules.

The rules are stated here a second time, apart from `core.mig.layouts`, by which layouts are
planned: a plan that breaks one of them is to be refused by the simulated driver as by a real one,
and not to be let through by the same mistake. Where a real driver chooses a place itself, so does
this one, as NVIDIA's guide shows: where the fewest other places are lost.
"""

from collections.abc import Iterator
from enum import StrEnum

import msgspec

from stoker.core.mig.geometry import ComputeProfile, Geometry, MigProfile

# Of the number of an instance: it is a part of the handles that lead to it.
NUMBER_BITS = 31


class ComputeRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A compute instance: with its GPU instance, a MIG device."""

    id: int  # in its GPU instance
    number: int  # of all that was ever made on the card: no other instance has it again
    profile_id: int
    start: int  # its first compute slice in the GPU instance
    size: int  # in compute slices
    uuid: str  # of the MIG device


class InstanceRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A GPU instance."""

    id: int
    number: int  # of all that was ever made on the card: no other instance has it again
    profile_id: int
    start: int  # its first memory slice
    size: int  # in memory slices
    compute: tuple[ComputeRecord, ...] = ()

    @property
    def mask(self) -> int:
        """Its memory slices as bits."""
        return _mask(self.start, self.size)


class CardRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The partitions of a card, and what a card remembers of those before."""

    is_enabled: bool = False  # MIG mode in force
    is_pending: bool = False  # MIG mode after the next reset
    instances: tuple[InstanceRecord, ...] = ()  # by ID
    made: int = 0  # how many instances of both kinds were ever made
    resets: int = 0
    # Unix seconds of the last change that a call made, and of the last reset.
    changed_at: float = 0.0
    reset_at: float = 0.0

    def instance(self, number: int) -> InstanceRecord | None:
        """Return the GPU instance of that number, unless it is gone."""
        return next((each for each in self.instances if each.number == number), None)


class Refusal(StrEnum):
    """Why the driver does not do it: NVML_ERROR_..."""

    INVALID_ARGUMENT = "INVALID_ARGUMENT"
    INSUFFICIENT_RESOURCES = "INSUFFICIENT_RESOURCES"
    IN_USE = "IN_USE"


class Activation(StrEnum):
    """What became of a change of mode, beside the success of the call: NVML_..."""

    SUCCESS = "SUCCESS"
    IN_USE = "ERROR_IN_USE"
    RESET_REQUIRED = "ERROR_RESET_REQUIRED"


# --- MIG mode


def with_mode(
    card: CardRecord,
    is_enabled: bool,
    *,
    is_toggled_at_once: bool,
    is_busy: bool,
    can_reset: bool,
) -> tuple[CardRecord, Activation]:
    """Return the card after a change of mode, and what became of the change.

    From Hopper on the mode changes at once or not at all. Before, the card has to be reset: where
    that cannot be, the mode is pending until it is.
    """
    if card.is_enabled == is_enabled:
        return msgspec.structs.replace(card, is_pending=is_enabled), Activation.SUCCESS
    # The driver destroys no instance by itself.
    is_busy = is_busy or bool(card.instances)
    if is_toggled_at_once:
        if is_busy:
            return card, Activation.IN_USE
        changed = msgspec.structs.replace(card, is_enabled=is_enabled, is_pending=is_enabled)
        return changed, Activation.SUCCESS
    pending = msgspec.structs.replace(card, is_pending=is_enabled)
    if not can_reset:
        return pending, Activation.RESET_REQUIRED
    if is_busy:
        return pending, Activation.IN_USE
    return after_reset(pending, card.reset_at), Activation.SUCCESS


def after_reset(card: CardRecord, at: float) -> CardRecord:
    """Return the card after a reset at this time: without instances, in the mode that was due."""
    return msgspec.structs.replace(
        card, is_enabled=card.is_pending, instances=(), resets=card.resets + 1, reset_at=at
    )


def after_unload(card: CardRecord, *, is_toggled_at_once: bool) -> CardRecord:
    """Return the card after its driver was unloaded: from Hopper on the mode is lost too."""
    stays = card.is_pending and not is_toggled_at_once
    return msgspec.structs.replace(card, is_enabled=stays, is_pending=stays, instances=())


# --- GPU instances


def with_instance(
    geometry: Geometry, card: CardRecord, profile: MigProfile, start: int | None
) -> tuple[CardRecord, InstanceRecord] | Refusal:
    """Return the card with one more GPU instance, and that; without a start the driver chooses."""
    if start is not None and start not in profile.starts:
        return Refusal.INVALID_ARGUMENT
    free = _free_starts(geometry, card, profile)
    if start is None and free:
        start = min(free, key=lambda each: (_lost_places(geometry, card, profile, each), each))
    if start is None or start not in free:
        return Refusal.INSUFFICIENT_RESOURCES
    size = profile.memory_slices
    made = InstanceRecord(
        # Nodes of a tree, numbered from the root; no two instances lie at the same one.
        id=geometry.memory_slices // size - 1 + start // size,
        number=card.made + 1,
        profile_id=profile.profile_id,
        start=start,
        size=size,
    )
    instances = tuple(sorted((*card.instances, made), key=lambda each: each.id))
    return msgspec.structs.replace(card, instances=instances, made=made.number), made


def without_instance(card: CardRecord, instance: InstanceRecord) -> CardRecord | Refusal:
    """Return the card without this GPU instance, which must have no compute instances."""
    if instance.compute:
        return Refusal.IN_USE
    instances = tuple(each for each in card.instances if each.number != instance.number)
    return msgspec.structs.replace(card, instances=instances)


def remaining(geometry: Geometry, card: CardRecord, profile: MigProfile) -> int:
    """Return how many more GPU instances of this profile can be made."""
    # Places of one profile do not overlap each other, but engines may run out before places do.
    there = sum(each.profile_id == profile.profile_id for each in card.instances)
    free = len(_free_starts(geometry, card, profile))
    left = min(free, profile.count_max - there)
    while left > 1 and not _has_engines(geometry, card, profile, left):
        left -= 1
    return left


def _free_starts(geometry: Geometry, card: CardRecord, profile: MigProfile) -> tuple[int, ...]:
    """Return where a GPU instance of this profile can be made now."""
    there = sum(each.profile_id == profile.profile_id for each in card.instances)
    if there >= profile.count_max or not _has_engines(geometry, card, profile, 1):
        return ()
    taken = _taken(card)
    return tuple(
        start for start in profile.starts if not taken & _mask(start, profile.memory_slices)
    )


def _has_engines(geometry: Geometry, card: CardRecord, profile: MigProfile, count: int) -> bool:
    """Whether compute slices and media engines are left for so many more.

    JPEG decoders and optical flow are handed out whole; the board has as many as its largest
    profile. That is why there is one instance with media extensions (`+me`) at most, and none with
    media engines beside one that has them all (`+me.all`).
    """
    profiles = geometry.profiles
    there = [known for each in card.instances for known in _by_id(geometry, each.profile_id)]
    wanted = [*there, *(profile,) * count]
    jpeg = max(each.jpeg_decoders for each in profiles)
    optical = max(each.optical_flow for each in profiles)
    return (
        sum(each.compute_slices for each in wanted) <= geometry.compute_slices
        and sum(each.jpeg_decoders for each in wanted) <= jpeg
        and sum(each.optical_flow for each in wanted) <= optical
    )


def _by_id(geometry: Geometry, profile_id: int) -> Iterator[MigProfile]:
    return (each for each in geometry.profiles if each.profile_id == profile_id)


def _lost_places(geometry: Geometry, card: CardRecord, profile: MigProfile, start: int) -> int:
    """Return how many places that are free now would not be with an instance here."""
    taken, mask = _taken(card), _mask(start, profile.memory_slices)
    return sum(
        not taken & (other := _mask(place, each.memory_slices)) and bool(other & mask)
        for each in geometry.profiles
        for place in each.starts
    )


def _taken(card: CardRecord) -> int:
    return sum(each.mask for each in card.instances)  # no two have a bit in common


def _mask(start: int, size: int) -> int:
    return (1 << size) - 1 << start


# --- compute instances


def with_compute(
    card: CardRecord,
    instance: InstanceRecord,
    whole: MigProfile,
    profile: ComputeProfile,
    start: int | None,
    uuid: str,
) -> tuple[CardRecord, ComputeRecord] | Refusal:
    """Return the card with one more compute instance in this GPU instance, and that."""
    if start is not None and start not in compute_starts(whole, profile):
        return Refusal.INVALID_ARGUMENT
    free = _free_compute_starts(instance, whole, profile)
    if start is None and free:
        start = free[0]
    if start is None or start not in free:
        return Refusal.INSUFFICIENT_RESOURCES
    taken = {each.id for each in instance.compute}
    made = ComputeRecord(
        id=next(each for each in range(whole.compute_slices) if each not in taken),
        number=card.made + 1,
        profile_id=profile.profile_id,
        start=start,
        size=profile.compute_slices,
        uuid=uuid,
    )
    compute = tuple(sorted((*instance.compute, made), key=lambda each: each.id))
    return _with_parts(card, instance, compute, made.number), made


def without_compute(
    card: CardRecord, instance: InstanceRecord, gone: ComputeRecord, *, is_busy: bool
) -> CardRecord | Refusal:
    """Return the card without this compute instance, on which there must be no process."""
    if is_busy:
        return Refusal.IN_USE
    compute = tuple(each for each in instance.compute if each.number != gone.number)
    return _with_parts(card, instance, compute, card.made)


def compute_remaining(instance: InstanceRecord, whole: MigProfile, profile: ComputeProfile) -> int:
    """Return how many more compute instances of this profile can be made."""
    there = sum(each.profile_id == profile.profile_id for each in instance.compute)
    left, taken = profile.count_max - there, _taken_compute(instance)
    found = 0
    for start in compute_starts(whole, profile):
        mask = _mask(start, profile.compute_slices)
        if found < left and not taken & mask:
            taken |= mask
            found += 1
    return found


def compute_starts(whole: MigProfile, profile: ComputeProfile) -> tuple[int, ...]:
    """Return the compute slices at which compute instances of this profile may begin.

    No listing of these was at hand: wherever they fit. The driver takes the first that is free, as
    the guide shows of three 1c in a 3g.
    """
    return tuple(range(whole.compute_slices - profile.compute_slices + 1))


def _free_compute_starts(
    instance: InstanceRecord, whole: MigProfile, profile: ComputeProfile
) -> tuple[int, ...]:
    there = sum(each.profile_id == profile.profile_id for each in instance.compute)
    if there >= profile.count_max:
        return ()
    taken = _taken_compute(instance)
    return tuple(
        start
        for start in compute_starts(whole, profile)
        if not taken & _mask(start, profile.compute_slices)
    )


def _taken_compute(instance: InstanceRecord) -> int:
    return sum(_mask(each.start, each.size) for each in instance.compute)


def _with_parts(
    card: CardRecord, instance: InstanceRecord, compute: tuple[ComputeRecord, ...], made: int
) -> CardRecord:
    changed = msgspec.structs.replace(instance, compute=compute)
    instances = tuple(
        changed if each.number == instance.number else each for each in card.instances
    )
    return msgspec.structs.replace(card, instances=instances, made=made)


# --- what was kept


def fault(geometry: Geometry | None, card: CardRecord) -> str | None:
    """Return why a board cannot be partitioned as this says; None: it can."""
    if geometry is None:
        is_plain = not (card.is_enabled or card.is_pending or card.instances)
        return None if is_plain else "it cannot be partitioned (MIG)"
    if card.instances and not card.is_enabled:
        return "it has GPU instances, and MIG mode is off"
    again = msgspec.structs.replace(card, instances=())
    for each in card.instances:
        profile = next(_by_id(geometry, each.profile_id), None)
        if profile is None:
            return f"it has no GPU instance profile {each.profile_id}"
        made = with_instance(geometry, again, profile, each.start)
        if isinstance(made, Refusal) or (made[1].id, made[1].size) != (each.id, each.size):
            return f"there can be no {profile.name} at {each.start}"
        if (wrong := _compute_fault(made[1], profile, each.compute)) is not None:
            return wrong
        again = made[0]
    numbers = [each.number for each in card.instances]
    numbers += [part.number for each in card.instances for part in each.compute]
    if len(set(numbers)) < len(numbers) or max(numbers, default=0) > card.made:
        return "its instances are not numbered as they were made"
    return None


def _compute_fault(
    instance: InstanceRecord, whole: MigProfile, compute: tuple[ComputeRecord, ...]
) -> str | None:
    parts = {each.profile_id: each for each in whole.compute_profiles}
    taken = 0
    for each in compute:
        profile = parts.get(each.profile_id)
        if profile is None or each.start not in compute_starts(whole, profile):
            return f"{whole.name} has no compute instance profile {each.profile_id} there"
        mask = _mask(each.start, profile.compute_slices)
        if taken & mask or each.size != profile.compute_slices:
            return f"compute instances of {whole.name} at {instance.start} overlap"
        taken |= mask
    return None
