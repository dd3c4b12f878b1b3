"""Image files of every bit depth and orientation give the right values."""

import io
import struct
import warnings
from functools import partial

import numpy as np
import pytest
from PIL import Image

from elfatt.data import UserError, check_shape, check_size, is_image, list_images, orientation_of, read_image
from elfatt.data.masks import check_mask

RAMP = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)  # 0, 257 … 65535: exactly 0 … 255 in 8 bits


def encode(image: Image.Image, kind: str, **options) -> io.BytesIO:
    file = io.BytesIO()
    image.save(file, kind, **options)
    file.seek(0)
    return file


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM", "JPEG2000"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_16_bits_are_scaled(kind, mode):
    options = {"irreversible": False} if kind == "JPEG2000" else {}
    read = np.asarray(read_image(encode(Image.fromarray(RAMP), kind, **options), mode))
    expected = np.arange(256, dtype=np.uint8).reshape(16, 16)
    np.testing.assert_array_equal(read, np.stack([expected] * 3, -1) if mode == "RGB" else expected)


def test_16_bits_big_endian_and_turned():
    rows = RAMP[:, :8]
    exif = Image.Exif()
    exif[0x0112] = 6  # stored with its top at the right: shown turned clockwise
    file = encode(Image.fromarray(rows.astype(">u2")), "TIFF", exif=exif)
    np.testing.assert_array_equal(np.asarray(read_image(file, "L")), np.rot90(rows // 257, -1))


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_an_uncompressed_tiff_with_exchanged_sides_opened_by_its_name(tmp_path, orientation):
    stored = np.arange(24, dtype=np.uint8).reshape(4, 6)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(stored).save(tmp_path / "a.tif", exif=exif)
    Image.fromarray(stored).save(tmp_path / "a.png", exif=exif)
    tiff, png = (np.asarray(read_image(tmp_path / f"a.{kind}", "L")) for kind in ("tif", "png"))
    assert tiff.shape == (6, 4)
    np.testing.assert_array_equal(tiff, png)


def test_a_portable_graymap_of_another_maximum_is_scaled():
    file = io.BytesIO(b"P5 2 1 4095\n" + np.array([0, 4095], ">u2").tobytes())
    np.testing.assert_array_equal(np.asarray(read_image(file, "L")), [[0, 255]])


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_32_bits_are_refused(dtype):
    with pytest.raises(ValueError, match=r"32-bit pixels .* 8 or 16 bits"):
        read_image(encode(Image.fromarray(RAMP.astype(dtype)), "TIFF"))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_8_bits_are_as_pillow_has_them(mode):
    rgb = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    image = Image.fromarray(rgb).convert(mode)
    file = encode(image, "TIFF" if mode == "CMYK" else "PNG")
    np.testing.assert_array_equal(np.asarray(read_image(file)), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize(
    ("orientation", "upright"),
    [
        (1, lambda a: a),
        (2, np.fliplr),
        (3, lambda a: np.rot90(a, 2)),
        (4, np.flipud),
        (5, lambda a: a.swapaxes(0, 1)),
        (6, lambda a: np.rot90(a, -1)),
        (7, lambda a: np.rot90(a, 2).swapaxes(0, 1)),
        (8, np.rot90),
        (9, lambda a: a),  # no such orientation
    ],
)
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_images_are_turned_upright(orientation, upright, kind):
    stored = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = encode(Image.fromarray(stored), kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
    assert orientation_of(Image.open(file)) == (orientation if orientation < 9 else 1)
    np.testing.assert_array_equal(np.asarray(read_image(file)), upright(stored))


XMP = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
XMP_UUID = bytes.fromhex("be7acfcb97a942e89c71999491e3afac")


@pytest.mark.parametrize("place", ["before", "after"])
@pytest.mark.parametrize("uuid", [b"JpgTiffExif->JP2", XMP_UUID], ids=["exif", "xmp"])
def test_a_jp2_file_is_turned_upright(tmp_path, uuid, place):
    """Pillow skips the boxes in which JPEG 2000 keeps its tags."""
    stored = np.random.default_rng(0).integers(0, 256, (40, 60), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    tags = XMP if uuid == XMP_UUID else exif.tobytes().removeprefix(b"Exif\0\0")
    box = struct.pack(">I", 24 + len(tags)) + b"uuid" + uuid + tags
    data = encode(Image.fromarray(stored), "JPEG2000").getvalue()
    start = data.index(b"jp2c") - 4 if place == "before" else len(data)
    path = tmp_path / "a.jp2"
    path.write_bytes(data[:start] + box + data[start:])
    np.testing.assert_array_equal(np.asarray(read_image(path, "L")), np.rot90(stored, -1))
    assert not check_size(path, (40, 60), "mask")
    for damaged in (data, data + box[:20], data + b"\0\0\0\7uuid"):
        path.write_bytes(damaged)
        with Image.open(path) as image:
            assert orientation_of(image) == 1


def test_a_picture_of_too_many_pixels_is_a_users_error(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    path = tmp_path / "a.png"
    Image.new("L", (7, 3)).save(path)
    for read in (
        read_image,
        check_mask,
        partial(check_size, size=(7, 3), owner="mask"),
        lambda path: read_image(io.BytesIO(path.read_bytes())),
    ):
        with pytest.raises(UserError, match=r"^(.*a\.png|it) has more than 20 pixels, .*: cut it into tiles"):
            read(path)


def test_damaged_exif_data_leaves_the_pixels():
    file = encode(Image.new("RGB", (3, 2), (255, 0, 0)), "PNG", exif=b"Exif\0\0XX*\0garbage")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert read_image(file).getpixel((0, 0)) == (255, 0, 0)


def test_a_truncated_image_is_refused(tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(OSError):
        read_image(path)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.JPG", True),
        ("a.webp", True),
        ("b/a.tif", True),
        ("a.avif", True),
        (".a.jpg", False),
        ("a.h5", False),
        ("a", False),
    ],
)
def test_which_files_are_images(name, expected):
    assert is_image(name) == expected


def test_images_are_listed_by_name_whatever_their_extension(tmp_path):
    for name in ("b.JPG", "deep/a.webp", "c.tiff", "notes.txt", ".hidden.png"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    images, others = list_images(tmp_path)
    assert list(images.items()) == [
        ("b", tmp_path / "b.JPG"),
        ("c", tmp_path / "c.tiff"),
        ("deep/a", tmp_path / "deep" / "a.webp"),
    ]
    assert others == [tmp_path / "notes.txt"]
    for name in ("@eaDir/b.JPG/SYNOFILE_THUMB_M.png", "#recycle/d.png", "lost+found/1.png"):  # of file servers
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    assert list_images(tmp_path)[0] == images and len(list_images(tmp_path)[1]) == 4
    (tmp_path / "b.png").touch()
    with pytest.raises(UserError, match=r"b\.png has the same name as b\.JPG: keep one"):
        list_images(tmp_path)
    with pytest.raises(UserError, match="nowhere is not a folder"):
        list_images(tmp_path / "nowhere")


def test_an_ending_belongs_to_the_name_of_a_file(tmp_path):
    for name in ("a_left.png", "a_right.png"):
        (tmp_path / name).touch()
    assert list_images(tmp_path, "_left.png") == ({"a": tmp_path / "a_left.png"}, [tmp_path / "a_right.png"])


@pytest.mark.parametrize(
    ("stored", "orientation", "size", "open_question"),
    [
        ((6, 4), 1, (6, 4), False),
        ((6, 4), 6, (4, 6), False),  # only the upright image fits
        ((6, 4), 3, (6, 4), True),
        ((6, 4), 2, (6, 4), True),
        ((5, 5), 8, (5, 5), True),
    ],
)
@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_sizes_of_labels_that_fit(tmp_path, stored, orientation, size, open_question, suffix):
    path = tmp_path / f"a{suffix}"
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("L", stored).save(path, exif=exif)
    assert check_size(path, size, "mask") is open_question


@pytest.mark.parametrize(
    ("orientation", "size", "message"),
    [
        (
            6,
            (6, 4),
            r"EXIF orientation 6, but mask has the stored size of 6x4 pixels .*: remove .*-Orientation= ",
        ),
        (6, (6, 5), "a.... has 4x6 pixels .*, but mask says 6x5: make them equal"),
        (1, (4, 6), "a.... has 6x4 pixels .*, but mask says 4x6"),
    ],
)
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sizes_of_labels_that_do_not_fit(tmp_path, orientation, size, message, suffix):
    path = tmp_path / f"a.{suffix}"
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("L", (6, 4)).save(path, exif=exif)
    with pytest.raises(UserError, match=message):
        check_size(path, size, "mask")


def test_a_very_flat_image_is_refused():
    check_shape("image a.png", (1000, 10))
    with pytest.raises(UserError, match=r"image a\.png has 10x1001 pixels, one side more than 100 times the other"):
        check_shape("image a.png", (10, 1001))


def test_links_are_followed_but_not_in_circles(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "x.png").touch()
    (tmp_path / "a" / "link").symlink_to(tmp_path / "elsewhere")
    assert list(list_images(tmp_path / "a")[0]) == ["link/x"]
    (tmp_path / "a" / "loop").symlink_to("..")
    with pytest.raises(UserError, match="a/loop is a link to one of its parent folders: remove the link"):
        list_images(tmp_path / "a")
