"""One-line messages for exhausted disk space and shared memory."""

from __future__ import annotations

import errno
import os
import shutil

_SHARED_MEMORY = ("bus error", "shared memory", "</torch_")
_FULL = (errno.ENOSPC, errno.EDQUOT)


def exhausted(
    error: BaseException, folder: str | os.PathLike | None = None, workers: str = "--workers 0"
) -> str | None:
    """Return a message if an error means that disk or shared memory is full, else None.

    Args:
        error: Error of the operating system, PyTorch or a data loader; its causes are checked too.
        folder: Folder being written to, if known.
        workers: Option that disables workers.
    """
    cause: BaseException | None = error
    while cause is not None:
        if any(sign in str(cause).lower() for sign in _SHARED_MEMORY):
            remedy = f"enlarge the mount (docker run --shm-size), use fewer workers, or {workers}"
            return f"the data loader's workers ran out of shared memory{_free('/dev/shm')}: {remedy}"
        if isinstance(cause, OSError) and cause.errno in _FULL:
            folder = folder or os.path.dirname(os.path.abspath(cause.filename or "."))
            return f"the disk is full{_free(folder)}: make room, then continue with --resume auto"
        cause = cause.__cause__ or cause.__context__
    return None


def _free(folder: str | os.PathLike) -> str:
    return f" ({folder} has {shutil.disk_usage(folder).free / 2**20:.1f} MiB left)" if os.path.isdir(folder) else ""
