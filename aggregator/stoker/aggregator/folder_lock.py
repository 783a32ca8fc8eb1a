"""Keeps a data folder for one process, by a lock that the kernel takes back however that ends."""

import errno
import fcntl
import os
from pathlib import Path
from typing import IO

from stoker.core.errors import InUse, StoreError

LOCK_NAME = "lock"


def lock_folder(folder: Path) -> IO[str]:
    """Return the locked file of `folder`, made when it is not there; closing it unlocks.

    Raises InUse with the other process, StoreError when the folder cannot be used.
    """
    try:
        folder.mkdir(mode=0o750, parents=True, exist_ok=True)
        lock = (folder / LOCK_NAME).open("a+", encoding="utf-8")
    except OSError as error:
        raise StoreError(f"data folder {folder}: cannot be used: {error.strerror}") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.seek(0)
        holder = lock.read(32).strip() or "unknown"
        lock.close()
        raise InUse(
            f"data folder {folder}: another aggregator (PID {holder}) uses it; "
            "stop that one, or give this one another --data-dir"
        ) from None
    try:
        os.ftruncate(lock.fileno(), 0)
        # Past the buffer: what a full disk refuses would stay in there and fail again at the close.
        os.write(lock.fileno(), f"{os.getpid()}\n".encode())
    except OSError as error:
        if error.errno != errno.ENOSPC:  # that keeps the PID out, and the lock holds all the same
            raise StoreError(f"data folder {folder}: {error.strerror}") from error
    return lock
