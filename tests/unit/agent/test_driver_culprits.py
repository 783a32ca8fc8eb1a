"""What is left alone, what is waited for, and which of them a fresh session is begun for."""

import pytest

from stoker.agent.driver_host.culprits import Culprits, Trial
from stoker.agent.driver_host.watch import Note
from stoker.agent.facts import Fact
from stoker.agent.readings import GpuFault, GpuIdentity, GpuReading, Inventory, XidSeen


def inventory(*uuids: str, missing: tuple[GpuFault, ...] = ()) -> Inventory:
    gpus = tuple(GpuIdentity(index, uuid, "T4", 16) for index, uuid in enumerate(uuids))
    return Inventory(0.0, None, None, None, simulated=True, gpus=gpus, missing=missing)


@pytest.fixture
def culprits() -> Culprits:
    made = Culprits(retrial_seconds_min=30, retrial_seconds_max=100)
    learn(made, inventory("a", "b", "c"), 0)
    return made


def learn(culprits: Culprits, found: Inventory, now: float) -> None:
    culprits.learn(culprits.suspects.learn(found), now)


@pytest.mark.parametrize(
    ("note", "name"),
    [
        (None, None),
        (Note(None, "nvmlInit"), None),
        (Note(1, "power"), "b"),
        (Note(7, "power"), "GPU 7"),
    ],
)
def test_which_gpu_a_call_is_about(culprits: Culprits, note: Note | None, name: str | None) -> None:
    assert culprits.name_of(note) == name


@pytest.mark.parametrize(
    ("name", "call", "suspects", "is_dcgm_left_alone"),
    [
        ("a GPU", Note(1, "nvmlDeviceGetPowerUsage"), ["b"], False),
        ("the driver as a whole", Note(None, "nvmlInit"), [], False),
        ("DCGM", Note(None, "dcgmGetLatestValues_v2"), [], True),
    ],
)
def test_what_a_host_hung_in_is_left_alone(
    culprits: Culprits,
    name: str,
    call: Note,
    suspects: list[str],
    is_dcgm_left_alone: bool,
) -> None:
    culprits.blame(call, "hung", 0)
    assert [each.uuid for each in culprits.suspects] == suspects, name
    assert culprits.is_dcgm_left_alone is is_dcgm_left_alone, name
    assert culprits.trial(0).without_dcgm is is_dcgm_left_alone, name


def test_dcgm_is_tried_by_the_session_that_is_begun_for_it(culprits: Culprits) -> None:
    culprits.blame(Note(None, "dcgmConnect_v2"), "hung", 0)
    assert not culprits.is_renewal_due(29)
    assert culprits.seconds_until_trial(0) == 30
    assert culprits.is_renewal_due(30)
    trial = culprits.trial(30)
    assert trial == Trial((), without_dcgm=False)
    culprits.conclude(trial, 31)
    assert not culprits.is_dcgm_left_alone
    assert not culprits.is_renewal_due(1e9)
    culprits.blame(Note(None, "dcgmGetLatestValues_v2"), "hung", 40)  # as soon as it was asked
    assert culprits.seconds_until_trial(40) == 60


def test_no_session_is_begun_for_a_lost_gpu_while_another_is_suspected(culprits: Culprits) -> None:
    learn(culprits, inventory("a", "b", missing=(GpuFault(2, "c", "gpu_lost", ""),)), 0)
    assert culprits.awaited_gpus == ("c",)
    assert culprits.is_renewal_due(30)
    culprits.blame(Note(1, "power"), "hung", 20)
    assert not culprits.is_renewal_due(1e9)
    assert culprits.seconds_until_trial(30) == 20  # of the suspect
    # A session that begins for another reason tries it all the same.
    assert culprits.trial(30).awaited == ("c",)
    culprits.acquit(inventory("a", "b", missing=(GpuFault(2, "c", "gpu_lost", ""),)), (), 50)
    assert culprits.is_renewal_due(50)


def test_a_missing_gpu_is_a_reading_without_facts_where_it_is_known(culprits: Culprits) -> None:
    gone = (GpuFault(2, "c", "gpu_lost", "it fell"), GpuFault(3, None, "unknown", ""))
    learn(culprits, inventory("a", "b", missing=gone), 0)
    told = (GpuReading("a", 1.0, facts={Fact.POWER_WATTS: 1.0}),)
    first, absent = culprits.completed(told, 2.0)
    assert first is told[0]
    assert (absent.uuid, absent.at, absent.facts, absent.is_lost) == ("c", 2.0, {}, True)
    assert absent.failures[0].message == "it fell"


def test_an_xid_that_was_told_while_a_suspect_was_tried_is_not_lost(culprits: Culprits) -> None:
    before, after = XidSeen(1.0, 79), XidSeen(2.0, 31)
    culprits.blame(Note(1, "power"), "hung", 0)
    culprits.acquit(inventory("a", "b", "c"), [GpuReading("a", 1.0, xids=(before,))], 1)
    readings = (GpuReading("a", 2.0, xids=(after,)), GpuReading("b", 2.0))
    assert [each.xids for each in culprits.completed(readings, 2.0)] == [(before, after), ()]
    assert culprits.completed(readings, 3.0) == readings  # told once
