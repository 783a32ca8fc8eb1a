"""What a fleet does about weeks of failures: its agents judge, it cordons, un-cordons and notices.

The agents' judgement is the agent's own (`stoker.agent.health.judging`), and the tables, the rules
for cordons and the findings are the aggregator's own. Only what lies between (sampling, streams,
the disk) is left out, and somebody mends what is unhealthy within hours.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from heapq import heappop, heappush
from random import Random

from stoker.agent.health.judging import judge_gpu
from stoker.agent.health.policy import Policy
from stoker.agent.verdicts import Check, FaultRecord, Life
from stoker.aggregator import events as e
from stoker.aggregator.cordoning import CordonPolicy
from stoker.aggregator.findings import Finding, Findings
from stoker.aggregator.fleet import Fleet
from stoker.aggregator.model import Frame, Gpu, NodeFacts
from stoker.aggregator.upkeep import cordons, judgements, review_of
from stoker.aggregator.verdicts import GpuHealth, HealthFault, RepairAction, Verdict
from stoker.testing.gpu_days import HOUR, Cause, Happening, Weeks
from stoker.testing.gpu_noise import MODEL

_MENDED_HOURS = (1.0, 5.0)
_LOOK_SECONDS = 2 * HOUR
_Key = tuple[Check, str]


@dataclass(slots=True)
class CordonOutcome:
    """What was done, and noticed."""

    limit: int  # GPUs that may be cordoned by themselves at one time
    most: int = 0  # that were
    times: int = 0  # a GPU was cordoned
    withheld: int = 0  # times that one was not, because of the share
    wrongly: set[str] = field(default_factory=set[str])  # cordoned, and nothing was wrong
    left: int = 0  # still cordoned when all was mended
    findings: dict[tuple[str, str, str], Finding] = field(
        default_factory=dict[tuple[str, str, str], Finding]
    )


def run_cordons(weeks: Weeks, policy: CordonPolicy | None = None) -> CordonOutcome:
    """Let the fleet go through weeks without swaps, and until everything is mended."""
    assert not weeks.swaps, "cards stay where they are"
    play = _Play(weeks, policy or CordonPolicy())
    play.run()
    return play.outcome


class _Play:
    def __init__(self, weeks: Weeks, policy: CordonPolicy) -> None:
        self._rng = Random(weeks.rng.getrandbits(64))
        self._policy = policy
        self._judging = Policy()
        self._fleet = Fleet()
        self._findings = Findings()
        self._version = 0
        self._look_at = 0.0
        self._records: dict[str, dict[_Key, FaultRecord]] = {}
        self._mending: set[str] = set()
        self._faulty: set[str] = set()  # that had a fault which is not a program's
        # What comes: at which time, in which order at one time, and what; a UUID: it is mended;
        # nothing: a review is due.
        self._coming: list[tuple[float, int, Happening | str | None]] = []
        self._number = 0
        self._gpus: dict[str, list[str]] = {}
        self._nodes = {uuid: place.node for uuid, place in weeks.first.items()}
        for happening in weeks.happenings:
            self._plan(happening.at, happening)
        self._begin(weeks)
        self.outcome = CordonOutcome(policy.limit(len(weeks.first)))

    def run(self) -> None:
        """Take everything in, in order."""
        now = 0.0
        while self._coming:
            now, _, what = heappop(self._coming)
            match what:
                case Happening():
                    self._happen(what)
                case str():
                    self._records.pop(what, None)
                    self._mending.discard(what)
                    self._tell(now, self._nodes[what])
                case None:
                    pass
            self._review(now)
            self._look(now)
        self.outcome.left = len(self._fleet.conditions.cordoned_by_health)

    def _begin(self, weeks: Weeks) -> None:
        for uuid, place in weeks.first.items():
            self._gpus.setdefault(place.node, []).append(uuid)
        for session, (name, uuids) in enumerate(self._gpus.items(), 1):
            gpus = tuple(
                Gpu(uuid, MODEL, i, 80 << 30, number=i + 1, pci_bus_id=weeks.first[uuid].slot)
                for i, uuid in enumerate(uuids)
            )
            facts = NodeFacts(name, "journal", "boot", "1", simulated=True, gpus=gpus)
            self._apply(e.NodeRegistered(0.0, facts))
            self._fleet.note(e.AgentConnected(0.0, name, session, (), 0))
            self._tell(0.0, name)

    def _happen(self, happening: Happening) -> None:
        """Take a fault down as the agent does, and have it mended if the GPU is not well by it."""
        at, uuid = happening.at, happening.uuid
        check, code = _told(happening.what)
        records = self._records.setdefault(uuid, {})
        fresh = FaultRecord(uuid, check, code, happening.what, at, at, 0, (Life("boot"),))
        known = records.get((check, code), fresh)
        records[check, code] = replace(known, last_at=at, count=known.count + 1)
        if happening.cause is not Cause.PROGRAM:
            self._faulty.add(uuid)
            if uuid not in self._mending:
                self._mending.add(uuid)
                self._plan(at + self._rng.uniform(*_MENDED_HOURS) * HOUR, uuid)
        self._tell(at, self._nodes[uuid])

    def _tell(self, now: float, name: str) -> None:
        """Have the node's agent tell its verdicts, and the ledger take down what they change."""
        self._version += 1
        health = tuple(self._judged(uuid) for uuid in self._gpus[name])
        frame = Frame(self._version, now, now, health=health)
        session = self._fleet.status(name).session
        self._fleet.note(e.FrameArrived(now, name, session, frame, now))
        for event in list(judgements(self._fleet, name, self._policy, now)):
            self._apply(event)

    def _judged(self, uuid: str) -> GpuHealth:
        """Return the agent's verdict in the aggregator's words."""
        health = judge_gpu(uuid, self._records.get(uuid, {}).values(), self._judging)
        faults = tuple(
            HealthFault(
                check=fault.check.value,
                code=fault.code,
                verdict=Verdict(fault.verdict.value),
                action=RepairAction(fault.action.value),
                reason=fault.reason,
                since=fault.since,
                last_at=fault.last_at,
                count=fault.count,
            )
            for fault in health.faults
        )
        return GpuHealth(
            uuid=uuid,
            verdict=Verdict(health.verdict.value),
            action=RepairAction(health.action.value),
            check=health.check.value if health.check else "",
            reason=health.reason,
            since=health.since,
            faults=faults,
        )

    def _review(self, now: float) -> None:
        found = review_of(self._fleet, self._policy, now)
        for event in list(cordons(found, now)):
            if isinstance(event, e.GpuCordoned):
                self.outcome.times += 1
                if event.uuid not in self._faulty:
                    self.outcome.wrongly.add(event.uuid)
            self._apply(event)
            count = len(self._fleet.conditions.cordoned_by_health)
            self.outcome.most = max(self.outcome.most, count)
        self.outcome.withheld += len(found.withheld)
        if found.due_at is not None:
            self._plan(found.due_at, None)

    def _look(self, now: float) -> None:
        """Take in what the fleet notices, some times a day."""
        if now < self._look_at:
            return
        self._look_at = now + _LOOK_SECONDS
        for finding in self._findings.found(self._fleet, now):
            key = (finding.kind, finding.uuid, finding.slot)
            self.outcome.findings.setdefault(key, finding)

    def _plan(self, at: float, what: Happening | str | None) -> None:
        self._number += 1
        heappush(self._coming, (at, self._number, what))

    def _apply(self, event: e.DurableEvent) -> None:
        self._version += 1
        self._fleet.apply(event, self._version)


# Faults that are no Xid, by the words of the noise.
_CHECKS: Mapping[str, _Key] = {
    "gpu_lost": (Check.GPU_LOST, "gpu_lost"),
    "gpu_missing": (Check.GPU_MISSING, ""),
    "hw_slowdown": (Check.HW_SLOWDOWN, ""),
}


def _told(what: str) -> _Key:
    return _CHECKS[what] if what in _CHECKS else (Check.XID, what.removeprefix("Xid "))
