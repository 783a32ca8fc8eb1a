"""The NVLinks of a simulated GPU: state, speed, errors, traffic; by function and by field."""

# ruff: noqa: N802 (the names are the driver's own)

from typing import Any

from stoker.agent.facts import Fact
from stoker.agent.simulated.card import SimulatedCard
from stoker.agent.simulated.library import NVML, error
from stoker.agent.simulated.session import SimulatedSession, of_card

# The scope of a field that asks for all links together.
ALL_LINKS = 0xFFFFFFFF
KIB = 1024
_MB = 1e6

# NVLink generations, as the driver counts them, by what one link carries at least.
_FIFTH_GENERATION_SPEED = 50_000 * _MB
_VERSIONS = ((_FIFTH_GENERATION_SPEED, 7), (26_000 * _MB, 6), (0.0, 4))
# The driver's counters of errors on links up to the fourth generation; the fifth counts others.
ERROR_FACTS = {
    0: Fact.NVLINK_REPLAY_ERRORS,
    1: Fact.NVLINK_RECOVERY_ERRORS,
    2: Fact.NVLINK_CRC_FLIT_ERRORS,
    3: Fact.NVLINK_CRC_DATA_ERRORS,
}
# A board of eight with four switches, in front of the GPUs in PCI order.
_NVSWITCHES, _NVSWITCH_BUS, _NVSWITCH_PCI_ID = 4, 0x05, 0x22A310DE
# Of the payload, what the protocol adds.
_RAW_OVERHEAD = 1.08


class LinkFunctions(SimulatedSession):
    """Questions about one NVLink."""

    @of_card
    def nvmlDeviceGetNvLinkState(self, card: SimulatedCard, link: int, /) -> int:
        return link_state(card, link)

    @of_card
    def nvmlDeviceGetNvLinkVersion(self, card: SimulatedCard, link: int, /) -> int:
        return link_version(card, link)

    @of_card
    def nvmlDeviceGetNvLinkErrorCounter(
        self, card: SimulatedCard, link: int, counter: int, /
    ) -> int:
        _check_link(card, link)
        fact = ERROR_FACTS.get(counter)
        if fact is None:
            raise error("NOT_SUPPORTED" if counter == 4 else "INVALID_ARGUMENT")
        return link_errors(card, link, fact)

    @of_card
    def nvmlDeviceGetNvLinkRemoteDeviceType(self, card: SimulatedCard, link: int, /) -> int:
        _check_link(card, link)
        switch: int = NVML.NVML_NVLINK_DEVICE_TYPE_SWITCH
        return switch  # every board of the catalogue that has links sits on a board of eight

    @of_card
    def nvmlDeviceGetNvLinkRemotePciInfo(self, card: SimulatedCard, link: int, /) -> Any:
        _check_link(card, link)
        return nvswitch_pci(link % _NVSWITCHES)


def nvswitch_pci(number: int) -> Any:
    """Return where one of the NVSwitches of a board is."""
    pci = NVML.nvmlPciInfo_t()
    pci.domain, pci.bus, pci.device = 0, _NVSWITCH_BUS + number, 0
    pci.busId = f"00000000:{pci.bus:02X}:00.0"
    pci.busIdLegacy = pci.busId[4:]
    pci.pciDeviceId = _NVSWITCH_PCI_ID
    return pci


def link_state(card: SimulatedCard, link: int) -> int:
    """Return 1 for an active link."""
    _check_link(card, link)
    return int(card.fact(Fact.NVLINK_UP, 1, str(link)))


def link_version(card: SimulatedCard, link: int) -> int:
    """Return the generation as the driver counts it: 6 for NVLink 4."""
    _check_link(card, link)
    speed = card.model.nvlink_bytes_per_second
    return next(version for least, version in _VERSIONS if speed >= least)


def link_megabytes_per_second(card: SimulatedCard, link: int) -> int:
    """Return what the link carries in each direction; zero when it is down."""
    return round(card.model.nvlink_bytes_per_second / _MB) * link_state(card, link)


def common_megabytes_per_second(card: SimulatedCard) -> int:
    """Return what every active link carries in each direction."""
    _check_link(card, 0)
    return round(card.model.nvlink_bytes_per_second / _MB)


def link_count(card: SimulatedCard) -> int:
    """Return how many links there are."""
    _check_link(card, 0)
    return card.model.nvlink_count


def link_errors(card: SimulatedCard, link: int, fact: Fact) -> int:
    """Return the errors of one link, or of all."""
    _check_link(card, 0 if link == ALL_LINKS else link)
    if card.model.nvlink_bytes_per_second >= _FIFTH_GENERATION_SPEED:
        raise error("NOT_SUPPORTED")
    if not card.told:
        return 0
    links = range(card.model.nvlink_count) if link == ALL_LINKS else (link,)
    return sum(int(card.fact(fact, 0, str(number))) for number in links)


def link_kibibytes(card: SimulatedCard, link: int, *, received: bool, raw: bool) -> int:
    """Return what was carried since the driver was loaded over one link, or over all."""
    _check_link(card, 0 if link == ALL_LINKS else link)
    carried = card.nvlink_bytes[received] * (_RAW_OVERHEAD if raw else 1.0)
    return int(carried * (card.model.nvlink_count if link == ALL_LINKS else 1) / KIB)


def _check_link(card: SimulatedCard, link: int) -> None:
    if not card.model.nvlink_count:
        raise error("NOT_SUPPORTED")
    if not 0 <= link < card.model.nvlink_count:
        raise error("INVALID_ARGUMENT")
