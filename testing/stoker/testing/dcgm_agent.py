"""Stands for DCGM's `dcgm_agent.py`: the functions that stoker calls, towards a `FakeHostengine`.

Signatures, and how results come, are those of testing/python3/dcgm_agent.py in DCGM 4.6; how it
behaves towards the connection is that of dcgmlib/src/DcgmClientHandler.cpp: connecting is tried
again and again until its time is up, a request waits a minute for its answer, and once the
connection is lost everything answers CONNECTION_NOT_VALID until it is made anew.
"""

# ruff: noqa: N802 (the names are DCGM's)

import functools
import socket
import time
from collections.abc import Callable, Sequence
from ctypes import c_void_p
from typing import Any

import msgspec

from stoker.testing import dcgm_structs
from stoker.testing.dcgm_structs import DCGMError

REQUEST_SECONDS = 60.0
_RETRY_SECONDS = 0.05
_TEXT_BYTES_MAX = 255

_connections: dict[int, socket.socket] = {}
_is_initialized = False


def _loses_keywords(function: Callable[..., Any]) -> Callable[..., Any]:
    """Call it without the arguments that were given by keyword, as the real decorator does."""

    @functools.wraps(function)
    def wrapper(*arguments: Any, **lost: Any) -> Any:
        return function(*arguments)

    return wrapper


@_loses_keywords
def dcgmInit() -> int:
    global _is_initialized  # noqa: PLW0603 (the library's own state)
    _require_library()
    _is_initialized = True
    return dcgm_structs.OK


@_loses_keywords
def dcgmShutdown() -> int:
    global _is_initialized  # noqa: PLW0603 (the library's own state)
    _require_library()
    _is_initialized = False
    for connection in _connections.values():
        connection.close()
    _connections.clear()
    return dcgm_structs.OK


@_loses_keywords
def dcgmConnect_v2(address: str, parameters: dcgm_structs.c_dcgmConnectV2Params_v2) -> c_void_p:
    _require_library()
    if not _is_initialized:
        raise DCGMError(dcgm_structs.UNINITIALIZED)
    until = time.monotonic() + (parameters.timeoutMs or 5000) / 1000
    while True:
        try:
            connection = _dial(address, is_unix=bool(parameters.addressIsUnixSocket))
            break
        except OSError as error:
            if time.monotonic() + _RETRY_SECONDS > until:
                raise DCGMError(dcgm_structs.CONNECTION_NOT_VALID) from error
            time.sleep(_RETRY_SECONDS)
    handle = max(_connections, default=0) + 1
    _connections[handle] = connection
    _request(c_void_p(handle), "login")
    return c_void_p(handle)


@_loses_keywords
def dcgmDisconnect(handle: c_void_p) -> int:
    connection = _connections.pop(handle.value or 0, None)
    if connection is None:
        raise DCGMError(dcgm_structs.BADPARAM)
    connection.close()
    return dcgm_structs.OK


@_loses_keywords
def dcgmGetAllSupportedDevices(handle: c_void_p) -> list[int]:
    return list(_request(handle, "devices"))


@_loses_keywords
def dcgmGetGpuInstanceHierarchy(handle: c_void_p) -> dcgm_structs.c_dcgmMigHierarchy_v2:
    hierarchy = dcgm_structs.c_dcgmMigHierarchy_v2()
    listed = _request(handle, "hierarchy")
    hierarchy.count = len(listed)
    for place, (group, number, gpu, uuid, instance) in enumerate(listed):
        row = hierarchy.entityList[place]
        row.entity.entityGroupId, row.entity.entityId = group, number
        row.parent.entityGroupId, row.parent.entityId = 1, gpu
        row.info.gpuUuid = uuid.encode()
        row.info.nvmlInstanceId = instance
    return hierarchy


@_loses_keywords
def dcgmProfGetSupportedMetricGroups(
    handle: c_void_p, gpu: int
) -> dcgm_structs.c_dcgmProfGetMetricGroups_v3:
    told = dcgm_structs.c_dcgmProfGetMetricGroups_v3()
    groups = _request(handle, "metric_groups", gpu)
    told.gpuId, told.numMetricGroups = gpu, len(groups)
    for place, (major, minor, fields) in enumerate(groups):
        row = told.metricGroups[place]
        row.majorId, row.minorId, row.numFieldIds = major, minor, len(fields)
        for index, field in enumerate(fields):
            row.fieldIds[index] = field
    return told


@_loses_keywords
def dcgmGroupCreate(handle: c_void_p, kind: int, name: str) -> c_void_p:
    return c_void_p(_request(handle, "make_group", kind, name))


@_loses_keywords
def dcgmGroupAddEntity(handle: c_void_p, group: c_void_p, entity_group: int, entity: int) -> int:
    _request(handle, "add_entity", group.value, entity_group, entity)
    return dcgm_structs.OK


@_loses_keywords
def dcgmGroupDestroy(handle: c_void_p, group: c_void_p) -> int:
    _request(handle, "drop_group", group.value)
    return dcgm_structs.OK


@_loses_keywords
def dcgmFieldGroupCreate(handle: c_void_p, fields: Sequence[int], name: str) -> c_void_p:
    return c_void_p(_request(handle, "make_field_group", list(fields), name))


@_loses_keywords
def dcgmWatchFields(
    handle: c_void_p,
    group: c_void_p,
    fields: c_void_p,
    microseconds: int,
    keep_seconds: float,
    keep_samples: int,
) -> int:
    _request(handle, "watch", group.value, fields.value, microseconds)
    return dcgm_structs.OK


@_loses_keywords
def dcgmUnwatchFields(handle: c_void_p, group: c_void_p, fields: c_void_p) -> int:
    _request(handle, "unwatch", group.value, fields.value)
    return dcgm_structs.OK


@_loses_keywords
def dcgmEntitiesGetLatestValues(
    handle: c_void_p,
    entities: Sequence[dcgm_structs.c_dcgmGroupEntityPair_t],
    fields: Sequence[int],
    flags: int,
) -> Any:
    pairs = [(entity.entityGroupId, entity.entityId) for entity in entities]
    told = _request(handle, "values", pairs, list(fields), flags)
    values = (dcgm_structs.c_dcgmFieldValue_v2 * len(told))()
    for value, (group, number, field, kind, status, at, content) in zip(values, told, strict=True):
        value.entityGroupId, value.entityId, value.fieldId = group, number, field
        value.fieldType, value.status, value.ts = ord(kind), status, at
        if isinstance(content, str):
            value.value.str = content.encode()[:_TEXT_BYTES_MAX]
        elif kind == "d":
            value.value.dbl = content
        else:
            value.value.i64 = content
    return values


@_loses_keywords
def dcgmProfPause(handle: c_void_p) -> int:
    _request(handle, "pause")
    return dcgm_structs.OK


@_loses_keywords
def dcgmProfResume(handle: c_void_p) -> int:
    _request(handle, "resume")
    return dcgm_structs.OK


def _require_library() -> None:
    if not dcgm_structs.library_is_loaded:
        raise DCGMError(dcgm_structs.UNINITIALIZED)


def _dial(address: str, *, is_unix: bool) -> socket.socket:
    if is_unix:
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.connect(address)
        except OSError:
            connection.close()
            raise
    else:
        host, _, port = address.rpartition(":")
        connection = socket.create_connection((host, int(port)))
    connection.settimeout(REQUEST_SECONDS)
    return connection


def _request(handle: c_void_p, function: str, *arguments: Any) -> Any:
    """Ask the hostengine, and wait for its answer."""
    connection = _connections.get(handle.value or 0)
    if connection is None:
        raise DCGMError(dcgm_structs.BADPARAM)
    body = msgspec.msgpack.encode((function, arguments))
    try:
        connection.sendall(len(body).to_bytes(4, "big") + body)
        length = int.from_bytes(receive(connection, 4), "big")
        status, result = msgspec.msgpack.decode(receive(connection, length))
    except TimeoutError as error:
        raise DCGMError(dcgm_structs.TIMEOUT) from error
    except OSError as error:
        raise DCGMError(dcgm_structs.CONNECTION_NOT_VALID) from error
    if status != dcgm_structs.OK:
        raise DCGMError(status)
    return result


def receive(connection: socket.socket, size: int) -> bytes:
    """Return so many bytes; raises ConnectionError at the end of the stream."""
    parts = bytearray()
    while len(parts) < size:
        part = connection.recv(size - len(parts))
        if not part:
            raise ConnectionError("the other end is gone")
        parts += part
    return bytes(parts)
