"""Stories for the alerts about agents and their drivers."""

from tests.support.alerting import AGENT, NODE, Case, Story, series

BUILD = {series("stoker_agent_build_info", NODE, version="1.0"): "1"}
LAST_SUCCESS = series("stoker_agent_last_success_timestamp_seconds", AGENT)
STARTED = series("process_start_time_seconds", AGENT)


def state(name: str, value: str = "1") -> Story:
    """The state of the driver, and what tells the node."""
    return {series("stoker_agent_driver_state", AGENT, state=name): value, **BUILD}


def agent(name: str, value: str) -> Story:
    """A series of the agent, and what tells the node."""
    return {series(name, AGENT): value, **BUILD}


AGENT_CASES = (
    Case(
        "StokerTargetDown",
        "critical",
        5,
        fires={series("up", AGENT): "0"},
        labels=AGENT,
        summary="stoker-agent at n1:9410 cannot be scraped",
        description="Prometheus has got no page from n1:9410 (stoker-agent) for 5 minutes, so "
        "nothing is known of what it reports. See whether the host is up and the daemon runs.",
        silent={
            "it is up": {series("up", AGENT): "1"},
            "it was down for 4 minutes": {series("up", AGENT): "0 0 0 0 1 0 0 0 0 1 0"},
            "it is nobody of ours": {series("up", job="node", instance="n1:9100"): "0"},
        },
    ),
    # The newest reading is as old as the story; it is too old in its second minute, for a minute.
    Case(
        "StokerTelemetryStale",
        "critical",
        3,
        fires={**BUILD, LAST_SUCCESS: "0", **state("blocked"), **state("released", "0")},
        labels=NODE,
        summary="node n1: no GPU was read for 3m 0s",
        description="The agent of node n1 (n1:9410) answers, but its newest reading of the GPUs is "
        "3m 0s old. Nothing is placed on the node meanwhile. Run `stoker agent status` there: it "
        "says what the driver does not answer.",
        silent={
            "it is read": {**BUILD, LAST_SUCCESS: "0+60"},
            "the driver is released": {LAST_SUCCESS: "0", **state("released")},
            "it was read again": {**BUILD, LAST_SUCCESS: "0 0 0 180 180 180 360 360"},
            "another's page has no such time": {**BUILD, series("process_start_time_seconds"): "0"},
        },
    ),
    Case(
        "StokerDriverBlocked",
        "critical",
        2,
        fires=state("blocked"),
        labels={**NODE, "state": "blocked"},
        summary="node n1: a call of the NVIDIA driver does not return",
        description="On node n1 (n1:9410) a call of the driver has not returned for 2 minutes, and "
        "starting anew has not helped. `stoker agent status` there names the call and the GPU; "
        "stoker_agent_driver_hangs_total counts them. If it stays, drain the node and reboot it.",
        silent={"it is read": state("blocked", "0"), "it has failed": state("failed")},
    ),
    Case(
        "StokerDriverFailed",
        "critical",
        5,
        fires=state("failed"),
        labels={**NODE, "state": "failed"},
        summary="node n1: the NVIDIA driver does not work",
        description="On node n1 (n1:9410) the driver is not loaded, or gives no sensible answer, "
        "for 5 minutes. Run `stoker agent doctor` there: it tells whether driver, library, devices "
        "or permissions are missing.",
        silent={
            "it is read": state("failed", "0"),
            "it is blocked": state("blocked"),
            "it was loaded again": state("failed", "1 1 0 1 1 1 1 0"),
        },
    ),
    Case(
        "StokerDriverHostStuck",
        "critical",
        5,
        fires=agent("stoker_agent_driver_host_unreaped", "1"),
        labels=NODE,
        summary="node n1: the kernel holds a killed process in the driver",
        description="On node n1 (n1:9410) a driver host was killed and the kernel has held it for "
        "5 minutes, so no GPU can be read. Only a reboot ends that: drain the node, then "
        "reboot it.",
        silent={
            "none is held": agent("stoker_agent_driver_host_unreaped", "0"),
            "it was let go of": agent("stoker_agent_driver_host_unreaped", "1 1 1 0 0 1 1 1 1 0"),
        },
    ),
    Case(
        "StokerDriverReleased",
        "info",
        240,
        fires=state("released"),
        labels={**NODE, "state": "released"},
        summary="node n1: the driver has been released for hours",
        description="Somebody had the agent of node n1 (n1:9410) let go of the driver more than 4 "
        "hours ago, and none of its GPUs is read or used since. When the work is done, run "
        "`stoker agent resume` there.",
        silent={"it is read": state("released", "0"), "it is blocked": state("blocked")},
    ),
    Case(
        "StokerKernelLogNotFollowed",
        "info",
        15,
        fires=agent("stoker_agent_kernel_log_followed", "0"),
        labels=NODE,
        summary="node n1: the kernel's log is not followed",
        description="The agent of node n1 (n1:9410) cannot follow the kernel's log, so it does not "
        "see faults that the driver tells only there: a GPU that falls off the bus without an "
        "event, for one. Start the root helper beside it; `stoker agent status` says why it is not "
        "followed.",
        silent={"it is followed": agent("stoker_agent_kernel_log_followed", "1")},
    ),
    Case(
        "StokerAssignmentsUnknown",
        "warning",
        5,
        fires=agent("stoker_agent_assignments_known", "0"),
        labels=NODE,
        summary="node n1: it is not known which GPUs others have assigned",
        description="The agent of node n1 (n1:9410) cannot learn which GPUs the kubelet or Slurm "
        "have handed out, so none of them counts as free. `stoker agent status` there says what "
        "does not answer.",
        silent={
            "they are known": agent("stoker_agent_assignments_known", "1"),
            "the kubelet was restarted": agent(
                "stoker_agent_assignments_known", "0 0 0 0 1 0 0 0 0 1 1"
            ),
        },
    ),
    Case(
        "StokerAggregatorUnreachable",
        "warning",
        10,
        fires=agent("stoker_agent_connected", "0"),
        labels=NODE,
        summary="node n1: the agent does not reach its aggregator",
        description="The agent of node n1 (n1:9410) has not been welcomed by an aggregator for 10 "
        "minutes. `stoker agent status` there says which addresses it tries.",
        silent={
            "it is connected": agent("stoker_agent_connected", "1"),
            "the aggregator was restarted": agent(
                "stoker_agent_connected", "0 0 0 1 1 1 0 1 1 1 1 1"
            ),
        },
    ),
)
