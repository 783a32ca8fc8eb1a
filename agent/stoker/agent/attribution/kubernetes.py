"""Asks the kubelet which devices its pods have, over the socket of its pod-resources API.

A machine without that socket is no Kubernetes node. Once there was one, or where somebody said that
there is one, a kubelet that does not answer leaves it unknown what it has handed out.

On most nodes only root may connect to it; then the root helper does, and hands the connection over.
"""

import asyncio
import os
import socket
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
from google.protobuf.message import DecodeError
from grpc import aio

from stoker.agent.attribution.assignments import PodClaim, PodDevices, PodHolding
from stoker.agent.attribution.bridge import Bridge
from stoker.agent.privileged import Helper, HelperUnavailable
from stoker.v1 import pod_resources_pb2 as pb

SOCKET = Path("/var/lib/kubelet/pod-resources/kubelet.sock")
ANSWER_SECONDS_MAX = 2.0
# A pod with a device is told in some 200 bytes; a node has hundreds of pods.
ANSWER_BYTES_MAX = 16 << 20

_METHOD = "/v1.PodResourcesLister/List"
_REQUEST = pb.ListPodResourcesRequest().SerializeToString()
_OPTIONS: list[tuple[str, int | str]] = [
    ("grpc.max_receive_message_length", ANSWER_BYTES_MAX),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_retries", 0),
    ("grpc.enable_http_proxy", 0),
    # Servers written in Go refuse what gRPC would make of some addresses.
    ("grpc.default_authority", "localhost"),
    # A kubelet that is restarted is asked again at the next reading, not minutes later.
    ("grpc.initial_reconnect_backoff_ms", 500),
    ("grpc.max_reconnect_backoff_ms", 1000),
]


@dataclass(frozen=True, slots=True)
class Listing:
    """What the kubelet told."""

    holdings: tuple[PodHolding, ...] = ()
    unknown: str = ""  # why it is not known; empty: it is


class PodResources:
    """The kubelet of this machine, if there is one."""

    def __init__(
        self,
        path: Path | None = SOCKET,
        *,
        is_required: bool = False,
        helper: Helper | None = None,
    ) -> None:
        """Take where the kubelet listens; None: there is none.

        `is_required` says that this machine is a Kubernetes node, also while there is no socket.
        `helper`: who connects to the kubelet where this user may not; None: nobody does.
        """
        self._path = None if path is None else path.absolute()
        self._is_expected = is_required
        self._helper = helper
        self._channel: aio.Channel | None = None
        self._bridge: Bridge | None = None  # over which the channel goes, if over one
        self._answer: tuple[bytes, Listing] | None = None  # the last one, and what it says

    async def list(self) -> Listing:
        """Return what the pods of this node have; takes ANSWER_SECONDS_MAX at most."""
        if self._path is None:
            return Listing()
        try:
            is_socket = stat.S_ISSOCK(os.stat(self._path).st_mode)
        except (FileNotFoundError, NotADirectoryError):
            return self._missing()
        except PermissionError:
            pass  # the helper may see it
        except OSError as error:
            return self._unknown(error.strerror or str(error))
        else:
            if not is_socket:
                return self._unknown("it is no socket")
            self._is_expected = True
        return await self._ask(self._path)

    async def close(self) -> None:
        """Hang up; it is dialled anew when asked again."""
        channel, self._channel = self._channel, None
        bridge, self._bridge = self._bridge, None
        try:
            if channel is not None:
                await channel.close()
        finally:
            if bridge is not None:
                await bridge.close()

    async def _ask(self, path: Path) -> Listing:
        deadline = asyncio.get_running_loop().time() + ANSWER_SECONDS_MAX
        if self._bridge is not None and self._bridge.is_over:  # gRPC cannot dial it again
            await self.close()
        if self._channel is None:
            instead = await self._dial(path, deadline)
            if instead is not None:
                return instead
        assert self._channel is not None
        # The answer stays bytes: an equal one need not be read again.
        call: aio.UnaryUnaryMultiCallable[bytes, bytes] = self._channel.unary_unary(
            _METHOD, request_serializer=_as_is, response_deserializer=_as_is
        )
        seconds = max(0.0, deadline - asyncio.get_running_loop().time())
        try:
            answer = await call(_REQUEST, timeout=seconds)
        except aio.AioRpcError as error:
            through = " (through the helper)" * (self._bridge is not None)
            await self.close()  # a new line does not wait for the back-off of this one
            return self._unknown(_reason(error) + through)
        if self._answer is None or self._answer[0] != answer:
            try:
                holdings = await asyncio.to_thread(parse_answer, answer)  # it may be long
            except DecodeError as error:
                return self._unknown(f"its answer cannot be read: {error}")
            self._answer = (answer, Listing(holdings))
        return self._answer[1]

    async def _dial(self, path: Path, deadline: float) -> Listing | None:
        """Have a channel to the kubelet, or return what is to be said without one."""
        refusal = _refusal(path)
        if not refusal:
            self._channel = aio.insecure_channel(f"unix:{path}", options=_OPTIONS)
            return None
        if self._helper is None:
            return self._unknown(f"{refusal}, and there is no root helper to ask")
        try:
            async with asyncio.timeout_at(deadline):
                told = await self._helper.connect_pod_resources()
        except TimeoutError:
            return self._unknown(f"{refusal}; the helper at {self._helper.path} takes too long")
        except HelperUnavailable as error:
            return self._unknown(f"{refusal}; {error}")
        if not told.is_there:
            return self._missing()
        self._is_expected = True
        if told.line is None:
            return self._unknown(f"{refusal}; the helper at {self._helper.path}: {told.why}")
        try:
            self._bridge = Bridge(told.line)
        except OSError as error:
            told.line.close()
            why = error.strerror or str(error)
            return self._unknown(f"{refusal}; no line to the helper's connection: {why}")
        self._channel = aio.insecure_channel(self._bridge.address, options=_OPTIONS)
        return None

    def _missing(self) -> Listing:
        """Return what follows from there being no socket."""
        return self._unknown("there is no such socket") if self._is_expected else Listing()

    def _unknown(self, why: str) -> Listing:
        return Listing(unknown=f"what the kubelet has handed out is not known: {self._path}: {why}")


def parse_answer(answer: bytes) -> tuple[PodHolding, ...]:
    """Return what the pods have; raises DecodeError."""
    return tuple(_holdings(pb.ListPodResourcesResponse.FromString(answer)))


def _holdings(answer: pb.ListPodResourcesResponse) -> Iterator[PodHolding]:
    for pod in answer.pod_resources:
        for container in pod.containers:
            where = (pod.namespace, pod.name, container.name)
            for devices in container.devices:
                yield PodDevices(*where, devices.resource_name, tuple(devices.device_ids))
            for resource in container.dynamic_resources:
                for claim in resource.claim_resources:
                    names = tuple(each.name for each in claim.cdi_devices)
                    yield PodClaim(*where, claim.driver_name, claim.device_name, names)


def _reason(error: aio.AioRpcError) -> str:
    code, details = error.code(), error.details() or ""
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return f"it has not answered within {ANSWER_SECONDS_MAX:g} s"
    if code is grpc.StatusCode.UNAVAILABLE:  # what gRPC says of it at length
        return "nobody answers there"
    return f"it answered {code.name}{f' ({details})' if details else ''}"


def _refusal(path: Path) -> str:
    """Return why this user may not connect; empty: nothing of that kind is in the way."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(os.fsencode(path))
        except PermissionError as error:
            return error.strerror or str(error)
        except OSError:  # gRPC meets it too, unless it is over by then
            return ""
    return ""


def _as_is(message: bytes) -> bytes:
    return message
