"""What an aggregator can be told: its options, where they come from, and what they must satisfy."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType

from stoker.aggregator.conditions import FAILURES_KEPT_SECONDS
from stoker.aggregator.cordoning import CordonAt, CordonPolicy
from stoker.aggregator.cuts import PartitioningOptions
from stoker.aggregator.lemons import LemonPolicy
from stoker.aggregator.moves import (
    ANSWER_SECONDS_DEFAULT,
    ANSWER_SECONDS_MAX,
    MOVES_DEFAULT,
    MOVES_MAX,
    RebalanceOptions,
)
from stoker.aggregator.placing.policies import CHOSEN_BY_NAME, Policies, parts_of, policy_named
from stoker.core import config
from stoker.core.addresses import Address, parse_address
from stoker.core.config import option, section
from stoker.core.daemons import LogLevel, check_reach, default_data_dir
from stoker.core.errors import BadInput, shown
from stoker.core.units import parse_duration

DAY_SECONDS = 86_400.0
# Compiled loops cost three seconds of CPU once and 109 MB; smaller fleets decide fast without.
COMPILE_FROM_GPUS = 256
ENVIRONMENT_PREFIX = "STOKER_AGGREGATOR_"
NO_POOLS: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricsConfig:
    """The page for Prometheus."""

    listen: str = option(
        "127.0.0.1:9411", "Address of the page for Prometheus; port 0 takes a free one."
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class HealthConfig:
    """What is done about GPUs that are not well."""

    cordon_at: CordonAt = option(
        CordonAt.UNHEALTHY,
        "From which verdict on a GPU is cordoned by itself; degraded: also where it is to be "
        "drained or more.",
    )
    cordon_share_max: float = option(
        0.2,
        "Never more than this share of all GPUs is cordoned by itself at one time.",
        minimum=0.0,
        maximum=1.0,
    )
    cordon_gpus_min: int = option(
        1,
        "So many GPUs may be cordoned by themselves however small the fleet; with this and the "
        "share at 0 none is.",
        minimum=0,
        maximum=1_000_000,
    )
    uncordon_after_seconds: float = option(
        60.0,
        "A GPU that was cordoned by itself is used again when it was well for so long.",
        minimum=0.0,
        maximum=30 * DAY_SECONDS,
    )
    changes_per_hour_max: int = option(
        30,
        "So often in an hour a GPU's verdict may change; then only worse ones count until the hour "
        "is over.",
        minimum=2,
        maximum=1_000_000,
    )
    lemon_days: float = option(
        30.0,
        "Failures of so many days tell a card or a slot that keeps failing.",
        minimum=1.0,
        maximum=FAILURES_KEPT_SECONDS / DAY_SECONDS,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class RebalanceConfig:
    """When holders of movable allocations are asked to move without anybody's call."""

    every_seconds: float = option(
        0.0,
        "How often moves that are worth their cost are offered; 0: only by `stoker rebalance`.",
        minimum=0.0,
        maximum=30 * DAY_SECONDS,
    )
    moves_max: int = option(
        MOVES_DEFAULT, "At most so many moves at one time.", minimum=1, maximum=MOVES_MAX
    )
    answer_seconds: float = option(
        ANSWER_SECONDS_DEFAULT,
        "How long a holder has to answer.",
        minimum=1.0,
        maximum=ANSWER_SECONDS_MAX,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacementConfig:
    """What a good place for a request is."""

    policy: str = option(
        "fragmentation",
        "The policy of all pools but those below, or several with weights, such as "
        "2*binpack+energy; docs/placement.md tells of each.",
    )
    pools: Mapping[str, str] = option(
        NO_POOLS, "Pools that follow another policy, such as {infer: balanced}."
    )
    compile_from_gpus: int = option(
        COMPILE_FROM_GPUS,
        "From so many GPUs on the decisions run compiled, where numba is installed; 0: at once.",
        minimum=0,
        maximum=100_000_000,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class MigConfig:
    """Which pools have their GPUs partitioned (MIG) by demand."""

    pools: Mapping[str, str] = option(
        NO_POOLS,
        "Pools whose idle GPUs are cut up for what waits: 'automatic' does it, 'propose' only "
        "tells of it. After that dwell=10m (a GPU that was changed is left alone for so long), "
        "wait=30s (a request must have waited so long) and whole_gpus=0 (so many free GPUs stay "
        "whole), such as {train: automatic dwell=10m whole_gpus=2}.",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class AggregatorConfig:
    """Everything that an aggregator can be told, as it is written."""

    listen: str = option(
        "127.0.0.1:7070", "Where agents and clients dial; port 0 takes a free one."
    )
    data_dir: Path | None = option(
        None, "Folder of the ledger; default: $STATE_DIRECTORY, or by the user who runs it."
    )
    insecure: bool = option(
        default=False, doc="Whether to listen beyond this machine without encryption."
    )
    log_level: LogLevel = option(LogLevel.INFO, "What is worth a line in the log.")
    metrics: MetricsConfig = section(MetricsConfig)
    health: HealthConfig = section(HealthConfig)
    rebalance: RebalanceConfig = section(RebalanceConfig)
    placement: PlacementConfig = section(PlacementConfig)
    mig: MigConfig = section(MigConfig)


@dataclass(frozen=True, slots=True)
class Settings:
    """What the aggregator goes by: the configuration, checked, with every default decided."""

    listen: Address
    metrics_listen: Address
    data_dir: Path
    log_level: LogLevel = LogLevel.INFO
    cordoning: CordonPolicy = field(default_factory=CordonPolicy)
    lemons: LemonPolicy = field(default_factory=LemonPolicy)
    rebalance: RebalanceOptions = field(default_factory=RebalanceOptions)
    policies: Policies = field(default_factory=Policies)
    compile_from_gpus: int = COMPILE_FROM_GPUS
    partitioning: Mapping[str, PartitioningOptions] = field(
        default_factory=dict[str, PartitioningOptions]
    )


def load(file: Path | None, environ: Mapping[str, str], flags: Mapping[str, object]) -> Settings:
    """Return the settings from a file, the environment and flags; raises BadInput."""
    written = config.load(AggregatorConfig, file, environ, ENVIRONMENT_PREFIX, flags)
    return settle(written, environ, is_root=os.geteuid() == 0)


def settle(written: AggregatorConfig, environ: Mapping[str, str], *, is_root: bool) -> Settings:
    """Check a configuration and decide its defaults; raises BadInput that names the option."""
    return Settings(
        listen=_reachable(written.listen, "listen", is_insecure=written.insecure),
        metrics_listen=_reachable(
            written.metrics.listen, "metrics.listen", is_insecure=written.insecure
        ),
        data_dir=written.data_dir or default_data_dir("aggregator", environ, is_root=is_root),
        log_level=written.log_level,
        cordoning=CordonPolicy(
            cordon_at=written.health.cordon_at,
            share_max=written.health.cordon_share_max,
            gpus_min=written.health.cordon_gpus_min,
            uncordon_after_seconds=written.health.uncordon_after_seconds,
            changes_per_hour_max=written.health.changes_per_hour_max,
        ),
        lemons=LemonPolicy(window_seconds=written.health.lemon_days * DAY_SECONDS),
        rebalance=RebalanceOptions(
            written.rebalance.every_seconds,
            written.rebalance.moves_max,
            written.rebalance.answer_seconds,
        ),
        policies=_policies(written.placement),
        compile_from_gpus=written.placement.compile_from_gpus,
        partitioning={
            pool: _partitioning(text, f"mig.pools: {pool}")
            for pool, text in written.mig.pools.items()
        },
    )


def _policies(written: PlacementConfig) -> Policies:
    named = {"placement.policy": written.policy}
    named |= {f"placement.pools: {pool}": name for pool, name in written.pools.items()}
    for where, name in named.items():
        try:
            policy = policy_named(name)
        except ValueError as error:
            raise BadInput(f"{where}: {error}") from None
        unknown = {each.name for each in parts_of(policy)} - set(CHOSEN_BY_NAME)
        if unknown:
            known = ", ".join(CHOSEN_BY_NAME)
            raise BadInput(f"{where}: {min(unknown)} is for comparisons only; known are {known}")
    return Policies.named(written.policy, written.pools)


def _partitioning(text: str, where: str) -> PartitioningOptions:
    how, *rest = text.split() or [""]
    if how not in ("automatic", "propose"):
        raise BadInput(f"{where}: must begin with 'automatic' or 'propose', found {shown(text)}")
    options = PartitioningOptions(is_automatic=how == "automatic")
    for each in rest:
        name, _, value = each.partition("=")
        match name:
            case "dwell":
                options = replace(options, dwell_seconds=parse_duration(value, f"{where}: dwell"))
            case "wait":
                seconds = parse_duration(value, f"{where}: wait")
                options = replace(options, hysteresis_seconds=seconds)
            case "whole_gpus" if value.isdecimal() and value.isascii():
                options = replace(options, whole_gpus_kept=int(value))
            case "whole_gpus":
                raise BadInput(f"{where}: whole_gpus must be a number, found {shown(value)}")
            case _:
                known = "dwell=..., wait=... and whole_gpus=..."
                raise BadInput(f"{where}: {shown(each)} is none of {known}")
    return options


def _reachable(text: str, what: str, *, is_insecure: bool) -> Address:
    address = parse_address(text, what)
    check_reach(address, what, is_insecure=is_insecure)
    return address
