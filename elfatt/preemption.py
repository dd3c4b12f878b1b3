"""Stop at the next step when the machine is taken away.

Slurm, Kubernetes and spot machines send SIGTERM some seconds before SIGKILL; torchrun passes it on to its processes.
SIGUSR1 is Slurm's early warning (``--signal=USR1@SECONDS``).
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from types import FrameType

import torch
import torch.distributed as dist

EXIT_CODE = 128 + signal.SIGTERM  # as a shell reports it
SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name)]  # Windows has no SIGUSR1


class Preempted(Exception):
    """The run has saved its state and stops, with ``EXIT_CODE``."""


class Preemption:
    """Context in which SIGTERM and SIGUSR1 are noted instead of ending the process; for the main thread.

    Attributes:
        requested: Whether this process has received one.
    """

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> Preemption:
        self._replaced = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._replaced.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.requested = True

    def agreed(self, device: torch.device) -> bool:
        """Return whether any process has received one; a collective call on ``device``, the same answer for all."""
        return any_process(device, self.requested)[0]


def any_process(device: torch.device, *flags: bool) -> list[bool]:
    """Return for each flag whether any process has set it; a collective call on ``device``."""
    if not (dist.is_available() and dist.is_initialized()):
        return list(flags)
    totals = torch.tensor(flags, dtype=torch.float32).to(device)
    dist.all_reduce(totals, dist.ReduceOp.MAX)
    return [bool(value) for value in totals.tolist()]


def ignore_signals() -> None:
    """Ignore the signals in a DataLoader worker: they often go to the whole process group.

    SIGTERM still ends the worker if its parent sends it; without, the parent would wait for it when it exits.
    """
    for number in SIGNALS:
        if number != signal.SIGTERM:
            signal.signal(number, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent and hasattr(signal, "sigwaitinfo"):  # not on macOS and Windows
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_obey, args=(parent.pid,), daemon=True).start()


def _obey(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
