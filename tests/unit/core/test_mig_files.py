"""The file format of mig-parted: what is read, what is refused and where, and what is written."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from stoker.core.errors import BadInput
from stoker.core.mig.boards import BOARDS
from stoker.core.mig.files import MigFile, parse_mig_file, render_mig_file, wanted_of
from stoker.core.mig.geometry import Wanted
from stoker.core.mig.reports import MigEntry

BALANCED = """\
version: v1
mig-configs:
  balanced:
    - device-filter: ["0x233010DE", "0x233110DE"]
      devices: [0, 1]
      mig-enabled: true
      mig-devices:
        1g.10gb: 2
        2g.20gb: 1
        1c.3g.40gb: 3
    - device-filter: "0x20B010DE:0x134F10DE"
      devices: all
      mig-enabled: false
      mig-devices: {}
  all-enabled:
    - devices: all
      mig-enabled: true
      mig-devices: {}
"""
BALANCED_READ = MigFile(
    {
        "balanced": (
            MigEntry(
                mig_enabled=True,
                device_filter=("0x233010DE", "0x233110DE"),
                devices=(0, 1),
                mig_devices={"1g.10gb": 2, "2g.20gb": 1, "1c.3g.40gb": 3},
            ),
            MigEntry(mig_enabled=False, device_filter=("0x20B010DE:0x134F10DE",)),
        ),
        "all-enabled": (MigEntry(mig_enabled=True),),
    }
)


def test_a_file_is_read_and_written_unchanged() -> None:
    assert parse_mig_file(BALANCED, "mig.yaml") == BALANCED_READ
    assert render_mig_file(BALANCED_READ) == BALANCED


@pytest.mark.parametrize(
    ("text", "entry"),
    [
        # As many write it: no mig-devices where there can be none, quotes, comments.
        ("{devices: all, mig-enabled: false}", MigEntry(mig_enabled=False)),
        (
            '{devices: "all", mig-enabled: true, mig-devices: {"1g.5gb+me": 1, 2g.10gb: 0}}',
            MigEntry(mig_enabled=True, mig_devices={"1g.5gb+me": 1, "2g.10gb": 0}),
        ),
        (
            "{device-filter: '', devices: [], mig-enabled: no, mig-devices: {}}",
            MigEntry(mig_enabled=False, devices=()),
        ),
        (
            "{device-filter: ['0x2bb510de'], devices: [3, 1], mig-enabled: false}",
            MigEntry(mig_enabled=False, device_filter=("0x2bb510de",), devices=(3, 1)),
        ),
        (
            "{devices: all, mig-enabled: true, mig-devices: {0g.0gb: 100}}",
            MigEntry(mig_enabled=True, mig_devices={"0g.0gb": 100}),  # no GPU offers it
        ),
    ],
)
def test_an_entry(text: str, entry: MigEntry) -> None:
    assert parse_mig_file(in_file(text), "mig.yaml").configs == {"c": (entry,)}


def in_file(entry: str) -> str:
    return f"version: v1\nmig-configs:\n  c:\n  - {entry}\n"


def test_every_profile_of_every_board_can_be_asked_for() -> None:
    names = {each.name: 1 for board in BOARDS for each in board.geometry.profiles}
    names |= {f"1c.{name}": 1 for name in names}
    file = MigFile({"c": (MigEntry(mig_enabled=True, mig_devices=names),)})
    assert parse_mig_file(render_mig_file(file), "mig.yaml") == file


def test_json_is_yaml() -> None:
    text = '{"version": "v1", "mig-configs": {"off": [{"devices": "all", "mig-enabled": false}]}}'
    assert parse_mig_file(text, "mig.json").configs == {"off": (MigEntry(mig_enabled=False),)}


def test_a_file_without_configurations() -> None:
    assert parse_mig_file("version: v1\n", "mig.yaml") == MigFile({})
    assert render_mig_file(MigFile({})) == "version: v1\n"


# --- what is refused


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "mig.yaml: the file is empty; wanted version and mig-configs"),
        ("# nothing\n", "mig.yaml: the file is empty"),
        ("a: [", "mig.yaml, line 1: not YAML: "),
        ("- a\n", "mig.yaml, line 1: wanted keys with values, found a list"),
        ("mig-configs: {}\n", "mig.yaml, line 1: wanted a version, found none"),
        ("version: v2\n", "mig.yaml, line 1: version: wanted version v1, found 'v2'"),
        ("version: 1\n", "mig.yaml, line 1: version: wanted text, found '1'"),
        ("version: v1\nmig-config: {}\n", "line 2: mig-config: wanted version and mig-configs, "),
        ("version: v1\nversion: v1\n", "line 2: version: wanted a key once, found it again"),
        ("version: v1\nmig-configs: {}\n", "mig-configs: wanted at least one configuration, "),
        ("version: v1\nmig-configs:\n", "mig-configs: wanted keys with values, found nothing"),
        ("version: v1\nmig-configs: [a]\n", "mig-configs: wanted keys with values, found a list"),
        (
            "version: v1\nmig-configs:\n  c: []\n",
            "line 3: mig-configs.c: wanted at least one entry",
        ),
        ("version: v1\nmig-configs:\n  c: {}\n", "mig-configs.c: wanted a list, found keys with"),
        (
            "version: v1\nmig-configs:\n  on: []\n",
            "line 3: mig-configs: wanted a key that is text,",
        ),
        ("version: v1\n---\nversion: v1\n", "mig.yaml, line 2: not YAML: "),
        ("version: &a v1\nmig-configs: *b\n", "mig.yaml, line 2: not YAML: found undefined alias"),
        ("version: v1\nmig-configs: " + "[" * 3000, "mig.yaml"),
        ("version: v1\0", "mig.yaml: not YAML: "),
    ],
)
def test_a_file_that_is_refused(text: str, told: str) -> None:
    with pytest.raises(BadInput) as refused:
        parse_mig_file(text, "mig.yaml")
    assert told in str(refused.value)
    assert len(str(refused.value)) < 300


@pytest.mark.parametrize(
    ("entry", "told"),
    [
        ("all", "mig.yaml, line 4: mig-configs.c[0]: wanted keys with values, found 'all'"),
        ("{devices: all}", "line 4: mig-configs.c[0]: wanted mig-enabled, found none"),
        ("{mig-enabled: false}", "mig-configs.c[0]: wanted devices, found none"),
        (
            "{devices: all, mig-enabled: true}",
            "mig-configs.c[0]: wanted mig-devices, as mig-enabled is true, found none",
        ),
        (
            "{devices: all, mig-enabled: false, mig-devices: {1g.5gb: 1}}",
            "mig-configs.c[0].mig-devices: wanted none, as mig-enabled is false, found 1g.5gb",
        ),
        (
            "{devices: all, mig-enabled: true, mig-devices: {1g.5gb: 1, 1g.5gb: 2}}",
            "mig-configs.c[0].mig-devices.1g.5gb: wanted a key once, found it again",
        ),
        (
            "{devices: all, mig-enabled: true, mig-devices: {1g.5gb: 0, 2g.10gb: 0}}",
            "mig-devices: wanted at least one MIG device, found only counts of 0",
        ),
        (
            "{devices: all, mig-enabled: true, mig-devices: {1g.5gb: -1}}",
            "mig-devices.1g.5gb: wanted a whole number from 0, found '-1'",
        ),
        (
            "{devices: all, mig-enabled: true, mig-devices: {1g.5gb: true}}",
            "mig-devices.1g.5gb: wanted a whole number from 0, found 'true'",
        ),
        (
            "{devices: all, mig-enabled: true, mig-devices: {1g.5gb: 1.5}}",
            "wanted a whole number from 0, found '1.5'",
        ),
        (
            "{devices: all, mig-enabled: true, mig-devices: {1g.5gb: }}",
            "wanted a whole number from 0, found nothing",
        ),
        (
            "{devices: all, mig-enabled: true, mig-devices: [1g.5gb]}",
            "mig-devices: wanted keys with values, found a list",
        ),
        (
            "{devices: 0, mig-enabled: false}",
            "devices: wanted all, or a list of indices, found '0'",
        ),
        ("{devices: none, mig-enabled: false}", "wanted all, or a list of indices, found 'none'"),
        ("{devices: [-1], mig-enabled: false}", "devices[0]: wanted a whole number from 0"),
        ("{devices: ['0'], mig-enabled: false}", "devices[0]: wanted a whole number from 0"),
        ("{devices: [0, [1]], mig-enabled: false}", "devices[1]: wanted a whole number from 0, f"),
        ("{devices: {}, mig-enabled: false}", "wanted all, or a list of indices, found keys with"),
        ("{devices: all, mig-enabled: 'no'}", "mig-enabled: wanted true or false, found 'no'"),
        ("{devices: all, mig-enabled: 2024-02-31}", "wanted a value that YAML knows, found '2024"),
        (
            "{device: all, mig-enabled: false}",
            "device: wanted one of device-filter, devices, mig-enabled, mig-devices, found an unk",
        ),
        (
            "{device-filter: A100-SXM4-40GB, devices: all, mig-enabled: false}",
            'device-filter: wanted a PCI device and vendor ID such as "0x233010DE", found \'A100-S',
        ),
        (
            "{device-filter: 0x233010DE, devices: all, mig-enabled: false}",
            "device-filter: wanted text, found '0x233010DE'",  # without quotes it is a number
        ),
        (
            "{device-filter: ['0x233010DE', '0x1:0x2:0x3'], devices: all, mig-enabled: false}",
            "device-filter[1]: wanted a PCI device and vendor ID",
        ),
        (f"{{devices: all, mig-enabled: {'x' * 9999}}}", "found 'xxx"),
    ],
)
def test_an_entry_that_is_refused(entry: str, told: str) -> None:
    with pytest.raises(BadInput) as refused:
        parse_mig_file(in_file(entry), "mig.yaml")
    assert told in str(refused.value)
    assert str(refused.value).startswith("mig.yaml, line 4: ")
    assert len(str(refused.value)) < 300


@pytest.mark.parametrize(
    "name",
    [
        *("bogus", "", "1g", "5gb", "1g.5", "g.5gb", "1g.5gb ", "1g.5GB", "1.1g.5gb", "1c.5gb"),
        *("1g.5gb+", "1g.5gb-", "1g.5gb+me-gfx", "1g.5gb+.all", "1g.5gb+me.", "1g.5gb+1me"),
        *("1g.5gb+me,", "x1g.5gb", "1g.5gb\n"),
    ],
)
def test_a_name_that_no_mig_device_can_have(name: str) -> None:
    devices = json.dumps({name: 1})
    text = in_file(f"{{devices: all, mig-enabled: true, mig-devices: {devices}}}")
    with pytest.raises(BadInput, match="wanted the name of a MIG device such as 1g.10gb"):
        parse_mig_file(text, "mig.yaml")


_scalars = st.sampled_from(
    [
        *("v1", "all", "0x233010DE", "1g.10gb", "", "~", "1.5", "2024-02-31", "!!bool maybe"),
        *(
            "!!int ''",
            "!!timestamp x",
            "!!binary x",
            "!!python/name:os",
            "&a x",
            "*a",
            "<<",
            "!x y",
        ),
        *("0", "true", "-1", "'", "!!float x", "!!seq x", "!!set x", "!!omap x", "!!null x"),
    ]
)
_keys = st.sampled_from(
    [
        *("version", "mig-configs", "c", "devices", "device-filter", "mig-enabled", "mig-devices"),
        *("1g.10gb", "? [a]", "!!bool maybe", "on", "<<"),
    ]
)
_trees = st.recursive(
    _scalars,
    lambda inner: (
        st.lists(inner, max_size=3).map(lambda items: f"[{', '.join(items)}]")
        | st.dictionaries(_keys, inner, max_size=4).map(
            lambda tree: "{" + ", ".join(f"{key}: {each}" for key, each in tree.items()) + "}"
        )
    ),
)


@given(st.text() | _trees | _trees.map(lambda tree: f"version: v1\nmig-configs: {tree}\n"))
def test_any_text_is_read_or_refused_in_words(text: str) -> None:
    told = "mig.yaml"
    try:
        parse_mig_file(text, "mig.yaml")
    except BadInput as refused:
        told = str(refused)
    assert told.startswith("mig.yaml")


@given(_trees)
def test_any_entry_is_read_or_refused_in_words(tree: str) -> None:
    told = "mig.yaml"
    try:
        parse_mig_file(in_file(tree), "mig.yaml")
    except BadInput as refused:
        told = str(refused)
    assert told.startswith("mig.yaml")
    assert len(told) < 300


# --- what is written

_names = st.text(min_size=1) | st.sampled_from(
    [
        "on",
        "No",
        "null",
        "~",
        "1",
        "1e3",
        "0x10",
        "all-1g.5gb.me",
        "a: b",
        "- a",
        "#",
        "=",
        "<<",
        " ",
    ]
)
_devices = st.dictionaries(
    st.from_regex(r"([1-7]c\.)?[1-7]g\.[0-9]{1,3}gb([+-](me|me\.all|gfx))?", fullmatch=True),
    st.integers(1, 7),
    max_size=4,
)
_filters = st.from_regex(r"0x[0-9A-F]{8}(:0x[0-9A-F]{8})?", fullmatch=True)


@st.composite
def _entries(draw: st.DrawFn) -> MigEntry:
    is_enabled = draw(st.booleans())
    return MigEntry(
        mig_enabled=is_enabled,
        device_filter=tuple(draw(st.lists(_filters, max_size=3))),
        devices=draw(st.none() | st.lists(st.integers(0, 63), max_size=3).map(tuple)),
        mig_devices=draw(_devices) if is_enabled else {},
    )


_files = st.dictionaries(
    _names, st.lists(_entries(), min_size=1, max_size=3).map(tuple), min_size=1, max_size=3
).map(MigFile)


@given(_files)
def test_what_is_written_is_read_as_the_same(file: MigFile) -> None:
    assert parse_mig_file(render_mig_file(file), "mig.yaml") == file


@given(_files)
def test_what_is_written_is_what_the_documented_format_allows(file: MigFile) -> None:
    """The rules of mig-parted's api/spec/v1, stated a second time, on what a YAML reader sees."""
    tree: Any = yaml.safe_load(render_mig_file(file))
    assert tree.keys() <= {"version", "mig-configs"}
    assert tree["version"] == "v1"
    assert tree["mig-configs"]
    for name, entries in tree["mig-configs"].items():
        assert isinstance(name, str)
        assert entries
        for entry in entries:
            assert_entry_is_allowed(entry)


def assert_entry_is_allowed(entry: Mapping[str, Any]) -> None:
    assert entry.keys() <= {"device-filter", "devices", "mig-enabled", "mig-devices"}
    only = entry.get("device-filter", "")
    assert isinstance(only, str) or all(isinstance(each, str) for each in only)
    devices = entry["devices"]
    assert devices == "all" or all(type(each) is int for each in devices)
    assert isinstance(entry["mig-enabled"], bool)
    counts = entry["mig-devices"]
    assert not counts or entry["mig-enabled"]
    assert all(isinstance(name, str) and type(count) is int for name, count in counts.items())
    assert not counts or any(counts.values())


# --- choosing


@dataclass(frozen=True)
class Card:
    index: int
    pci_device_id: int
    uuid: str


H100, A100 = 0x233010DE, 0x20B010DE
CARDS = (Card(0, H100, "GPU-0"), Card(1, H100, "GPU-1"), Card(2, A100, "GPU-2"))
ON = Wanted(is_enabled=True, devices=(("1g.10gb", 2),))
OFF = Wanted(is_enabled=False)


def on(**more: Any) -> MigEntry:
    return MigEntry(mig_enabled=True, mig_devices={"1g.10gb": 2, "7g.80gb": 0}, **more)


def off(**more: Any) -> MigEntry:
    return MigEntry(mig_enabled=False, **more)


@pytest.mark.parametrize(
    ("entries", "wanted"),
    [
        ((), {}),
        ((on(),), {"GPU-0": ON, "GPU-1": ON, "GPU-2": ON}),
        ((on(devices=(1,)),), {"GPU-1": ON}),
        ((on(devices=()),), {}),
        ((on(devices=(9,)),), {}),  # one file for nodes of different sizes
        ((on(device_filter=("0x233010de",)),), {"GPU-0": ON, "GPU-1": ON}),
        ((on(device_filter=("0x1", "0x20B010DE")),), {"GPU-2": ON}),
        ((on(device_filter=("0x20B010DE",), devices=(0, 2)),), {"GPU-2": ON}),
        ((on(), off(devices=(0,))), {"GPU-0": OFF, "GPU-1": ON, "GPU-2": ON}),
        ((off(devices=(0,)), on()), {"GPU-0": ON, "GPU-1": ON, "GPU-2": ON}),
        ((on(device_filter=("0x20B110DE:0x134F10DE",)),), {}),
    ],
)
def test_later_entries_win_and_gpus_that_none_is_about_are_left_alone(
    entries: tuple[MigEntry, ...], wanted: dict[str, Wanted]
) -> None:
    assert wanted_of(entries, CARDS) == wanted


def test_a_filter_by_subsystem_is_refused_where_it_would_decide() -> None:
    entry = on(device_filter=("0x20B010DE:0x134F10DE",))
    with pytest.raises(BadInput, match="GPU 2 is a 0x20B010DE, and which subsystem it has is not"):
        wanted_of((entry,), CARDS)


def test_the_same_wish_is_one_value() -> None:
    one = MigEntry(mig_enabled=True, mig_devices={"1g.10gb": 1, "2g.20gb": 2})
    other = MigEntry(mig_enabled=True, mig_devices={"2g.20gb": 2, "1g.10gb": 1, "3g.40gb": 0})
    assert wanted_of((one,), CARDS) == wanted_of((other,), CARDS)
