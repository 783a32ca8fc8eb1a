"""Puts the methods of a service on a gRPC server, with one way to parse and one way to fail.

The generated registration lets a message that cannot be parsed end in an unnamed error and a
traceback in the log; here it becomes INVALID_ARGUMENT that names the field, and what a method
raises as CallFailure becomes the status of the call.
"""

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import grpc
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass
from grpc import aio

from stoker.aggregator.failures import CallFailure, Context, invalid
from stoker.aggregator.limits import Malformed
from stoker.aggregator.malformed import find_fault

Method = Callable[..., Awaitable[Any]]


def add_service(
    server: aio.Server, service: ServiceDescriptor, methods: Mapping[str, Method]
) -> None:
    """Serve `service` with `methods`, by name; every method of the service must be there.

    A method takes the request and the context; one that a client streams to takes only the context,
    from which it reads with `received`. What it streams it writes to the context.
    """
    handlers = {method.name: _handler(method, methods[method.name]) for method in service.methods}
    assert handlers.keys() == methods.keys(), f"{service.full_name} has no {methods.keys()}"
    generic = grpc.method_handlers_generic_handler(service.full_name, handlers)
    server.add_generic_rpc_handlers((generic,))


async def received(context: Context) -> Message | None:
    """Return the next message of the client's stream, None at its end; raises Malformed."""
    message: object = await context.read()
    if isinstance(message, Malformed):
        raise message
    return message if isinstance(message, Message) else None


def _handler(method: MethodDescriptor, behaviour: Method) -> "grpc.RpcMethodHandler[Any, Any]":
    parse = _parser(GetMessageClass(method.input_type))
    serialize = GetMessageClass(method.output_type).SerializeToString
    if method.client_streaming and method.server_streaming:
        return grpc.stream_stream_rpc_method_handler(_streaming(behaviour), parse, serialize)
    if method.server_streaming:
        return grpc.unary_stream_rpc_method_handler(_unary(behaviour), parse, serialize)
    assert not method.client_streaming, f"{method.full_name}: no method streams only up"
    return grpc.unary_unary_rpc_method_handler(_unary(behaviour), parse, serialize)


def _parser(kind: type[Message]) -> Callable[[bytes], Message | Malformed]:
    def parse(data: bytes) -> Message | Malformed:
        try:
            return kind.FromString(data)
        except DecodeError:
            return find_fault(kind.DESCRIPTOR, data)

    return parse


def _unary(behaviour: Method) -> Any:
    async def answer(request: Message | Malformed, context: Context) -> Any:
        try:
            if isinstance(request, Malformed):
                raise request
            return await behaviour(request, context)
        except Malformed as error:
            await invalid(error).abort(context)
        except CallFailure as failure:
            await failure.abort(context)

    return answer


def _streaming(behaviour: Method) -> Any:
    async def answer(_: object, context: Context) -> None:
        try:
            await behaviour(context)
        except Malformed as error:
            await invalid(error).abort(context)
        except CallFailure as failure:
            await failure.abort(context)

    return answer
