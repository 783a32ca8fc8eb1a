"""What an agent's configuration declares of partitions: what wins, and what is refused at start."""

import re
from collections.abc import Mapping
from pathlib import Path

import pytest

from stoker.agent.config import AgentConfig, load, settle
from stoker.agent.mig.declared import (
    OWN_NAME,
    Declaration,
    MigConfig,
    declare,
    wanted_by,
)
from stoker.agent.partitions import GpuPartitions
from stoker.core.errors import BadInput
from stoker.core.mig.geometry import Geometry, Wanted

H100, A100 = 0x233010DE, 0x20B210DE
OFF, EMPTY = Wanted(is_enabled=False), Wanted(is_enabled=True)
FILE = """
version: v1
mig-configs:
  mixed:
    - device-filter: ["0x233010DE"]
      devices: all
      mig-enabled: true
      mig-devices: {"3g.40gb": 1, "1g.10gb": 2}
    - devices: [1]
      mig-enabled: false
  plain:
    - devices: all
      mig-enabled: false
"""


def gpu(index: int, board: int = H100) -> GpuPartitions:
    return GpuPartitions(
        uuid=f"GPU-{index}",
        index=index,
        model="a card",
        pci_device_id=board,
        is_enabled=False,
        is_pending=False,
        toggles_at_once=True,
        geometry=Geometry(7, 8, ()),
        instances=(),
    )


def on(**devices: int) -> Wanted:
    return Wanted(True, tuple((name, count) for name, count in devices.items()))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mig.yaml"
    path.write_text(FILE)
    return path


def test_nothing_is_declared_unless_it_is_said() -> None:
    declared = declare(MigConfig())
    assert declared == Declaration("")
    assert declared.is_empty
    assert wanted_by(declared, [gpu(0)]) == {}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("off", OFF),
        ("empty", EMPTY),
        ("3g.40gb", Wanted(True, (("3g.40gb", 1),))),
        ("3g.40gb, 2x1g.10gb", Wanted(True, (("3g.40gb", 1), ("1g.10gb", 2)))),
        ("3g.40gb 2x1g.10gb", Wanted(True, (("3g.40gb", 1), ("1g.10gb", 2)))),
        ("1g.10gb,1g.10gb , 2x1g.10gb", Wanted(True, (("1g.10gb", 4),))),
        ("1g.10gb+me, 2x1c.2g.20gb", Wanted(True, (("1g.10gb+me", 1), ("1c.2g.20gb", 2)))),
        ("2g.48gb-me", Wanted(True, (("2g.48gb-me", 1),))),
        ("1g.24gb+me.all", Wanted(True, (("1g.24gb+me.all", 1),))),
    ],
)
def test_a_layout_as_it_is_written(text: str, expected: Wanted) -> None:
    declared = declare(MigConfig(gpus={"0": text}))
    assert declared.gpus == (("0", expected),)
    assert declared.config == OWN_NAME


@pytest.mark.parametrize(
    ("gpus", "message"),
    [
        ({"0": ""}, "mig.gpus: 0: wanted off, empty, or devices such as"),
        ({"0": "3g"}, "mig.gpus: 0: wanted off, empty, or devices such as .*found '3g'"),
        ({"0": "0x1g.10gb"}, "found '0x1g.10gb'"),
        ({"0": "3g.40gb,"}, "found ''"),
        ({"0": "2 x 1g.10gb"}, "found '2'"),
        ({"0": "off, 3g.40gb"}, "found 'off'"),
        ({"gpu0": "off"}, "mig.gpus: wanted an index, a UUID .* or all, found 'gpu0'"),
        ({"-1": "off"}, "found '-1'"),
        ({"1": "off", "01": "empty"}, "mig.gpus: 1 is given twice"),
    ],
)
def test_what_is_no_layout_is_named(gpus: Mapping[str, str], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        declare(MigConfig(gpus=gpus))


def test_a_uuid_wins_over_an_index_and_both_over_all_and_over_the_file(file: Path) -> None:
    gpus = {"all": "off", "1": "empty", "GPU-2": "3g.40gb", "2": "7g.80gb"}
    cards = [gpu(0), gpu(1), gpu(2), gpu(3)]
    declared = declare(MigConfig(file=file, config="mixed", gpus=gpus))
    assert wanted_by(declared, cards) == {
        "GPU-0": OFF,
        "GPU-1": EMPTY,
        "GPU-2": Wanted(True, (("3g.40gb", 1),)),
        "GPU-3": OFF,
    }


def test_the_file_is_for_the_boards_and_the_indices_that_it_names(file: Path) -> None:
    declared = declare(MigConfig(file=file, config="mixed", gpus={"2": "empty"}))
    assert declared.config == "mixed"
    mixed = Wanted(True, (("1g.10gb", 2), ("3g.40gb", 1)))
    cards = [gpu(0), gpu(1), gpu(2), gpu(3, A100)]
    assert wanted_by(declared, cards) == {"GPU-0": mixed, "GPU-1": OFF, "GPU-2": EMPTY}


@pytest.mark.parametrize(
    ("written", "message"),
    [
        (MigConfig(config="mixed"), "mig.config: 'mixed' is of no use without mig.file"),
        (MigConfig(file=Path("/nowhere")), "mig.file: /nowhere is of no use without mig.config"),
        (
            MigConfig(file=Path("/nowhere/mig.yaml"), config="x"),
            "mig.file: /nowhere/mig.yaml cannot be read: No such file or directory",
        ),
    ],
)
def test_a_file_goes_with_the_name_of_a_configuration(written: MigConfig, message: str) -> None:
    with pytest.raises(BadInput, match=re.escape(message)):
        declare(written)


def test_a_configuration_that_the_file_has_not(file: Path) -> None:
    with pytest.raises(BadInput, match=rf"mig.config: {file} has no 'x'; it has mixed, plain"):
        declare(MigConfig(file=file, config="x"))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"version: v2\nmig-configs: {}\n", "mig.file: .*mig.yaml.*version"),
        (b"\xff\xfe", "is not UTF-8 at byte 0"),
        (b"#" * 2**20 + b"\n", "is larger than 1048576 bytes"),
        (FILE.replace("mig-devices", "mig-device", 1).encode(), "mig.file: .*mig-device"),
    ],
)
def test_a_file_that_is_none_is_named(data: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "mig.yaml"
    path.write_bytes(data)
    with pytest.raises(BadInput, match=message):
        declare(MigConfig(file=path, config="mixed"))


def test_it_is_a_section_of_the_agents_configuration(tmp_path: Path, file: Path) -> None:
    written = tmp_path / "agent.yaml"
    gpus = "{0: '3g.40gb, 1g.10gb'}"
    text = f"mig:\n  file: {file}\n  config: plain\n  gpus: {gpus}\n"
    written.write_text(text)
    declared = load(written, {}, {}).mig
    assert wanted_by(declared, [gpu(0), gpu(1)]) == {
        "GPU-0": Wanted(True, (("3g.40gb", 1), ("1g.10gb", 1))),
        "GPU-1": OFF,
    }


def test_a_bad_layout_ends_the_agent_before_it_has_begun() -> None:
    with pytest.raises(BadInput, match="mig.gpus: all: wanted off"):
        settle(AgentConfig(mig=MigConfig(gpus={"all": "half"})), {}, hostname="n")


def test_off_without_quotes_is_a_truth_value_in_yaml_and_said_to_be(tmp_path: Path) -> None:
    written = tmp_path / "agent.yaml"
    written.write_text("mig: {gpus: {0: off}}\n")
    with pytest.raises(BadInput, match=r"mig.gpus: 0: wanted text, found false \(quote it\)"):
        load(written, {}, {})
