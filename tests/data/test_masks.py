"""Masks of the wrong form or labels are named; masks that teach nothing are found."""

import numpy as np
import pytest
from PIL import Image

from elfatt.data import UserError
from elfatt.data.masks import check_classes, check_labels, check_mask


def save(folder, mode="L", suffix=".png", orientation=1):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = folder / f"mask{suffix}"
    Image.new(mode, (6, 4)).save(path, exif=exif)
    return path


@pytest.mark.parametrize("mode", ["L", "P", "1"])
def test_one_channel_of_up_to_8_bits_is_a_mask(tmp_path, mode):
    assert check_mask(save(tmp_path, mode)) == (6, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "RGB"}, "picture of mode RGB: save class indices as 8-bit grey"),
        ({"mode": "I;16"}, "picture of mode I;16"),
        ({"suffix": ".jpg"}, "is a JPEG, whose compression changes labels"),
        ({"orientation": 3}, "has the EXIF orientation 3"),
    ],
)
def test_what_is_no_mask(tmp_path, options, message):
    path = save(tmp_path, **options)
    with pytest.raises(UserError, match=f"mask {path} .*{message}"):
        check_mask(path)


def test_a_damaged_mask(tmp_path):
    path = tmp_path / "mask.png"
    with pytest.raises(UserError, match=r"mask\.png cannot be read"):
        check_mask(path)


def test_labels():
    labels = np.array([[0, 3], [255, 2]], np.uint8)
    check_labels("m.png", labels, 3, "look")
    with pytest.raises(UserError, match=r"^mask m\.png holds label 2, 3, but 0 to 1 and 255 are known: look$"):
        check_labels("m.png", labels, 1, "look")


@pytest.mark.parametrize("pixels", [[0, 5, 0, 1], [3, 2, 0, 0]])
def test_two_classes_can_be_told_apart(pixels):
    check_classes("masks", pixels, "abcd", 7)


def test_a_single_class_of_one_can_be_learned():
    check_classes("masks", [4], ["object"], 7)


@pytest.mark.parametrize(
    ("pixels", "names", "found"),
    [([0, 9, 0], "abc", "only 'b'"), ([0, 0], "ab", "none"), ([0], "a", "none")],
)
def test_masks_that_teach_nothing(pixels, names, found):
    message = f"of {len(names)} classes, the 7 masks read contain {found}, and ignored pixels"
    with pytest.raises(UserError, match=message):
        check_classes("masks", pixels, names, 7)
