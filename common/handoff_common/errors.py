"""The few errors of the system; each is one gRPC status.

A message says what happened, to which guest and host, and what to do next. Raise one of these anywhere below an RPC
handler: the server's interceptor answers with the status (see server.py), a client gets it back by `from_rpc_error`.
"""

from typing import ClassVar

import grpc
import grpc.aio


class HandoffError(Exception):
    """Base of all errors that a caller is meant to see."""

    code: ClassVar[grpc.StatusCode] = grpc.StatusCode.INTERNAL

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class InvalidArgumentError(HandoffError):
    """The request is wrong whatever the state of the system (INVALID_ARGUMENT)."""

    code = grpc.StatusCode.INVALID_ARGUMENT


class NotFoundError(HandoffError):
    """The guest, host or migration does not exist (NOT_FOUND)."""

    code = grpc.StatusCode.NOT_FOUND


class PreconditionError(HandoffError):
    """Refused in the present state; the same call may work after something has been changed (FAILED_PRECONDITION)."""

    code = grpc.StatusCode.FAILED_PRECONDITION


class StaleTermError(PreconditionError):
    """The call comes from a leader that has been replaced (FAILED_PRECONDITION)."""


class ConflictError(HandoffError):
    """Another writer was first; read again (ABORTED)."""

    code = grpc.StatusCode.ABORTED


class ExhaustedError(HandoffError):
    """Not enough memory, disk, or ports (RESOURCE_EXHAUSTED)."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED


class UnavailableError(HandoffError):
    """The other side can't be reached now, or has no leader; try again (UNAVAILABLE)."""

    code = grpc.StatusCode.UNAVAILABLE


class HostDownError(UnavailableError):
    """A host's agent can't be reached: asking another controller would not help (UNAVAILABLE)."""


class DeadlineError(HandoffError):
    """No answer in time; whether it took effect is not known (DEADLINE_EXCEEDED)."""

    code = grpc.StatusCode.DEADLINE_EXCEEDED


# Trailing metadata of a failed call: the class of the error, where the status alone is not enough.
KIND_TRAILER = "handoff-error"

_BY_CODE: dict[grpc.StatusCode, type[HandoffError]] = {
    kind.code: kind
    for kind in (
        InvalidArgumentError,
        NotFoundError,
        PreconditionError,
        ConflictError,
        ExhaustedError,
        UnavailableError,
        DeadlineError,
    )
}


def from_rpc_error(error: grpc.aio.AioRpcError, peer: str) -> HandoffError:
    """Turns a client's gRPC error into ours. `peer` names the other side in messages that gRPC itself wrote."""
    kind = _BY_CODE.get(error.code(), HandoffError)
    if dict(error.trailing_metadata() or ()).get(KIND_TRAILER) == HostDownError.__name__:
        kind = HostDownError
    details = error.details() or error.code().name
    if "failed to connect to all addresses" in details:
        details = f"can't be reached ({details.rsplit(': ', 1)[-1]})"
    if kind in (UnavailableError, DeadlineError):
        return kind(f"{peer}: {details}")
    return kind(details)
