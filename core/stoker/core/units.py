"""Text to base units and back: sizes in bytes, durations in seconds."""

import re

from stoker.core.errors import BadInput, shown

# IEC 80000-13 binary prefixes and SI decimal ones. A bare "G" is refused: it reads as both.
_BYTES_PER_UNIT = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
}
_SECONDS_PER_UNIT = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}

# More digits than any size has are refused before they cost anything.
_BYTES = re.compile(r"(\d{1,30})(?:\.(\d{1,30}))?\s*([A-Za-z]*)", re.ASCII)
_DURATION = re.compile(r"(?:\d+(?:\.\d+)?(?:ms|[smhdw]))+", re.ASCII)
_DURATION_PART = re.compile(r"(\d+(?:\.\d+)?)(ms|[smhdw])", re.ASCII)
_NUMBER = re.compile(r"\d+(?:\.\d+)?", re.ASCII)

BYTES_MAX = 2**63 - 1  # what a signed 64-bit field on the wire can carry
DURATION_SECONDS_MAX = 10 * 365 * 86400.0


def parse_bytes(text: str, what: str = "size") -> int:
    """Return the number of bytes `text` names, such as `20GiB`, `512 MiB`, `10GB` or `4096`.

    A part of a byte counts as a whole one. Raises BadInput, naming `what`, when the text is no size
    or does not fit 63 bits.
    """
    found = _BYTES.fullmatch(text.strip())
    if found is None or found[3] not in _BYTES_PER_UNIT:
        raise BadInput(
            f"{what}: {shown(text)} is not a size; write a number and a unit of "
            f"{', '.join(u for u in _BYTES_PER_UNIT if u)}, such as 20GiB"
        )
    fraction = found[2] or ""
    scaled = int(found[1] + fraction) * _BYTES_PER_UNIT[found[3]]
    size = -(-scaled // int("1" + "0" * len(fraction)))
    if size > BYTES_MAX:
        raise BadInput(f"{what}: {shown(text)} is larger than 2^63 - 1 bytes")
    return size


def parse_duration(text: str, what: str = "duration") -> float:
    """Return the seconds `text` names, such as `90`, `45s`, `10m` or `1h30m`.

    Raises BadInput, naming `what`, when the text is no duration or is longer than ten years.
    """
    stripped = text.strip()
    if _NUMBER.fullmatch(stripped):
        seconds = float(stripped)
    elif _DURATION.fullmatch(stripped):
        parts = _DURATION_PART.findall(stripped)
        seconds = sum(float(n) * _SECONDS_PER_UNIT[unit] for n, unit in parts)
    else:
        raise BadInput(
            f"{what}: {shown(text)} is not a duration; write seconds or a sum of "
            "ms, s, m, h, d, w, such as 45s, 10m or 1h30m"
        )
    if seconds > DURATION_SECONDS_MAX:
        raise BadInput(f"{what}: {shown(text)} is longer than ten years")
    return seconds


def format_bytes(size: int) -> str:
    """Return `size` bytes for a person, in the largest binary unit of which it is one or more."""
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        scale = _BYTES_PER_UNIT[unit]
        if abs(size) >= scale:
            return f"{size / scale:.1f}".removesuffix(".0") + f" {unit}"
    return f"{size} B"


def format_duration(seconds: float) -> str:
    """Return `seconds` for a person, in at most two units, such as `1h 30m` or `45s`."""
    if seconds < 0.9995:
        return f"{seconds * 1000:.0f}ms"
    rest = round(seconds)
    parts: list[str] = []
    for unit in ("d", "h", "m", "s"):
        count, rest = divmod(rest, int(_SECONDS_PER_UNIT[unit]))
        if count:
            parts.append(f"{count}{unit}")
    return " ".join(parts[:2])
