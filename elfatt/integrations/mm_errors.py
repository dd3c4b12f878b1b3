"""How the dense programs end: what their user has to put right takes one line, anything else keeps its traceback."""

from __future__ import annotations

import errno
import re
import shutil
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.queues import Queue
from pathlib import Path

import torch
from torch._utils import ExceptionWrapper

import elfatt
from elfatt.data import UserError


def run(main: Callable[[], object]) -> None:
    """Runs a program; what its user has to put right takes one line, anything else keeps its traceback."""
    try:
        main()
    except (ValueError, TypeError, RuntimeError) as error:
        message = _line(error) if isinstance(error, UserError) or _is_ours(error) else _shared_memory(error)
        if message is None:
            raise
        path = Path(sys.argv[0])
        raise SystemExit(f"{path.parent.name}/{path.name}: error: {message}") from None
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()  # its threads would outlive the interpreter, which then aborts


def _is_ours(error: Exception) -> bool:
    """Whether the package raised it itself: its ValueErrors and TypeErrors are for the user."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    ours = Path(last.filename).is_relative_to(Path(elfatt.__file__).parent)
    return not isinstance(error, RuntimeError) and ours and last.line.startswith("raise ")


def start_worker(prepare: Callable[[int], None] | None, worker: int) -> None:
    """First call in a worker of a data loader: what it cannot hand over becomes an error of the program.

    Python prints such an error in the worker, and the program waits for the batch for ever.

    Args:
        prepare: The loader's own ``worker_init_fn``.
        worker: Number.
    """
    Queue._on_queue_feeder_error = _hand_over
    if prepare:
        prepare(worker)


def _hand_over(queue: Queue, error: Exception, batch: tuple) -> None:
    queue.put((batch[0], ExceptionWrapper((type(error), error, error.__traceback__), "in a worker")))


def _line(error: Exception) -> str:
    """The message alone, of what mmengine's registry or a worker of the data loader has wrapped."""
    text = str(error)
    if "\nOriginal Traceback" in text:
        text = text.strip().splitlines()[-1].partition(": ")[2]
    return " ".join(re.sub(r"class `\w+` in \S+: ", "", text).split())


def _shared_memory(error: Exception | None) -> str | None:
    """What to do where workers have no room to hand over their batches, or None for another error."""
    while error and not re.search("shared memory|</torch_", str(error)):
        error = error.__cause__ or error.__context__
    if not error:
        return None
    free = shutil.disk_usage("/dev/shm").free / 2**20
    return (
        f"the data loader's workers need more shared memory than the {free:,.0f} MiB free in /dev/shm: enlarge that "
        "mount (docker run --shm-size), or --cfg-options train_dataloader.num_workers=0 val_dataloader.num_workers=0 "
        "test_dataloader.num_workers=0"
    )


@contextmanager
def as_user_error(where: str, *kinds: type[Exception]) -> Iterator[None]:
    """Makes errors of these kinds, raised within, a ``UserError`` of one line that begins with ``where``."""
    try:
        yield
    except kinds as error:
        text = _line(error)
        raise UserError(f"{where}: {text[:600]}{'…' if len(text) > 600 else ''}") from error


@contextmanager
def enough_space(folder: str) -> Iterator[None]:
    """Makes the error of a full disk, raised within, a ``UserError`` that names the folder and what is free."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        free = shutil.disk_usage(folder).free / 2**20
        remedy = "free some, or give another --work-dir; --resume auto then continues"
        raise UserError(folder, f"has no room left ({free:,.1f} MiB free)", remedy) from error
