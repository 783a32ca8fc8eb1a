"""What is remembered of faults: it comes, lasts, ends, comes again, and is forgotten.

Everything that must not be forgotten leaves as records; applied to what was there before they give
what is here.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from stoker.agent.health.judging import ends_with_life
from stoker.agent.health.meanings import VERDICT_RANK
from stoker.agent.health.notes import SETTLE_SECONDS, Notes
from stoker.agent.health.policy import Policy
from stoker.agent.records import GpusExpected, HealthRecord, LifeBegun
from stoker.agent.verdicts import (
    LIVES_MAX,
    Check,
    Ending,
    ExpectedGpu,
    FaultKey,
    FaultRecord,
    History,
    KernelLogPosition,
    Life,
)

Key = tuple[Check, str]  # a fault of a GPU that is known: its check and code

# More faults of one GPU are not remembered; those that matter least go first.
FAULTS_PER_GPU_MAX = 64
# What is told so long after it happened may be over: a log that was not followed from the start.
LATE_SECONDS = 60.0
# A condition that lasts is written again so often, so that what is remembered of it is not old.
REFRESH_SECONDS = 3600.0
# How often it is looked for what can be forgotten, and how far the wall clock may stray meanwhile.
FORGET_SECONDS = 3600.0
CLOCK_STRAYS_MAX_SECONDS = 60.0

_NOTHING: Mapping[Key, FaultRecord] = MappingProxyType({})
_MENDED = (Ending.FORGIVEN, Ending.REPLACED)


@dataclass(frozen=True, slots=True)
class _More:
    """What a fault that lasts has had since it was last written."""

    count: int
    last_at: float
    detail: str


class Memory:
    """The faults and lives of the node's GPUs. `at` is Unix seconds, `now` monotonic ones."""

    def __init__(self, policy: Policy, boot_id: str, history: History) -> None:
        self._policy, self._boot_id = policy, boot_id
        self._faults: dict[FaultKey, FaultRecord] = {}
        self._lasting: dict[str, dict[Key, FaultRecord]] = {}
        self._lives: dict[str, Life] = dict(history.lives)
        self.expected: tuple[ExpectedGpu, ...] = history.expected
        self._notes = Notes(history.kernel_log)
        self.changed: set[str] = set()  # GPUs whose verdict may be another one
        self._now, self._has_ticked = 0.0, False
        self._more: dict[FaultKey, _More] = {}
        self._quiet: dict[FaultKey, float | None] = {}  # when it is over; None: to be found out
        self._reset_at: dict[str, float] = {}
        self._forget_from: tuple[float, float] | None = None  # what the clocks said last time
        self._restored = {key: record.last_at for key, record in history.faults.items()}
        for record in history.faults.values():
            self._put(record)
            self._notes.restore(record)
        for uuid in self._lives:
            if self._lives[uuid].boot_id != boot_id:
                self.begin_life(uuid, Life(boot_id), at=None)
        for uuid in self._lasting:  # what ended while its check was off
            self._end_by_life(uuid, self.life(uuid), at=None)

    # --- what is known

    def lasting(self, uuid: str) -> Mapping[Key, FaultRecord]:
        """Return the faults of a GPU that are not over."""
        return self._lasting.get(uuid, _NOTHING)

    def life(self, uuid: str) -> Life:
        """Return the life that the GPU is in."""
        return self._lives.get(uuid) or Life(self._boot_id)

    def uuids(self) -> Iterable[str]:
        """Return the GPUs of which something lasts."""
        return tuple(uuid for uuid, lasting in self._lasting.items() if lasting)

    def energy(self, uuid: str) -> float | None:
        """Return the most that the GPU's counter of energy is known to have had in this life."""
        known = [
            record.energy_joules
            for record in self.lasting(uuid).values()
            if record.energy_joules is not None and record.lives[-1] == self.life(uuid)
        ]
        return max(known, default=None)

    # --- what happens

    def incident(
        self,
        uuid: str,
        key: Key,
        at: float,
        detail: str,
        *,
        energy: float | None = None,
        told_at: float | None = None,
    ) -> None:
        """Take in that a fault came; with `told_at` it may be told late, or once more."""
        meaning = self._policy.meaning(*key)
        if meaning.is_ignored:
            return
        if told_at is not None and self._is_over(uuid, key, at, told_at):
            return
        fault_key = (uuid, *key)
        record = self._faults.get(fault_key)
        if record is None or record.ended_at is not None or record.lives[-1] != self.life(uuid):
            self._come(record, uuid, key, at, detail, energy)
        else:
            before = self._more.get(fault_key)
            count = before.count if before else 0
            last_at = max(at, before.last_at if before else record.last_at)
            self._more[fault_key] = _More(count + 1, last_at, detail)
        if fault_key in self._quiet and self._has_ticked:
            seconds = self._policy.quiet_seconds(meaning) or 0.0
            age = 0.0 if told_at is None else min(max(told_at - at, 0.0), seconds)
            self._quiet[fault_key] = self._now + seconds - age

    def condition(
        self,
        uuid: str,
        key: Key,
        at: float,
        detail: str,
        *,
        follows: bool = False,
        energy: float | None = None,
    ) -> None:
        """Take in that something is bad now; it may have been before."""
        if key[0] in self._policy.disabled:
            return
        record = self._faults.get((uuid, *key))
        if record is None or record.ended_at is not None or record.lives[-1] != self.life(uuid):
            self._come(record, uuid, key, at, detail, energy)
            return
        age = self._notes.age(record.key)
        is_news = follows and detail != record.detail and age >= SETTLE_SECONDS
        if is_news or age >= REFRESH_SECONDS:
            energy = record.energy_joules if energy is None else energy
            last_at = max(at, record.last_at)
            self._write(replace(record, last_at=last_at, detail=detail, energy_joules=energy))

    def enrich(self, uuid: str, key: Key, plain: str, detail: str) -> None:
        """Say more of a fault than the plain words that it was noted with."""
        record = self.lasting(uuid).get(key)
        if record is not None and record.detail == plain:
            self._write(replace(record, detail=detail))

    def recover(self, uuid: str, key: Key, at: float) -> None:
        """Take in that what was bad is good again."""
        record = self.lasting(uuid).get(key)
        if record is None:
            return
        before, life = record.lives[-1], self.life(uuid)
        ending = Ending.RECOVERED
        if before != life:
            ending = Ending.RESET if before.boot_id == life.boot_id else Ending.REBOOT
        self._end(record, at, ending)

    def begin_life(self, uuid: str, life: Life, at: float | None) -> None:
        """Take in that a GPU was reset, or its host booted (`at` None: nobody knows when)."""
        self._end_by_life(uuid, life, at)
        self._lives[uuid] = life
        if at is not None:
            self._reset_at[uuid] = at
        self._notes.tell(LifeBegun(uuid, life))
        self.changed.add(uuid)

    def reset(self, uuid: str, at: float) -> None:
        """Take in that a GPU was reset just now."""
        life = self.life(uuid)
        self.begin_life(uuid, replace(life, resets=life.resets + 1), at)

    def know(self, uuid: str) -> None:
        """Take in that there is such a GPU."""
        if uuid not in self._lives:
            self.begin_life(uuid, Life(self._boot_id), at=None)

    def mend(self, uuid: str, at: float) -> None:
        """Take in late that a GPU was reset then: what came before is over, and what came since is
        of the life that it is in.
        """
        life = self.life(uuid)
        before = replace(life, resets=life.resets - 1)
        for record in tuple(self.lasting(uuid).values()):
            ending = ends_with_life(self._policy.meaning(record.check, record.code), before, life)
            if ending is not None and record.last_at < at:
                self._end(record, at, ending)

    def forgive(self, uuid: str, at: float, ending: Ending) -> None:
        """Let nothing that came before count any more."""
        for key, record in tuple(self._faults.items()):
            if key[0] != uuid or record.ending in _MENDED:
                continue
            if record.ended_at is None:
                self._end(record, at, ending)
            else:
                self._write(replace(record, ending=ending))

    def drop(self, uuid: str, key: Key) -> None:
        """Take back a fault: it was another one."""
        if (uuid, *key) in self._faults:
            self._forget((uuid, *key))

    def expect(self, gpus: tuple[ExpectedGpu, ...]) -> None:
        """Take in which GPUs the node should have."""
        if gpus != self.expected:
            self.expected = gpus
            self._notes.tell(GpusExpected(gpus))

    def take_position(self, position: KernelLogPosition) -> None:
        """Take in up to where the kernel's log was taken in."""
        self._notes.take_position(position)

    def tick(self, at: float, now: float) -> None:
        """Take in that time has passed."""
        self._now, self._has_ticked = now, True
        self._notes.tick(now)
        if self._more:
            self._settle()
        if self._quiet:
            self._end_quiet(at)
        if self._forget_from is None or now - self._forget_from[1] >= FORGET_SECONDS:
            self._forget_old(at)

    def take_records(self) -> tuple[HealthRecord, ...]:
        """Return what has to be written since the last call; applied twice it equals once."""
        return self._notes.take()

    def take_loss(self, records: Iterable[HealthRecord]) -> None:
        """Take in that these could not be written: what is known then is told again, later."""
        self._notes.take_loss(records)

    # --- coming and going

    def _is_over(self, uuid: str, key: Key, at: float, told_at: float) -> bool:
        """Whether what is told was taken in before a restart, or long ago and is mended since.

        What is remembered from the future was noted by a clock that went wrong.
        """
        restored = self._restored.get((uuid, *key))
        if restored is not None and at <= restored + 1.0 and restored <= told_at + LATE_SECONDS:
            return True
        if told_at - at <= LATE_SECONDS:
            return False
        record = self._faults.get((uuid, *key))
        ended_at = record.ended_at if record is not None else None
        if ended_at is not None and at <= ended_at <= told_at + LATE_SECONDS:
            return True
        life, reset_at = self.life(uuid), self._reset_at.get(uuid, float("-inf"))
        before = replace(life, resets=life.resets - 1)
        return (
            at < reset_at and ends_with_life(self._policy.meaning(*key), before, life) is not None
        )

    def _come(
        self,
        record: FaultRecord | None,
        uuid: str,
        key: Key,
        at: float,
        detail: str,
        energy: float | None,
    ) -> None:
        life = self.life(uuid)
        if record is not None and record.ended_at is not None:
            is_long_ago = at - record.ended_at > self._policy.limits.remember_seconds
            if record.ending in _MENDED or is_long_ago:
                record = None
        if record is None:
            fresh = FaultRecord(uuid, *key, detail, at, at, 1, (life,), energy_joules=energy)
            self._write(fresh)
            self._make_room(uuid, fresh.key)
            return
        self._fold(record.key)
        record = self._faults[record.key]
        lives = record.lives if record.lives[-1] == life else (*record.lives, life)[-LIVES_MAX:]
        self._write(
            replace(
                record,
                detail=detail,
                first_at=record.first_at if record.ended_at is None else at,
                last_at=max(at, record.last_at) if record.ended_at is None else at,
                count=record.count + 1,
                lives=lives,
                ended_at=None,
                ending=None,
                energy_joules=energy,
            )
        )

    def _end(self, record: FaultRecord, at: float | None, ending: Ending) -> None:
        self._fold(record.key)
        record = self._faults[record.key]
        ended_at = record.last_at if at is None else max(at, record.last_at)
        self._write(replace(record, ended_at=ended_at, ending=ending))

    def _end_by_life(self, uuid: str, life: Life, at: float | None) -> None:
        for record in tuple(self.lasting(uuid).values()):
            meaning = self._policy.meaning(record.check, record.code)
            if meaning.is_ignored or record.lives[-1] == life:
                continue
            ending = ends_with_life(meaning, record.lives[-1], life)
            if ending is not None:
                self._end(record, at, ending)

    def _end_quiet(self, at: float) -> None:
        for key, due in tuple(self._quiet.items()):
            over_at = self._quiet_until(key, at) if due is None else due
            self._quiet[key] = over_at
            if self._now >= over_at:
                self._end(self._faults[key], at, Ending.RECOVERED)

    def _quiet_until(self, key: FaultKey, at: float) -> float:
        seconds = self._policy.quiet_seconds(self._policy.meaning(*key[1:])) or 0.0
        last_at = self._more[key].last_at if key in self._more else self._faults[key].last_at
        # The wall clock may have jumped since, either way.
        return self._now + seconds - min(max(at - last_at, 0.0), seconds)

    def _put(self, record: FaultRecord) -> None:
        key = record.key
        self._faults[key] = record
        self.changed.add(record.uuid)
        lasting = self._lasting.setdefault(record.uuid, {})
        if record.ended_at is not None:
            lasting.pop(key[1:], None)
            self._quiet.pop(key, None)
            return
        lasting[key[1:]] = record
        meaning = self._policy.meaning(record.check, record.code)
        if not meaning.is_ignored and self._policy.quiet_seconds(meaning) is not None:
            self._quiet.setdefault(key, None)

    # --- writing

    def _write(self, record: FaultRecord) -> None:
        """Keep a fault as it is now, and write it down: now, or with what else comes soon."""
        self._put(record)
        self._notes.change(record)

    def _settle(self) -> None:
        for key in tuple(self._more):
            if self._notes.age(key) >= SETTLE_SECONDS:
                self._fold(key)
                self._notes.note(self._faults[key])

    def _fold(self, key: FaultKey) -> None:
        """Add to a fault what it has had more of."""
        more = self._more.pop(key, None)
        if more is not None:
            record = self._faults[key]
            self._put(
                replace(
                    record,
                    count=record.count + more.count,
                    last_at=max(record.last_at, more.last_at),
                    detail=more.detail,
                )
            )

    # --- forgetting

    def _forget(self, key: FaultKey) -> None:
        record = self._faults.pop(key)
        self._lasting.get(record.uuid, {}).pop(key[1:], None)
        self._quiet.pop(key, None)
        self._more.pop(key, None)
        self.changed.add(record.uuid)
        self._notes.forget(key)

    def _make_room(self, uuid: str, fresh: FaultKey) -> None:
        others = [key for key in self._faults if key[0] == uuid and key != fresh]
        if len(others) >= FAULTS_PER_GPU_MAX:
            self._forget(min(others, key=self._weight))

    def _weight(self, key: FaultKey) -> tuple[bool, int, float]:
        """Return how much a fault matters: whether it lasts, how bad it is, how new it is."""
        record = self._faults[key]
        verdict = self._policy.meaning(record.check, record.code).verdict
        return (record.ended_at is None, VERDICT_RANK[verdict], record.last_at)

    def _forget_old(self, at: float) -> None:
        """Forget what is over for long, by a wall clock that went right for some time."""
        before, self._forget_from = self._forget_from, (at, self._now)
        if before is None:
            return
        strayed = (at - before[0]) - (self._now - before[1])
        if abs(strayed) <= CLOCK_STRAYS_MAX_SECONDS:
            for key in tuple(self._old(at)):
                self._forget(key)

    def _old(self, at: float) -> Iterator[FaultKey]:
        for key, record in self._faults.items():
            ended_at = at if record.ended_at is None else record.ended_at
            if at - ended_at > self._policy.limits.remember_seconds:
                yield key
