"""Image files as every program reads them: one list of extensions, 8 bits per channel, upright."""

from __future__ import annotations

import os
from typing import IO

import numpy as np
from PIL import ExifTags, Image, ImageOps

_NOT_PIXELS = {"BUFR", "EPS", "FITS", "GRIB", "HDF5", "MPEG", "WMF"}  # Pillow knows them, but most need a plugin
_16_BITS = {"JPEG2000", "PNG", "PPM"}  # their mode "I" holds 16 bits in 32

Image.init()
EXTENSIONS = frozenset(
    extension
    for extension, kind in Image.registered_extensions().items()
    if kind in Image.OPEN and kind not in _NOT_PIXELS
)


def is_image(path: str | os.PathLike) -> bool:
    """Whether a path is a visible file name with the extension, in any case, of an image that Pillow reads."""
    name = os.path.basename(path)
    return os.path.splitext(name)[1].lower() in EXTENSIONS and not name.startswith(".")


def orientation_of(image: Image.Image) -> int:
    """The EXIF orientation: 1 stored upright, 2 to 4 flipped or turned by 180°, 5 to 8 with sides exchanged."""
    try:
        found = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged EXIF data raises almost anything, and the pixels may be fine
        return 1
    return found if found in range(1, 9) else 1


def read_image(file: str | os.PathLike | IO[bytes], mode: str = "RGB") -> Image.Image:
    """Decodes an image file to its end and gives it as ``standard_image`` does.

    Args:
        file: Path, or file opened for reading.
        mode: ``RGB``, or ``L`` for grey.

    Raises:
        OSError, SyntaxError, ValueError: The file is missing, damaged or no image; Pillow raises all three.
        ValueError: Its 32-bit pixels have no known range.
    """
    with Image.open(file) as image:
        image.load()
        return standard_image(image, mode)


def standard_image(image: Image.Image, mode: str = "RGB") -> Image.Image:
    """An open image with 8 bits per channel, turned upright as its EXIF orientation says, without transparency.

    Args:
        image: As Pillow opened it; 16 bits are scaled to 8.
        mode: ``RGB``, or ``L`` for grey.

    Raises:
        ValueError: Its 32-bit pixels have no known range.
    """
    kind = image.format
    if orientation_of(image) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16") or (image.mode == "I" and kind in _16_BITS):
        image = Image.fromarray(np.round(np.asarray(image) / 257).astype(np.uint8))  # convert() clips at 255
    elif image.mode in ("I", "F"):
        raise ValueError(f"32-bit pixels (mode {image.mode}) have no known range: save the image with 8 or 16 bits")
    return image.convert(mode)
