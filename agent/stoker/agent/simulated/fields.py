"""nvmlDeviceGetFieldValues on a simulated GPU: a table of what each field tells.

A field that a board does not have answers NOT_SUPPORTED in its own entry; the call as a whole
fails only for what concerns the whole GPU. Value types are those in which other readers of NVML
take the fields; a reader goes by `valueType`.
"""

# ruff: noqa: N802 (the names are the driver's own)

from collections.abc import Callable, Iterable, Mapping, Sequence
from struct import Struct
from types import MappingProxyType
from typing import Any

from stoker.agent.facts import Fact
from stoker.agent.simulated.card import SimulatedCard
from stoker.agent.simulated.health import (
    ecc_errors,
    remapped_rows,
    retired_pages,
    retired_pages_pending,
)
from stoker.agent.simulated.library import NVML, error, error_code
from stoker.agent.simulated.links import (
    ALL_LINKS,
    common_megabytes_per_second,
    link_count,
    link_errors,
    link_kibibytes,
    link_megabytes_per_second,
    link_state,
    link_version,
)
from stoker.agent.simulated.scenario import Field
from stoker.agent.simulated.session import USUAL_DRIVER, SimulatedSession, of_card

FieldId = int | tuple[int, int]  # a field, or a field and its scope (a link)
Value = int | float
_Ask = Callable[[SimulatedCard, int], Value]

_DOUBLE: int = NVML.NVML_VALUE_TYPE_DOUBLE
_UINT: int = NVML.NVML_VALUE_TYPE_UNSIGNED_INT
_ULONGLONG: int = NVML.NVML_VALUE_TYPE_UNSIGNED_LONG_LONG
_INT: int = NVML.NVML_VALUE_TYPE_SIGNED_INT
# Field, scope, time, latency, value type, error, and the union of values.
_HEAD = Struct("@IIqqII")
_UNIONS = {_DOUBLE: Struct("@d"), _UINT: Struct("@Q"), _ULONGLONG: Struct("@Q"), _INT: Struct("@q")}
_LATENCY_MICROSECONDS = 0
_WORD = (1 << 64) - 1


class FieldFunctions(SimulatedSession):
    """Questions asked many at a time."""

    @of_card
    def nvmlDeviceGetFieldValues(
        self, card: SimulatedCard, field_ids: Sequence[FieldId], /
    ) -> Sequence[Any]:
        if not field_ids:
            raise error("INVALID_ARGUMENT")
        faults = () if self._is_plain else tuple(self._field_faults(card))
        packed = bytearray()
        at = int(card.now * 1e6)
        for wanted in field_ids:
            field, scope = wanted if isinstance(wanted, tuple) else (wanted, 0)
            value_type, code, value = self._answer(card, field, scope, faults)
            packed += _HEAD.pack(field, scope, at, _LATENCY_MICROSECONDS, value_type, code)
            packed += _UNIONS[value_type].pack(value)
        values: Sequence[Any] = (NVML.c_nvmlFieldValue_t * len(field_ids)).from_buffer_copy(packed)
        return values

    def _answer(
        self, card: SimulatedCard, field: int, scope: int, faults: Iterable[Field]
    ) -> tuple[int, int, Value]:
        """Return the type, the error (0: none) and the value of one field."""
        known = field if self.release is USUAL_DRIVER else self.release.current_field(field)
        value_type, ask = _UNKNOWN if known is None else FIELDS.get(known, _UNKNOWN)
        for fault in faults:
            if fault.field != field or fault.scope not in (None, scope):
                continue
            if fault.error is not None:
                return value_type, error_code(fault.error), 0
            if isinstance(fault.value, float):
                return _DOUBLE, 0, fault.value
            if fault.value is not None:
                is_signed = value_type == _INT
                return value_type, 0, fault.value if is_signed else fault.value & _WORD
        try:
            return value_type, 0, ask(card, scope)
        except NVML.NVMLError as refused:
            return value_type, refused.value, 0


def _not_supported(card: SimulatedCard, scope: int) -> Value:
    raise error("NOT_SUPPORTED")


_UNKNOWN: tuple[int, _Ask] = (_UINT, _not_supported)


def _deprecated(card: SimulatedCard, scope: int) -> Value:
    raise error("DEPRECATED")  # as an A100 with driver 570 answered


def _milliwatts(watts: Callable[[SimulatedCard], float]) -> tuple[int, _Ask]:
    return _UINT, lambda card, _: round(watts(card) * 1000)


def _average_power(card: SimulatedCard, scope: int) -> Value:
    if not card.model.has_average_power:
        raise error("NOT_SUPPORTED")
    return round(card.power_watts * 1000)


def _memory_celsius(card: SimulatedCard, scope: int) -> Value:
    celsius = card.memory_celsius
    if celsius is None:
        raise error("NOT_SUPPORTED")
    return round(celsius)


def _margin(celsius: Callable[[SimulatedCard], float | None]) -> tuple[int, _Ask]:
    """Degrees from a threshold to where throttling begins: zero there, negative beyond."""

    def ask(card: SimulatedCard, scope: int) -> Value:
        threshold = celsius(card)
        if not card.model.has_temperature_margin or threshold is None:
            raise error("NOT_SUPPORTED")
        return round(card.model.temperature_max_celsius - threshold)

    return _INT, ask


def _memory_margin(card: SimulatedCard, scope: int) -> Value:
    model = card.model
    if not model.has_temperature_margin or model.memory_temperature_max_celsius is None:
        raise error("NOT_SUPPORTED")
    return 0  # as on the boards that show it


def _throttled(bit: int) -> tuple[int, _Ask]:
    """Nanoseconds for which this held the clocks down."""
    return _ULONGLONG, lambda card, _: int(card.throttled_seconds[bit] * 1e9)


def _energy(card: SimulatedCard, scope: int) -> Value:
    return int(card.energy_joules * 1000)


def _pcie_bytes(card: SimulatedCard, place: int) -> Value:
    if card.model.pcie_generation < _PCIE_COUNTED_FROM:
        raise error("NOT_SUPPORTED")
    return int(card.pcie_bytes[place])


# Counters of PCIe bytes were seen on A100, Ada and Blackwell; of Turing nothing is known.
_PCIE_COUNTED_FROM = 4


def _ecc(error_type: int, counter_type: int) -> tuple[int, _Ask]:
    return _ULONGLONG, lambda card, _: ecc_errors(card, error_type, counter_type)


def _row(place: int) -> tuple[int, _Ask]:
    return _UINT, lambda card, _: remapped_rows(card)[place]


def _traffic(*, received: bool, raw: bool) -> tuple[int, _Ask]:
    return _ULONGLONG, lambda card, link: link_kibibytes(card, link, received=received, raw=raw)


def _link_bytes(*, received: bool) -> tuple[int, _Ask]:
    def ask(card: SimulatedCard, link: int) -> Value:
        return link_kibibytes(card, link, received=received, raw=False) * 1024

    return _ULONGLONG, ask


def _errors_of_links(fact: Fact, fields: Sequence[int], total: int) -> dict[int, tuple[int, _Ask]]:
    """Return the fields that have one link in their name, and the one of all links."""

    def of_link(link: int) -> _Ask:
        return lambda card, _: link_errors(card, link, fact)

    found: dict[int, tuple[int, _Ask]] = {
        field: (_ULONGLONG, of_link(link)) for link, field in enumerate(fields)
    }
    found[total] = (_ULONGLONG, of_link(ALL_LINKS))
    return found


def _speeds_of_links(fields: Sequence[int]) -> dict[int, tuple[int, _Ask]]:
    def of_link(link: int) -> _Ask:
        return lambda card, _: link_megabytes_per_second(card, link)

    return {field: (_UINT, of_link(link)) for link, field in enumerate(fields)}


# By the driver's number; what is not here is NOT_SUPPORTED.
FIELDS: Mapping[int, tuple[int, _Ask]] = MappingProxyType(
    {
        1: (_UINT, lambda card, _: 1),  # ECC now
        2: (_UINT, lambda card, _: 1),  # ECC after the next reset
        3: _ecc(0, 0),
        4: _ecc(1, 0),
        5: _ecc(0, 1),
        6: _ecc(1, 1),
        29: (_UINT, lambda card, _: retired_pages(card, 0)),
        30: (_UINT, lambda card, _: retired_pages(card, 1)),
        31: (_UINT, lambda card, _: retired_pages_pending(card)),
        **_errors_of_links(Fact.NVLINK_CRC_FLIT_ERRORS, (*range(32, 38), *range(96, 102)), 38),
        **_errors_of_links(Fact.NVLINK_CRC_DATA_ERRORS, (*range(39, 45), *range(102, 108)), 45),
        **_errors_of_links(Fact.NVLINK_REPLAY_ERRORS, (*range(46, 52), *range(108, 114)), 52),
        **_errors_of_links(Fact.NVLINK_RECOVERY_ERRORS, (*range(53, 59), *range(114, 120)), 59),
        74: _throttled(0x4),
        75: _throttled(0x20),
        76: _throttled(0x10),
        77: (_ULONGLONG, lambda card, _: 0),  # board limit
        78: (_ULONGLONG, lambda card, _: 0),  # low utilization
        79: (_ULONGLONG, lambda card, _: 0),  # reliability
        82: (_UINT, _memory_celsius),
        83: (_ULONGLONG, _energy),
        **_speeds_of_links((*range(84, 90), *range(132, 138))),
        90: (_UINT, lambda card, _: common_megabytes_per_second(card)),
        91: (_UINT, lambda card, _: link_count(card)),
        94: (_UINT, lambda card, _: int(card.fact(Fact.PCIE_REPLAYS, 0))),
        95: (_UINT, lambda card, _: 0),
        138: _traffic(received=False, raw=False),
        139: _traffic(received=True, raw=False),
        140: _traffic(received=False, raw=True),
        141: _traffic(received=True, raw=True),
        142: _row(0),
        143: _row(1),
        144: _row(2),
        145: _row(3),
        161: (_ULONGLONG, lambda c, link: link_errors(c, link, Fact.NVLINK_REPLAY_ERRORS)),
        162: (_ULONGLONG, lambda c, link: link_errors(c, link, Fact.NVLINK_RECOVERY_ERRORS)),
        163: (_ULONGLONG, lambda c, link: link_errors(c, link, Fact.NVLINK_CRC_FLIT_ERRORS)),
        164: (_UINT, link_megabytes_per_second),
        165: (_UINT, link_state),
        166: (_UINT, link_version),
        184: (_UINT, lambda card, _: int(card.model.has_mig and card.model.has_gpm)),
        185: (_UINT, _average_power),
        186: _milliwatts(lambda card: card.power_watts),
        187: _milliwatts(lambda card: card.model.power_limit_min_watts),
        188: _milliwatts(lambda card: card.model.power_limit_watts),
        189: _milliwatts(lambda card: card.model.power_limit_watts),
        190: _milliwatts(lambda card: card.model.power_limit_watts),
        191: (_ULONGLONG, _energy),
        192: _milliwatts(lambda card: card.model.power_limit_watts),
        193: _margin(lambda card: card.model.temperature_shutdown_celsius),
        194: _margin(lambda card: card.model.temperature_slowdown_celsius),
        195: (_INT, _memory_margin),
        196: _margin(lambda card: card.model.temperature_max_celsius),
        197: (_ULONGLONG, lambda card, _: _pcie_bytes(card, 0)),
        198: (_ULONGLONG, lambda card, _: _pcie_bytes(card, 1)),
        202: _link_bytes(received=False),
        204: _link_bytes(received=True),
        226: (_UINT, _deprecated),
        227: (_UINT, _deprecated),
        230: (_UINT, lambda card, _: int(card.fact(Fact.RECOVERY_ACTION, 0))),
        269: _throttled(0x20),
        270: _throttled(0x40),
        271: _throttled(0x80),
    }
)
