"""Requirements on what an operation is said to have come to, and on how it is waited for."""

from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import pytest

from stoker.cli.mig_asking import AWAY_SECONDS_MAX, wait
from stoker.cli.mig_outcomes import exit_code, outcomes
from stoker.core.errors import BadInput, ExitCode, StokerError
from stoker.core.local import NoAgent
from stoker.core.mig.reports import (
    GpuMigFacts,
    GpuPlan,
    InstanceFacts,
    MigAsk,
    MigReport,
)

replace = msgspec.structs.replace

OURS = "op-1"
BIG = InstanceFacts("7g.80gb", 0, 8, (7,), ("MIG-7",))
SMALL = InstanceFacts("1g.10gb", 0, 1, (1,), ("MIG-1",))
BEFORE = GpuMigFacts(
    uuid="GPU-0",
    index=0,
    model="NVIDIA H100 80GB HBM3",
    pci_device_id="0x233010DE",
    mode=True,
    mode_pending=True,
    instances=(BIG,),
    state="applying",
    operation_id=OURS,
)
PLAN = GpuPlan(
    uuid="GPU-0",
    index=0,
    model="NVIDIA H100 80GB HBM3",
    mode=True,
    mode_wanted=True,
    mode_change="none",
    changes=(),
    steps=("a step",),
    in_the_way=(),
    uuids_lost=(),
)
BEGUN = MigReport("host-a", "apply", "mixed", OURS, (PLAN,), (BEFORE,))


def looked(*gpus: GpuMigFacts) -> MigReport:
    return MigReport("host-a", "status", "", "", (), gpus)


def now(**changed: Any) -> GpuMigFacts:
    return replace(BEFORE, **changed)


# what the GPU is like in the end -> exit code, what is said
ENDS: dict[str, tuple[GpuMigFacts, ExitCode, str]] = {
    "done": (now(state="success", instances=(SMALL,)), ExitCode.OK, "done; it has 1g.10gb@0"),
    "a reset is needed": (
        now(state="reboot-required", reason="MIG mode is pending"),
        ExitCode.PENDING,
        "reboot-required: MIG mode is pending",
    ),
    "nothing was touched": (
        now(state="failed", reason="process 12 is in the way"),
        ExitCode.REFUSED,
        "process 12 is in the way; it is as it was: it has 7g.80gb@0",
    ),
    "restored, under other UUIDs": (
        now(
            state="failed",
            reason="no room",
            instances=(replace(BIG, uuids=("MIG-8",)),),
        ),
        ExitCode.REFUSED,
        "no room; it is as it was: it has 7g.80gb@0",
    ),
    "between": (
        now(state="failed", reason="no way back", instances=()),
        ExitCode.FAILED,
        "no way back; it has no instances",
    ),
    "restored, but for a compute instance": (
        now(state="failed", reason="no way back", instances=(replace(BIG, compute=(), uuids=()),)),
        ExitCode.FAILED,
        "no way back; it has 7g.80gb@0 (no compute instance: 7g.80gb@0)",
    ),
    "another mode": (
        now(state="failed", reason="no way back", instances=(), mode=False),
        ExitCode.FAILED,
        "no way back; it has MIG mode off",
    ),
    "nobody can tell": (
        now(state="failed", reason="the helper is gone", unread="no helper"),
        ExitCode.FAILED,
        "the helper is gone; it has partitions that cannot be told: no helper",
    ),
    "overtaken": (
        now(state="success", operation_id="op-2"),
        ExitCode.FAILED,
        "operation op-2 took the place of this one; it has 7g.80gb@0",
    ),
}


@pytest.mark.parametrize("name", ENDS)
def test_what_it_came_to(name: str) -> None:
    gpu, code, sentence = ENDS[name]
    (found,) = outcomes(BEGUN, looked(gpu))
    assert (found.gpu, found.exit_code, found.sentence) == (0, code, sentence)


def test_an_operation_of_the_past_is_not_done_again() -> None:
    before = now(operation_id="op-2", state="success")
    (found,) = outcomes(replace(BEGUN, gpus=(before,)), looked(before))
    assert found.exit_code is ExitCode.REFUSED
    assert found.sentence == ("operation op-1 is known, and is not done again; it has 7g.80gb@0")


def test_a_gpu_with_which_there_is_nothing_to_do_is_well() -> None:
    before = now(operation_id="op-0", state="success")
    begun = replace(BEGUN, plans=(replace(PLAN, steps=()),), gpus=(before,))
    (found,) = outcomes(begun, looked(before))
    assert (found.exit_code, found.sentence) == (ExitCode.OK, "nothing to do; it has 7g.80gb@0")


def test_only_gpus_with_a_plan_are_told_of_and_all_of_them() -> None:
    other = now(uuid="GPU-9", index=9, state="success")
    (found,) = outcomes(BEGUN, looked(other))
    assert (found.gpu, found.exit_code) == (0, ExitCode.FAILED)
    assert found.sentence == "its agent tells nothing of it any more"


# codes of the GPUs -> that of the command
CODES: dict[tuple[ExitCode, ...], ExitCode] = {
    (): ExitCode.OK,
    (ExitCode.OK, ExitCode.OK): ExitCode.OK,
    (ExitCode.OK, ExitCode.PENDING): ExitCode.PENDING,
    (ExitCode.PENDING, ExitCode.REFUSED, ExitCode.OK): ExitCode.REFUSED,
    (ExitCode.REFUSED, ExitCode.FAILED, ExitCode.PENDING): ExitCode.FAILED,
}

STATES = {
    ExitCode.OK: now(state="success"),
    ExitCode.PENDING: now(state="reboot-required"),
    ExitCode.REFUSED: now(state="failed"),
    ExitCode.FAILED: now(state="failed", instances=()),
}


@pytest.mark.parametrize("codes", CODES)
def test_the_gravest_gpu_decides(codes: tuple[ExitCode, ...]) -> None:
    found = [outcomes(BEGUN, looked(STATES[code]))[0] for code in codes]
    assert exit_code(found) is CODES[codes]


class Agent:
    """Answers each look with the next of its scripted answers; the last one over and over."""

    def __init__(self, *script: MigReport | Exception) -> None:
        self._script = list(script)
        self.asked: list[MigAsk] = []
        self.told: list[Sequence[GpuMigFacts]] = []
        self.away: list[str] = []
        self.seconds = 0.0

    def ask(self, ask: MigAsk) -> MigReport:
        self.asked.append(ask)
        answer = self._script.pop(0) if len(self._script) > 1 else self._script[0]
        if isinstance(answer, Exception):
            raise answer
        return answer

    def pause(self, seconds: float) -> None:
        self.seconds += seconds

    def note_away(self, error: StokerError) -> None:
        self.away.append(str(error))

    def wait(self, begun: MigReport = BEGUN) -> MigReport:
        monotonic: Callable[[], float] = lambda: self.seconds  # noqa: E731 (typed)
        return wait(
            *(self.ask, begun, self.told.append, self.note_away),
            pause=self.pause,
            monotonic=monotonic,
        )


FINAL = looked(now(state="success"))


def test_waits_until_nothing_more_happens_and_tells_of_each_look() -> None:
    ways = (now(state="draining"), now(state="applying"), now(state="rolling-back"))
    agent = Agent(*map(looked, ways), FINAL)
    assert agent.wait() is FINAL
    assert agent.told == [(each,) for each in ways] + [FINAL.gpus]
    assert set(agent.asked) == {MigAsk("status", gpus=("GPU-0",))}


@pytest.mark.parametrize("state", ["success", "failed", "reboot-required"])
def test_states_in_which_nothing_more_happens(state: str) -> None:
    agent = Agent(looked(now(state=state)))
    agent.wait()
    assert agent.seconds == 0.0


def test_waits_for_every_gpu() -> None:
    one, other = now(state="success"), now(uuid="GPU-1", state="applying")
    agent = Agent(looked(one, other), looked(one, now(uuid="GPU-1", state="failed")))
    assert len(agent.wait().gpus) == len(agent.told) == 2


def test_an_agent_that_is_restarted_is_waited_for() -> None:
    away = NoAgent("nobody listens")
    agent = Agent(away, away, looked(now(state="applying")), away, FINAL)
    assert agent.wait() is FINAL
    assert agent.away == ["nobody listens"] * 2  # once for each time


def test_an_agent_that_stays_away_is_given_up() -> None:
    agent = Agent(looked(now(state="applying")), NoAgent("nobody listens"))
    with pytest.raises(NoAgent):
        agent.wait()
    assert agent.seconds > AWAY_SECONDS_MAX


def test_a_gpu_that_is_not_read_yet_is_waited_for() -> None:
    assert Agent(looked(), looked(), FINAL).wait() is FINAL


def test_a_gpu_that_stays_away_is_given_up() -> None:
    agent = Agent(looked(now(state="applying")), looked())
    assert agent.wait() == looked()
    assert agent.seconds > AWAY_SECONDS_MAX


def test_other_errors_are_not_waited_out() -> None:
    agent = Agent(BadInput("what?"))
    with pytest.raises(BadInput):
        agent.wait()
    assert agent.seconds == 0.0


def test_nothing_to_wait_for() -> None:
    agent = Agent(BadInput("not asked"))
    begun = replace(BEGUN, plans=())
    assert agent.wait(begun) is begun
