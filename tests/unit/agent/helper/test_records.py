"""Records of the kernel's log: what they say, which are passed on, and when they were written."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stoker.agent.helper.records import (
    RECORD_BYTES_MAX,
    is_about_gpus,
    parse_record,
    wall_time,
)

XID = "NVRM: Xid (PCI:0000:3b:00): 79, pid=1234, GPU has fallen off the bus."


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (f"4,339,5140900,-;{XID}", (339, 5140900, XID)),
        ("6,1,0,-;", (1, 0, "")),
        ("6,1,7,-,caller=T1;text; with; semicolons", (1, 7, "text; with; semicolons")),
        ("0,12,7,c;an emergency", (12, 7, "an emergency")),
        ("6,18446744073,7,-;a long number", (18446744073, 7, "a long number")),
        # What the driver prints in one call is one record with escaped ends of lines.
        (
            r"3,5,9,-;NVRM: GPU 0000:3b:00.0\x0aNVRM: has fallen off the bus",
            (5, 9, "NVRM: GPU 0000:3b:00.0\nNVRM: has fallen off the bus"),
        ),
        (r"3,5,9,-;a\x09b\x5cx0a", (5, 9, "a\tb\\x0a")),
        (r"3,5,9,-;gr\xc3\xbcn", (5, 9, "grün")),
        (r"3,5,9,-;\xff\x1b[31m", (5, 9, "??[31m")),
    ],
)
def test_what_a_record_says(line: str, expected: tuple[int, int, str]) -> None:
    record = parse_record(line.encode())
    assert record is not None
    assert (record.sequence, record.microseconds, record.text.replace("\ufffd", "?")) == expected


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b" SUBSYSTEM=pci",
        b" DEVICE=+pci:0000:3b:00.0",
        b" 6,339,5140900,-;a continuation is none, whatever it says",
        b"6,339,5140900,-",
        b"6,339,5140900;too few fields",
        b"6,,5140900,-;no sequence",
        b"6,-1,5140900,-;a negative one",
        b"6,1_0,5140900,-;no number",
        b"6,1," + b"9" * 20 + b",-;longer than any number of the kernel",
        b"6,\xc2\xb2,5140900,-;a digit, but not one of ours",
        # Written to /dev/kmsg by a program: the kernel says so, whatever the program says.
        b"12,339,5140900,-;" + XID.encode(),
        b"30,339,5140900,-;systemd[1]: Started Session 1 of user root.",
        b"2147483644,339,5140900,-;" + XID.encode(),
        b",339,5140900,-;no priority",
    ],
)
def test_what_is_no_record(line: bytes) -> None:
    assert parse_record(line) is None


@given(st.binary(max_size=300) | st.binary(max_size=60).map(lambda b: b"6,1,2,-;" + b))
def test_any_bytes_are_a_record_or_none(line: bytes) -> None:
    record = parse_record(line)
    if record is not None:
        assert record.sequence >= 0
        assert record.microseconds >= 0
        assert all(character.isprintable() or character in "\n\t" for character in record.text)


def test_a_text_without_end_is_cut() -> None:
    record = parse_record(b"6,1,2,-;" + b"x" * (1 << 20))
    assert record is not None
    assert len(record.text) == RECORD_BYTES_MAX


@pytest.mark.parametrize(
    ("text", "is_passed_on"),
    [
        (XID, True),
        ("nvidia 0000:3b:00.0: vgaarb: changed VGA decodes", True),
        ("nvidia-nvswitch0: SXid (PCI:0000:c1:00.0): 12028, Non-fatal", True),
        ("NVLink: link 3 is down", True),
        ("pcieport 0000:3a:00.0: AER: Uncorrected (Fatal) error received", True),
        ("{1}[Hardware Error]: AER: aer_status: 0x00040000", True),
        ("eth0: link is up", False),
        ("overlayfs: lower layer: no xattr", False),
        ("Out of memory: Killed process 4242 (secret-name)", False),
        ("", False),
    ],
)
def test_only_what_may_be_about_gpus_is_passed_on(text: str, is_passed_on: bool) -> None:
    assert is_about_gpus(text) is is_passed_on


@pytest.mark.parametrize(
    ("microseconds", "is_new", "expected"),
    [
        (40_000_000, False, 940.0),  # the host was booted at 900
        (0, False, 900.0),
        (99_000_000, True, 1000.0),  # the log's clock wanders; what has just come is of now
        (120_000_000, False, 1000.0),  # and is never of the future
    ],
)
def test_when_a_record_was_written(microseconds: int, is_new: bool, expected: float) -> None:
    assert wall_time(microseconds, now=1000.0, monotonic=100.0, is_new=is_new) == expected
