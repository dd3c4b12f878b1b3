"""Entry point of the segmentation and detection programs, and their error handling."""

from __future__ import annotations

import re
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import elfatt
from elfatt.console import replace_unprintable
from elfatt.data import UserError
from elfatt.data.resources import exhausted
from elfatt.preemption import EXIT_CODE, Preempted
from elfatt.processes import leave_process_group

NO_WORKERS = "--cfg-options " + " ".join(f"{split}_dataloader.num_workers=0" for split in ("train", "val", "test"))


def run(main: Callable[[], object]) -> None:
    """Run a program; user errors are reported in one line, other errors keep their traceback."""
    replace_unprintable()
    try:
        main()
    except Preempted:
        leave_process_group()
        raise SystemExit(EXIT_CODE) from None
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        ours = isinstance(error, UserError) or _is_ours(error)
        message = _line(error) if ours else exhausted(error, workers=NO_WORKERS)
        if message is None:
            raise
        path = Path(sys.argv[0])
        raise SystemExit(f"{path.parent.name}/{path.name}: error: {message}") from None
    leave_process_group()


def _is_ours(error: Exception) -> bool:
    """Whether the package itself raised it: its ``ValueError`` and ``TypeError`` messages are for the user."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    ours = Path(last.filename).is_relative_to(Path(elfatt.__file__).parent)
    return not isinstance(error, RuntimeError) and ours and (last.line or "").startswith("raise ")


def _line(error: Exception) -> str:
    """Return the bare message of an error wrapped by mmengine's registry or a data loader worker."""
    text = str(error)
    if "\nOriginal Traceback" in text:
        text = text.strip().splitlines()[-1].partition(": ")[2]
    return " ".join(re.sub(r"class `\w+` in \S+: ", "", text).split())


@contextmanager
def as_user_error(where: str, *kinds: type[Exception]) -> Iterator[None]:
    """Convert errors of these kinds into a one-line ``UserError`` that starts with ``where``."""
    try:
        yield
    except kinds as error:
        text = _line(error) or f"it is damaged ({type(error).__name__}), copy it again"
        raise UserError(f"{where}: {text[:600]}{'…' if len(text) > 600 else ''}") from error


@contextmanager
def enough_space(folder: str) -> Iterator[None]:
    """Convert a full-disk error into a ``UserError`` that names the folder and its free space."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        if full := exhausted(error, folder, NO_WORKERS):
            raise UserError(full) from error
        raise
