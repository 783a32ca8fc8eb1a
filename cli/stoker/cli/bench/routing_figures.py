"""What `stoker bench routing` reports, worked out from what its callers counted."""

from collections.abc import Sequence
from dataclasses import dataclass

from stoker.cli.bench.figures import CLIENTS_LAG_SECONDS_MAX, Machine, Spread, ratio
from stoker.testing.replica_messages import CallsReport


@dataclass(frozen=True, slots=True)
class PolicyFigures:
    """What became of the calls under one policy."""

    calls: int
    errors: int
    call_p50_seconds: float | None  # from when a call was due until its answer was read
    call_p90_seconds: float | None
    call_p99_seconds: float | None
    call_max_seconds: float | None
    shares: tuple[float, ...]  # each replica's part of the calls; the slowed one is the first
    lag_p99_seconds: float | None  # how late the callers were


@dataclass(frozen=True, slots=True)
class Policies:
    """The policies side by side."""

    round_robin: PolicyFigures  # each replica in its turn
    stoker: PolicyFigures  # the SDK's router


@dataclass(frozen=True, slots=True)
class RoutingReport:
    """How calls of a service fare of which one replica is slower than the others."""

    replicas: int
    slots: int  # calls that a replica works on at a time
    call_seconds: float  # that one takes on the mean, without waiting
    slow_factor: float  # of the first replica
    rate: float
    seconds: float
    policies: Policies
    p99_ratio: float | None  # stoker's by round robin's
    valid: bool
    invalid_reasons: tuple[str, ...]
    at: str  # when it began, UTC
    machine: Machine


def policy_figures(report: CallsReport, addresses: Sequence[str]) -> PolicyFigures:
    """Return the figures of one policy; `addresses` are those of the replicas, in their order."""
    spread = Spread.of_micros(report.call_micros)
    return PolicyFigures(
        calls=report.calls,
        errors=sum(report.errors.values()),
        call_p50_seconds=spread.p50,
        call_p90_seconds=spread.p90,
        call_p99_seconds=spread.p99,
        call_max_seconds=spread.max,
        shares=tuple(
            report.by_address.get(each, 0) / report.calls if report.calls else 0.0
            for each in addresses
        ),
        lag_p99_seconds=Spread.of_micros(report.lag_micros).p99,
    )


def p99_ratio(policies: Policies) -> float | None:
    """Return the router's 99th percentile by that of round robin; None: there is none."""
    return ratio(policies.stoker.call_p99_seconds, policies.round_robin.call_p99_seconds)


def objections(name: str, figures: PolicyFigures) -> list[str]:
    """Return why the calls of a policy were not what was asked for."""
    if figures.lag_p99_seconds is None:
        return [f"{name}: no call was due in the window"]
    found: list[str] = []
    if figures.lag_p99_seconds > CLIENTS_LAG_SECONDS_MAX:
        found.append(
            f"{name}: the callers were {figures.lag_p99_seconds:.3f} s late (99th percentile), "
            f"more than {CLIENTS_LAG_SECONDS_MAX:g} s: it was they who were slow"
        )
    if figures.errors:
        found.append(f"{name}: {figures.errors} of {figures.calls} calls failed")
    return found
