"""Image reading shared by all programs: supported extensions, 8 bits per channel, upright orientation."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import IO, cast

import numpy as np
from PIL import ExifTags, Image, ImageOps
from PIL.TiffImagePlugin import TiffImageFile

from elfatt.data.errors import UserError

_NOT_PIXELS = {"BUFR", "EPS", "FITS", "GRIB", "HDF5", "MPEG", "WMF"}  # known to Pillow, but most need a plugin
_16_BITS = {"JPEG2000", "PNG", "PPM"}  # formats whose mode "I" is 16-bit data
_SERVICE_FOLDERS = {  # of file servers, system tools and archives: thumbnails, deleted and saved files; in lower case
    *("@eadir", "@recycle", "@tmp", "@sharesnap", "@recently-snapshot", "#recycle", "#snapshot"),
    *("$recycle.bin", "system volume information", "lost+found", "__macosx"),
}
_JP2_METADATA = {  # content of a uuid box, by the uuid, and what Pillow calls it
    b"JpgTiffExif->JP2": ("exif", b"Exif\0\0"),
    bytes.fromhex("be7acfcb97a942e89c71999491e3afac"): ("xmp", b""),
}
FLATTEST = 100  # maximum aspect ratio: still a pixel wide at 128 pixels, the shortest long side of a recipe

Image.init()
EXTENSIONS = frozenset(
    extension
    for extension, kind in Image.registered_extensions().items()
    if kind in Image.OPEN and kind not in _NOT_PIXELS
)


def is_image(path: str | os.PathLike) -> bool:
    """Return whether a file is not hidden and has an image extension that Pillow reads, in any case."""
    name = os.path.basename(path)
    return os.path.splitext(name)[1].lower() in EXTENSIONS and not name.startswith(".")


def is_hidden(path: Iterable[str]) -> bool:
    """Return whether a part of a path is hidden, or a folder in which file servers keep thumbnails or deleted files."""
    return any(part.startswith(".") or part.lower() in _SERVICE_FOLDERS for part in path)


@contextmanager
def opened(file: str | os.PathLike | IO[bytes], name: str | os.PathLike | None = None) -> Iterator[Image.Image]:
    """Open an image file with Pillow, as ``Image.open``.

    Args:
        file: Path or binary file.
        name: Path for the message, if ``file`` is a binary file.

    Raises:
        UserError: More pixels than Pillow reads.
    """
    try:
        with Image.open(file) as image:
            yield image
    except Image.DecompressionBombError as error:
        fault = f"has more than {2 * cast(int, Image.MAX_IMAGE_PIXELS):,} pixels, Pillow's limit"
        where = name or (file if isinstance(file, str | os.PathLike) else "it")
        raise UserError(where, fault, "cut it into tiles, or scale it down") from error


def _read_jp2_metadata(image: Image.Image) -> None:
    """Add the EXIF or XMP data of a JPEG 2000 file, which Pillow skips, to ``image.info``."""
    stream = getattr(image, "fp", None)
    if image.format != "JPEG2000" or stream is None or "exif" in image.info:
        return
    start, offset = stream.tell(), 0
    while True:
        stream.seek(offset)
        size, kind = int.from_bytes(stream.read(4), "big"), stream.read(4)
        head = 8
        if size == 1:
            size, head = int.from_bytes(stream.read(8), "big"), 16
        if kind == b"uuid" and (name := _JP2_METADATA.get(stream.read(16))):
            image.info[name[0]] = name[1] + stream.read(max(0, size - head - 16) if size else -1)
        if size < head:  # the end, the last box, or a bare codestream
            break
        offset += size
    stream.seek(start)


def orientation_of(image: Image.Image) -> int:
    """Return the EXIF orientation: 1 upright, 2 to 4 flipped or rotated by 180°, 5 to 8 with sides swapped."""
    try:
        _read_jp2_metadata(image)
        found = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged EXIF data raises almost anything, while the pixels may be fine
        return 1
    return found if found in range(1, 9) else 1


def walk(folder: str | os.PathLike[str]) -> Iterator[tuple[str, list[str]]]:
    """Yield a folder, its subfolders and their file names, following links.

    Raises:
        UserError: A link to one of its parent folders, which would never end.
    """
    for place, folders, files in os.walk(folder, followlinks=True):
        here = os.path.join(os.path.realpath(place), "")
        for path in (os.path.join(place, name) for name in folders):
            if os.path.islink(path) and here.startswith(os.path.join(os.path.realpath(path), "")):
                raise UserError(path, "is a link to one of its parent folders", "remove the link")
        yield place, files


def list_images(folder: str | os.PathLike, suffix: str = "") -> tuple[dict[str, Path], list[Path]]:
    """List the images below a folder, and the files that are ignored.

    Args:
        folder: Folder, searched recursively.
        suffix: Usual ending of names, e.g. ``_leftImg8bit.png``. The part before the extension is required and removed;
            the extension decides between images of the same name.

    Returns:
        Images by relative path without suffix, sorted, and the ignored files: non-images and images in hidden folders
        (see ``is_hidden``).

    Raises:
        UserError: No such folder, or two images of the same name.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(folder, "is not a folder", "pass the folder of the images or masks")
    ending, extension = os.path.splitext(suffix)
    if not extension and ending.startswith("."):
        ending, extension = "", ending
    paths = (Path(place, name) for place, names in walk(folder) for name in names)
    images: dict[str, Path] = {}
    others = []
    for path in sorted(path for path in paths if not path.name.startswith(".")):
        hidden = is_hidden(path.relative_to(folder).parts)
        if hidden or not is_image(path) or not path.stem.endswith(ending):
            others += [path] * (is_image(path) or not hidden)
            continue
        name = path.relative_to(folder).with_suffix("").as_posix().removesuffix(ending)
        if twin := images.get(name):
            usual = [image for image in (twin, path) if image.suffix.lower() == extension.lower()]
            if len(usual) != 1:
                raise UserError(path, f"has the same name as {twin.name}", "keep one of the two")
            others.append(path if usual[0] is twin else twin)
            path = usual[0]
        images[name] = path
    return images, others


def check_shape(where: str, size: tuple[int, int]) -> None:
    """Check that an image's aspect ratio survives resizing.

    Raises:
        UserError: One side is more than 100 times the other.
    """
    if max(size) > FLATTEST * min(size):
        fault = f"has {size[0]}x{size[1]} pixels, one side more than {FLATTEST} times the other"
        raise UserError(where, fault, "crop it into pieces, or remove it")


def check_size(image: str | os.PathLike, size: tuple[int, int], owner: str | os.PathLike) -> bool:
    """Check that an image, turned upright, has the size of its mask or annotation.

    Args:
        image: Path of the image.
        size: Width and height of the mask or annotation in pixels.
        owner: File of the mask or annotation.

    Returns:
        Whether the labels need a visual check: EXIF turns the image, and both orientations have this size.

    Raises:
        UserError: The size differs, or is that of the stored, not the upright, image.
    """
    with opened(image) as file:
        orientation, stored = orientation_of(file), file.size
        if file.format == "TIFF":
            tags = cast(TiffImageFile, file).tag_v2
            stored = tags[256], tags[257]  # Pillow reports the upright size before it turns the pixels
    upright = stored[::-1] if orientation > 4 else stored
    if size == upright:
        return orientation != 1 and stored == upright
    width, height = size
    if size == stored:
        raise UserError(
            image,
            f"is rotated by its EXIF orientation {orientation}, but {owner} has the stored size of {width}x{height} "
            "pixels (width x height)",
            f"remove the image's orientation tag (exiftool -Orientation= {image})",
        )
    fault = f"has {upright[0]}x{upright[1]} pixels (width x height), but {owner} says {width}x{height}"
    raise UserError(image, fault, "make them equal")


def read_image(file: str | os.PathLike | IO[bytes], mode: str = "RGB") -> Image.Image:
    """Decode an image file completely, and convert it by ``standard_image``.

    Args:
        file: Path or binary file.
        mode: ``RGB``, or ``L`` for greyscale.

    Raises:
        OSError, SyntaxError, ValueError: The file is missing, damaged or not an image; Pillow raises all three.
        UserError: More pixels than Pillow reads.
        ValueError: Its 32-bit pixels have no known range.
    """
    # not by path: Pillow 13 memory-maps uncompressed TIFFs that EXIF turns with their sides swapped
    name = file if isinstance(file, str | os.PathLike) else None
    source = open(file, "rb") if isinstance(file, str | os.PathLike) else nullcontext(file)
    with source as stream, opened(stream, name) as image:
        _read_jp2_metadata(image)  # before load() lets go of the file
        image.load()
        return standard_image(image, mode)


def standard_image(image: Image.Image, mode: str = "RGB") -> Image.Image:
    """Convert an image to 8 bits per channel, upright by its EXIF orientation, without transparency.

    Args:
        image: Image as opened by Pillow; 16 bits are scaled to 8.
        mode: ``RGB``, or ``L`` for greyscale.

    Raises:
        ValueError: Its 32-bit pixels have no known range.
    """
    kind = image.format
    if orientation_of(image) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16") or (image.mode == "I" and kind in _16_BITS):
        image = Image.fromarray(np.round(np.asarray(image) / 257).astype(np.uint8))  # convert() would clip at 255
    elif image.mode in ("I", "F"):
        raise ValueError(f"32-bit pixels (mode {image.mode}) have no known range: save the image with 8 or 16 bits")
    return image.convert(mode)
