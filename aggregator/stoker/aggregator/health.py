"""The service `grpc.health.v1.Health`, for the aggregator as a whole and for each service."""

import asyncio
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import grpc
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2  # type: ignore[import-untyped]

from stoker.aggregator.failures import CallFailure, Context

SERVICE: Any = health_pb2.DESCRIPTOR.services_by_name["Health"]
# The types of the package do not know it yet.
_HealthListResponse: Any = GetMessageClass(SERVICE.methods_by_name["List"].output_type)


class Health:
    """Says what it was told last; at first, that nothing is serving."""

    def __init__(self, services: Iterable[str]) -> None:
        self._services = frozenset(("", *services))
        self._is_serving = False
        self._news = asyncio.Event()

    def methods(self) -> Mapping[str, Callable[..., Any]]:
        """Return the methods by their names on the wire."""
        return {"Check": self.check, "List": self.list, "Watch": self.watch}

    def set(self, *, is_serving: bool) -> None:
        """Say from now on whether the aggregator does its work."""
        self._is_serving = is_serving
        self._news.set()
        self._news.clear()

    async def check(
        self, message: health_pb2.HealthCheckRequest, context: Context
    ) -> health_pb2.HealthCheckResponse:
        """Return the state of one service."""
        if message.service not in self._services:
            sentence = f"service {message.service!r} is not known"
            raise CallFailure(grpc.StatusCode.NOT_FOUND, "NOT_FOUND", sentence)
        return self._state()

    async def list(self, message: Message, context: Context) -> Message:
        """Return the state of every service."""
        answer: Message = _HealthListResponse(
            statuses={name: self._state() for name in self._services}
        )
        return answer

    async def watch(self, message: health_pb2.HealthCheckRequest, context: Context) -> None:
        """Stream the state of one service, now and whenever it changes."""
        told: int | None = None
        while True:
            state = self._state(is_known=message.service in self._services)
            if state.status != told:
                told = state.status
                await context.write(state)
            else:
                await self._news.wait()

    def _state(self, *, is_known: bool = True) -> health_pb2.HealthCheckResponse:
        answer = health_pb2.HealthCheckResponse
        if not is_known:
            return answer(status=answer.SERVICE_UNKNOWN)
        return answer(status=answer.SERVING if self._is_serving else answer.NOT_SERVING)
