"""Image files as every program reads them: one list of extensions, 8 bits per channel, upright."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import IO, cast

import numpy as np
from PIL import ExifTags, Image, ImageOps
from PIL.TiffImagePlugin import TiffImageFile

from elfatt.data.errors import UserError

_NOT_PIXELS = {"BUFR", "EPS", "FITS", "GRIB", "HDF5", "MPEG", "WMF"}  # Pillow knows them, but most need a plugin
_16_BITS = {"JPEG2000", "PNG", "PPM"}  # their mode "I" holds 16 bits in 32
FLATTEST = 100  # resized to 128 pixels, the shortest recipe's long side, it is still a pixel wide

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


def walk(folder: str | os.PathLike[str]) -> Iterator[tuple[str, list[str]]]:
    """Every folder below one, links followed, and the names of its files.

    Raises:
        UserError: A link to a folder that holds it, which has no end.
    """
    for place, folders, files in os.walk(folder, followlinks=True):
        here = os.path.join(os.path.realpath(place), "")
        for path in (os.path.join(place, name) for name in folders):
            if os.path.islink(path) and here.startswith(os.path.join(os.path.realpath(path), "")):
                raise UserError(path, "is a link to a folder that holds it", "remove the link")
        yield place, files


def list_images(folder: str | os.PathLike, suffix: str = "") -> tuple[dict[str, Path], list[Path]]:
    """The images below a folder, and the files that no program reads: others, and images in hidden folders.

    Args:
        folder: Looked through to its last subfolder.
        suffix: What names usually end in, such as ``_leftImg8bit.png``. What it has before the extension is cut off;
            its extension decides between two images of one name.

    Returns:
        Images by their path in the folder without suffix, in order, and the other files.

    Raises:
        UserError: No such folder, or two images of one name.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(folder, "is no folder", "give the one that holds the images or masks")
    ending, extension = os.path.splitext(suffix)
    if not extension and ending.startswith("."):
        ending, extension = "", ending
    paths = (Path(place, name) for place, names in walk(folder) for name in names)
    images: dict[str, Path] = {}
    others = []
    for path in sorted(path for path in paths if not path.name.startswith(".")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if hidden or not is_image(path) or not path.stem.endswith(ending):
            others += [path] * (is_image(path) or not hidden)
            continue
        name = path.relative_to(folder).with_suffix("").as_posix().removesuffix(ending)
        if twin := images.get(name):
            usual = [image for image in (twin, path) if image.suffix.lower() == extension.lower()]
            if len(usual) != 1:
                raise UserError(path, f"has the name of {twin.name}", "keep one of the two")
            others.append(path if usual[0] is twin else twin)
            path = usual[0]
        images[name] = path
    return images, others


def check_shape(where: str, size: tuple[int, int]) -> None:
    """Stops at an image so flat that nothing is left of it once its long side is that of a recipe.

    Raises:
        UserError: One side, in pixels, is more than 100 times the other.
    """
    if max(size) > FLATTEST * min(size):
        fault = f"has {size[0]}x{size[1]} pixels, one side more than {FLATTEST} times the other"
        raise UserError(where, fault, "cut it into pieces, or leave it out")


def check_size(image: str | os.PathLike, size: tuple[int, int], owner: str | os.PathLike) -> bool:
    """Compares an image file, turned upright, with what was drawn or written for it.

    Args:
        image: Path.
        size: Width and height of the mask or annotation, in pixels.
        owner: Its file.

    Returns:
        Whether only a look can tell if the labels belong to the upright image: EXIF turns it, and the sizes agree both
        ways.

    Raises:
        UserError: Another size, or the size of the pixels as they are stored.
    """
    with Image.open(image) as file:
        orientation, stored = orientation_of(file), file.size
        if file.format == "TIFF":
            tags = cast(TiffImageFile, file).tag_v2
            stored = tags[256], tags[257]  # Pillow gives the upright size before the pixels are turned
    upright = stored[::-1] if orientation > 4 else stored
    if size == upright:
        return orientation != 1 and stored == upright
    width, height = size
    if size == stored:
        raise UserError(
            image,
            f"is turned upright by its EXIF orientation {orientation}, but {owner} has the {width}x{height} pixels "
            "(width x height) of the image as it is stored",
            f"remove the orientation tag from the picture (exiftool -Orientation= {image}), whose pixels then match",
        )
    fault = f"has {upright[0]}x{upright[1]} pixels (width x height), but {owner} says {width}x{height}"
    raise UserError(image, fault, "make them equal")


def read_image(file: str | os.PathLike | IO[bytes], mode: str = "RGB") -> Image.Image:
    """Decodes an image file to its end and gives it as ``standard_image`` does.

    Args:
        file: Path, or file opened for reading.
        mode: ``RGB``, or ``L`` for grey.

    Raises:
        OSError, SyntaxError, ValueError: The file is missing, damaged or no image; Pillow raises all three.
        ValueError: Its 32-bit pixels have no known range.
    """
    # by its name, Pillow 13 maps an uncompressed TIFF into memory with its sides exchanged, if EXIF turns it
    opened = open(file, "rb") if isinstance(file, str | os.PathLike) else nullcontext(file)
    with opened as stream, Image.open(stream) as image:
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
