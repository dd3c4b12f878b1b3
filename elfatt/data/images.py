"""Image files as every program reads them: one list of extensions, 8 bits per channel, upright."""

from __future__ import annotations

import os
from pathlib import Path
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
    path = Path(path)
    return path.suffix.lower() in EXTENSIONS and not path.name.startswith(".")


def orientation_of(image: Image.Image) -> int:
    """The EXIF orientation: 1 stored upright, 2 to 4 flipped or turned by 180°, 5 to 8 with sides exchanged."""
    try:
        found = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged EXIF data raises almost anything, and the pixels may be fine
        return 1
    return found if found in range(1, 9) else 1


def read_image(file: str | os.PathLike | IO[bytes], mode: str = "RGB") -> Image.Image:
    """Decodes an image file to its end, turned upright as its EXIF orientation says.

    16 bits are scaled to 8; transparency is dropped.

    Args:
        file: Path, or file opened for reading.
        mode: ``RGB``, or ``L`` for grey.

    Raises:
        OSError, SyntaxError, ValueError: The file is missing, damaged or no image; Pillow raises all three.
        ValueError: Its 32-bit pixels have no known range.
    """
    with Image.open(file) as image:
        image.load()
        if orientation_of(image) != 1:
            image = ImageOps.exif_transpose(image)
        return _to_8_bits(image).convert(mode)


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Single-channel images of more bits as ``L``; Pillow's own conversion clips them at 255."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in _16_BITS):
        return Image.fromarray(np.round(np.asarray(image) / 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"32-bit pixels (mode {image.mode}) have no known range: save the image with 8 or 16 bits")
    return image
