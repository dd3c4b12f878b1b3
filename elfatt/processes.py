"""Helpers for data loader workers and process groups."""

from __future__ import annotations

import gc
from collections.abc import Callable
from multiprocessing.queues import Queue

import torch.distributed as dist
from torch._utils import ExceptionWrapper


def start_worker(prepare: Callable[[int], None] | None, worker: int) -> None:
    """First call in a worker of a data loader: what it cannot hand over becomes an error of the program.

    Python prints such an error in the worker, and the program waits for the batch for ever.

    Args:
        prepare: The loader's own ``worker_init_fn``.
        worker: Number.
    """
    Queue._on_queue_feeder_error = _hand_over  # type: ignore[attr-defined]  # private
    if prepare:
        prepare(worker)


def _hand_over(queue: Queue, error: Exception, batch: tuple) -> None:
    queue.put((batch[0], ExceptionWrapper((type(error), error, error.__traceback__), "in a worker")))


def leave_process_group() -> None:
    """Destroy the process group, if there is one.

    A thread of gloo that still holds a tensor when the interpreter goes aborts the process. The group joins its threads
    when it is freed, and models wrapped in DDP, which hold it, are in reference cycles.
    """
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
        gc.collect()
