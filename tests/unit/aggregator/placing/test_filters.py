"""Every filter: what fits, and what the refusal wanted, found and says."""

from dataclasses import dataclass

import pytest
from tests.unit.aggregator.builders import (
    A100,
    GIB,
    H100,
    START,
    T4,
    Scene,
    make_facts,
    make_gpus,
    make_process,
    make_samples,
    share,
    whole,
)
from tests.unit.aggregator.changes import (
    Change,
    add_a_card,
    assign,
    assign_all,
    block_driver,
    cordon,
    cordon_a_gpu,
    cordon_all_gpus,
    cordon_five_gpus,
    disconnect,
    go_stale,
    lose_a_card,
    lose_assignments,
    lose_processes,
    miss_a_card,
    miss_cards_that_nobody_read,
    nothing,
    omit_a_card,
    reconnect,
    release_driver,
    reserve,
    set_mig,
    share_out,
    stay_fresh,
    take_all,
    take_all_but_the_cordoned,
    take_all_but_the_missing,
    take_six,
    uncordon,
    use_all_by_others,
    use_by_hidden,
    use_by_others,
    use_by_owned,
)

from stoker.aggregator import events as e
from stoker.aggregator.model import DriverState, Refusal, Request
from stoker.aggregator.placing.filters import could_ever_fit, refuse
from stoker.aggregator.processes import ProcessTable


@dataclass(frozen=True)
class Fits:
    what: str
    request: Request
    change: Change = nothing


FITS = (
    Fits("all GPUs of a node", whole(8)),
    Fits("the node that was asked for", whole(node="n1")),
    Fits("the host that was asked for", whole(host_boot_id="boot of n1")),
    Fits("the pool that was asked for", whole(pool="train")),
    Fits("the model by a part of its name", whole(8, models=("h100",))),
    Fits("the model by its name in the catalogue", whole(8, models=("H100-80GB",))),
    Fits("a share of all the memory of a GPU", share(80)),
    Fits("a share of what the driver leaves", share(79), reserve),
    Fits("a node that is no longer cordoned", whole(), uncordon),
    Fits("a sample that is three intervals old", whole(), stay_fresh),
    Fits("what others leave free", whole(2), take_six),
    Fits("a share beside another", share(10), share_out),
    Fits("what a process of others leaves free", whole(7), use_by_others),
    Fits("memory beside a process of others", share(50), use_all_by_others),
    Fits("the cards whose processes are known", whole(7), lose_processes),
    Fits("the cards that can be read", whole(7), lose_a_card),
    Fits("the cards that are not out of use", whole(7), miss_a_card),
    Fits("a share of a card that is not out of use", share(80), miss_a_card),
    Fits("the cards beside those that nobody read", whole(8), miss_cards_that_nobody_read),
    Fits("the cards that were there at the last process reading", whole(8), add_a_card),
    Fits("the cards without MIG", whole(7), set_mig),
    Fits("the cards that are not cordoned", whole(7), cordon_a_gpu),
    Fits("a share beside cards that are cordoned", share(80), cordon_five_gpus),
    Fits("the cards that nobody else has handed out", whole(7), assign),
    Fits("a share of a card that nobody else has handed out", share(80), assign),
)


@pytest.mark.parametrize("case", FITS, ids=lambda case: case.what)
def test_fits(case: Fits) -> None:
    scene = Scene(make_facts(pool="train"))
    case.change(scene)
    view = scene.view()
    assert refuse(case.request, view.nodes["n1"], view) is None


@dataclass(frozen=True)
class Refused:
    what: str
    request: Request
    change: Change
    filter: str
    wanted: str
    found: str
    reason: str
    lasting: bool = False  # it would not fit on the free node either


EIGHT_UNKNOWN = ", ".join(f"GPU {i}" for i in range(8))

REFUSED = (
    Refused(
        *("another node", whole(node="n2"), nothing, "node", "n2", "n1"),
        "node n2 was asked for",
        lasting=True,
    ),
    Refused(
        *("another host", whole(host_boot_id="b"), nothing, "host", "boot b", "boot boot of n1"),
        "it is another host than the one the command would run on",
        lasting=True,
    ),
    Refused(
        *("another pool", whole(pool="infer"), nothing, "pool", "infer", "train"),
        "pool infer was asked for, it is in pool train",
        lasting=True,
    ),
    Refused(
        *("another model", whole(models=("A100",)), nothing, "model", "A100", H100),
        f"wanted A100, it has {H100}",
        lasting=True,
    ),
    Refused(
        *("a ninth GPU", whole(9), nothing, "gpus_total", "9", "8"),
        "wanted 9 x GPU on one node, it has 8",
        lasting=True,
    ),
    Refused(
        *("too large a share", share(81), nothing, "memory_total", str(81 * GIB), str(80 * GIB)),
        "wanted 81 GiB of one GPU, its largest has 80 GiB beyond what the driver keeps",
        lasting=True,
    ),
    Refused(
        *("what the driver keeps", share(80), reserve, "memory_total"),
        *(str(80 * GIB), str(79 * GIB)),
        "wanted 80 GiB of one GPU, its largest has 79 GiB beyond what the driver keeps",
        lasting=True,
    ),
    Refused(
        *("a byte too much", share(80 + 1 / GIB), nothing, "memory_total"),
        *(str(80 * GIB + 1), str(80 * GIB)),
        f"wanted {80 * GIB + 1} B of one GPU, its largest has {80 * GIB} B "
        "beyond what the driver keeps",
        lasting=True,
    ),
    Refused(
        *("a cordoned node", whole(), cordon, "cordoned", "not cordoned", "Xid 79"),
        "cordoned: Xid 79",
    ),
    Refused(
        *("a disconnected node", whole(), disconnect, "disconnected"),
        *("connected, driver read", "disconnected: no frame for 30s"),
        "disconnected: no frame for 30s",
    ),
    Refused(
        *("a node that has just reconnected", whole(), reconnect, "driver"),
        *("connected, driver read", "its driver has not been read yet"),
        "its driver has not been read yet",
    ),
    Refused(
        *("a blocked driver", whole(), block_driver, "driver"),
        *("connected, driver read", "driver blocked: nvmlDeviceGetTemperature"),
        "driver blocked: nvmlDeviceGetTemperature",
    ),
    Refused(
        *("a driver that was released", whole(), release_driver, "driver"),
        "connected, driver read",
        "released by root for 10m: `stoker agent resume` on the host takes the driver again",
        "released by root for 10m: `stoker agent resume` on the host takes the driver again",
    ),
    Refused(
        *("a card that is out of use", whole(8), miss_a_card, "gpus_total", "8", "7"),
        "wanted 8 x GPU on one node, it has 7 of 8 GPUs; "
        "GPU 3 is out: nvmlDeviceGetPowerUsage has not returned within 1 s",
        lasting=True,
    ),
    Refused(
        *("cards that nobody read", whole(9), miss_cards_that_nobody_read, "gpus_total"),
        *("9", "8"),
        "wanted 9 x GPU on one node, it has 8 of 13 GPUs; GPU 8 is out: it fell off the bus; "
        "GPU 9 is out: it fell off the bus; GPU 10 is out: it fell off the bus; "
        "out as well: GPU 11, GPU 12",
        lasting=True,
    ),
    Refused(
        *("a full node with a card out of use", whole(), take_all_but_the_missing, "gpus_free"),
        *("1", "0"),
        "wanted 1 x GPU free on one node, 0 of 8 are: allocated to a1; "
        "GPU 3 is out: nvmlDeviceGetPowerUsage has not returned within 1 s",
    ),
    Refused(
        *("a stale node", whole(), go_stale, "stale"),
        *("a sample of the last three intervals", "2s late"),
        "its newest sample is 2s beyond three sampling intervals",
    ),
    Refused(
        *("more than is free", whole(4), take_six, "gpus_free", "4", "2"),
        "wanted 4 x GPU free on one node, 2 of 8 are: allocated to a1",
    ),
    Refused(
        *("a full node", whole(), take_all, "gpus_free", "1", "0"),
        "wanted 1 x GPU free on one node, 0 of 8 are: allocated to a1, a2, a3 and 5 more",
    ),
    Refused(
        *("a GPU that others use", whole(8), use_by_others, "gpus_free", "8", "7"),
        "wanted 8 x GPU free on one node, 7 of 8 are: "
        "GPU 7 is used by PID 4242 (bob, python train.py)",
    ),
    Refused(
        *("GPUs that are used in pods, jobs, containers and units", whole(8), use_by_owned),
        *("gpus_free", "8", "3"),
        "wanted 8 x GPU free on one node, 3 of 8 are: "
        "GPU 0 is used by PID 0 (bob, python train.py, pod ml/train-0); "
        "GPU 1 is used by PID 1 (bob, python train.py, Slurm job 7); "
        "GPU 2 is used by PID 2 (bob, python train.py, container 0123456789ab); "
        "GPU 3 is used by PID 3 (bob, python train.py, unit jupyter.service); "
        "GPU 4 is used by PID 4 (bob, python train.py, pod with UID u-1)",
    ),
    Refused(
        *("a GPU that somebody hidden uses", whole(), use_by_hidden, "gpus_free", "1", "0"),
        "wanted 1 x GPU free on one node, 0 of 1 are: "
        "GPU 0 is used by PID 4242 (its owner is hidden)",
    ),
    Refused(
        *("memory beside somebody hidden", share(1), use_by_hidden, "memory_free"),
        *(str(GIB), "0"),
        "wanted 1 GiB of one GPU, at most 0 B is free on one: "
        "GPU 0 is used by PID 4242 (its owner is hidden)",
    ),
    Refused(
        *("memory that others use", share(51), use_all_by_others, "memory_free"),
        *(str(51 * GIB), str(50 * GIB)),
        "wanted 51 GiB of one GPU, at most 50 GiB is free on one: "
        + "; ".join(f"GPU {i} is used by PID {100 + i} (bob, python train.py)" for i in range(8)),
    ),
    Refused(
        *("memory that is given away", share(11), share_out, "memory_free"),
        *(str(11 * GIB), str(10 * GIB)),
        "wanted 11 GiB of one GPU, at most 10 GiB is free on one: "
        "allocated to a1, a2, a3 and 5 more",
    ),
    Refused(
        *("a card whose processes could not be read", whole(8), lose_processes, "gpus_free"),
        *("8", "7"),
        "wanted 8 x GPU free on one node, 7 of 8 are: the processes on GPU 3 are not known yet",
    ),
    Refused(
        *("a card that could not be read", whole(8), lose_a_card, "gpus_free", "8", "7"),
        "wanted 8 x GPU free on one node, 7 of 8 are: the newest reading of GPU 3 failed",
    ),
    Refused(
        *("a card that has no sample", whole(8), omit_a_card, "gpus_free", "8", "7"),
        "wanted 8 x GPU free on one node, 7 of 8 are: the newest reading of GPU 7 failed",
    ),
    Refused(
        *("a card newer than the process table", whole(9), add_a_card, "gpus_free", "9", "8"),
        "wanted 9 x GPU free on one node, 8 of 9 are: the processes on GPU 8 are not known yet",
    ),
    Refused(
        *("a card in MIG mode", whole(8), set_mig, "mig_mode", "8", "7"),
        "wanted 8 x GPU on one node, 7 are not in MIG mode: MIG mode is on at GPU 0",
        lasting=True,
    ),
    Refused(
        *("a card that is cordoned", whole(8), cordon_a_gpu, "gpus_cordoned", "8", "7"),
        "wanted 8 x GPU on one node, 7 of 8 are not cordoned: "
        "GPU 3 is cordoned: Xid 3 (for 1m 30s)",
        lasting=True,
    ),
    Refused(
        *("many cards that are cordoned", whole(4), cordon_five_gpus, "gpus_cordoned", "4", "3"),
        "wanted 4 x GPU on one node, 3 of 8 are not cordoned: GPU 0 is cordoned: Xid 0 (for 0ms); "
        "GPU 1 is cordoned: Xid 1 (for 0ms); GPU 2 is cordoned: Xid 2 (for 0ms); 2 more",
        lasting=True,
    ),
    Refused(
        *("a share of cordoned cards", share(1), cordon_all_gpus, "gpus_cordoned"),
        *(str(GIB), "0"),
        "wanted 1 GiB of one GPU, the largest that is not cordoned has 0 B: "
        "GPU 0 is cordoned: Xid 0 (for 0ms); GPU 1 is cordoned: Xid 1 (for 0ms); "
        "GPU 2 is cordoned: Xid 2 (for 0ms); 5 more",
        lasting=True,
    ),
    Refused(
        *("a full node with a cordoned card", whole(), take_all_but_the_cordoned, "gpus_free"),
        *("1", "0"),
        "wanted 1 x GPU free on one node, 0 of 8 are: allocated to a1; "
        "GPU 3 is cordoned: Xid 3 (for 0ms)",
    ),
    Refused(
        *("a card that others have handed out", whole(8), assign, "gpus_free", "8", "7"),
        "wanted 8 x GPU free on one node, 7 of 8 are: GPU 2 is handed out by "
        "kubelet: pod ml/train-0 (container c), kubelet: pod ml/train-1 (container c)",
    ),
    Refused(
        *("a share of cards that others have handed out", share(1), assign_all, "memory_free"),
        *(str(GIB), "0"),
        "wanted 1 GiB of one GPU, at most 0 B is free on one: "
        + "; ".join(f"GPU {i} is handed out by slurm: Slurm job {i}" for i in range(8)),
    ),
    Refused(
        *("cards that others may have handed out", whole(), lose_assignments, "gpus_free"),
        *("1", "0"),
        "wanted 1 x GPU free on one node, 0 of 8 are: "
        "what others have handed out is not known: the kubelet does not answer",
    ),
)


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.what)
def test_refused(case: Refused) -> None:
    scene = Scene(make_facts(pool="train"))
    case.change(scene)
    view = scene.view()
    expected = Refusal("n1", case.filter, case.reason, case.wanted, case.found)
    assert refuse(case.request, view.nodes["n1"], view) == expected
    assert could_ever_fit(case.request, view.nodes["n1"], view) is not case.lasting


def test_node_without_a_sample_is_stale() -> None:
    scene = Scene()
    scene.record(e.NodeRegistered(START, make_facts()))
    scene.connect("n1")
    scene.frame("n1", driver=DriverState.READING, processes=ProcessTable(START, ()))
    view = scene.view()
    refusal = refuse(whole(), view.nodes["n1"], view)
    assert refusal is not None
    assert (refusal.filter, refusal.found) == ("stale", "none")
    assert refusal.reason == "no sample of its GPUs has arrived yet"


def test_node_without_a_process_table_is_not_placeable() -> None:
    scene = Scene()
    scene.record(e.NodeRegistered(START, make_facts(gpus=2)))
    scene.connect("n1")
    scene.frame("n1", driver=DriverState.READING, samples=make_samples(make_gpus("n1", 2)))
    view = scene.view()
    for request in (whole(), share(1)):
        refusal = refuse(request, view.nodes["n1"], view)
        assert refusal is not None
        assert refusal.reason.endswith("the processes on GPU 0, GPU 1 are not known yet")
    scene.frame("n1", processes=ProcessTable(START, ()))
    view = scene.view()
    assert refuse(whole(2), view.nodes["n1"], view) is None


MIXED = (*make_gpus("a", 2, A100, 40), *make_gpus("t", 2, T4, 16))


@pytest.mark.parametrize(
    ("request_", "filter_", "found"),
    [
        pytest.param(whole(2, models=("A100",)), None, "", id="enough of the model"),
        pytest.param(whole(2), None, "", id="any model"),
        pytest.param(whole(3), "gpus_total", "2", id="all of one model"),
        pytest.param(whole(3, models=("A100",)), "gpus_total", "2", id="too few of the model"),
        pytest.param(share(40, models=("A100",)), None, "", id="a share of the large model"),
        pytest.param(
            share(17, models=("T4",)), "memory_total", str(16 * GIB), id="of the small one"
        ),
        pytest.param(
            whole(models=("H100",)), "model", f"{A100}, {T4}", id="a model that is not there"
        ),
    ],
)
def test_on_a_mixed_node_only_the_model_counts(
    request_: Request, filter_: str | None, found: str
) -> None:
    scene = Scene(make_facts(gpus=MIXED))
    view = scene.view()
    refusal = refuse(request_, view.nodes["n1"], view)
    assert (refusal.filter if refusal else None) == filter_
    assert refusal is None or refusal.found == found


def test_processes_of_an_allocation_are_foreign_on_gpus_that_it_has_not() -> None:
    scene = Scene(make_facts(gpus=2))
    mine = scene.grant(whole(ttl_seconds=900.0))
    processes = tuple(make_process(f"n1-{i}", pid=i, allocation_id=mine.id) for i in range(2))
    scene.frame("n1", processes=ProcessTable(START, processes))
    first, second = scene.view().nodes["n1"].gpus
    assert first.foreign == ()
    assert [process.pid for process in second.foreign] == [1]
    assert not second.is_free


def test_what_an_ended_allocation_left_running_is_foreign() -> None:
    scene = Scene(make_facts(gpus=1))
    mine = scene.grant(whole())
    scene.obey("n1")
    left = make_process("n1-0", allocation_id=mine.id)
    scene.frame("n1", processes=ProcessTable(START, (left,)))
    assert scene.view().nodes["n1"].gpus[0].foreign == ()
    scene.hand_back(mine.id)
    assert scene.view().nodes["n1"].gpus[0].foreign == (left,)
    assert scene.view().nodes["n1"].free_gpus == 0
