"""Checks of segmentation masks, with one class index per pixel."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np

from elfatt.data.errors import UserError
from elfatt.data.images import opened, orientation_of

IGNORED = 255  # label excluded from training and evaluation


def check_mask(path: str | os.PathLike) -> tuple[int, int]:
    """Check a mask file and return its width and height in pixels.

    Raises:
        UserError: Not an image, several channels, more than 8 bits, lossy compression, or an EXIF orientation.
    """
    try:
        with opened(path) as file:
            mode, kind, orientation, size = file.mode, file.format, orientation_of(file), file.size
    except UserError:
        raise
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(path, f"cannot be read ({error})", "restore the file") from error
    if mode not in ("L", "P", "1"):
        raise UserError(f"mask {path}", f"is a picture of mode {mode}", "save class indices as 8-bit grey (L)")
    if kind == "JPEG":
        raise UserError(f"mask {path}", "is a JPEG, whose compression changes labels", "save the original as PNG")
    if orientation != 1:
        fault = f"has the EXIF orientation {orientation}, but masks are read as stored"
        raise UserError(f"mask {path}", fault, f"remove the tag (exiftool -Orientation= {path}), or save it upright")
    return size


def check_labels(path: str | os.PathLike, labels: np.ndarray, largest: int, remedy: str) -> None:
    """Check that labels are within the classes.

    Args:
        path: Path of the mask.
        labels: Labels ``[H, W]``.
        largest: Largest valid label, besides 255 (ignored).
        remedy: Remedy in the message.

    Raises:
        UserError: Unknown labels.
    """
    unknown = np.unique(labels[(labels > largest) & (labels != IGNORED)])
    if unknown.size:
        found = ", ".join(map(str, unknown[:5]))
        raise UserError(f"mask {path}", f"holds label {found}, but 0 to {largest} and {IGNORED} are known", remedy)


def check_classes(
    where: str | os.PathLike, pixels: Sequence[int] | np.ndarray, names: Sequence[str], masks: int
) -> None:
    """Check that masks distinguish classes; otherwise loss is trivially 0 and mIoU 100.

    Args:
        where: Folder of the masks.
        pixels: Labelled pixels per class.
        names: Class names.
        masks: Number of masks counted.

    Raises:
        UserError: There are no labelled pixels, or all have one of several classes.
    """
    seen = [name for name, count in zip(names, pixels, strict=True) if count]
    if len(seen) < min(2, len(names)):
        found = f"only '{seen[0]}'" if seen else "none"
        raise UserError(
            where,
            f"leaves nothing to learn: of {len(names)} classes, the {masks:,} masks read contain {found}, and ignored "
            "pixels",
            "write each class as its own index, e.g. an object as 1, not 255; if 0 is a class of its own, set "
            "reduce_zero_label=False",
        )
