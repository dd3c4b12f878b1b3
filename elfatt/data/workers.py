"""Workers of a data loader that report what they cannot hand over; needs PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from multiprocessing.queues import Queue

from torch._utils import ExceptionWrapper


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
