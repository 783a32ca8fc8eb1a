"""NVLinks: which GPUs and NVSwitches the links of a GPU lead to."""

from collections.abc import Callable, Mapping
from typing import Any

import pynvml  # type: ignore[import-untyped]
import pytest
from tests.support.nvml_rig import Rig

from stoker.agent.driver import Suspect
from stoker.agent.nvml.links import normalised
from stoker.agent.readings import NvlinkPeer
from stoker.agent.simulated.scenario import (
    Fail,
    Field,
    Lose,
    Missing,
    ScriptedDriver,
    ScriptedFact,
)

NVML: Any = pynvml
TYPE = "nvmlDeviceGetNvLinkRemoteDeviceType"
PCI = "nvmlDeviceGetNvLinkRemotePciInfo"
GPU, NPU, UNKNOWN = 0, 1, 0xFF
STATE = 165  # of nvmlDeviceGetFieldValues
# Of the first four cards of a DGX-1 with V100: how many links lead from which to which.
CUBE_MESH: Mapping[int, Mapping[int, int]] = {
    0: {1: 1, 2: 1, 3: 2},
    1: {0: 1, 2: 2, 3: 1},
    2: {0: 1, 1: 2, 3: 2},
    3: {0: 2, 1: 1, 2: 2},
}


def wired(
    rig: Rig, matrix: Mapping[int, Mapping[int, int]], kind: int | None = GPU, short: bool = False
) -> Rig:
    """Lead the links of the cards to one another; what is left over leads nowhere that is known.

    `kind`: what is told of the other end; None: the driver does not tell. `short`: addresses have
    four digits of the domain.
    """
    ask_address = rig.nvml.nvmlDeviceGetNvLinkRemotePciInfo
    rig.nvml.nvmlInit()
    cards = map(rig.nvml.nvmlDeviceGetHandleByIndex, range(rig.nvml.nvmlDeviceGetCount()))
    addresses = [card.pci_bus_id for card in cards]
    rig.nvml.nvmlShutdown()

    def other_end(card: Any, link: int) -> int | None:
        ends = [peer for peer, links in matrix.get(card.index, {}).items() for _ in range(links)]
        return ends[link] if link < len(ends) else None

    def remote_type(card: Any, link: int) -> int:
        if kind is None:
            raise NVML.NVMLError(NVML.NVML_ERROR_FUNCTION_NOT_FOUND)
        return UNKNOWN if other_end(card, link) is None else kind

    def remote_pci(card: Any, link: int) -> Any:
        peer, pci = other_end(card, link), ask_address(card, link)
        if peer is not None:
            pci.busId = addresses[peer][4:].lower() if short else addresses[peer]
        return pci

    rig.nvml.nvmlDeviceGetNvLinkRemoteDeviceType = remote_type  # type: ignore[method-assign]
    rig.nvml.nvmlDeviceGetNvLinkRemotePciInfo = remote_pci  # type: ignore[method-assign]
    return rig


def peers(rig: Rig) -> dict[int, dict[int, int]]:
    """Return the matrix that the inventory tells, by index."""
    index = {gpu.uuid: gpu.index for gpu in rig.inventory.gpus}
    return {
        gpu.index: {index[each.uuid]: each.links for each in gpu.nvlink_peers}
        for gpu in rig.inventory.gpus
    }


def switches(rig: Rig) -> list[int]:
    return [gpu.nvswitch_links for gpu in rig.inventory.gpus]


@pytest.mark.parametrize(
    ("model", "links"),
    [
        ("A100-40GB", 12),
        ("A100-80GB", 12),
        ("H100-80GB", 18),
        ("H200-141GB", 18),
        ("B200", 18),
        ("L40S", 0),
        ("T4", 0),
    ],
)
def test_cards_on_a_board_of_eight_are_linked_to_its_switches(model: str, links: int) -> None:
    rig = Rig(model=model).opened()
    assert switches(rig) == [links] * 4
    assert peers(rig) == {0: {}, 1: {}, 2: {}, 3: {}}


@pytest.mark.parametrize("short", [False, True])
@pytest.mark.parametrize("kind", [GPU, None])
def test_cards_that_are_wired_to_one_another(kind: int | None, short: bool) -> None:
    rig = wired(Rig(model="A100-40GB"), CUBE_MESH, kind, short).opened()
    assert peers(rig) == CUBE_MESH
    # What the driver knows not to be a GPU and cannot name is a switch that a guest does not see;
    # where it cannot tell GPUs apart either, an address that is no GPU's says nothing.
    left = [12 - sum(CUBE_MESH[index].values()) for index in range(4)]
    assert switches(rig) == ([0] * 4 if kind is None else left)


def test_a_peer_is_named_by_its_uuid_in_pci_order() -> None:
    rig = wired(Rig(gpus=3), {0: {2: 4, 1: 2}}).opened()
    assert rig.inventory.gpus[0].nvlink_peers == (
        NvlinkPeer(rig.nvml.uuids[1], 2),
        NvlinkPeer(rig.nvml.uuids[2], 4),
    )
    assert rig.inventory.gpus[1].nvlink_peers == ()  # each says what itself is told


def test_a_processor_at_the_other_end_is_no_gpu_and_no_switch() -> None:
    rig = wired(Rig(model="A100-40GB", gpus=2), {0: {1: 12}, 1: {0: 12}}, NPU).opened()
    assert (peers(rig), switches(rig)) == ({0: {}, 1: {}}, [0, 0])


def test_a_link_that_is_down_does_not_count() -> None:
    down = tuple(
        ScriptedFact(gpu=0, fact="nvlink_up", label=str(link), value=0)  # type: ignore[arg-type]
        for link in (0, 5)
    )
    rig = Rig(counters=down).opened()
    assert switches(rig) == [16, 18, 18, 18]


def lose(rig: Rig) -> None:
    rig.play(Lose(gpu=1))


def leave_alone(rig: Rig) -> None:
    rig.inventory = rig.driver.inventory([Suspect(1, rig.nvml.uuids[1], 4, "it hung")])


@pytest.mark.parametrize("happens", [lose, leave_alone])
def test_a_gpu_that_cannot_be_read_is_nobody_s_peer(happens: Callable[[Rig], None]) -> None:
    rig = wired(Rig(model="A100-40GB"), CUBE_MESH).opened()
    assert peers(rig) == CUBE_MESH
    happens(rig)
    if happens is lose:
        rig.inventory = rig.driver.inventory()
    assert peers(rig) == {
        index: {peer: links for peer, links in CUBE_MESH[index].items() if peer != 1}
        for index in (0, 2, 3)
    }


@pytest.mark.parametrize(
    "fault",
    [
        Missing(function=TYPE),
        Fail(function=TYPE, error="NOT_SUPPORTED"),
        Fail(function=TYPE, error="UNKNOWN"),
        Field(gpu=0, field=STATE, error="NO_PERMISSION"),
        Field(gpu=0, field=STATE, value=3),
    ],
)
def test_what_the_driver_does_not_tell_leaves_a_gpu_without_peers(fault: Any) -> None:
    rig = Rig(fault).opened()
    assert peers(rig)[0] == {}
    assert switches(rig)[0] == 0
    assert rig.inventory.missing == ()


def test_states_are_asked_one_by_one_where_there_is_no_field_of_them() -> None:
    rig = Rig(Field(field=STATE, error="NOT_SUPPORTED")).opened()
    assert switches(rig) == [18] * 4


def test_a_link_that_is_asleep_is_a_link() -> None:
    rig = Rig(Field(field=STATE, scope=3, value=2), Field(field=STATE, scope=4, value=0)).opened()
    assert switches(rig) == [17] * 4
    assert [gpu.nvlinks_active for gpu in rig.inventory.gpus] == [17] * 4


def test_a_remote_address_that_is_not_told_leaves_the_rest() -> None:
    rig = wired(Rig(Fail(gpu=0, function=PCI, error="UNKNOWN"), gpus=2), {0: {1: 2}, 1: {0: 2}})
    assert peers(rig.opened()) == {0: {}, 1: {0: 2}}


def test_drivers_before_r470_do_not_tell_what_is_at_the_other_end() -> None:
    driver = ScriptedDriver("450.80.02")
    rig = Rig(model="A100-40GB", driver=driver).opened()
    assert switches(rig) == [0] * 4
    rig = wired(Rig(model="A100-40GB", driver=driver), CUBE_MESH, None).opened()
    assert peers(rig) == CUBE_MESH


def test_a_gpu_that_is_lost_while_its_links_are_followed_is_missing() -> None:
    rig = Rig(Lose(gpu=2, function=TYPE)).opened()
    assert [(each.index, each.error_kind) for each in rig.inventory.missing] == [(2, "gpu_lost")]


def test_links_are_followed_when_gpus_are_looked_for_and_not_with_every_reading() -> None:
    rig = Rig().opened()
    rig.driver.sample()
    assert TYPE not in rig.asked(0)


@pytest.mark.parametrize(
    ("address", "same"),
    [
        ("00000000:18:00.0", "0000:18:00.0"),
        ("00000000:AF:00.0", "0000:af:00.0"),
        ("00010000:0A:00.0", "10000:0a:00.0"),
    ],
)
def test_an_address_is_the_same_however_it_is_written(address: str, same: str) -> None:
    assert normalised(address) == normalised(same)
