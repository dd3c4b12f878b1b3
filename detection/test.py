"""Evaluates Mask R-CNN on COCO: ``python -m detection.test CONFIG CHECKPOINT``."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # torchrun runs the file, not the module

from elfatt.integrations import mm_errors, mm_runner  # noqa: E402


def main(argv: list[str] | None = None):
    """Runs the program with these arguments, by default the command line's."""
    return mm_runner.test(mm_runner.parse_test(argv, "detection"), "detection")


if __name__ == "__main__":
    mm_errors.run(main)
