"""What an aggregator can be told: its options, where they come from, and what they must satisfy."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from stoker.core import config
from stoker.core.addresses import Address, parse_address
from stoker.core.config import option, section
from stoker.core.daemons import LogLevel, check_reach, default_data_dir

ENVIRONMENT_PREFIX = "STOKER_AGGREGATOR_"


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricsConfig:
    """The page for Prometheus."""

    listen: str = option(
        "127.0.0.1:9411", "Address of the page for Prometheus; port 0 takes a free one."
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


@dataclass(frozen=True, slots=True)
class Settings:
    """What the aggregator goes by: the configuration, checked, with every default decided."""

    listen: Address
    metrics_listen: Address
    data_dir: Path
    log_level: LogLevel = LogLevel.INFO


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
    )


def _reachable(text: str, what: str, *, is_insecure: bool) -> Address:
    address = parse_address(text, what)
    check_reach(address, what, is_insecure=is_insecure)
    return address
