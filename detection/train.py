"""Train Mask R-CNN on COCO: ``python -m detection.train CONFIG``."""

from __future__ import annotations

from elfatt.integrations import mm_errors, mm_runner


def main(argv: list[str] | None = None):
    """Run the program."""
    return mm_runner.train(mm_runner.parse_train(argv, "detection"), "detection")


if __name__ == "__main__":
    mm_errors.run(main)
