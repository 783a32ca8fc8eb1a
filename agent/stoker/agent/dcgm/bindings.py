"""The functions of DCGM's Python bindings that we call: loaded from their folder, errors made ours.

The bindings are plain files that NVIDIA's package datacenter-gpu-manager-4-core installs; no
package registry has them. They import one another by bare name, so their folder stands first on
`sys.path` while they are imported, and no longer: it also holds names like `logger` and `stats`.
Only a driver host that was told of an nv-hostengine imports them, when it first needs them.

`dcgm_agent` and `dcgm_structs` suffice: `pydcgm` above them loads 2 MB more and may print. Their
functions lose keyword arguments, so every argument is given by place. Numbers that are part of
DCGM's binary interface stand here as numbers: names have changed between releases.
"""

import ctypes
import importlib
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from stoker.agent.dcgm.codes import OK, PACKAGE, DcgmFailed
from stoker.agent.dcgm.fields import MetricGroup
from stoker.agent.dcgm.values import GPU, GPU_INSTANCE, Entity, Value
from stoker.agent.driver import LibraryMissing

T = TypeVar("T")

_GROUP_EMPTY = 1
_UUID_FIELD = 54
_LIVE = 1  # ask the driver, not the cache: nobody watches the UUID
_DOUBLE, _TEXT = "d", "s"
_KEEP_SECONDS, _KEEP_SAMPLES = 60.0, 2  # we read the newest only
# The connection is tried over and over for so long, even when it is refused at once.
_CONNECT_MILLISECONDS = 500


@dataclass(frozen=True, slots=True)
class Instance:
    """A GPU instance and where it is."""

    entity: Entity
    gpu_uuid: str
    gpu_instance_id: int  # NVML's


@dataclass(frozen=True, slots=True)
class Bindings:
    """The two modules."""

    agent: Any
    structs: Any


def load_bindings(folder: Path) -> Bindings:
    """Import the bindings from their folder; raises LibraryMissing."""
    if not (folder / "dcgm_agent.py").is_file():
        raise LibraryMissing(f"dcgm.bindings: {folder} has no dcgm_agent.py; {PACKAGE} installs it")
    sys.path.insert(0, str(folder))
    try:
        agent = importlib.import_module("dcgm_agent")
        structs = importlib.import_module("dcgm_structs")
    except Exception as error:  # whatever a foreign file does when it is run
        raise LibraryMissing(
            f"dcgm.bindings: {folder} cannot be imported: {type(error).__name__}: {error}"
        ) from error
    finally:
        sys.path.remove(str(folder))
    return Bindings(agent, structs)


class Hostengine:
    """A connection to an nv-hostengine. Every method may block for long and raises DcgmFailed."""

    def __init__(self, bindings: Bindings, address: str, announce: Callable[[str], None]) -> None:
        """Connect to HOST:PORT or to a socket's path; `announce` hears of every call before it."""
        self._bindings, self._structs = bindings, bindings.structs
        self._announce = announce
        # The only function that loads the library, for all its underscore.
        load = self._structs._dcgmInit  # noqa: SLF001
        self._call("dcgmInit", lambda init: (load(), init()))
        # Of the ways to connect the one that all releases of DCGM 4 have.
        parameters = self._structs.c_dcgmConnectV2Params_v2()
        parameters.version = self._structs.c_dcgmConnectV2Params_version2
        parameters.persistAfterDisconnect = 0  # what we watch ends with us
        parameters.timeoutMs = _CONNECT_MILLISECONDS
        parameters.addressIsUnixSocket = int(address.startswith("/"))
        self._handle = self._call("dcgmConnect_v2", lambda connect: connect(address, parameters))

    def close(self) -> None:
        """Disconnect, and with that unwatch everything."""
        self._ask("dcgmDisconnect")

    def uuids(self) -> dict[str, Entity]:
        """Return the GPUs by UUID."""
        numbers = self._ask("dcgmGetAllSupportedDevices")
        if not numbers:
            return {}
        entities = [Entity(GPU, int(number)) for number in numbers]
        told = self._values(entities, (_UUID_FIELD,), _LIVE)
        return {
            value.value: value.entity
            for value in told
            if value.status == OK and isinstance(value.value, str)
        }

    def instances(self) -> tuple[Instance, ...]:
        """Return the GPU instances of all GPUs."""
        hierarchy = self._ask("dcgmGetGpuInstanceHierarchy")
        listed = (hierarchy.entityList[place] for place in range(hierarchy.count))
        return tuple(
            Instance(
                Entity(GPU_INSTANCE, each.entity.entityId),
                str(each.info.gpuUuid),
                each.info.nvmlInstanceId,
            )
            for each in listed
            if each.entity.entityGroupId == GPU_INSTANCE
        )

    def metric_groups(self, gpu: Entity) -> tuple[MetricGroup, ...]:
        """Return which profiling fields the GPU has, and which of them go together."""
        told = self._ask("dcgmProfGetSupportedMetricGroups", gpu.number)
        groups = (told.metricGroups[place] for place in range(told.numMetricGroups))
        return tuple(
            MetricGroup(group.majorId, group.minorId, tuple(group.fieldIds[: group.numFieldIds]))
            for group in groups
        )

    def make_group(self, name: str, entities: Iterable[Entity]) -> Any:
        """Return a group of entities; the name must be new to the whole hostengine."""
        group = self._ask("dcgmGroupCreate", _GROUP_EMPTY, name)
        for entity in entities:
            self._ask("dcgmGroupAddEntity", group, entity.group, entity.number)
        return group

    def drop_group(self, group: Any) -> None:
        """Remove a group."""
        self._ask("dcgmGroupDestroy", group)

    def make_field_group(self, name: str, fields: Sequence[int]) -> Any:
        """Return a group of fields; the name must be new to the whole hostengine."""
        return self._ask("dcgmFieldGroupCreate", list(fields), name)

    def watch(self, group: Any, field_group: Any, interval_seconds: float) -> None:
        """Have the fields of the entities measured from now on."""
        microseconds = round(interval_seconds * 1e6)
        self._ask("dcgmWatchFields", group, field_group, microseconds, _KEEP_SECONDS, _KEEP_SAMPLES)

    def unwatch(self, group: Any, field_group: Any) -> None:
        """Stop that."""
        self._ask("dcgmUnwatchFields", group, field_group)

    def newest(self, entities: Sequence[Entity], fields: Sequence[int]) -> tuple[Value, ...]:
        """Return the newest value of every field of every entity, also of those not watched."""
        return self._values(entities, fields, 0)

    def pause(self) -> None:
        """Leave the hardware counters to other profilers: of all clients of the hostengine."""
        self._ask("dcgmProfPause")

    def resume(self) -> None:
        """Take the hardware counters again."""
        self._ask("dcgmProfResume")

    def _values(
        self, entities: Sequence[Entity], fields: Sequence[int], flags: int
    ) -> tuple[Value, ...]:
        pair = self._structs.c_dcgmGroupEntityPair_t
        pairs = [pair(entity.group, entity.number) for entity in entities]
        return self._call(
            "dcgmEntitiesGetLatestValues",
            lambda ask: tuple(
                _value(told) for told in ask(self._handle, pairs, list(fields), flags)
            ),
        )

    def _ask(self, function: str, *arguments: Any) -> Any:
        return self._call(function, lambda ask: ask(self._handle, *arguments))

    def _call(self, function: str, use: Callable[[Callable[..., Any]], T]) -> T:
        return _call(self._bindings, self._announce, function, use)


def shut_down(bindings: Bindings, announce: Callable[[str], None]) -> None:
    """End the library's own threads before the process ends; raises DcgmFailed."""
    _call(bindings, announce, "dcgmShutdown", lambda shut: shut())


def _call(
    bindings: Bindings,
    announce: Callable[[str], None],
    function: str,
    use: Callable[[Callable[..., Any]], T],
) -> T:
    """Make one call; its errors become ours here, and nowhere else."""
    announce(function)
    try:
        return use(getattr(bindings.agent, function))
    except bindings.structs.DCGMError as error:
        raise DcgmFailed(function, int(error.value), str(error)) from error
    except (AttributeError, TypeError, ValueError, ctypes.ArgumentError) as error:
        # Bindings of another release than we know.
        raise DcgmFailed(function, None, f"{type(error).__name__}: {error}") from error


def _value(told: Any) -> Value:
    union, kind = told.value, chr(told.fieldType)
    value = union.dbl if kind == _DOUBLE else str(union.str) if kind == _TEXT else union.i64
    entity = Entity(told.entityGroupId, told.entityId)
    return Value(entity, told.fieldId, told.status, told.ts / 1e6, value)
