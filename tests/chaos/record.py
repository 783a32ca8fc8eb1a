"""What clients were told, kept by themselves, and how the ledger is held against it.

The record knows nothing of how the aggregator works. Each wish has its own idempotency key, which
it also carries as a label, so that whatever the ledger lists can be led back to one wish. A wish is
ASKED until somebody answers; only what was answered binds the aggregator, and what was asked may or
may not have happened.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum, auto
from typing import assert_never

from stoker.client import Allocation, AllocationState, Device

KEY_LABEL = "wish"


class Stage(StrEnum):
    """How far a wish has come, by what its client was told."""

    ASKED = auto()  # the call is under way, or its answer was lost
    REFUSED = auto()  # told that it cannot be placed
    HELD = auto()  # told that it is granted
    GIVING_BACK = auto()  # the release is under way, or its answer was lost
    GIVEN_BACK = auto()  # told that it is released
    ABANDONED = auto()  # the client has gone without a word; the TTL ends it


@dataclass(slots=True, eq=False)
class Wish:
    """One request of one client."""

    key: str
    gpus: int
    memory_bytes: int | None  # None: whole GPUs
    stage: Stage = Stage.ASKED
    allocation: Allocation | None = None  # as it was granted
    unanswered: int = 0  # tries of the present call whose answer was lost


class Broken(AssertionError):
    """The aggregator did what it must not; the text tells the whole case."""


class Record:
    """Every wish of every client."""

    def __init__(self) -> None:
        self.wishes: dict[str, Wish] = {}
        self.counts: Counter[str] = Counter()
        self._holders: dict[str, set[str]] = defaultdict(set)  # GPU UUID -> keys of wishes held

    @property
    def answers(self) -> int:
        """How many requests and releases were answered."""
        return sum(self.counts[name] for name in ("grants", "refusals", "releases"))

    def ask(self, key: str, gpus: int, memory_bytes: int | None) -> Wish:
        """Note a new wish."""
        assert key not in self.wishes, key
        wish = self.wishes[key] = Wish(key, gpus, memory_bytes)
        return wish

    def granted(self, wish: Wish, allocation: Allocation) -> None:
        """Note an acknowledged grant; raises Broken when it cannot be beside those held."""
        self._check_shape(wish, allocation)
        for device in allocation.devices:
            for key in self._holders[device.uuid]:
                self._check_together(wish, allocation, device, self.wishes[key])
            self._holders[device.uuid].add(wish.key)
        wish.stage, wish.allocation = Stage.HELD, allocation
        self.counts["grants"] += 1
        self.counts["gangs"] += len(allocation.devices) > 1
        self.counts["shares"] += wish.memory_bytes is not None

    def refused(self, wish: Wish) -> None:
        """Note that the wish was refused."""
        wish.stage = Stage.REFUSED
        self.counts["refusals"] += 1

    def giving_back(self, wish: Wish) -> None:
        """Note that the client lets go: from here on somebody else may be given its devices."""
        self._let_go(wish, Stage.GIVING_BACK)

    def given_back(self, wish: Wish) -> None:
        """Note an acknowledged release."""
        assert wish.stage is Stage.GIVING_BACK, wish
        wish.stage = Stage.GIVEN_BACK
        self.counts["releases"] += 1

    def abandoned(self, wish: Wish) -> None:
        """Note that the client has died, holding or asking."""
        self._let_go(wish, Stage.ABANDONED)
        self.counts["abandoned"] += 1

    # --- the ledger's answer against all that

    def compare(self, listed: Iterable[Allocation], total_bytes: Mapping[str, int]) -> None:
        """Hold all allocations, ended ones too, against the record while no call is under way.

        `total_bytes`: the memory of every GPU, by UUID. Raises Broken.
        """
        allocations = list(listed)
        by_key: dict[str, list[Allocation]] = defaultdict(list)
        for allocation in allocations:
            by_key[(allocation.request.labels or {}).get(KEY_LABEL, "")].append(allocation)
        for key, found in by_key.items():
            wish = self.wishes.get(key)
            if wish is None:
                raise Broken(f"nobody asked for {found}")
            if len(found) > 1:
                raise Broken(f"granted more than once: {wish} is {found}")
            self._check_state(wish, found[0])
        for wish in self.wishes.values():
            if wish.stage is Stage.HELD and wish.key not in by_key:
                raise Broken(f"lost: {wish} is not listed")
        check_room(allocations, total_bytes)

    def _check_state(self, wish: Wish, found: Allocation) -> None:
        known = wish.allocation
        if known is not None and (known.id, known.node, known.devices) != _place(found):
            raise Broken(f"changed: {wish} is now {found}")
        state = found.state
        match wish.stage:
            case Stage.ASKED | Stage.ABANDONED:
                is_right = True
            case Stage.HELD:
                is_right = state is AllocationState.GRANTED
            case Stage.GIVING_BACK:
                is_right = state is not AllocationState.WAITING
            case Stage.GIVEN_BACK:
                is_right = state in (AllocationState.RELEASING, AllocationState.ENDED)
            case Stage.REFUSED:  # one that waited in vain is remembered
                is_right = state is AllocationState.ENDED and not found.devices
            case _:
                assert_never(wish.stage)
        if not is_right:
            raise Broken(f"its client knows it as {wish.stage}: {wish} is {found}")

    # --- helpers

    def _let_go(self, wish: Wish, stage: Stage) -> None:
        if wish.allocation is not None:
            for device in wish.allocation.devices:
                self._holders[device.uuid].discard(wish.key)
        wish.stage = stage

    def _check_shape(self, wish: Wish, allocation: Allocation) -> None:
        if wish.allocation is not None:
            raise Broken(f"answered twice: {wish} got {allocation}")
        devices = allocation.devices
        wanted_bytes = wish.memory_bytes
        is_right = (
            allocation.state is AllocationState.GRANTED
            and bool(allocation.node)
            and len({device.uuid for device in devices}) == len(devices) == wish.gpus
            and all(device.exclusive == (wanted_bytes is None) for device in devices)
            and (wanted_bytes is None or devices[0].memory_bytes == wanted_bytes)
            and (allocation.request.labels or {}).get(KEY_LABEL) == wish.key
        )
        if not is_right:
            raise Broken(f"not what was asked for: {wish} got {allocation}")

    def _check_together(
        self, wish: Wish, allocation: Allocation, device: Device, other: Wish
    ) -> None:
        if wish.memory_bytes is None or other.memory_bytes is None:
            raise Broken(f"{device.uuid} granted twice: to {other}, and to {wish} as {allocation}")


def check_room(allocations: Iterable[Allocation], total_bytes: Mapping[str, int]) -> None:
    """Raise Broken when a whole GPU is somebody else's too, or its shares are more than it has."""
    takers: dict[str, list[tuple[str, Device]]] = defaultdict(list)
    for allocation in allocations:
        if allocation.state in (AllocationState.GRANTED, AllocationState.RELEASING):
            for device in allocation.devices:
                takers[device.uuid].append((allocation.id, device))
    for uuid, found in takers.items():
        if len(found) > 1 and any(device.exclusive for _, device in found):
            raise Broken(f"{uuid} granted twice: {found}")
        if sum(device.memory_bytes for _, device in found) > total_bytes[uuid]:
            raise Broken(f"{uuid} has {total_bytes[uuid]} bytes, granted are {found}")


def _place(allocation: Allocation) -> tuple[str, str, tuple[Device, ...]]:
    return allocation.id, allocation.node, allocation.devices
