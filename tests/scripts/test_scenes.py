"""Scenes: masks and JSON say the same, nothing held out is in training, later digits cover earlier ones."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
from mmengine.config import Config
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images

from scripts.quickstart import material, scenes
from scripts.quickstart.material import NAMES, Material, enlarge, load_material, paint

SPLITS = {"train": "training", "val": "validation"}
COUNTS = {"train": 12, "val": 6}
BLACK = [np.zeros((160, 160, 3), np.uint8)]


def read(folder, split):
    """The JSON, and (image, mask, annotations) of each scene."""
    content = json.loads((folder / "annotations" / f"instances_{split}2017.json").read_text())
    triples = []
    for entry in content["images"]:
        mask = folder / "annotations" / SPLITS[split] / entry["file_name"].replace(".jpg", ".png")
        image = folder / f"{split}2017" / entry["file_name"]
        own = [a for a in content["annotations"] if a["image_id"] == entry["id"]]
        triples.append((np.array(Image.open(image)), np.array(Image.open(mask)), own))
    return content, triples


def decode(segmentation):
    """Run lengths to a mask, pixel by pixel: zeros first, down the columns."""
    height, width = segmentation["size"]
    mask = np.zeros((height, width), bool)
    position, value = 0, False
    for count in segmentation["counts"]:
        for pixel in range(position, position + count):
            mask[pixel % height, pixel // height] = value
        position, value = position + count, not value
    assert position == height * width
    return mask


def contents(folder, pattern="*"):
    """{name: bytes} of all files that match, of which there are some."""
    files = {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob(pattern) if file.is_file()}
    assert files
    return files


@pytest.mark.parametrize("split", SPLITS)
def test_mask_and_json_agree_in_every_pixel(scenes_folder, split):
    content, triples = read(scenes_folder, split)
    assert [c["name"] for c in content["categories"]] == list(NAMES)
    assert len(triples) == COUNTS[split]
    for image, mask, own in triples:
        assert image.shape == (128, 128, 3) and mask.shape == (128, 128) and mask.dtype == np.uint8
        assert scenes.DIGITS[0] <= len(own) <= scenes.DIGITS[1]
        painted, seen = np.zeros_like(mask), np.zeros(mask.shape, int)
        for annotation in own:
            shape = decode(annotation["segmentation"])
            ys, xs = np.nonzero(shape)
            box = [xs.min(), ys.min(), np.ptp(xs) + 1, np.ptp(ys) + 1]
            assert annotation["bbox"] == box and annotation["area"] == shape.sum() > 0
            assert 1 <= annotation["category_id"] <= 10 and annotation["iscrowd"] == 0
            painted[shape] = annotation["category_id"]
            seen += shape
        assert seen.max() == 1, "visible parts do not overlap"
        assert np.array_equal(painted, mask)
    ids = [a["id"] for a in content["annotations"]]
    assert ids == list(range(1, len(ids) + 1))


def test_pycocotools_reads_the_same(scenes_folder):
    masks = pytest.importorskip("pycocotools.mask")
    for annotation in read(scenes_folder, "val")[0]["annotations"]:
        compressed = masks.frPyObjects(annotation["segmentation"], 128, 128)
        assert np.array_equal(masks.decode(compressed).astype(bool), decode(annotation["segmentation"]))
        assert masks.toBbox(compressed).tolist() == annotation["bbox"]


@pytest.mark.parametrize("mask", [np.zeros((3, 5), bool), np.ones((3, 5), bool), np.eye(4, 3, dtype=bool)])
def test_run_lengths(mask):
    assert np.array_equal(decode(scenes.run_lengths(mask)), mask)


def test_both_layouts_share_the_images(scenes_folder):
    for split, name in SPLITS.items():
        for image in (scenes_folder / "images" / name).iterdir():
            assert image.samefile(scenes_folder / f"{split}2017" / image.name)


def test_deterministic_and_kept(scenes_folder, tmp_path):
    again = tmp_path / "again"
    scenes.write_scenes(again, **COUNTS)
    assert contents(again) == contents(scenes_folder)
    (again / "mine").touch()
    scenes.write_scenes(again, **COUNTS, seed=1)
    assert (again / "mine").exists(), "a folder that is there is kept"
    scenes.write_scenes(tmp_path / "other", train=1, val=1, seed=1)
    first = "train2017/train_00001.jpg"
    assert contents(tmp_path / "other")[first] != contents(again)[first]
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("changed", ["digits", "photographs"])
@pytest.mark.parametrize("split", SPLITS)
def test_nothing_of_the_one_split_is_in_the_other(scenes_folder, tmp_path, monkeypatch, split, changed):
    """What belongs to `split` is replaced: the other split stays the same to the byte, each scene of this changes."""
    data, photos = load_digits(), [photo.copy() for photo in load_sample_images().images]
    if changed == "digits":
        data.images[load_material()[split].indices] = 16.0
    else:
        for photo in photos:
            photo[:, np.s_[:480] if split == "train" else np.s_[480:]] = (255, 0, 255)
    monkeypatch.setattr(material, "load_digits", lambda: data)
    monkeypatch.setattr(material, "load_sample_images", lambda: SimpleNamespace(images=photos))
    scenes.write_scenes(tmp_path / "data", **COUNTS)
    (other,) = SPLITS.keys() - {split}
    for pattern in (f"{other}_*", f"*_{other}2017.json"):
        assert contents(tmp_path / "data", pattern) == contents(scenes_folder, pattern)
    after, before = contents(tmp_path / "data", f"{split}_*.jpg"), contents(scenes_folder, f"{split}_*.jpg")
    assert all(after[name] != before[name] for name in before)


def test_the_split_is_the_classifiers(tmp_path):
    from scripts.quickstart.digits import COPIES, write_digits

    write_digits(tmp_path / "digits")
    target = load_digits().target
    for split, part in load_material().items():
        files = list((tmp_path / "digits" / split).glob("*/*.png"))
        assert {int(file.stem[:4]) for file in files} == set(part.indices)
        assert len(files) == len(part.indices) * (1 + COPIES if split == "train" else 1)
        assert all(file.parent.name.startswith(f"{target[int(file.stem[:4])]}_") for file in files)


def test_paint_cuts_at_the_borders():
    opacity = np.arange(6, dtype=float).reshape(2, 3) / 10
    for y in range(-4, 8):
        for x in range(-5, 9):
            canvas, expected = np.zeros((5, 6, 3)), np.zeros((5, 6, 3))
            paint(canvas, opacity, y, x, np.array([10.0, 20.0, 30.0]))
            for i, j in np.ndindex(opacity.shape):
                if 0 <= y + i < 5 and 0 <= x + j < 6:
                    expected[y + i, x + j] = opacity[i, j] * np.array([10.0, 20.0, 30.0])
            assert np.allclose(canvas, expected)


def test_later_digits_cover_earlier_ones_and_all_stay_visible(monkeypatch):
    """Full squares as digits: the ink of each is known, so the owner of every pixel can be found anew."""
    placed = []

    def enlarge(digit, side):
        placed.append(side)
        return np.ones((side, side))

    monkeypatch.setattr(scenes, "enlarge", enlarge)
    monkeypatch.setattr(scenes, "DIGIT_SIDES", (24, 40))  # squares take more room than digits
    covered = 0
    for number in range(20):
        placed.clear()
        full = Material(np.arange(10), np.ones((10, 8, 8)), np.arange(10), BLACK)
        scene = scenes.compose(np.random.default_rng(number), full)
        assert scenes.DIGITS[0] <= len(scene.labels) <= scenes.DIGITS[1]
        colours = []
        for k in range(1, len(scene.labels) + 1):
            mask = scene.owner == k
            (colour,) = np.unique(scene.image[mask], axis=0)  # one colour: nothing of another digit is on it
            colours.append(tuple(colour))
            ys, xs = np.nonzero(mask)
            square = max(np.ptp(ys), np.ptp(xs)) + 1  # a lower bound of its side
            covered += mask.sum() < square**2
            assert mask.sum() >= scenes.VISIBLE * square**2
        assert (np.ptp(ys) + 1, np.ptp(xs) + 1) == (square, square) and square in placed and mask.sum() == square**2
        assert len(set(colours)) == len(colours) and not scene.image[scene.owner == 0].any()
    assert covered > 10


def test_a_mask_is_the_ink_not_its_square():
    digit = np.zeros((8, 8))
    digit[2:6, 3:5] = 16
    ys, xs = np.nonzero(enlarge(digit, 64) >= 0.5)
    assert abs(ys.min() - 16) <= 2 and abs(ys.max() - 47) <= 2 and abs(xs.min() - 24) <= 2 and abs(xs.max() - 39) <= 2
    shares = [(enlarge(image, 48) >= 0.5).mean() for image in load_digits().images]
    assert 0.05 < min(shares) and max(shares) < 0.7
    for number in range(5):
        scene = scenes.compose(np.random.default_rng(number), Material(np.zeros(1), digit[None], np.array([1]), BLACK))
        assert scene.image[scene.owner > 0].any(axis=-1).all(), "a pixel of a digit has its ink"


def test_the_configs_know_the_classes():
    from elfatt.integrations.mm_models import build_model
    from tests.integrations.dense import CONFIGS

    for task, classes in (("segmentation", ("background", *material.NAMES)), ("detection", tuple(material.NAMES))):
        config = Config.fromfile(CONFIGS / task / "scenes_nano.py")
        model = build_model(config)
        head = model.decode_head if task == "segmentation" else model.roi_head.bbox_head
        for loader in (config.train_dataloader, config.val_dataloader, config.test_dataloader):
            assert loader.dataset.metainfo.classes == classes and head.num_classes == len(classes)


def test_the_report_gives_percent_beside_the_goal():
    from scripts.quickstart import report

    scores = {"segmentation": {"mIoU": 61.25}, "detection": {"coco/bbox_mAP_50": 0.5, "coco/segm_mAP_50": 0.25}}
    lines = report.dense_table(scores).splitlines()[2:]
    assert [line.split("|")[2].strip() for line in lines] == [
        "61.2 % (goal 75 %)",
        "50.0 % (goal 70 %)",
        "25.0 % (goal 65 %)",
    ]
