"""Evaluate UperNet on ADE20K: ``python -m segmentation.test CONFIG CHECKPOINT``."""

from __future__ import annotations

from elfatt.integrations import mm_errors, mm_runner


def main(argv: list[str] | None = None):
    """Run the program."""
    return mm_runner.test(mm_runner.parse_test(argv, "segmentation"), "segmentation")


if __name__ == "__main__":
    mm_errors.run(main)
