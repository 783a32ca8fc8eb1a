"""A Fleet service for tests of clients: it can be slow, lose replies, restart and refuse."""

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any

import grpc
from google.rpc import (  # type: ignore[import-untyped]
    error_details_pb2,
    status_pb2,
)

from stoker.v1 import fleet_pb2, fleet_pb2_grpc, mig_pb2, placing_pb2, types_pb2

PATIENCE_SECONDS = 20.0
CUDA = "CUDA_VISIBLE_DEVICES"
GRANTED = types_pb2.ALLOCATION_STATE_GRANTED
WAITING = types_pb2.ALLOCATION_STATE_WAITING
ENDED = types_pb2.ALLOCATION_STATE_ENDED


class Service(fleet_pb2_grpc.FleetServicer):
    """One node with one GPU. What it knows outlives restarts of the server."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.allocations: dict[str, types_pb2.Allocation] = {}
        self.keys: dict[str, str] = {}
        self.calls: list[tuple[str, Any]] = []
        self.lost_replies = 0  # so many answers get lost after their effect
        self.hang = threading.Event()  # while set, nothing is answered
        self.node = fleet_pb2.Node(
            name="n1",
            state=fleet_pb2.NODE_STATE_READY,
            gpus=[fleet_pb2.NodeGpu(uuid="GPU-1", memory_total_bytes=5)],
        )
        self.taken_out: list[fleet_pb2.NodeGpu] = []  # known still, though not on the node
        self.health = fleet_pb2.ListHealthResponse(gpus_total=1, cordoned_by_health_max=1)
        self._numbers = itertools.count(1)

    # --- what tests ask and do

    def called(self, method: str) -> list[Any]:
        return [message for name, message in self.calls if name == method]

    def until(self, what: str, is_so: Callable[[], bool]) -> None:
        with self.changed:
            assert self.changed.wait_for(is_so, PATIENCE_SECONDS), f"waited in vain for {what}"

    def end(self, id_: str, reason: str) -> None:
        with self.changed:
            self.allocations[id_].state = ENDED
            self.allocations[id_].ended_reason = reason
            self.changed.notify_all()

    # --- the service

    def Allocate(  # noqa: N802 (gRPC's names)
        self, request: fleet_pb2.AllocateRequest, context: Any
    ) -> fleet_pb2.AllocateResponse:
        self._note("Allocate", request, context)
        with self.changed:
            found = self._find_or_make(request)
            context.send_initial_metadata((("stoker-allocation-id", found.id),))
            if found.state == WAITING and not request.wait_seconds:
                del self.allocations[found.id]
                self._refuse(context)
            while found.state == WAITING and context.is_active():
                if not self._is_taken():
                    found.state = GRANTED
                    found.devices.add(uuid="GPU-1", model="T4", memory_bytes=5, exclusive=True)
                self.changed.wait(0.05)
            self.changed.notify_all()
            answer = types_pb2.Allocation.FromString(found.SerializeToString())
        self._lose(context)
        return fleet_pb2.AllocateResponse(allocation=answer)

    def KeepAlive(  # noqa: N802
        self, request_iterator: Any, context: Any
    ) -> Iterator[fleet_pb2.KeepAliveResponse]:
        for request in request_iterator:
            self._note("KeepAlive", request, context)
            known = self.allocations[request.allocation_id]
            yield fleet_pb2.KeepAliveResponse(
                allocation_id=known.id, state=known.state, ended_reason=known.ended_reason
            )

    def Release(  # noqa: N802
        self, request: fleet_pb2.ReleaseRequest, context: Any
    ) -> fleet_pb2.ReleaseResponse:
        self._note("Release", request, context)
        known = self.allocations.get(request.allocation_id)
        if known is None:
            _abort(context, grpc.StatusCode.NOT_FOUND, "NOT_FOUND", "it is not known")
            raise AssertionError
        if known.state != ENDED:
            self.end(known.id, request.reason)
        self._lose(context)
        return fleet_pb2.ReleaseResponse(allocation=known)

    def Rebalance(  # noqa: N802
        self, request: placing_pb2.RebalanceRequest, context: Any
    ) -> placing_pb2.RebalanceResponse:
        self._note("Rebalance", request, context)
        return placing_pb2.RebalanceResponse(summary="nothing to move")

    def AnswerMove(  # noqa: N802
        self, request: placing_pb2.AnswerMoveRequest, context: Any
    ) -> placing_pb2.AnswerMoveResponse:
        self._note("AnswerMove", request, context)
        _abort(context, grpc.StatusCode.NOT_FOUND, "NOT_FOUND", "nobody was asked to move")
        raise AssertionError

    def Mig(  # noqa: N802
        self, request: mig_pb2.MigRequest, context: Any
    ) -> mig_pb2.MigResponse:
        self._note("Mig", request, context)
        _abort(context, grpc.StatusCode.UNAVAILABLE, "NOT_CONNECTED", "node n1 is not connected")
        raise AssertionError

    def Explain(  # noqa: N802
        self, request: placing_pb2.ExplainRequest, context: Any
    ) -> placing_pb2.ExplainResponse:
        self._note("Explain", request, context)
        known = self.allocations.get(request.allocation_id)
        return placing_pb2.ExplainResponse(
            placeable=known is None, summary="so it is", allocation=known
        )

    def ListNodes(  # noqa: N802
        self, request: fleet_pb2.ListNodesRequest, context: Any
    ) -> fleet_pb2.ListNodesResponse:
        self._note("ListNodes", request, context)
        return fleet_pb2.ListNodesResponse(nodes=[self.node], resource_version=7)

    def ListAllocations(  # noqa: N802
        self, request: fleet_pb2.ListAllocationsRequest, context: Any
    ) -> fleet_pb2.ListAllocationsResponse:
        self._note("ListAllocations", request, context)
        return fleet_pb2.ListAllocationsResponse(allocations=self.allocations.values())

    def Watch(  # noqa: N802
        self, request: fleet_pb2.WatchRequest, context: Any
    ) -> Iterator[fleet_pb2.WatchResponse]:
        self._note("Watch", request, context)
        # Two changes at a time: then the stream breaks, and it is for the client to come again.
        for version in (request.resource_version + 1, request.resource_version + 2):
            yield fleet_pb2.WatchResponse(resource_version=version, event="NodeCordoned")
        context.abort(grpc.StatusCode.UNAVAILABLE, "cut off")

    def Cordon(  # noqa: N802
        self, request: fleet_pb2.CordonRequest, context: Any
    ) -> fleet_pb2.CordonResponse:
        self._note("Cordon", request, context)
        self._keep_from_use(request, context)
        self._lose(context)
        return fleet_pb2.CordonResponse(node=self.node)

    def Uncordon(  # noqa: N802
        self, request: fleet_pb2.UncordonRequest, context: Any
    ) -> fleet_pb2.UncordonResponse:
        self._note("Uncordon", request, context)
        if request.gpu_uuid:
            self._gpu(request.gpu_uuid, context).ClearField("cordon")
        else:
            self.node.ClearField("cordoned")
            self.node.ClearField("drain_at")
        self._lose(context)
        return fleet_pb2.UncordonResponse(node=self.node)

    def Drain(  # noqa: N802
        self, request: fleet_pb2.DrainRequest, context: Any
    ) -> fleet_pb2.DrainResponse:
        self._note("Drain", request, context)
        self._keep_from_use(request, context)
        if request.HasField("grace_seconds"):
            drain_at = time.time() + request.grace_seconds
            if request.gpu_uuid:
                self._gpu(request.gpu_uuid, context).cordon.drain_at = drain_at
            else:
                self.node.drain_at = drain_at
        self._lose(context)
        return fleet_pb2.DrainResponse(node=self.node)

    def ListHealth(  # noqa: N802
        self, request: fleet_pb2.ListHealthRequest, context: Any
    ) -> fleet_pb2.ListHealthResponse:
        self._note("ListHealth", request, context)
        self._lose(context)
        return self.health

    # --- helpers

    def _note(self, method: str, message: Any, context: Any) -> None:
        while self.hang.is_set() and context.is_active():
            self.hang.wait(0.01)
        with self.changed:
            self.calls.append((method, message))
            self.changed.notify_all()

    def _find_or_make(self, request: fleet_pb2.AllocateRequest) -> types_pb2.Allocation:
        if request.idempotency_key in self.keys:
            return self.allocations[self.keys[request.idempotency_key]]
        found = types_pb2.Allocation(id=f"a{next(self._numbers)}", request=request.request)
        found.state = WAITING if self._is_taken() else GRANTED
        found.env[CUDA] = f"GPU-of-{found.id}"
        self.allocations[found.id] = found
        self.keys[request.idempotency_key] = found.id
        return found

    def _is_taken(self) -> bool:
        return any(each.state == GRANTED for each in self.allocations.values())

    def _refuse(self, context: Any) -> None:
        refusal = types_pb2.Refusal(node="n1", filter="gpus_free", reason="0 of 1 is free")
        refusals = types_pb2.Refusals(summary="no node has it", nodes=[refusal], nodes_total=1)
        code = grpc.StatusCode.RESOURCE_EXHAUSTED
        _abort(context, code, "CANNOT_PLACE", refusals.summary, refusals)

    def _keep_from_use(
        self, request: fleet_pb2.CordonRequest | fleet_pb2.DrainRequest, context: Any
    ) -> None:
        if request.gpu_uuid:
            cordon = fleet_pb2.GpuCordon(reason=request.reason, at=time.time())
            self._gpu(request.gpu_uuid, context).cordon.CopyFrom(cordon)
        else:
            self.node.cordoned = request.reason

    def _gpu(self, uuid: str, context: Any) -> fleet_pb2.NodeGpu:
        for gpu in (*self.node.gpus, *self.taken_out):
            if gpu.uuid == uuid:
                return gpu
        _abort(context, grpc.StatusCode.NOT_FOUND, "NOT_FOUND", f"GPU '{uuid}' is not known")
        raise AssertionError

    def _lose(self, context: Any) -> None:
        if self.lost_replies:
            self.lost_replies -= 1
            context.abort(grpc.StatusCode.UNAVAILABLE, "the reply got lost")


def _abort(context: Any, code: grpc.StatusCode, reason: str, text: str, *details: Any) -> None:
    status = status_pb2.Status(code=code.value[0], message=text)
    for each in (error_details_pb2.ErrorInfo(domain="stoker", reason=reason), *details):
        status.details.add().Pack(each)
    context.set_trailing_metadata((("grpc-status-details-bin", status.SerializeToString()),))
    context.abort(code, text)


class Served:
    """The service behind a port, which can go and come back."""

    def __init__(self) -> None:
        self.service = Service()
        self.port = 0
        self.start()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def start(self) -> None:
        workers = futures.ThreadPoolExecutor(16)
        self._server = grpc.server(workers, options=[("grpc.so_reuseport", 0)])
        fleet_pb2_grpc.add_FleetServicer_to_server(self.service, self._server)
        self.port = self._server.add_insecure_port(f"127.0.0.1:{self.port}")
        self._server.start()

    def stop(self) -> None:
        self._server.stop(0).wait(PATIENCE_SECONDS)
