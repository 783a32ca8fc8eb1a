"""What readings of one GPU say about its condition: the checks that present facts decide.

Each check is small: it compares a fact, or what was measured over time, with a limit, and finds
that something is bad, or that what was found before is good again. What a check cannot tell now it
does not mention, and what was found before stays. Times are seconds on a clock that never goes
back.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

from stoker.agent.facts import CORRECTABLE, UNCORRECTABLE, Fact, Rate
from stoker.agent.health import checks
from stoker.agent.health.options import HealthConfig
from stoker.agent.health.windows import Window
from stoker.agent.readings import GpuReading
from stoker.agent.verdicts import Check

Key = tuple[Check, str]  # a check and its code

# A tick that comes later than this tells nothing about the time before it.
TICK_SECONDS_MAX = 60.0
# The driver's counters of energy and errors start anew with it: then they fall at least so far.
ENERGY_FALL_JOULES = 1000.0

_HOT, _SLOW, _BRAKED = "hw_thermal_slowdown", "hw_slowdown", "hw_power_brake_slowdown"
_ACTIVE = Fact.CLOCK_EVENT_ACTIVE
_LINK_ERRORS = (
    Fact.NVLINK_RECOVERY_ERRORS,
    Fact.NVLINK_REPLAY_ERRORS,
    Fact.NVLINK_CRC_FLIT_ERRORS,
    Fact.NVLINK_CRC_DATA_ERRORS,
)
# What counts since the driver was loaded, beside energy.
_SINCE_LOADED = (Fact.ECC_CORRECTED_VOLATILE_ERRORS, Fact.PCIE_REPLAYS)


@dataclass(frozen=True, slots=True)
class Finding:
    """Something is bad, or what was bad is good again."""

    check: Check
    code: str
    is_bad: bool
    detail: str = ""
    follows: bool = False  # the detail is to be told anew when it changes


@dataclass(slots=True)
class GpuWatch:
    """What has to be kept of one GPU from reading to reading; a reset begins most of it anew."""

    links: int = 0  # NVLinks that its model has; 0: not known
    read_at: float | None = None  # Unix seconds of the newest reading
    read: float | None = None  # the same, monotonic
    measured_since: float | None = None  # before that nobody knows what there was
    energy: float | None = None
    has_new_host: bool = False  # the driver was opened anew since its counters were compared
    slowdown_celsius: float | None = None
    memory_celsius_max: float | None = None
    is_at_margin: bool = False
    counters: dict[Fact, float] = field(default_factory=dict[Fact, float])
    link_counters: dict[Fact, Mapping[str, float]] = field(
        default_factory=dict[Fact, Mapping[str, float]]
    )
    links_up: set[str] = field(default_factory=set[str])
    windows: dict[tuple[object, ...], Window] = field(
        default_factory=dict[tuple[object, ...], Window]
    )
    turned: dict[Key, float] = field(default_factory=dict[Key, float])  # since when it is otherwise

    def begin_life(self) -> None:
        """Forget what was measured: the GPU was reset."""
        self.counters.clear()
        self.link_counters.clear()
        self.links_up.clear()
        self.windows.clear()
        self.turned.clear()

    # --- life

    def is_reset(self, reading: GpuReading) -> bool:
        """Whether the driver was loaded anew, or the GPU reset, since the reading before."""
        energy = reading.facts.get(Fact.ENERGY_JOULES)
        before, self.energy = self.energy, self.energy if energy is None else energy
        if energy is not None and before is not None:
            if has_fallen(before, energy):
                return True
            self.has_new_host = False
            return False
        if not self.has_new_host or Rate.SLOW not in reading.rates:
            return False
        self.has_new_host = False
        facts = reading.facts
        return any(
            facts[fact] < self.counters.get(fact, 0.0) for fact in _SINCE_LOADED if fact in facts
        )

    # --- every tick

    def look(
        self, reading: GpuReading, now: float, limits: HealthConfig, lasting: Collection[Key]
    ) -> Iterator[Finding]:
        """Yield what the reading says; `lasting` is what was found bad before."""
        facts = reading.facts
        before, self.read, self.read_at = self.read, now, reading.at
        if self.measured_since is None:
            self.measured_since = now
        if Rate.SLOW in reading.rates:
            self.slowdown_celsius = facts.get(Fact.TEMPERATURE_SLOWDOWN_CELSIUS)
            self.memory_celsius_max = facts.get(Fact.MEMORY_TEMPERATURE_MAX_CELSIUS)
            self.is_at_margin = facts.get(Fact.TEMPERATURE_MARGIN_CELSIUS, 1.0) <= 0.0
            yield from self._look_slowly(reading, now, limits, lasting)
        reasons = reading.by_label.get(_ACTIVE)
        is_hot = self._is_hot(facts)
        is_slow = is_braked = False
        if reasons is not None:
            is_hot = is_hot or bool(reasons.get(_HOT))
            is_slow = bool(reasons.get(_SLOW))
            is_braked = bool(reasons.get(_BRAKED))
        if not (is_hot or is_slow or is_braked or self.windows or lasting):
            return
        seconds = 0.0 if before is None else min(now - before, TICK_SECONDS_MAX)
        window = limits.window_seconds
        for check, is_active, begins, ends, what in (
            (
                Check.THERMAL,
                is_hot,
                limits.thermal_share_max,
                limits.thermal_share_end,
                "at or above its slowdown temperature, or slowed down by heat",
            ),
            (
                Check.HW_SLOWDOWN,
                is_slow,
                limits.hw_slowdown_share_max,
                limits.hw_slowdown_share_end,
                "slowed down by hardware",
            ),
            (
                Check.POWER_BRAKE,
                is_braked,
                limits.power_brake_share_max,
                limits.power_brake_share_end,
                "slowed down by the power supply",
            ),
        ):
            active = self._sum((check,), now, seconds if is_active else 0.0, window)
            if active >= begins * window:
                yield Finding(
                    check, "", True, f"{what} for {active:.0f} s of the last {window:.0f} s"
                )
            elif (check, "") in lasting and active < max(ends * window, 1e-9):
                yield from self._over(check, "", now, window)

    def _is_hot(self, facts: Mapping[Fact, float]) -> bool:
        if self.is_at_margin:
            return True
        slowdown, memory_max = self.slowdown_celsius, self.memory_celsius_max
        return (slowdown is not None and facts.get(Fact.TEMPERATURE_CELSIUS, 0.0) >= slowdown) or (
            memory_max is not None and facts.get(Fact.MEMORY_TEMPERATURE_CELSIUS, 0.0) >= memory_max
        )

    # --- the turn of slow facts

    def _look_slowly(
        self, reading: GpuReading, now: float, limits: HealthConfig, lasting: Collection[Key]
    ) -> Iterator[Finding]:
        facts = reading.facts
        yield from _memory(facts, reading.by_label, limits, lasting)
        yield from self._corrected(facts, now, limits, lasting)
        yield from _states(facts, lasting)
        yield from self._pcie_replays(facts, now, limits, lasting)
        yield from self._pcie_link(facts, now, limits, lasting)
        if Fact.NVLINK_UP in reading.by_label:
            yield from self._links_down(reading.by_label[Fact.NVLINK_UP], now, limits, lasting)
            yield from self._link_errors(reading.by_label, now, limits, lasting)

    def _corrected(
        self,
        facts: Mapping[Fact, float],
        now: float,
        limits: HealthConfig,
        lasting: Collection[Key],
    ) -> Iterator[Finding]:
        grown = self._growth(facts, Fact.ECC_CORRECTED_VOLATILE_ERRORS)
        if grown is None:
            return
        check, window = Check.ECC_CORRECTED, limits.window_seconds
        errors = self._sum((check,), now, grown, window)
        most = limits.ecc_corrected_errors_per_minute_max * window / 60
        detail = f"{errors:.0f} corrected memory errors in {window:.0f} s, at most {most:.0f} are"
        detail = f"{detail} usual"
        yield from self._above((check, ""), errors, most, now, window, detail, lasting)

    def _pcie_replays(
        self,
        facts: Mapping[Fact, float],
        now: float,
        limits: HealthConfig,
        lasting: Collection[Key],
    ) -> Iterator[Finding]:
        grown = self._growth(facts, Fact.PCIE_REPLAYS)
        width = facts.get(Fact.PCIE_LINK_WIDTH)
        generation = facts.get(Fact.PCIE_LINK_GENERATION_MAX)
        if grown is None or width is None or generation is None:
            return
        check, window = Check.PCIE_REPLAYS, limits.window_seconds
        replays = self._sum((check,), now, grown, window)
        if not replays and (check, "") not in lasting:
            return
        rates = checks.PCIE_REPLAYS_PER_MINUTE_AND_LANE
        rate = rates.get(int(generation), max(rates.values()))
        most = rate * width * window / 60 * limits.pcie_replays_limit_ratio
        detail = (
            f"{replays:.0f} PCIe replays in {window:.0f} s, at most {most:.0f} are usual for "
            f"{width:.0f} lanes of generation {generation:.0f}"
        )
        yield from self._above((check, ""), replays, most, now, window, detail, lasting)

    def _pcie_link(
        self,
        facts: Mapping[Fact, float],
        now: float,
        limits: HealthConfig,
        lasting: Collection[Key],
    ) -> Iterator[Finding]:
        width, widest = facts.get(Fact.PCIE_LINK_WIDTH), facts.get(Fact.PCIE_LINK_WIDTH_MAX)
        generation = facts.get(Fact.PCIE_LINK_GENERATION)
        fastest = facts.get(Fact.PCIE_LINK_GENERATION_MAX)
        if width is None or widest is None or generation is None or fastest is None:
            return
        key = (Check.PCIE_LINK, "")
        is_bad = width < widest or generation < fastest
        load = facts.get(Fact.UTILIZATION_RATIO, 0.0)
        if is_bad and load < limits.pcie_link_utilization_ratio_min:
            self.turned.pop(key, None)  # an idle GPU saves power, and its link may be as it likes
            return
        detail = (
            f"PCIe link of {width:.0f} lanes of generation {generation:.0f} under load, "
            f"{widest:.0f} of generation {fastest:.0f} are possible"
        )
        yield from self._steady(key, is_bad, now, limits.pcie_link_seconds, 0.0, detail, lasting)

    def _links_down(
        self,
        links: Mapping[str, float],
        now: float,
        limits: HealthConfig,
        lasting: Collection[Key],
    ) -> Iterator[Finding]:
        if not lasting and len(self.links_up) == len(links) and all(links.values()):
            self._settle_links(links)
            return
        up = {link for link, is_up in links.items() if is_up}
        self.links_up |= up
        for link in links:
            is_expected = link in self.links_up or (
                bool(up) and link.isdigit() and int(link) < self.links
            )
            key = (Check.NVLINK_DOWN, link)
            is_down = link not in up
            if is_down and not is_expected and key not in lasting:
                continue
            seconds = (limits.nvlink_down_seconds, limits.nvlink_up_seconds)
            detail = f"NVLink {link} is down"
            yield from self._steady(key, is_down, now, *seconds, detail, lasting)

    def _settle_links(self, links: Mapping[str, float]) -> None:
        """All are up: none is about to be found down."""
        if self.turned:
            for link in links:
                self.turned.pop((Check.NVLINK_DOWN, link), None)

    def _link_errors(
        self,
        by_label: Mapping[Fact, Mapping[str, float]],
        now: float,
        limits: HealthConfig,
        lasting: Collection[Key],
    ) -> Iterator[Finding]:
        check = Check.NVLINK_ERRORS
        changed: set[str] = set()
        for fact in _LINK_ERRORS:
            counts = by_label.get(fact)
            if counts is None:
                continue
            before = self.link_counters.get(fact)
            self.link_counters[fact] = counts
            if before is None or before == counts:
                continue
            seconds = limits.window_seconds
            if fact in (Fact.NVLINK_CRC_FLIT_ERRORS, Fact.NVLINK_CRC_DATA_ERRORS):
                seconds = checks.NVLINK_CRC_WINDOW_SECONDS
            for link, count in counts.items():
                grown = count - before.get(link, count)
                if grown > 0:
                    self._sum((check, link, fact), now, grown, seconds)
                    changed.add(link)
        changed.update(link for found, link in lasting if found is check)
        for link in changed:
            detail = self._link_fault(link, now, limits)
            if detail:
                yield Finding(check, link, True, f"NVLink {link}: {detail}")
            elif (check, link) in lasting and not self._has_link_errors(link, now):
                yield from self._over(check, link, now, limits.window_seconds)

    def _link_fault(self, link: str, now: float, limits: HealthConfig) -> str:
        window, crc_window = limits.window_seconds, checks.NVLINK_CRC_WINDOW_SECONDS
        recoveries, replays, flits, data = (
            self._faded((Check.NVLINK_ERRORS, link, fact), now) for fact in _LINK_ERRORS
        )
        if recoveries > limits.nvlink_recoveries_max:
            return f"{recoveries:.0f} recoveries in {window:.0f} s"
        if replays > limits.nvlink_replays_per_minute_max * window / 60:
            return f"{replays:.0f} replays in {window:.0f} s"
        if flits + data > limits.nvlink_crc_errors_per_second_max * crc_window:
            return f"{flits + data:.0f} CRC errors in {crc_window:.0f} s"
        return ""

    def _has_link_errors(self, link: str, now: float) -> bool:
        return any(self._faded((Check.NVLINK_ERRORS, link, fact), now) > 0 for fact in _LINK_ERRORS)

    # --- over time

    def _growth(self, facts: Mapping[Fact, float], fact: Fact) -> float | None:
        """Return by how much a counter grew since it was told before."""
        count = facts.get(fact)
        if count is None:
            return None
        before = self.counters.get(fact, count)
        self.counters[fact] = count
        return max(0.0, count - before)

    def _sum(self, key: tuple[object, ...], now: float, amount: float, seconds: float) -> float:
        """Add to a window, which is there only while there is something in it."""
        window = self.windows.get(key)
        if window is None:
            if not amount:
                return 0.0
            window = self.windows[key] = Window(seconds)
        if amount:
            window.add(now, amount)
        return self._faded(key, now)

    def _faded(self, key: tuple[object, ...], now: float) -> float:
        window = self.windows.get(key)
        if window is None:
            return 0.0
        left = window.fade(now)
        if not left:
            del self.windows[key]
        return left

    def _over(self, check: Check, code: str, now: float, window: float) -> Iterator[Finding]:
        """Yield that what was measured is good again, once it was measured for long enough."""
        if self.measured_since is not None and now - self.measured_since >= window:
            yield Finding(check, code, False)

    def _above(
        self,
        key: Key,
        found: float,
        most: float,
        now: float,
        window: float,
        detail: str,
        lasting: Collection[Key],
    ) -> Iterator[Finding]:
        """Yield that something is beyond its limit, or below half of it again."""
        if found > most:
            yield Finding(*key, True, detail)
        elif key in lasting and found <= most / 2:
            yield from self._over(*key, now, window)

    def _steady(
        self,
        key: Key,
        is_bad: bool,
        now: float,
        bad_seconds: float,
        good_seconds: float,
        detail: str,
        lasting: Collection[Key],
    ) -> Iterator[Finding]:
        """Yield what has been so for long enough."""
        is_lasting = key in lasting
        if is_bad == is_lasting:
            self.turned.pop(key, None)
            if is_bad:
                yield Finding(*key, True, detail)
            return
        since = self.turned.setdefault(key, now)
        if now - since >= (bad_seconds if is_bad else good_seconds):
            self.turned.pop(key)
            yield Finding(*key, is_bad, detail)


def has_fallen(before: float, energy: float) -> bool:
    """Whether a counter of energy has begun anew; less is how it is read out."""
    return energy < max(before - ENERGY_FALL_JOULES, before / 2)


def _memory(
    facts: Mapping[Fact, float],
    by_label: Mapping[Fact, Mapping[str, float]],
    limits: HealthConfig,
    lasting: Collection[Key],
) -> Iterator[Finding]:
    errors = facts.get(Fact.ECC_UNCORRECTED_VOLATILE_ERRORS)
    if errors is not None:
        is_bad = errors > limits.ecc_uncorrected_errors_max
        detail = f"{_counted(errors, 'uncorrected memory error')} since the driver was loaded"
        yield from _found(Check.ECC_UNCORRECTED, "", is_bad, detail, lasting)
    pending = facts.get(Fact.REMAPPED_ROWS_PENDING)
    if pending is not None:
        detail = "a memory row waits to be replaced"
        yield from _found(Check.ROW_REMAP_PENDING, "", bool(pending), detail, lasting)
    failed = facts.get(Fact.REMAPPED_ROWS_FAILED)
    if failed is not None:
        detail = "a memory row could not be replaced"
        yield from _found(Check.ROW_REMAP_FAILED, "", bool(failed), detail, lasting)
    check = Check.RETIRED_PAGES
    waiting = facts.get(Fact.RETIRED_PAGES_PENDING)
    if waiting is not None:
        detail = "a memory page waits to be taken out of use"
        yield from _found(check, checks.PAGES_PENDING, bool(waiting), detail, lasting)
    pages = by_label.get(Fact.RETIRED_PAGES)
    if pages is not None and CORRECTABLE in pages and UNCORRECTABLE in pages:
        bad, of_all = pages[UNCORRECTABLE], pages[CORRECTABLE] + pages[UNCORRECTABLE]
        detail = f"{_counted(of_all, 'memory page')} out of use"
        is_full = of_all > limits.retired_pages_max
        yield from _found(check, checks.PAGES_FULL, is_full, detail, lasting)
        detail = f"{_counted(bad, 'memory page')} out of use after uncorrected errors"
        is_worn = bad > limits.retired_pages_uncorrected_max
        yield from _found(check, checks.PAGES_UNCORRECTED, is_worn, detail, lasting)


def _states(facts: Mapping[Fact, float], lasting: Collection[Key]) -> Iterator[Finding]:
    """Yield what the driver says outright."""
    asked = facts.get(Fact.RECOVERY_ACTION)
    if asked is not None:
        check, wanted = Check.RECOVERY_ACTION, ""
        if asked:
            wanted = checks.RECOVERY_CODES.get(int(asked), checks.RECOVERY_OTHER)
            detail = f"the driver asks for recovery: {wanted.replace('_', ' ')} ({asked:.0f})"
            yield Finding(check, wanted, True, detail)
        for found, code in tuple(lasting):
            if found is check and code != wanted:
                yield Finding(check, code, False)
    persistence = facts.get(Fact.PERSISTENCE_MODE)
    if persistence is not None:
        detail = "persistence mode is off"
        yield from _found(Check.PERSISTENCE, "", not persistence, detail, lasting)


def _found(
    check: Check, code: str, is_bad: bool, detail: str, lasting: Collection[Key]
) -> Iterator[Finding]:
    if is_bad:
        yield Finding(check, code, True, detail, follows=True)
    elif (check, code) in lasting:
        yield Finding(check, code, False)


def _counted(count: float, noun: str) -> str:
    return f"{count:.0f} {noun}{'' if count == 1 else 's'}"
