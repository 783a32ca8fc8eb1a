"""What an agent can be told: its options, where they come from, and what they must satisfy."""

import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from types import MappingProxyType

from stoker.agent.health.options import HealthConfig
from stoker.agent.health.policy import Policy, policy_of
from stoker.agent.mig.declared import Declaration, MigConfig, declare
from stoker.core import config
from stoker.core.addresses import Address, parse_address
from stoker.core.config import option, section
from stoker.core.daemons import LogLevel, check_reach, default_data_dir
from stoker.core.errors import BadInput, shown
from stoker.core.gpu_models import parse_simulate_spec
from stoker.core.local import PATH_BYTES_MAX, checked_path

ENVIRONMENT_PREFIX = "STOKER_AGENT_"
NODE_NAME_CHARACTERS_MAX = 253
LABELS_MAX = 64
LABEL_KEY_CHARACTERS_MAX = 63
LABEL_VALUE_CHARACTERS_MAX = 256
POOL_CHARACTERS_MAX = 63

SOCKET_NAME = "agent.sock"

_DNS_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?", re.ASCII)
_NO_LABELS: Mapping[str, str] = MappingProxyType({})


class HostnameLabel(StrEnum):
    """How dcgm-exporter spells the label: the first until 2026-05, the second since."""

    UPPER = "Hostname"
    LOWER = "hostname"


@dataclass(frozen=True, slots=True, kw_only=True)
class DcgmConfig:
    """NVIDIA DCGM, which reads hardware counters of GPUs before Hopper."""

    address: str = option(
        "", "An nv-hostengine that runs already, HOST:PORT or a socket's path; empty: none."
    )
    bindings: Path = option(
        Path("/usr/share/datacenter-gpu-manager-4/bindings/python3"),
        "Folder of DCGM's Python bindings.",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class KubernetesConfig:
    """The kubelet of this host, if it has one."""

    pod_resources_socket: Path | None = option(
        None,
        "Kubelet's socket of who has which device; default: where kubelets have it, if there is "
        "one. When it is given it must answer before a GPU counts as free.",
    )
    ignore_kubelet: bool = option(
        default=False, doc="Whether GPUs that this host's kubelet has handed out count as free."
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricsConfig:
    """The page for Prometheus."""

    listen: str = option(
        "127.0.0.1:9410", "Address of the page for Prometheus; port 0 takes a free one."
    )
    window_seconds: float = option(
        60.0,
        "Time over which least, most and mean are told: at least that between two scrapes.",
        minimum=1.0,
        maximum=3600.0,
    )
    dcgm_hostname_label: HostnameLabel = option(
        HostnameLabel.UPPER, "How the page of DCGM's names spells the label of the host."
    )
    tls_cert: Path | None = option(None, "Certificate (PEM) of the page; needs tls_key.")
    tls_key: Path | None = option(None, "Private key (PEM) of that certificate.")
    tls_client_ca: Path | None = option(
        None, "Certificates (PEM) that a scraper's own must descend from; needs tls_cert."
    )
    basic_auth_file: Path | None = option(
        None, "Who may scrape: lines of USER:HASH, the hash by bcrypt as htpasswd -B writes it."
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentConfig:
    """Everything that an agent can be told, as it is written."""

    node: str = option("", "Name of this node, unique in the fleet; empty: the host name.")
    aggregator: tuple[str, ...] = option(
        ("127.0.0.1:7070",), "Where the aggregator listens; several are tried in turn."
    )
    pool: str = option("", "The pool that this node belongs to; empty: none.")
    labels: Mapping[str, str] = option(
        _NO_LABELS, "Words about this node, shown to clients.", flag="--label"
    )
    interval_seconds: float = option(
        1.0, "Time between two samples of every GPU.", minimum=0.05, maximum=60.0
    )
    slow_interval_seconds: float = option(
        10.0,
        "Time between two readings of what changes slowly or costs much.",
        minimum=1.0,
        maximum=300.0,
    )
    call_timeout_seconds: float = option(
        1.0,
        "Time after which a call into the driver counts as hung.",
        minimum=0.1,
        maximum=30.0,
    )
    processes_interval_seconds: float = option(
        5.0, "Time between two readings of the processes on the GPUs.", minimum=0.1, maximum=300.0
    )
    data_dir: Path | None = option(
        None, "Folder of the journal; default: $STATE_DIRECTORY, or by the user who runs it."
    )
    socket: Path | None = option(
        None,
        "Socket of `stoker agent` commands; default: agent.sock in $RUNTIME_DIRECTORY or data_dir.",
    )
    helper_socket: Path = option(
        Path("/run/stoker/helper.sock"),
        "Socket of the root helper, which tells what only root may see.",
    )
    kernel_log: Path | None = option(
        None, "File that is followed in place of the kernel's log; for simulated GPUs."
    )
    simulate: tuple[str, ...] = option(
        (), "GPUs to simulate in place of the real ones, such as 8xH100-80GB."
    )
    seed: int = option(0, "Which simulated node, of many that look alike.", minimum=0)
    scenario: Path | None = option(
        None, "File of processes and faults that happen on the simulated GPUs."
    )
    insecure: bool = option(
        default=False, doc="Whether to talk beyond this machine without encryption."
    )
    log_level: LogLevel = option(LogLevel.INFO, "What is worth a line in the log.")
    dcgm: DcgmConfig = section(DcgmConfig)
    health: HealthConfig = section(HealthConfig)
    kubernetes: KubernetesConfig = section(KubernetesConfig)
    metrics: MetricsConfig = section(MetricsConfig)
    mig: MigConfig = section(MigConfig)


@dataclass(frozen=True, slots=True)
class Settings:
    """What the agent goes by: the configuration, checked, with every default decided."""

    node: str
    aggregators: tuple[Address, ...]
    pool: str
    labels: Mapping[str, str]
    interval_seconds: float
    processes_interval_seconds: float
    data_dir: Path
    simulate: tuple[str, ...]
    seed: int
    scenario: Path | None
    log_level: LogLevel
    metrics_listen: Address
    slow_interval_seconds: float
    call_timeout_seconds: float
    socket: Path
    dcgm: DcgmConfig
    metrics: MetricsConfig
    policy: Policy
    helper_socket: Path
    kernel_log: Path | None
    pod_resources_socket: Path | None
    is_kubelet_ignored: bool
    mig: Declaration


def load(file: Path | None, environ: Mapping[str, str], flags: Mapping[str, object]) -> Settings:
    """Return the settings from a file, the environment and flags; raises BadInput."""
    written = config.load(AgentConfig, file, environ, ENVIRONMENT_PREFIX, flags)
    return settle(written, environ, hostname=socket.gethostname())


def settle(written: AgentConfig, environ: Mapping[str, str], *, hostname: str) -> Settings:
    """Check a configuration and decide its defaults; raises BadInput that names the option."""
    aggregators = tuple(parse_address(each, "aggregator") for each in written.aggregator)
    if not aggregators:
        raise BadInput("aggregator: wanted at least one HOST:PORT, found none")
    for each in aggregators:
        check_reach(each, "aggregator", is_insecure=written.insecure)
        if each.port == 0:
            raise BadInput(f"aggregator: {each} has no port to dial")
    listen = parse_address(written.metrics.listen, "metrics.listen")
    _check_metrics(written.metrics)
    is_encrypted = written.metrics.tls_cert is not None
    check_reach(listen, "metrics.listen", is_insecure=written.insecure or is_encrypted)
    _check_dcgm(written.dcgm, is_insecure=written.insecure)
    for spec in written.simulate:
        parse_simulate_spec(spec)
    if written.scenario is not None and not written.simulate:
        raise BadInput("scenario: it is for simulated GPUs, and simulate is not given")
    kubernetes = written.kubernetes
    if kubernetes.ignore_kubelet and kubernetes.pod_resources_socket is not None:
        found = kubernetes.pod_resources_socket
        raise BadInput(
            f"kubernetes.ignore_kubelet: it cannot be with kubernetes.pod_resources_socket {found}"
        )
    if written.kernel_log is not None and not written.simulate:
        raise BadInput("kernel_log: it is for simulated GPUs, and simulate is not given")
    data_dir = written.data_dir or default_data_dir("agent", environ, is_root=os.geteuid() == 0)
    return Settings(
        node=_checked_node(written.node or hostname),
        aggregators=aggregators,
        pool=_checked_pool(written.pool),
        labels=_checked_labels(written.labels),
        interval_seconds=written.interval_seconds,
        processes_interval_seconds=written.processes_interval_seconds,
        data_dir=data_dir,
        simulate=written.simulate,
        seed=written.seed,
        scenario=written.scenario,
        log_level=written.log_level,
        metrics_listen=listen,
        slow_interval_seconds=written.slow_interval_seconds,
        call_timeout_seconds=written.call_timeout_seconds,
        socket=written.socket or default_socket(data_dir, environ),
        dcgm=written.dcgm,
        metrics=written.metrics,
        policy=policy_of(written.health),
        helper_socket=checked_path(written.helper_socket, "helper_socket"),
        kernel_log=written.kernel_log,
        pod_resources_socket=written.kubernetes.pod_resources_socket,
        is_kubelet_ignored=written.kubernetes.ignore_kubelet,
        mig=declare(written.mig),
    )


def default_socket(data_dir: Path, environ: Mapping[str, str]) -> Path:
    """Return where an agent listens for local commands, unless it is told where."""
    return Path(environ.get("RUNTIME_DIRECTORY") or data_dir) / SOCKET_NAME


def _check_metrics(metrics: MetricsConfig) -> None:
    """Raise BadInput for an option without the one that it needs."""
    given = {
        "tls_cert": metrics.tls_cert,
        "tls_key": metrics.tls_key,
        "tls_client_ca": metrics.tls_client_ca,
    }
    for name, needed in (
        ("tls_cert", "tls_key"),
        ("tls_key", "tls_cert"),
        ("tls_client_ca", "tls_cert"),
    ):
        if given[name] is not None and given[needed] is None:
            raise BadInput(f"metrics.{name}: {given[name]} is of no use without metrics.{needed}")


def _check_dcgm(dcgm: DcgmConfig, *, is_insecure: bool) -> None:
    """Raise BadInput for an address that nothing can listen at, or that is too far away."""
    if dcgm.address.startswith("/"):
        if len(os.fsencode(dcgm.address)) > PATH_BYTES_MAX:
            raise BadInput(
                f"dcgm.address: wanted a path of at most {PATH_BYTES_MAX} bytes, "
                f"found {shown(dcgm.address)}"
            )
    elif dcgm.address:
        address = parse_address(dcgm.address, "dcgm.address")
        check_reach(address, "dcgm.address", is_insecure=is_insecure)
        if address.port == 0:
            raise BadInput(f"dcgm.address: {address} has no port to dial")


def _checked_node(name: str) -> str:
    if len(name) > NODE_NAME_CHARACTERS_MAX or not _DNS_NAME.fullmatch(name):
        raise BadInput(
            f"node: wanted letters, digits, dots, dashes, underscores, at most "
            f"{NODE_NAME_CHARACTERS_MAX}, found {shown(name)}"
        )
    return name


def _checked_pool(pool: str) -> str:
    if len(pool) > POOL_CHARACTERS_MAX or (pool and not _DNS_NAME.fullmatch(pool)):
        raise BadInput(
            f"pool: wanted letters, digits, dots, dashes, underscores, at most "
            f"{POOL_CHARACTERS_MAX}, found {shown(pool)}"
        )
    return pool


def _checked_labels(labels: Mapping[str, str]) -> Mapping[str, str]:
    if len(labels) > LABELS_MAX:
        raise BadInput(f"labels: wanted at most {LABELS_MAX}, found {len(labels)}")
    for key, value in labels.items():
        if not 0 < len(key.encode()) <= LABEL_KEY_CHARACTERS_MAX:
            raise BadInput(
                f"labels: wanted a key of 1 to {LABEL_KEY_CHARACTERS_MAX} bytes, found {shown(key)}"
            )
        if len(value.encode()) > LABEL_VALUE_CHARACTERS_MAX:
            raise BadInput(
                f"labels: {key}: wanted at most {LABEL_VALUE_CHARACTERS_MAX} bytes, "
                f"found {len(value.encode())}"
            )
    return labels
