"""The pictures of predictions, on arrays of no scene in particular."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from scripts.quickstart.pictures import Instances, draw_instances, draw_semantic

NAMES = ("a", "b", "c")


@pytest.fixture
def image():
    return np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)


@pytest.mark.parametrize("scenes", [1, 3])
def test_semantic(image, scenes, tmp_path):
    truth = np.random.default_rng(1).integers(0, 4, image.shape[:2])
    draw_semantic([(image, truth, truth)] * scenes, NAMES, tmp_path / "picture.png")
    pixels = np.array(Image.open(tmp_path / "picture.png").convert("RGB"))
    for colour in ((31, 119, 180), (255, 127, 14), (44, 160, 44)):  # of tab10
        assert (pixels == colour).all(axis=-1).sum() > 500


def test_instances_and_none(image, tmp_path):
    boxes = np.array([[2.0, 3.0, 10.0, 12.0], [5.0, 0.0, 30.0, 20.0]])
    masks = np.zeros((2, *image.shape[:2]), bool)
    masks[0, 3:12, 2:10] = True  # the second is empty, as a weak prediction may be
    truth = Instances(boxes, masks, np.array([0, 2]))
    none = Instances(np.zeros((0, 4)), np.zeros((0, *image.shape[:2]), bool), np.zeros(0, int), np.zeros(0))
    weak = truth._replace(scores=np.array([0.9, 0.3]))
    draw_instances([(image, truth, none), (image, truth, weak)], NAMES, tmp_path / "picture.png", columns=1)
    assert Image.open(tmp_path / "picture.png").size[0] > 500
