"""Lets gRPC talk over a connection that somebody else has made.

gRPC for Python dials addresses, and takes no descriptor. So it is given the address of a socket of
our own, and what it says there is passed on.

That address is a name in the abstract namespace, because a name there ends with its socket: nothing
is left behind however this process ends. Everybody on this machine may dial such a name, and take
one that is free. So only this very process is let in, only once, and the name is kept for as long
as gRPC may dial it again: nobody can answer there in place of the kubelet.
"""

import asyncio
import contextlib
import os
import secrets
import socket
import struct

# Held back in each direction while the other side does not take it.
_PART_BYTES = 1 << 16
_CREDENTIALS = struct.Struct("3i")
_WAITING_MAX = 8


class Bridge:
    """Passes on what one gRPC channel and the far end say to each other, until either hangs up."""

    def __init__(self, far: socket.socket) -> None:
        """Take a connected socket that does not block; it is closed with the bridge.

        Raises OSError.
        """
        name = f"stoker-{secrets.token_hex(16)}"
        self.address = f"unix-abstract:{name}"
        self._far = far
        self._door = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._door.setblocking(False)
            self._door.bind(f"\0{name}")
            self._door.listen(_WAITING_MAX)
        except OSError:
            self._door.close()
            raise
        self._carrying = asyncio.create_task(self._run(), name="bridge to the kubelet")

    @property
    def is_over(self) -> bool:
        """Whether either side has hung up; then nothing is carried any more."""
        return self._carrying.done()

    async def close(self) -> None:
        """Hang up on both sides, and let go of the name; the channel must be closed before."""
        self._carrying.cancel()
        try:
            await asyncio.gather(self._carrying, return_exceptions=True)
        finally:
            self._far.close()
            self._door.close()

    async def _run(self) -> None:
        with self._far, await self._accept() as near:
            # From now on who dials the name is refused.
            self._door.shutdown(socket.SHUT_RDWR)
            await _carry_both(near, self._far)

    async def _accept(self) -> socket.socket:
        """Return the first connection that this process makes; all others are hung up on."""
        while True:
            caller, _ = await asyncio.get_running_loop().sock_accept(self._door)
            said = caller.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
            if _CREDENTIALS.unpack(said)[0] == os.getpid():
                return caller
            caller.close()


async def _carry_both(near: socket.socket, far: socket.socket) -> None:
    ways = [asyncio.create_task(_carry(near, far)), asyncio.create_task(_carry(far, near))]
    try:
        await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for each in ways:
            each.cancel()
        await asyncio.gather(*ways, return_exceptions=True)


async def _carry(source: socket.socket, sink: socket.socket) -> None:
    """Pass on until one side has hung up."""
    loop = asyncio.get_running_loop()
    with contextlib.suppress(ConnectionError):
        while part := await loop.sock_recv(source, _PART_BYTES):
            await loop.sock_sendall(sink, part)
