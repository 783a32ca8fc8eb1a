"""The health of a simulated GPU: memory errors, worn rows and pages, modes. Scenarios spoil it."""

# ruff: noqa: N802 (the names are the driver's own)

from typing import Any

from stoker.agent.facts import BANK_AVAILABILITIES, CORRECTABLE, UNCORRECTABLE, Fact
from stoker.agent.simulated.card import SimulatedCard
from stoker.agent.simulated.instances import MigDevice
from stoker.agent.simulated.library import NVML, error
from stoker.agent.simulated.session import Device, SimulatedSession, of_card, of_device

# By (uncorrected, aggregate), as the driver's enumerations count.
_ECC_FACTS = {
    (0, 0): Fact.ECC_CORRECTED_VOLATILE_ERRORS,
    (1, 0): Fact.ECC_UNCORRECTED_VOLATILE_ERRORS,
    (0, 1): Fact.ECC_CORRECTED_AGGREGATE_ERRORS,
    (1, 1): Fact.ECC_UNCORRECTED_AGGREGATE_ERRORS,
}
# Where a page of a chip that retires pages lies; the addresses mean nothing.
_PAGE_BYTES = 1 << 16
_CAUSES = (CORRECTABLE, UNCORRECTABLE)


class HealthFunctions(SimulatedSession):
    """Questions about errors and modes."""

    @of_card
    def nvmlDeviceGetEccMode(self, card: SimulatedCard, /) -> list[int]:
        return [1, 1]  # on all of these boards, from the factory

    @of_card
    def nvmlDeviceGetTotalEccErrors(
        self, card: SimulatedCard, error_type: int, counter_type: int, /
    ) -> int:
        return ecc_errors(card, error_type, counter_type)

    @of_device
    def nvmlDeviceGetMemoryErrorCounter(
        self, device: Device, error_type: int, counter_type: int, location: int, /
    ) -> int:
        if not 0 <= location < NVML.NVML_MEMORY_LOCATION_COUNT:
            raise error("INVALID_ARGUMENT")
        if location == NVML.NVML_MEMORY_LOCATION_SRAM:
            return 0  # what is scripted happens in the device's memory
        if isinstance(device, MigDevice) or location != NVML.NVML_MEMORY_LOCATION_DRAM:
            raise error("NOT_SUPPORTED")
        return ecc_errors(device, error_type, counter_type)

    @of_card
    def nvmlDeviceGetRemappedRows(self, card: SimulatedCard, /) -> tuple[int, int, int, int]:
        return remapped_rows(card)

    @of_card
    def nvmlDeviceGetRowRemapperHistogram(self, card: SimulatedCard, /) -> Any:
        banks = _row_remap_banks(card)
        histogram = NVML.c_nvmlRowRemapperHistogramValues()
        for availability in BANK_AVAILABILITIES:
            healthy = banks if availability == BANK_AVAILABILITIES[0] else 0
            told = card.fact(Fact.ROW_REMAP_BANKS, healthy, availability)
            setattr(histogram, availability, int(told))
        return histogram

    @of_card
    def nvmlDeviceGetRetiredPages(self, card: SimulatedCard, cause: int, /) -> list[int]:
        return [page["address"] for page in _retired_pages(card, cause)]

    @of_card
    def nvmlDeviceGetRetiredPages_v2(
        self, card: SimulatedCard, cause: int, /
    ) -> list[dict[str, int]]:
        return _retired_pages(card, cause)

    @of_card
    def nvmlDeviceGetRetiredPagesPendingStatus(self, card: SimulatedCard, /) -> int:
        return retired_pages_pending(card)

    @of_card
    def nvmlDeviceGetPersistenceMode(self, card: SimulatedCard, /) -> int:
        return int(card.fact(Fact.PERSISTENCE_MODE, 1))

    @of_card
    def nvmlDeviceGetComputeMode(self, card: SimulatedCard, /) -> int:
        return int(card.fact(Fact.COMPUTE_MODE, 0))


def ecc_errors(card: SimulatedCard, error_type: int, counter_type: int) -> int:
    """Return how many memory errors of the driver's type were counted by its counter."""
    fact = _ECC_FACTS.get((error_type, counter_type))
    if fact is None:
        raise error("INVALID_ARGUMENT")
    return int(card.fact(fact, 0))


def remapped_rows(card: SimulatedCard) -> tuple[int, int, int, int]:
    """Return rows replaced after correctable and uncorrectable errors, pending, failed."""
    _row_remap_banks(card)
    return (
        int(card.fact(Fact.REMAPPED_ROWS, 0, CORRECTABLE)),
        int(card.fact(Fact.REMAPPED_ROWS, 0, UNCORRECTABLE)),
        int(card.fact(Fact.REMAPPED_ROWS_PENDING, 0)),
        int(card.fact(Fact.REMAPPED_ROWS_FAILED, 0)),
    )


def retired_pages(card: SimulatedCard, cause: int) -> int:
    """Return how many pages were retired for this cause, as the driver's enumeration counts."""
    _fail_unless_pages_retire(card)
    if not 0 <= cause < len(_CAUSES):
        raise error("INVALID_ARGUMENT")
    return int(card.fact(Fact.RETIRED_PAGES, 0, _CAUSES[cause]))


def retired_pages_pending(card: SimulatedCard) -> int:
    """Return whether a page is retired at the next reset."""
    _fail_unless_pages_retire(card)
    return int(card.fact(Fact.RETIRED_PAGES_PENDING, 0))


def _retired_pages(card: SimulatedCard, cause: int) -> list[dict[str, int]]:
    return [
        {"address": (number + 1) * _PAGE_BYTES, "timestamp": int(card.now * 1e6)}
        for number in range(retired_pages(card, cause))
    ]


def _row_remap_banks(card: SimulatedCard) -> int:
    if card.model.row_remap_banks is None:
        raise error("NOT_SUPPORTED")
    return card.model.row_remap_banks


def _fail_unless_pages_retire(card: SimulatedCard) -> None:
    if card.model.row_remap_banks is not None:
        raise error("NOT_SUPPORTED")  # from Ampere on, rows are remapped instead
