"""How a connection to the aggregator behaves: pings, sizes, time limits."""

from collections.abc import Sequence

# For each call, beyond what it waits on purpose.
TIMEOUT_SECONDS = 10.0
# A stream that watches begins anew after this, from where it was.
WATCH_SECONDS_MAX = 3600.0
# Of giving back what was asked for and is not wanted any more.
LEAVE_SECONDS_MAX = 2.0
# For the node to let go, so that whoever asks next finds the devices free.
RELEASE_WAIT_SECONDS = 10.0

# A list of 10,000 nodes with 8 GPUs and their processes has some tens of MB.
_MESSAGE_BYTES_MAX = 256 * 2**20
# A peer that vanished without a word is noticed so soon, while a call is under way.
_PING_MILLISECONDS = 30_000
_PING_ANSWER_MILLISECONDS = 10_000
_RECONNECT_MILLISECONDS_MAX = 2_000


def channel_options() -> Sequence[tuple[str, int]]:
    """Return the gRPC channel arguments of a client."""
    return (
        ("grpc.keepalive_time_ms", _PING_MILLISECONDS),
        ("grpc.keepalive_timeout_ms", _PING_ANSWER_MILLISECONDS),
        ("grpc.max_receive_message_length", _MESSAGE_BYTES_MAX),
        ("grpc.initial_reconnect_backoff_ms", 50),
        ("grpc.max_reconnect_backoff_ms", _RECONNECT_MILLISECONDS_MAX),
        # Which calls are sent again is decided by `retrying`, not below it.
        ("grpc.enable_retries", 0),
        # A proxy for the web is in no way to an aggregator of one's own.
        ("grpc.enable_http_proxy", 0),
    )
