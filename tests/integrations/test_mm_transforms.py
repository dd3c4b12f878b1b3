"""The steps that read and check a user's files give mmcv's arrays, from every bit depth, upright."""

import numpy as np
import pytest
from PIL import Image

from elfatt.data import UserError
from elfatt.integrations.mm_transforms import CheckInstances, CheckMask, LoadImage


def save(path, pixels, **options):
    Image.fromarray(pixels).save(path, **options)
    return {"img_path": str(path)}


def test_colours_are_read_in_mmcvs_order(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    results = LoadImage()(save(tmp_path / "a.png", pixels))
    np.testing.assert_array_equal(results["img"], pixels[..., ::-1])
    assert results["img_shape"] == results["ori_shape"] == (4, 6)
    grey = LoadImage(mode="L")(save(tmp_path / "b.png", pixels[..., 0]))["img"]
    np.testing.assert_array_equal(grey, pixels[..., 0])


def test_16_bits_are_scaled_and_the_image_is_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = np.arange(24, dtype=np.uint16).reshape(4, 6) * 257
    results = LoadImage()(save(tmp_path / "a.tif", pixels, exif=exif))
    np.testing.assert_array_equal(results["img"], np.stack([np.rot90(pixels // 257, -1)] * 3, -1))
    assert results["ori_shape"] == (6, 4)


def test_an_image_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(UserError, match=r"image .*a\.tif cannot be read: 32-bit pixels \(mode F\)"):
        LoadImage()(save(tmp_path / "a.tif", np.zeros((4, 6), np.float32)))
    with pytest.raises(UserError, match=r"image .*none\.png cannot be read: No such file"):
        LoadImage()({"img_path": str(tmp_path / "none.png")})
    with pytest.raises(UserError, match=r"b\.png has 1200x2 pixels, one side more than 100 times"):
        LoadImage()(save(tmp_path / "b.png", np.zeros((2, 1200), np.uint8)))
    with pytest.raises(UserError, match="LoadImage.*'BGR'.* use 'RGB' or 'L'"):
        LoadImage(mode="BGR")


@pytest.mark.parametrize(
    ("check", "results", "message"),
    [
        (CheckMask(3), {"seg_map_path": "m.png", "seg_fields": []}, "CheckMask comes before LoadAnnotations"),
        (CheckInstances(), {"gt_bboxes": [], "ori_shape": (4, 6)}, "CheckInstances comes after LoadAnnotations"),
    ],
)
def test_a_check_at_the_wrong_place_stops(check, results, message):
    with pytest.raises(UserError, match=message):
        check(results)


def test_images_without_labels_pass():
    for check in (CheckMask(3), CheckInstances()):
        results = {"img_path": "a.png", "ori_shape": (4, 6)}
        assert check(dict(results)) == results


def test_a_mask_one_pixel_high_is_refused(tmp_path):
    save(tmp_path / "m.png", np.zeros((1, 6), np.uint8))
    results = {"gt_seg_map": np.zeros(6, np.uint8), "seg_map_path": str(tmp_path / "m.png"), "ori_shape": (1, 6)}
    with pytest.raises(UserError, match=r"m\.png is one pixel wide or high"):
        CheckMask(3)(results)
