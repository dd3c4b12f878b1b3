"""Segmentation masks: one class index a pixel."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
from PIL import Image

from elfatt.data.errors import UserError
from elfatt.data.images import orientation_of

IGNORED = 255  # the label of pixels that neither train nor count


def check_mask(path: str | os.PathLike) -> tuple[int, int]:
    """Width and height of a mask, in pixels.

    Raises:
        UserError: No image, channels, more than 8 bits, a lossy format, or an EXIF orientation.
    """
    try:
        with Image.open(path) as file:
            mode, kind, orientation, size = file.mode, file.format, orientation_of(file), file.size
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(path, f"cannot be read ({error})", "restore the file") from error
    if mode not in ("L", "P", "1"):
        raise UserError(f"mask {path}", f"is a picture of mode {mode}", "save class indices as 8-bit grey (L)")
    if kind == "JPEG":
        raise UserError(f"mask {path}", "is a JPEG, whose compression changes labels", "write it anew, as PNG")
    if orientation != 1:
        fault = f"has the EXIF orientation {orientation}, and masks are read as they are stored"
        raise UserError(f"mask {path}", fault, f"remove the tag (exiftool -Orientation= {path}), or save it upright")
    return size


def check_labels(path: str | os.PathLike, labels: np.ndarray, largest: int, remedy: str) -> None:
    """Stops at a label beyond the classes.

    Args:
        path: The mask.
        labels: ``[H, W]``.
        largest: Of the labels allowed; 255, ignored, is another.
        remedy: For the message.

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
    """Stops at masks that tell no two classes apart: a loss of 0 and a mIoU of 100 are all they can give.

    Args:
        where: The folder.
        pixels: Labelled pixels of each class.
        names: Of the classes.
        masks: How many masks were counted.

    Raises:
        UserError: Pixels of no class, or of one where there are several.
    """
    seen = [name for name, count in zip(names, pixels, strict=True) if count]
    if len(seen) < min(2, len(names)):
        found = f"'{seen[0]}' alone" if seen else "none"
        raise UserError(
            where,
            f"leaves nothing to learn: of {len(names)} classes the {masks:,} masks read hold {found}, and pixels "
            "to ignore",
            "write each class as its own index, an object as 1 and not as 255; where 0 is a class of its own, set "
            "reduce_zero_label=False",
        )
