"""When the driver is asked and when not, by what the agent says and what the kernel has loaded."""

from pathlib import Path

import pytest
from msgspec.structs import replace
from tests.support.doctor_hosts import well, with_gpu

from stoker.agent.doctor.asking import default_lock_folders, why_not_asked
from stoker.agent.doctor.observed import AgentFacts, WhyNot
from stoker.core.local import DriverCall, DriverFacts, ReleaseFacts, Status


def state(name: str, call: str | None = None) -> DriverFacts:
    in_call = None if call is None else DriverCall(call, 0)
    return DriverFacts(name, "why", None, 1, in_call, 1, 0, 0, 0)


WELL = well()
RELEASE = ReleaseFacts(at=0.0, until=None, by="root")
SAYS: dict[str, tuple[Status, WhyNot | None]] = {
    "reading": (WELL, None),
    "failed, which says nothing of hanging": (replace(WELL, driver=state("failed")), None),
    "released": (replace(WELL, driver=state("released")), WhyNot.RELEASED),
    "releasing": (replace(WELL, release=RELEASE), WhyNot.RELEASED),
    "blocked": (replace(WELL, driver=state("blocked")), WhyNot.HANGS),
    "starting, in a call": (replace(WELL, driver=state("starting", "nvmlInit")), WhyNot.STARTING),
    "starting, not in a call": (replace(WELL, driver=state("starting")), None),
    "one GPU is left alone": (
        with_gpu(WELL, 1, is_read=False, reason="left alone: nvmlX has not returned within 1 s"),
        WhyNot.HANGS,
    ),
    "one GPU is lost": (with_gpu(WELL, 1, is_read=False, reason="GPU is lost"), None),
    "simulated": (replace(WELL, simulated=True, release=RELEASE), None),
}


@pytest.mark.parametrize("name", SAYS)
def test_what_the_agent_says_counts(name: str) -> None:
    status, expected = SAYS[name]
    found = why_not_asked(AgentFacts(status, "", True), has_module=True)
    assert (None if found is None else found.reason) is expected


@pytest.mark.parametrize(
    ("agent", "has_module", "expected"),
    [
        (AgentFacts(None, "nobody", False), True, None),
        (AgentFacts(None, "nonsense", True), True, WhyNot.UNSAID),
        (None, True, WhyNot.UNSAID),
        # Opening NVML would load the module, which somebody may have taken out on purpose.
        (AgentFacts(None, "nobody", False), False, WhyNot.UNLOADED),
        (AgentFacts(WELL, "", True), False, WhyNot.UNLOADED),
    ],
)
def test_no_agent_and_no_module(
    agent: AgentFacts | None, has_module: bool, expected: WhyNot | None
) -> None:
    found = why_not_asked(agent, has_module=has_module)
    assert (None if found is None else found.reason) is expected


def test_root_locks_where_nobody_else_writes() -> None:
    assert default_lock_folders({}, 0)[0] == Path("/run")
    runtime = {"XDG_RUNTIME_DIR": "/run/user/7"}
    assert default_lock_folders(runtime, 7)[0] == Path("/run/user/7")
    assert default_lock_folders({}, 7)[-1] == Path("/tmp")
