"""The clients of a simulated world: they ask, keep alive, run processes, give back, or die without
a word.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Protocol

from stoker.aggregator.model import Device
from stoker.testing.calls import Failed, Said, call, packet
from stoker.testing.machine import EPOCH, GIB, Machine
from stoker.testing.network import End
from stoker.testing.process import Process, Surroundings
from stoker.testing.rebalancer import AGREES, ARRIVES, ASKS_TWICE, CARRY_SECONDS, Rebalancer
from stoker.testing.witness import Witness
from stoker.v1 import fleet_pb2, placing_pb2, types_pb2

if TYPE_CHECKING:
    from stoker.testing.mig_town import MigTown

CALL_PATIENCE_SECONDS = 2.0
RETRY_SECONDS = (0.05, 1.5)
ATTEMPTS_MAX = 8
# Shares of the TTL after which a lease is kept alive again: by most, and by those who take chances.
KEEP_ALIVE_RATIOS = (0.15, 0.4)
LATE_KEEP_ALIVE_RATIOS = (0.85, 1.02)
PAUSE_SECONDS = (0.1, 6.0)
HOLD_SECONDS = (1.0, 25.0)
SHORT_HOLD_SECONDS = (0.01, 1.0)


# What a failed call says when asking again would not help.
FINAL = ("CANNOT_PLACE", "NOT_GRANTED", "NOT_FOUND", "KEY_REUSED", "INVALID_REQUEST")


class Town(Surroundings, Protocol):
    """What a client finds around it, beside what every process does."""

    machines: dict[str, Machine]
    is_calm: bool
    rebalancer: Rebalancer
    partitions: "MigTown | None"


@dataclass(slots=True, eq=False)
class Wish:
    """What a client asks for, as often as it takes, always with the same key."""

    message: fleet_pb2.AllocateRequest
    attempts: int = 0
    end: End | None = None  # of the last attempt
    is_last: bool = False  # of the run: it is wanted until it is there, and then kept


@dataclass(slots=True, eq=False)
class Lease:
    """What a client believes to have."""

    id: str
    parts: Mapping[str, tuple[Device, ...]]  # by node
    ttl_seconds: float
    until: float  # virtual seconds; it believes no longer
    is_kept_late: bool
    is_over: bool = False
    pids: list[tuple[str, int]] = field(default_factory=list[tuple[str, int]])  # node, PID
    line: End | None = None  # for keep-alives
    is_last: bool = False  # it is kept to the end of the run
    answered: str = ""  # the offer to move that was answered last

    @property
    def devices(self) -> tuple[Device, ...]:
        """All that it has, on whichever node."""
        return tuple(device for devices in self.parts.values() for device in devices)


class ClientProcess(Process):
    """One client; it wants one thing after the other."""

    def __init__(self, name: str, around: Town, witness: Witness) -> None:
        super().__init__(name, around)
        self.town = around
        self.witness = witness
        self.wishes = 0
        self._lease: Lease | None = None
        self._new: Lease | None = None  # where it moves over to

    # --- a life

    def begin(self) -> None:
        self._lease = self._new = None
        self._wish: Wish | None = None
        self._pause()

    def perish(self) -> None:
        # Its belief stays until the TTL is over: a dead client cannot be told from a slow one.
        self.around.network.break_all_of(self.name)
        if self._lease is not None:
            self._end_processes(self._lease, lingering=0.4)

    def _pause(self) -> None:
        self.after(self.around.rng.uniform(*PAUSE_SECONDS), self._want_something)

    def _want_something(self) -> None:
        if self.town.is_calm:
            return
        rng = self.around.rng
        self._want(Wish(self._draw_request(rng.uniform(2.0, 40.0) if rng.random() < 0.5 else 0.0)))

    def want_for_good(self, wait_seconds: float) -> None:
        """Ask for something, however long it takes, and keep it; unless something is wanted."""
        if self.is_up and self._wish is None and self._lease is None:
            self._want(Wish(self._draw_request(wait_seconds), is_last=True))

    def _draw_request(self, wait_seconds: float) -> fleet_pb2.AllocateRequest:
        self.wishes += 1
        request = draw_request(self.name, self.town)
        request.movable = self.town.rebalancer.draws_movable()
        key = f"{self.name}/{self.wishes}"
        return fleet_pb2.AllocateRequest(
            request=request, idempotency_key=key, wait_seconds=wait_seconds
        )

    # --- asking

    def _want(self, wish: Wish) -> None:
        self._wish = wish
        request = wish.message.request
        what = f"{request.memory_bytes / GIB:.0f} GiB" if request.memory_bytes else request.gpus
        self.tell(f"asks for {what}, key {wish.message.idempotency_key}")
        self._try(wish)

    def _try(self, wish: Wish) -> None:
        wish.attempts += 1
        attempt = wish.attempts
        wish.end = self._allocate(wish.message, partial(self._answered, wish, attempt))
        if self.around.rng.random() < self.around.network.faults.call_twice:
            self.after(self.around.rng.uniform(0.0, 1.0), partial(self._ask_twice, wish))
        patience = wish.message.wait_seconds + CALL_PATIENCE_SECONDS
        self.after(patience, lambda: self._retry(wish, attempt))

    def _ask_twice(self, wish: Wish) -> None:
        """Make the same call once more, as a client may that did not wait for its first one."""
        self._allocate(wish.message, _ignore)

    def _allocate(
        self,
        message: fleet_pb2.AllocateRequest,
        heard: "Callable[[Said[fleet_pb2.AllocateResponse] | Failed], None]",
    ) -> End:
        kind = fleet_pb2.AllocateResponse
        network = self.around.network
        return call(network, self.name, "Allocate", message, kind, self.guarded(heard))

    def _retry(self, wish: Wish, attempt: int) -> None:
        if self._wish is not wish or wish.attempts != attempt or wish.end is None:
            return
        wish.end.close()
        wish.end = None
        if attempt >= ATTEMPTS_MAX and not wish.is_last:
            self.tell(f"gives up on {wish.message.idempotency_key}")
            self._wish = None
            self._pause()
            return

        def try_again() -> None:
            if self._wish is wish and wish.attempts == attempt:
                self._try(wish)

        self.after(self.around.rng.uniform(*RETRY_SECONDS), try_again)

    def _answered(
        self, wish: Wish, attempt: int, said: Said[fleet_pb2.AllocateResponse] | Failed
    ) -> None:
        if self._wish is not wish or wish.attempts != attempt:
            return  # the answer to a call that was given up
        if isinstance(said, Failed):
            if said.reason.startswith(FINAL):
                self._wish = None
                self._pause()
            else:
                self._retry(wish, attempt)
            return
        self._wish = None
        given = said.message.allocation
        if given.state == types_pb2.ALLOCATION_STATE_GRANTED:
            self._take(given, given.expires_at - EPOCH - said.wall_offset, wish.is_last)
        else:
            self._pause()

    # --- holding

    def _take(self, given: types_pb2.Allocation, until: float, is_last: bool) -> None:
        lease = self._hold(given, until, is_last)
        if lease is None:
            self._pause()  # the answer came too late to be of use
            return
        self._lease = lease
        self._use(lease)

    def _hold(self, given: types_pb2.Allocation, until: float, is_last: bool) -> Lease | None:
        """Believe in what was granted, and keep it alive."""
        if until <= self.now:
            return None
        here = types_pb2.Placement(node=given.node, devices=given.devices)
        parts = {
            part.node: tuple(
                Device(
                    each.uuid,
                    each.model,
                    each.index,
                    each.memory_bytes,
                    each.exclusive,
                    mig_device_uuid=each.mig_device_uuid,
                    mig_profile=each.mig_profile,
                )
                for each in part.devices
            )
            for part in given.placements or (here,)
        }
        is_kept_late = self.around.rng.random() < 0.2 and not is_last
        ttl_seconds = given.request.ttl_seconds
        lease = Lease(given.id, parts, ttl_seconds, until, is_kept_late, is_last=is_last)
        self.tell(f"has {lease.id} on {' and '.join(parts)} until {until:.3f}")
        self.witness.believes(self.name, lease.id, lease.devices, until)
        return lease

    def _use(self, lease: Lease) -> None:
        self.after(self.around.rng.uniform(0.0, 1.0), partial(self._work, lease))
        self._keep_alive_later(lease)
        self.after(lease.until - self.now, partial(self._doubt, lease))
        if not lease.is_last:
            seconds = SHORT_HOLD_SECONDS if self.around.rng.random() < 0.2 else HOLD_SECONDS
            self.after(self.around.rng.uniform(*seconds), partial(self._finish, lease))

    def _work(self, lease: Lease) -> None:
        if lease.is_over:
            return
        rng = self.around.rng
        for node, devices in lease.parts.items():
            machine = self.town.machines[node]
            for device in devices:
                if rng.random() < 0.8:
                    bytes_ = min(device.memory_bytes, rng.randint(1, 8) * GIB)
                    seen = rng.random() < 0.8
                    mig = device.mig_device_uuid
                    pid = machine.run(self.now, [device.uuid], bytes_, lease.id, seen, mig)
                    lease.pids.append((node, pid))
        if rng.random() < 0.3:
            self.after(rng.uniform(0.5, 8.0), partial(self._work, lease))

    def _keep_alive_later(self, lease: Lease) -> None:
        ratios = LATE_KEEP_ALIVE_RATIOS if lease.is_kept_late else KEEP_ALIVE_RATIOS
        seconds = lease.ttl_seconds * self.around.rng.uniform(*ratios)
        self.after(seconds, partial(self._keep_alive, lease))

    def _keep_alive(self, lease: Lease) -> None:
        if lease.is_over:
            return
        message = fleet_pb2.KeepAliveRequest(allocation_id=lease.id)
        if lease.line is not None:
            lease.line.send(packet(message))
        else:
            network, kind = self.around.network, fleet_pb2.KeepAliveResponse
            heard = self.guarded(partial(self._kept_alive, lease))
            lease.line = call(network, self.name, "KeepAlive", message, kind, heard)
        self._keep_alive_later(lease)

    def _kept_alive(self, lease: Lease, said: Said[fleet_pb2.KeepAliveResponse] | Failed) -> None:
        if lease.is_over:
            return
        if isinstance(said, Failed):
            lease.line = None  # the next keep-alive dials again
        elif said.message.state == types_pb2.ALLOCATION_STATE_GRANTED:
            lease.until = max(lease.until, said.message.expires_at - EPOCH - said.wall_offset)
            self.witness.believes(self.name, lease.id, lease.devices, lease.until)
            if said.message.HasField("move"):
                self._answer(lease, said.message.move)
        else:
            self.tell(f"is told that {lease.id} is over: {said.message.ended_reason}")
            self._let_go(lease, lingering=0.2)

    def _doubt(self, lease: Lease) -> None:
        """Believe no longer when nothing was acknowledged for a TTL."""
        if lease.is_over:
            return
        if lease.until > self.now:
            self.after(lease.until - self.now, partial(self._doubt, lease))
            return
        self.tell(f"has lost {lease.id}: no keep-alive got through")
        self._let_go(lease, lingering=0.2)

    def _finish(self, lease: Lease) -> None:
        if lease.is_over:
            return
        if self.around.rng.random() < 0.15 and not self.town.is_calm:
            self.crash("without a release")
            return
        self.tell(f"gives {lease.id} back")
        self._let_go(lease, lingering=0.15)
        self._release(lease.id, 1)

    def _release(self, id_: str, attempt: int) -> None:
        is_done = False

        def heard(said: Said[fleet_pb2.ReleaseResponse] | Failed) -> None:
            nonlocal is_done
            is_done = is_done or isinstance(said, Said) or said.reason.startswith(FINAL)

        def look() -> None:
            if not is_done:
                end.close()
                if attempt < ATTEMPTS_MAX:
                    self._release(id_, attempt + 1)

        wait_seconds = self.around.rng.choice((0.0, 1.0))
        message = fleet_pb2.ReleaseRequest(allocation_id=id_, wait_seconds=wait_seconds)
        network, kind = self.around.network, fleet_pb2.ReleaseResponse
        end = call(network, self.name, "Release", message, kind, self.guarded(heard))
        self.after(CALL_PATIENCE_SECONDS, look)

    def _let_go(self, lease: Lease, lingering: float) -> None:
        lease.is_over = True
        self.witness.believes_no_more(lease.id)
        if lease.line is not None:
            lease.line.close()
        self._end_processes(lease, lingering)
        if lease is self._new:
            self._new = None  # it stays where it was
        elif lease is self._lease:
            self._lease = None
            if self._new is not None:
                self._give_back(self._new)
            self._pause()

    def _give_back(self, lease: Lease) -> None:
        self._let_go(lease, lingering=0.15)
        self._release(lease.id, 1)

    # --- moving, when the fleet asks

    def _answer(self, lease: Lease, offer: placing_pb2.MoveOffer) -> None:
        if lease is not self._lease or self._new is not None or lease.answered == offer.id:
            return
        lease.answered = offer.id
        rng = self.town.rebalancer.rng
        accept = rng.random() < AGREES
        self.tell(f"{'agrees' if accept else 'declines'} to move {lease.id}: {offer.reason}")
        message = placing_pb2.AnswerMoveRequest(offer_id=offer.id, accept=accept)
        network, kind = self.around.network, placing_pb2.AnswerMoveResponse
        heard = self.guarded(partial(self._may_move, lease))
        call(network, self.name, "AnswerMove", message, kind, heard)
        if rng.random() < ASKS_TWICE:
            call(network, self.name, "AnswerMove", message, kind, _ignore)

    def _may_move(self, old: Lease, said: Said[placing_pb2.AnswerMoveResponse] | Failed) -> None:
        if isinstance(said, Failed) or not said.message.HasField("allocation"):
            return
        given = said.message.allocation
        if given.state != types_pb2.ALLOCATION_STATE_GRANTED:
            return
        if old is not self._lease or self._new is not None:
            self._release(given.id, 1)  # what was to move is over
            return
        new = self._hold(given, given.expires_at - EPOCH - said.wall_offset, old.is_last)
        if new is None:
            return
        self._new = new
        self._keep_alive_later(new)
        self.after(new.until - self.now, partial(self._doubt, new))
        seconds = self.town.rebalancer.rng.uniform(*CARRY_SECONDS)
        self.after(seconds, partial(self._moved, old, new))

    def _moved(self, old: Lease, new: Lease) -> None:
        """The work has been carried over, or it failed; what is left behind is given back."""
        if new is not self._new or old is not self._lease:
            return
        if self.town.rebalancer.rng.random() < ARRIVES:
            self.tell(f"has moved from {old.id} to {new.id}")
            self.witness.counts["moved"] += 1
            self._lease, self._new = new, None
            self._give_back(old)
            self.after(0.0, partial(self._work, new))
            if not new.is_last:
                seconds = self.around.rng.uniform(*HOLD_SECONDS)
                self.after(seconds, partial(self._finish, new))
        else:
            self.tell(f"does not move from {old.id} to {new.id} after all")
            self._give_back(new)

    def _end_processes(self, lease: Lease, lingering: float) -> None:
        rng = self.around.rng
        for node, pid in lease.pids:
            machine = self.town.machines[node]
            if rng.random() < lingering and not self.town.is_calm:
                self.around.scheduler.after(rng.uniform(0.5, 12.0), partial(machine.end, pid))
            else:
                machine.end(pid)


def draw_request(holder: str, town: Town) -> types_pb2.Request:
    """Return a request that some node of the town could host, most of the time."""
    rng = town.rng
    gpus_max = max(len(machine.gpus) for machine in town.machines.values())
    kind = rng.random()
    machine = rng.choice(list(town.machines.values()))
    place = rng.random()
    request = types_pb2.Request(
        gpus=1 if kind < 0.8 else rng.randint(2, gpus_max),
        holder=holder,
        ttl_seconds=rng.uniform(2.0, 20.0),
        node=machine.name if place < 0.15 else "",
        models=[machine.gpus[0].model] if 0.15 < place < 0.25 else [],
        priority=rng.choice((0, 0, 0, 0, 5, -5)),
    )
    if kind < 0.45:
        request.memory_bytes = rng.randint(1, 40) * GIB
    elif kind < 0.55:
        request.nodes = rng.randint(2, 3)
    if town.partitions is not None:
        town.partitions.draw_request(request)
    return request


def _ignore(said: object) -> None:
    del said
