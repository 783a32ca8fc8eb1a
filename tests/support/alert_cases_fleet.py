"""Stories for the alerts about the fleet, from the aggregator's page."""

from tests.support.alerting import AGGREGATOR, Case, Story, series

OUTCOMES = ("granted", "queued", "refused", "invalid", "repeated", "failed")
NODE = {**AGGREGATOR, "node": "n1"}
CORDONED = {**NODE, "gpu": "3", "uuid": "GPU-3f2", "by": "health"}


def requests(**growing: str) -> Story:
    """Answers to requests by outcome; those that are not named stay 0. The first named is first."""
    values = {**growing, **{each: "0" for each in OUTCOMES if each not in growing}}
    return {
        series("stoker_allocation_requests_total", AGGREGATOR, outcome=outcome): value
        for outcome, value in values.items()
    }


def node(up: str, cordoned: str = "0") -> Story:
    """A node of the fleet."""
    return {
        series("stoker_node_up", NODE): up,
        series("stoker_node_cordoned", NODE): cordoned,
    }


def hub(name: str, value: str, **labels: str) -> Story:
    """A series of the aggregator."""
    return {series(name, AGGREGATOR, labels): value}


def cordons(withheld: str, by_health: str, at_most: str) -> Story:
    """How many GPUs are cordoned for their health, may be, and should be beyond that."""
    return {
        **hub("stoker_fleet_gpu_cordons_withheld", withheld),
        **hub("stoker_fleet_gpu_cordons", by_health, by="health"),
        **hub("stoker_fleet_gpu_cordons_max", at_most),
    }


FLEET_CASES = (
    Case(
        "StokerAgentDisconnected",
        "critical",
        5,
        fires=node("0"),
        labels=NODE,
        summary="node n1: its agent is not connected",
        description="The aggregator at hub:9411 has had no stream of the agent of node n1 for 5 "
        "minutes; nothing is placed there, and what it holds stays held. See whether the host is "
        "up and the agent runs. Cordon a node that is out of use, with `stoker cordon`.",
        silent={
            "it is connected": node("1"),
            "it is out of use": node("0", cordoned="1"),
            "it was restarted": node("0 0 1 1 0 0 1 1 0 0 1"),
        },
    ),
    # The first failure is a minute into the story.
    Case(
        "StokerAllocationsFailing",
        "critical",
        1,
        fires=requests(failed="0 1 1 1 1 1 1"),
        labels={**AGGREGATOR, "outcome": "failed"},
        summary="requests for GPUs fail because the aggregator cannot note them down",
        description="The aggregator at hub:9411 has answered requests for GPUs with an error of "
        "its store within the last 10 minutes. Look at its disk and its log.",
        silent={
            "all are granted": requests(granted="0+5"),
            "they are refused": requests(refused="0+5"),
            "it failed long ago": requests(failed="3"),
        },
    ),
    # The share is known with the second sample; the alert follows a quarter of an hour later.
    Case(
        "StokerAllocationsRefused",
        "warning",
        16,
        fires=requests(refused="0+6", granted="0+2", invalid="0+90"),
        labels=AGGREGATOR,
        summary="75% of the requests for GPUs are refused",
        description="The aggregator at hub:9411 has refused 75% of the requests for GPUs in the "
        "last 15 minutes. The answers say why; `stoker why` explains a shape, `stoker status` "
        "shows what is free.",
        silent={
            "half of them are refused": requests(refused="0+6", granted="0+3", queued="0+3"),
            "a few are": requests(
                invalid="0+5",
                refused="0 1 2 3 3 3 3 3 3 3 3 3 3 3 3 3 3 3 3 3 3",
            ),
            "nobody asks": requests(),
            "they cannot be understood": requests(invalid="0+9", granted="0+1"),
        },
    ),
    Case(
        "StokerGrantsRefusedByNodes",
        "warning",
        1,
        fires=hub("stoker_allocation_holds_refused_total", "0 1 1 1 1 1 1"),
        labels=AGGREGATOR,
        summary="nodes cannot hold what was granted on them",
        description="Nodes of the aggregator at hub:9411 have refused allocations within the last "
        "10 minutes that were granted on them; those have ended. The holder is told why, and "
        "`stoker status` shows which nodes are not well. A full disk of the agent is one reason.",
        silent={
            "none was refused": hub("stoker_allocation_holds_refused_total", "0"),
            "one was long ago": hub("stoker_allocation_holds_refused_total", "2"),
        },
    ),
    Case(
        "StokerLedgerFailing",
        "critical",
        1,
        fires=hub("stoker_ledger_failures_total", "0 1 1 1 1 1 1"),
        labels=AGGREGATOR,
        summary="the aggregator's store refuses writes",
        description="The store of the aggregator at hub:9411 has refused writes within the last 10 "
        "minutes; nothing is granted or released until it takes them again. Look at the disk of "
        "its data folder: space, errors, permissions.",
        silent={
            "it never failed": hub("stoker_ledger_failures_total", "0"),
            "it failed long ago": hub("stoker_ledger_failures_total", "2"),
        },
    ),
    Case(
        "StokerGpuCordonedLong",
        "warning",
        24 * 60,
        fires={series("stoker_fleet_gpu_cordoned", CORDONED): "1"},
        labels=CORDONED,
        summary="GPU 3 of node n1 has been cordoned for a day",
        description="GPU 3 (GPU-3f2) of node n1 has been cordoned by health for more than a day. "
        "`stoker health` tells what is wrong with it; repair it, or give it back with "
        "`stoker uncordon --gpu`.",
        silent={
            "it was given back": {
                series("stoker_fleet_gpu_cordoned", CORDONED): "1x1000 stale _x3 1x400"
            },
        },
    ),
    Case(
        "StokerCordonsWithheld",
        "critical",
        2,
        fires=cordons(withheld="3", by_health="5", at_most="5"),
        labels=AGGREGATOR,
        summary="3 unhealthy GPUs stay in use: too many are cordoned already",
        description="The aggregator at hub:9411 has as many GPUs cordoned for their health as it "
        "may at one time, and 3 more should be. Either much of the fleet is broken, or a check is "
        "wrong: look at `stoker health`, and cordon by hand what is truly broken.",
        silent={
            "none is withheld": cordons(withheld="0", by_health="5", at_most="5"),
            "an operator undid one": cordons(withheld="1", by_health="4", at_most="5"),
            "none are wanted": cordons(withheld="1", by_health="0", at_most="0"),
            "operators cordoned many": {
                **cordons(withheld="1", by_health="0", at_most="5"),
                **hub("stoker_fleet_gpu_cordons", "7", by="operator"),
            },
        },
    ),
    Case(
        "StokerLemonsFound",
        "warning",
        10,
        fires={
            **hub("stoker_fleet_findings", "2", kind="lemon_gpu"),
            **hub("stoker_fleet_findings", "0", kind="lemon_slot"),
        },
        labels=AGGREGATOR,
        summary="2 GPUs or slots keep failing",
        description="The aggregator at hub:9411 has found 2 GPUs or slots that fail again and "
        "again after repairs. `stoker health` names them with their faults; have them inspected or "
        "replaced.",
        silent={
            "none is found": hub("stoker_fleet_findings", "0", kind="lemon_slot"),
            "a straggler is": hub("stoker_fleet_findings", "1", kind="straggler"),
        },
    ),
    Case(
        "StokerStragglersFound",
        "warning",
        10,
        fires=hub("stoker_fleet_findings", "1", kind="straggler"),
        labels={**AGGREGATOR, "kind": "straggler"},
        summary="1 GPUs are behind their peers",
        description="The aggregator at hub:9411 has found 1 GPUs that are slower than the others "
        "of the same allocation, which all of it waits for. `stoker health` names them with what "
        "they are behind in.",
        silent={
            "none is found": hub("stoker_fleet_findings", "0", kind="straggler"),
            "a lemon is": hub("stoker_fleet_findings", "1", kind="lemon_gpu"),
        },
    ),
)
