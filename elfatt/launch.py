"""``python -m elfatt.launch``: torchrun that stops its processes at SIGUSR1 too, and then ends with their exit code.

torchrun alone dies of SIGUSR1, and ends with a traceback and exit code 1 after SIGTERM.
"""

from __future__ import annotations

import signal
import sys

from torch.distributed import run
from torch.distributed.elastic.multiprocessing import SignalException

from elfatt.preemption import SIGNALS


def main(argv: list[str] | None = None) -> int:
    """Run torchrun's command line and return the exit code."""
    for number in SIGNALS:
        if number != signal.SIGTERM:
            signal.signal(number, lambda *_: signal.raise_signal(signal.SIGTERM))
    try:
        run.main(argv)
    except SignalException as error:
        return 128 + error.sigval
    return 0


if __name__ == "__main__":
    sys.exit(main())
