"""Looks at what runs beside the driver: services, the fabric manager, container engines."""

import subprocess
from collections.abc import Callable, Sequence

from stoker.agent.doctor.observed import (
    CdiSpec,
    ContainersFacts,
    Engine,
    FabricFacts,
    ServicesFacts,
    Unseen,
)
from stoker.agent.doctor.parse import (
    cdi_spec,
    has_docker_runtime,
    has_toml_runtime,
    tool_version,
    units,
)
from stoker.agent.doctor.roots import Roots
from stoker.agent.doctor.units import UNITS

_PROPERTIES = "--property=Id,LoadState,ActiveState,SubState,Result"
# What says that an engine is installed, and the file that names its runtimes.
_ENGINES = (
    ("docker", ("dockerd",), "/etc/docker/daemon.json", has_docker_runtime),
    ("containerd", ("containerd",), "/etc/containerd/config.toml", has_toml_runtime),
    ("cri-o", ("crio",), "/etc/crio/crio.conf", has_toml_runtime),
)
# containerd and CRI-O read more files; nvidia-ctk writes into these folders.
_DROP_INS = {"containerd": "/etc/containerd/conf.d", "cri-o": "/etc/crio/crio.conf.d"}
_CDI_FOLDERS = ("/etc/cdi", "/run/cdi", "/var/run/cdi")


def services(roots: Roots, seconds: float) -> ServicesFacts | Unseen:
    """Return the units that GPUs need, as systemd tells."""
    if not roots.exists("/run/systemd/system"):
        return Unseen("systemd does not run here")
    program = roots.program("systemctl")
    if program is None:
        return Unseen("systemctl is not installed")
    argv = [str(roots.path(program)), "show", "--no-pager", _PROPERTIES, *UNITS]
    said = _run(argv, seconds)
    return said if isinstance(said, Unseen) else ServicesFacts(units(said))


def fabric(roots: Roots, seconds: float) -> FabricFacts | Unseen:
    """Return the fabric manager that is installed."""
    program = roots.program("nv-fabricmanager")
    if program is None:
        return FabricFacts(None, None)
    said = _run([str(roots.path(program)), "--version"], seconds)
    return said if isinstance(said, Unseen) else FabricFacts(program, tool_version(said))


def containers(roots: Roots) -> ContainersFacts:
    """Return how containers get at GPUs."""
    engines = [
        Engine(name, config, _has_runtime(roots, name, config, has))
        for name, programs, config, has in _ENGINES
        if any(map(roots.program, programs))
    ]
    if roots.program("podman"):
        engines.append(Engine("podman", "", None))
    specs: dict[str, CdiSpec] = {}
    for folder in _CDI_FOLDERS:
        if folder.startswith("/var/") and roots.path(folder).resolve() == _run_cdi(roots):
            continue  # /var/run is /run
        for name in roots.names(folder):
            path = f"{folder}/{name}"
            if name.endswith((".yaml", ".yml", ".json")) and (
                spec := cdi_spec(path, roots.text(path))
            ):
                specs[path] = spec
    return ContainersFacts(tuple(engines), roots.program("nvidia-ctk"), tuple(specs.values()))


def _run_cdi(roots: Roots) -> object:
    return roots.path("/run/cdi").resolve()


def _has_runtime(roots: Roots, name: str, config: str, has: Callable[[str], bool]) -> bool | None:
    paths = [config]
    if folder := _DROP_INS.get(name):
        paths += [f"{folder}/{each}" for each in roots.names(folder)]
    found = False
    for path in paths:
        try:
            text = roots.text_or_none(path)
            found = found or (text is not None and has(text))
        except (OSError, ValueError):
            return None
    return found


def _run(argv: Sequence[str], seconds: float) -> str | Unseen:
    """Return what a program prints."""
    name = argv[0].rpartition("/")[2]
    try:
        done = subprocess.run(
            argv,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Unseen(f"{name} has not ended within {seconds:g} s")
    except OSError as error:
        return Unseen(f"{name} cannot be run: {error.strerror}")
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip().splitlines()
        return Unseen(f"{name} failed: {said[0] if said else f'exit code {done.returncode}'}")
    return done.stdout
