"""What a call to the aggregator can fail with.

ClientError             every error of this package; carries the exit code that a command ends with
├── InvalidRequest      what was asked cannot be understood or is out of range
│   └── KeyReused       the idempotency key stands for another request
├── Refused             understood, and cannot be placed now; `refusals` says why, per node
├── MigRefused          the node's agent does not do it, or not now; the text says why
├── NoEndpoint          the service has no endpoint that can be called now
├── NotFound            there is no such allocation or node
├── AllocationEnded     the allocation is no longer granted; `reason` says why
├── VersionTooOld       the changes after that resource version are no longer kept: list anew
├── StoreUnavailable    the aggregator cannot write down what was asked, so nothing was done
├── Unreachable         no answer: nobody there, or not in time; or the node meant is away
└── AggregatorFailed    any other answer; a bug or a broken machine
"""

from stoker.client.model import AllocationState, Refusals
from stoker.core.errors import BadInput, ExitCode, StokerError


class ClientError(StokerError):
    """An error of a call to the aggregator."""


class InvalidRequest(ClientError, BadInput):
    """What was asked cannot be understood; the text names the field, the wanted and the found."""

    exit_code = ExitCode.USAGE


class KeyReused(InvalidRequest):
    """The idempotency key was used before, for another request."""


class Refused(ClientError):
    """The request cannot be placed now."""

    exit_code = ExitCode.REFUSED

    def __init__(self, refusals: Refusals) -> None:
        self.refusals = refusals
        super().__init__(refusals.summary)


class MigRefused(ClientError):
    """The agent of the node does not change its partitions so, or not now."""

    exit_code = ExitCode.REFUSED


class NoEndpoint(ClientError):
    """No endpoint of a service can be called now; the text says why, for the first of them."""

    exit_code = ExitCode.REFUSED


class NotFound(ClientError):
    """The named allocation or node does not exist."""

    exit_code = ExitCode.NOT_FOUND


class AllocationEnded(ClientError):
    """An allocation is no longer granted."""

    exit_code = ExitCode.REFUSED

    def __init__(self, allocation_id: str, state: AllocationState, reason: str) -> None:
        self.allocation_id = allocation_id  # empty where the reason names it
        self.state = state
        self.reason = reason
        named = f"allocation {allocation_id} is {state}: " if allocation_id else ""
        super().__init__(f"{named}{reason or 'no reason given'}")


class VersionTooOld(ClientError):
    """The changes that were asked for are no longer kept."""


class StoreUnavailable(ClientError):
    """The aggregator cannot write to its store."""

    exit_code = ExitCode.STORE


class Unreachable(ClientError):
    """The aggregator did not answer, or the node that was meant is not connected to it."""

    exit_code = ExitCode.UNREACHABLE


class AggregatorFailed(ClientError):
    """The aggregator answered with an error that no request should give."""
