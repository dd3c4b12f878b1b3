"""Consoles that cannot print every character."""

from __future__ import annotations

import sys


def replace_unprintable() -> None:
    """Print ``?`` for characters that the console's encoding lacks, such as × in ASCII, instead of raising."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # not in notebooks
            stream.reconfigure(errors="replace")
