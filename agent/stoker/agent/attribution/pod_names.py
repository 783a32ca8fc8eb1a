"""Names of pods and containers, from how the kubelet names the folders of their logs.

The pod-resources API knows pods by name and cgroups know them by UID; that both are the same pod is
told by the folder of its logs, NAMESPACE_NAME_UID, which is there before a container of it starts.
"""

import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

PODS = Path("/var/log/pods")
CONTAINERS = Path("/var/log/containers")
# A name that is not there is looked for again after so long: listing a full folder takes a while.
LIST_SECONDS_MIN = 5.0
ENTRIES_MAX = 20_000  # of each folder; a node has some hundred pods
_ID_CHARACTERS = 64


@dataclass(frozen=True, slots=True)
class PodName:
    """What a pod, and perhaps a container of it, is called; empty: not known."""

    namespace: str = ""
    pod: str = ""
    container: str = ""


class PodNames:
    """The names on this machine. It reads when a name is not known; use it in one thread."""

    def __init__(
        self,
        pods: Path | None = PODS,
        containers: Path | None = CONTAINERS,
        *,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """Take the kubelet's folders; None: they are not to be looked at."""
        self._pods_folder, self._containers_folder = pods, containers
        self._monotonic = monotonic
        self._pods: dict[str, tuple[str, str]] = {}  # by UID
        self._containers: dict[str, str] = {}  # by id
        self._listed_at: float | None = None

    def look_up(self, pod_uid: str, container_ids: Iterable[str]) -> PodName:
        """Return the names of a pod, and of whichever of the containers is one of it."""
        ids = tuple(container_ids)
        if pod_uid not in self._pods or not any(each in self._containers for each in ids):
            self._list()
        namespace, pod = self._pods.get(pod_uid, ("", ""))
        container = next((self._containers[each] for each in ids if each in self._containers), "")
        return PodName(namespace, pod, container)

    def _list(self) -> None:
        now = self._monotonic()
        if self._listed_at is not None and now - self._listed_at < LIST_SECONDS_MIN:
            return
        self._listed_at = now
        self._pods = dict(filter(None, map(parse_pod_folder, _entries(self._pods_folder))))
        links = _entries(self._containers_folder)
        self._containers = dict(filter(None, map(parse_container_link, links)))


def parse_pod_folder(name: str) -> tuple[str, tuple[str, str]] | None:
    """Return the UID, and the namespace and name, of NAMESPACE_NAME_UID; None: it is not one."""
    parts = name.split("_")
    return (parts[2], (parts[0], parts[1])) if len(parts) == 3 and all(parts) else None


def parse_container_link(name: str) -> tuple[str, str] | None:
    """Return the id and the name of the container of POD_NAMESPACE_CONTAINER-ID.log, or None."""
    before, dash, id_ = name.removesuffix(".log").rpartition("-")
    parts = before.split("_")
    is_one = dash and len(id_) == _ID_CHARACTERS and len(parts) == 3 and all(parts)
    return (id_, parts[2]) if is_one else None


def _entries(folder: Path | None) -> list[str]:
    """Return the names in a folder; none when it is not there, or may not be read."""
    if folder is None:
        return []
    try:
        return os.listdir(folder)[:ENTRIES_MAX]
    except OSError:
        return []
