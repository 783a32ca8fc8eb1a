"""Requirements on what `stoker mig export` writes: read again, it wants what is there."""

from collections.abc import Mapping
from dataclasses import dataclass

import pytest
from tests.conftest import Golden

from stoker.cli.mig_export import NotTold, exported, lost
from stoker.core.errors import ExitCode
from stoker.core.mig.files import parse_mig_file, render_mig_file, wanted_of
from stoker.core.mig.geometry import Wanted
from stoker.core.mig.reports import GpuMigFacts, InstanceFacts, MigReport


def gpu(
    index: int, *instances: InstanceFacts, mode: bool | None = True, unread: str = ""
) -> GpuMigFacts:
    return GpuMigFacts(
        uuid=f"GPU-{index}",
        index=index,
        model="NVIDIA A100-SXM4-80GB",
        pci_device_id="0x20B210DE",
        mode=mode,
        mode_pending=mode,
        instances=instances,
        unread=unread,
    )


def instance(profile: str, start: int, size: int, *compute: int) -> InstanceFacts:
    return InstanceFacts(profile, start, size, compute, tuple(f"MIG-{i}" for i in compute))


def report(*gpus: GpuMigFacts) -> MigReport:
    return MigReport("host-a", "status", "", "", (), gpus)


SMALL = tuple(instance("1g.10gb", start, 1, 1) for start in range(7))
MIXED = (instance("3g.40gb", 4, 4, 3), instance("2g.20gb", 0, 2, 2), instance("1g.10gb", 2, 1, 1))
PARTS = (instance("3g.40gb", 0, 4, 1, 2), instance("1g.10gb+me", 4, 1, 1))
HOSTS: Mapping[str, tuple[GpuMigFacts, ...]] = {
    "all-alike": (gpu(0, *SMALL), gpu(1, *SMALL)),
    "each-its-own": (
        gpu(1, *MIXED),
        gpu(0, *SMALL),
        gpu(2, mode=False),
        gpu(3),
        gpu(4, *PARTS),
        gpu(5, *reversed(MIXED)),
    ),
    "without-mig": (gpu(0, mode=None), gpu(1, mode=None)),
}


@pytest.mark.parametrize("name", HOSTS)
def test_file(golden: Golden, name: str) -> None:
    golden(
        f"cli/mig-export-{name}.yaml",
        render_mig_file(exported(report(*HOSTS[name]), "current", is_whole=True)),
    )


@dataclass(frozen=True)
class Card:
    """What of a GPU an entry chooses by."""

    index: int
    uuid: str
    pci_device_id: int = 0x20B210DE


WANTED: Mapping[str, Mapping[str, Wanted]] = {
    "all-alike": {f"GPU-{index}": Wanted(True, (("1g.10gb", 7),)) for index in range(2)},
    "each-its-own": {
        "GPU-0": Wanted(True, (("1g.10gb", 7),)),
        "GPU-1": Wanted(True, (("1g.10gb", 1), ("2g.20gb", 1), ("3g.40gb", 1))),
        "GPU-2": Wanted(False),
        "GPU-3": Wanted(True),
        "GPU-4": Wanted(True, (("1c.3g.40gb", 1), ("1g.10gb+me", 1), ("2c.3g.40gb", 1))),
        "GPU-5": Wanted(True, (("1g.10gb", 1), ("2g.20gb", 1), ("3g.40gb", 1))),
    },
    "without-mig": {"GPU-0": Wanted(False), "GPU-1": Wanted(False)},
}


@pytest.mark.parametrize("name", HOSTS)
def test_read_again_it_wants_what_is_there(name: str) -> None:
    text = render_mig_file(exported(report(*HOSTS[name]), "current", is_whole=True))
    entries = parse_mig_file(text, "exported").configs["current"]
    cards = [Card(each.index, each.uuid) for each in HOSTS[name]]
    assert wanted_of(entries, cards) == WANTED[name]


def test_a_gpu_that_cannot_be_read_is_not_exported_as_empty() -> None:
    with pytest.raises(NotTold, match="GPU 1: .*no helper") as caught:
        exported(report(gpu(0, *SMALL), gpu(1, unread="no helper")), "current", is_whole=True)
    assert caught.value.exit_code is ExitCode.MISSING


def test_an_instance_without_devices_is_told_of() -> None:
    found = report(gpu(3, instance("2g.20gb", 4, 2), *SMALL[:2]))
    assert lost(found) == [
        "GPU 3: 2g.20gb at slice 4 has no compute instance, so it is no device, and is left out"
    ]
    (entry,) = exported(found, "current", is_whole=True).configs["current"]
    assert entry.mig_devices == {"1g.10gb": 2}


def test_a_part_of_a_node_is_not_written_as_all_of_it() -> None:
    (entry,) = exported(report(gpu(2, *SMALL)), "current", is_whole=False).configs["current"]
    assert entry.devices == (2,)
