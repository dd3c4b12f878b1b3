"""Helpers for DataLoader workers and process groups."""

from __future__ import annotations

import gc
from collections.abc import Callable
from multiprocessing.queues import Queue

import torch.distributed as dist
from torch._utils import ExceptionWrapper

from elfatt.preemption import ignore_signals


def start_worker(prepare: Callable[[int], None] | None, worker: int) -> None:
    """Initialise a DataLoader worker so that batches it cannot send raise in the main process.

    By default, Python prints the error in the worker, and the main process waits for the batch forever. The worker
    also outlives the signals of ``elfatt.preemption``, which often go to the whole process group.

    Args:
        prepare: The DataLoader's own ``worker_init_fn``.
        worker: Worker id.
    """
    ignore_signals()
    Queue._on_queue_feeder_error = _hand_over  # type: ignore[attr-defined]  # private
    if prepare:
        prepare(worker)


def _hand_over(queue: Queue, error: Exception, batch: tuple) -> None:
    queue.put((batch[0], ExceptionWrapper((type(error), error, error.__traceback__), "in a worker")))


def leave_process_group() -> None:
    """Destroy the process group, if any.

    A gloo thread that still holds a tensor at interpreter shutdown aborts the process. The group joins its threads when
    freed, but DDP models keep it alive in reference cycles, hence the garbage collection.
    """
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
        gc.collect()
