"""What a record of the kernel's log says: /dev/kmsg's text form, as text to be parsed."""

import re

# The longest that the kernel writes is 8 KiB.
RECORD_BYTES_MAX = 1 << 14

_ESCAPED = re.compile(rb"\\x([0-9a-fA-F]{2})")
_NUMBER_DIGITS_MAX = 19
# Three bits say how urgent a record is, those above them who wrote it: 0 is the kernel, and what
# programs write to /dev/kmsg (or have journald pass on) is never of that one.
_KERNEL_PRIORITIES = frozenset(b"%d" % priority for priority in range(8))
_WORDS = ("nvrm", "nvidia", "nvlink", "pcieport")


class Record:
    """A record of the kernel's log."""

    __slots__ = ("microseconds", "sequence", "text")

    def __init__(self, sequence: int, microseconds: int, text: str) -> None:
        """`microseconds`: since boot, by a clock that nobody corrects."""
        self.sequence = sequence
        self.microseconds = microseconds
        self.text = text


def parse_record(line: bytes) -> Record | None:
    r"""Return the record in `6,339,5140900,-;its text`; None for what is none, or not the kernel's.

    Lines that begin with a space (" SUBSYSTEM=pci") describe the record above and are none. The
    kernel writes what is not plain ASCII as \x0a: lines printed together are one record.
    """
    head, semicolon, text = line.partition(b";")
    fields = head.split(b",")
    if not semicolon or len(fields) < 4 or fields[0] not in _KERNEL_PRIORITIES:
        return None
    sequence, microseconds = fields[1], fields[2]
    for number in (sequence, microseconds):
        if not number.isdigit() or len(number) > _NUMBER_DIGITS_MAX:
            return None
    whole = _ESCAPED.sub(_unescaped, text[:RECORD_BYTES_MAX]).decode("utf-8", "replace")
    shown = "".join(c if c.isprintable() or c in "\n\t" else "?" for c in whole)
    return Record(int(sequence), int(microseconds), shown)


def is_about_gpus(text: str) -> bool:
    """Whether a record may be about a GPU, its links or its slot."""
    folded = text.lower()
    return "AER:" in text or any(word in folded for word in _WORDS)


def wall_time(microseconds: int, now: float, monotonic: float, *, is_new: bool) -> float:
    """Return when a record was written, in Unix seconds.

    One that has just come is dated by the wall clock: the clock of the log wanders from all others,
    by seconds in a day. An older one has nothing better.
    """
    return now if is_new else min(now, now - monotonic + microseconds / 1e6)


def _unescaped(found: re.Match[bytes]) -> bytes:
    return bytes([int(found[1], 16)])
