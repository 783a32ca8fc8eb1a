"""A kubelet as far as its pod-resources API goes: a real gRPC server on a Unix socket."""

import asyncio
import contextlib
import socket
from collections.abc import Iterable
from pathlib import Path
from typing import Self

import grpc
from grpc import aio

from stoker.v1 import pod_resources_pb2 as pb

_SERVICE, _METHOD = "v1.PodResourcesLister", "List"


class Kubelet:
    """Serves while it is entered. What it says can be changed at any time."""

    def __init__(self, socket_path: Path) -> None:
        """Take where to listen; nobody does yet."""
        self.socket_path = socket_path
        self.calls = 0  # how often it was asked
        self._pods: dict[tuple[str, str], pb.PodResources] = {}
        self._failure: tuple[grpc.StatusCode, str] | None = None
        self._raw: bytes | None = None
        self._may_answer = asyncio.Event()
        self._may_answer.set()
        self._server: aio.Server | None = None

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.vanish()

    async def start(self) -> None:
        """Listen, as a kubelet does that was started anew: a socket that lies there is replaced."""
        self.socket_path.unlink(missing_ok=True)
        server = aio.server()
        handler = grpc.unary_unary_rpc_method_handler(
            self._list, pb.ListPodResourcesRequest.FromString, _as_is
        )
        server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(_SERVICE, {_METHOD: handler}),)
        )
        server.add_insecure_port(f"unix:{self.socket_path}")
        await server.start()
        self._server = server

    async def vanish(self, *, leaving_socket: bool = False) -> None:
        """Stop at once; a kubelet that is killed leaves its socket, at which nobody listens."""
        server, self._server = self._server, None
        if server is not None:
            await server.stop(None)
        self.socket_path.unlink(missing_ok=True)
        if leaving_socket:
            with contextlib.closing(socket.socket(socket.AF_UNIX)) as dead:
                dead.bind(str(self.socket_path))

    # --- what it says

    def give(
        self, namespace: str, pod: str, container: str, resource: str, ids: Iterable[str]
    ) -> None:
        """Have a container of a pod have devices of a resource, by a device plugin."""
        self._container(namespace, pod, container).devices.add(
            resource_name=resource, device_ids=list(ids)
        )

    def claim(
        self,
        namespace: str,
        pod: str,
        container: str,
        cdi_names: Iterable[str],
        *,
        driver: str = "",
        device: str = "",
    ) -> None:
        """Have a container of a pod have a device by a resource claim (DRA)."""
        claim = self._container(namespace, pod, container).dynamic_resources.add(
            claim_name=f"{pod}-gpu", claim_namespace=namespace
        )
        names = [pb.CdiDevice(name=name) for name in cdi_names]
        claim.claim_resources.add(cdi_devices=names, driver_name=driver, device_name=device)

    def take_away(self, namespace: str, pod: str) -> None:
        """Have the pod end."""
        del self._pods[namespace, pod]

    def hang(self) -> None:
        """Answer nobody until `go_on`."""
        self._may_answer.clear()

    def go_on(self) -> None:
        """Answer those who wait, and everybody else."""
        self._may_answer.set()

    def fail(self, code: grpc.StatusCode, details: str) -> None:
        """Answer every call with an error."""
        self._failure = (code, details)

    def mend(self) -> None:
        """Answer with what the pods have again."""
        self._failure = None
        self._raw = None

    def say(self, raw: bytes) -> None:
        """Answer every call with these bytes."""
        self._raw = raw

    def _container(self, namespace: str, pod: str, container: str) -> pb.ContainerResources:
        if (namespace, pod) not in self._pods:
            self._pods[namespace, pod] = pb.PodResources(name=pod, namespace=namespace)
        containers = self._pods[namespace, pod].containers
        for each in containers:
            if each.name == container:
                return each
        return containers.add(name=container)

    async def _list(
        self,
        _request: pb.ListPodResourcesRequest,
        context: "aio.ServicerContext[pb.ListPodResourcesRequest, bytes]",
    ) -> bytes:
        self.calls += 1
        await self._may_answer.wait()
        if self._failure is not None:
            await context.abort(*self._failure)
        if self._raw is not None:
            return self._raw
        return pb.ListPodResourcesResponse(
            pod_resources=list(self._pods.values())
        ).SerializeToString()


def _as_is(message: bytes) -> bytes:
    return message
