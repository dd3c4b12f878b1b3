"""What mmseg and mmdet pass over in a user's folder stops a run or is counted in its log."""

import json
import shutil

import numpy as np
import pytest
import torch
from mmengine.registry import DATASETS, DefaultScope
from PIL import Image

from elfatt.data import UserError
from elfatt.integrations import mm_datasets, mm_models
from tests.integrations.miniature import write_ade20k, write_coco


@pytest.fixture
def warnings(monkeypatch):
    lines = []
    monkeypatch.setattr(mm_datasets, "warn", lines.append)
    return lines


def open_masks(root, kind="BaseSegDataset", classes=("a", "b", "c", "d"), **options):
    mm_models._register("mmseg")
    prefix = {"img_path": "images/training", "seg_map_path": "annotations/training"}
    pipeline = [{"type": "LoadImage"}, {"type": "LoadAnnotations"}, {"type": "CheckMask", "num_classes": len(classes)}]
    settings = {"type": kind, "data_root": str(root), "data_prefix": prefix, "pipeline": pipeline}
    with DefaultScope.overwrite_default_scope("mmseg"):
        return mm_datasets.open_dataset({**settings, "metainfo": {"classes": classes}, **options})


def open_instances(root, split="train2017", **options):
    mm_models._register("mmdet")
    settings = {"ann_file": f"annotations/instances_{split}.json", "data_prefix": {"img": f"{split}/"}}
    with DefaultScope.overwrite_default_scope("mmdet"):
        return mm_datasets.open_dataset({"type": "CocoDataset", "data_root": str(root), **settings, **options})


@pytest.fixture
def masks(tmp_path):
    return write_ade20k(tmp_path / "data")


def test_every_extension_trains(masks, warnings):
    images, labels = masks / "images" / "training", masks / "annotations" / "training"
    (images / "0.jpg").rename(images / "0.JPG")
    Image.open(images / "1.jpg").save(images / "1.webp")
    (images / "1.jpg").unlink()
    Image.open(labels / "2.png").save(labels / "2.tif")
    (labels / "2.png").unlink()
    (images / "notes.txt").touch()
    dataset = open_masks(masks)
    items = [dataset.get_data_info(i) for i in range(len(dataset))]
    pairs = [[item[key].rpartition("/")[2] for key in ("img_path", "seg_map_path")] for item in items]
    assert pairs == [["0.JPG", "0.png"], ["1.webp", "1.png"], ["2.jpg", "2.tif"], ["3.jpg", "3.png"]]
    assert (items[0]["reduce_zero_label"], items[0]["label_map"], items[0]["seg_fields"]) == (False, None, [])
    assert dataset[1]["gt_seg_map"].max() == 3
    (line,) = warnings
    assert "images/training: 1 files are skipped" in line and line.endswith("notes.txt")


def test_masks_without_an_image_are_counted(masks, warnings):
    (masks / "images" / "training" / "2.jpg").unlink()
    assert len(open_masks(masks)) == 3
    (line,) = warnings
    assert "annotations/training: 1 of 4 masks have no image, first" in line and line.endswith("2.png")


def test_images_without_a_mask_and_twins_stop(masks, warnings):
    (masks / "annotations" / "training" / "2.png").unlink()
    with pytest.raises(UserError, match=r"contains 1 of 4 images without a mask, first .*2\.jpg: add masks"):
        open_masks(masks)
    images = masks / "images" / "training"
    for name in ("0.png", "0.webp"):
        Image.new("RGB", (96, 64)).save(images / name)
    (images / "2.jpg").unlink()
    assert len(open_masks(masks)) == 3  # img_suffix decides between twins
    assert "2 files are skipped, first" in warnings[0]
    (images / "0.jpg").unlink()
    with pytest.raises(UserError, match=r"0\.webp has the same name as 0\.png"):
        open_masks(masks)


def test_a_mask_that_cannot_be_read_is_named(masks, warnings):
    path = masks / "annotations" / "training" / "1.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 4, (64, 96), np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:80])  # the head is whole
    dataset = open_masks(masks)
    with pytest.raises(UserError, match=r"mask .*training/1\.png cannot be read: "):
        [dataset[i] for i in range(4)]


def test_a_list_of_names_chooses(masks, warnings):
    (masks / "train.txt").write_text("3\n1\n")
    dataset = open_masks(masks, ann_file="train.txt")
    assert [dataset.get_data_info(i)["img_path"].rpartition("/")[2] for i in range(2)] == ["3.jpg", "1.jpg"]
    (masks / "train.txt").write_text("3\n9\n")
    with pytest.raises(UserError, match=r"train\.txt names 1 images that are not in .*, first 9"):
        open_masks(masks, ann_file="train.txt")


def test_names_with_endings_and_masks_beside_their_images(masks, warnings):
    images, labels = masks / "images" / "training", masks / "annotations" / "training"
    for path in images.iterdir():
        path.rename(images / f"{path.stem}_left.JPG")
    for path in labels.iterdir():
        shutil.copy(path, labels / f"{path.stem}_colour.png")
        path.rename(labels / f"{path.stem}_train.png")
    suffixes = {"img_suffix": "_left.png", "seg_map_suffix": "_train.png"}
    dataset = open_masks(masks, **suffixes)
    assert dataset.get_data_info(3)["seg_map_path"].endswith("3_train.png") and len(dataset) == 4 and not warnings
    for path in labels.iterdir():
        path.rename(images / path.name)
    together = {"img_path": "images/training", "seg_map_path": "images/training"}
    dataset = open_masks(masks, data_prefix=together, img_suffix="_left.JPG", seg_map_suffix="_train.png")
    assert len(dataset) == 4  # as mmseg lists it
    assert len(open_masks(masks, data_prefix={"img_path": "images/training"}, img_suffix="_left.JPG")) == 4


def test_other_listings_and_readers_are_left_alone(masks, warnings):
    shutil.copytree(masks / "images" / "training", masks / "later")
    pairs = {"img_path": "images/training", "img_path2": "later", "seg_map_path": "annotations/training"}
    dataset = open_masks(masks, "BaseCDDataset", data_prefix=pairs)
    assert dataset.get_data_info(1)["img_path2"].endswith("later/1.jpg")
    for path in (masks / "annotations" / "training").iterdir():
        Image.open(path).convert("RGB").save(path)
    assert len(open_masks(masks, pipeline=[])) == 4
    with pytest.raises(UserError, match=r"0\.png is a picture of mode RGB"):
        open_masks(masks)


def test_a_damaged_image_is_named_where_it_is_read(masks, warnings):
    (masks / "images" / "training" / "1.jpg").write_bytes(b"")
    dataset = open_masks(masks)
    with pytest.raises(UserError, match=r"1\.jpg cannot be read"):
        dataset[1]


def turn(path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.open(path).save(path, exif=exif)


def test_turned_images(masks, tmp_path, warnings):
    turn(masks / "images" / "training" / "2.jpg", 3)
    open_masks(masks)
    (line,) = warnings
    assert line.startswith("1 of 4 images opened are rotated") and "2.jpg" in line
    turn(masks / "images" / "training" / "2.jpg", 6)
    with pytest.raises(UserError, match=r"2\.jpg .*orientation 6, .*2\.png has the stored size of 96x64 pixels"):
        open_masks(masks)
    boxes = write_coco(tmp_path / "coco")
    turn(boxes / "train2017" / "1.jpg", 8)
    with pytest.raises(UserError, match=r"1\.jpg .*orientation 8, .*train2017\.json has the stored size of 96x64 "):
        open_instances(boxes)


@pytest.mark.parametrize(
    ("labels", "zero", "classes", "found"),
    [
        ((0, 255), False, "ab", "only 'a'"),
        ((0, 1), True, "ab", "only 'a'"),
        ((0, 0), True, "ab", "none"),
        ((0, 1), False, "ab", None),
        ((0, 1), True, "a", None),
    ],
)
def test_masks_that_teach_nothing(masks, monkeypatch, warnings, labels, zero, classes, found):
    for path in (masks / "annotations" / "training").iterdir():
        Image.fromarray(np.array(labels, np.uint8).repeat(32)[:, None].repeat(96, 1)).save(path)
    dataset = open_masks(masks, classes=tuple(classes), reduce_zero_label=zero)
    if not found:
        mm_datasets.check_training_masks(dataset)
        return
    with pytest.raises(UserError, match=f"annotations/training leaves nothing to learn: .* masks read contain {found}"):
        mm_datasets.check_training_masks(dataset)
    monkeypatch.setattr(mm_datasets, "SAMPLE", 2)
    with pytest.raises(UserError, match="4 masks read"):  # beyond the sample where that tells no two apart
        mm_datasets.check_training_masks(dataset)
    Image.fromarray((np.indices((64, 96))[0] % 3).astype(np.uint8)).save(masks / "annotations" / "training" / "1.png")
    mm_datasets.check_training_masks(open_masks(masks, classes=("a", "b", "c"), reduce_zero_label=zero))


def edit(root, change, split="train2017"):
    file = root / "annotations" / f"instances_{split}.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def test_a_plain_data_set_is_left_alone():
    @DATASETS.register_module(force=True)
    class Plain(torch.utils.data.Dataset):
        def __init__(self, length):
            self.length = length

        def __len__(self):
            return self.length

    assert len(mm_datasets.open_dataset({"type": "Plain", "length": 3})) == 3


def test_lost_annotations_are_counted_once(tmp_path, warnings):
    root = write_coco(tmp_path / "data")
    edit(root, lambda content: content["annotations"][2].update(area=0))
    dataset = open_instances(root)
    assert len(dataset) == 4 and [len(dataset.get_data_info(i)["instances"]) for i in range(4)] == [2, 1, 2, 0]
    (line,) = warnings
    assert "instances_train2017.json: 1 of 6 annotations are lost: 1 because each has an area of 0" in line


def test_classes_in_another_order_stop(tmp_path):
    root = write_coco(tmp_path / "data")
    edit(root, lambda content: content["categories"].reverse())
    with pytest.raises(UserError, match=r"in a different order than the classes: \[toothbrush, .* \[person, bicycle"):
        open_instances(root)


def test_an_evaluated_file_has_the_classes_and_no_id_0(tmp_path):
    root = write_coco(tmp_path / "data")
    file = str(root / "annotations" / "instances_val2017.json")
    open_instances(root)
    from mmdet.evaluation import CocoMetric

    class Evaluator:
        metrics = []

    def check(**options):
        settings = {"ann_file": file, "metric": ["bbox", "segm"], **options}
        mm_datasets.check_scored({"type": "CocoMetric", **settings})
        mm_datasets.check_scored([{"type": CocoMetric, **settings}])
        Evaluator.metrics = [CocoMetric(**settings)]
        mm_datasets.check_evaluator(Evaluator, file, DATASETS.get("mmdet.CocoDataset").METAINFO["classes"])
        return Evaluator.metrics[0]._coco_api

    def damage(**values):
        edit(root, lambda content: content["annotations"][1].update(values), "val2017")

    edit(root, lambda content: content["annotations"][0].pop("iscrowd"), "val2017")
    assert [annotation["iscrowd"] for annotation in check().anns.values()] == [0] * 4
    damage(segmentation=[[50, 12, 90, 12]])
    check(metric="bbox")
    with pytest.raises(UserError, match=r"the annotation 2, whose first polygon has fewer than three points: remove"):
        check()
    damage(segmentation={"size": [64, 96], "counts": "`"})
    with pytest.raises(UserError, match=r"the annotation 2, which has run lengths that are neither whole numbers"):
        check()
    damage(segmentation=[[50, 12, 90, 12, 90, 56, 50, 56]], id=0)
    with pytest.raises(UserError, match=r"val2017\.json has an annotation of id 0"):
        check()
    edit(root, lambda content: content["annotations"][1].pop("area"), "val2017")
    with pytest.raises(UserError, match=r"has no valid 'area' in annotations\[1\]"):
        check()
    edit(root, lambda content: content.pop("annotations"), "val2017")
    check(format_only=True, outfile_prefix=str(tmp_path / "out"))
    edit(root, lambda content: content["categories"].reverse(), "val2017")
    with pytest.raises(UserError, match=r"val2017\.json lists its categories in a different order"):
        check(format_only=True, outfile_prefix=str(tmp_path / "out"))


def test_dropped_images_are_counted(tmp_path, warnings):
    root = write_coco(tmp_path / "data")
    Image.new("RGB", (96, 31)).save(root / "train2017" / "1.jpg")
    edit(root, lambda content: content["images"][1].update(height=31))

    def clip(content):
        for annotation in content["annotations"][2:4]:
            annotation.update(bbox=[4, 4, 36, 20], segmentation=[[4, 4, 40, 4, 40, 24, 4, 24]])

    edit(root, clip)
    assert len(open_instances(root)) == 4 and not warnings
    assert len(open_instances(root, filter_cfg={"min_size": 32, "filter_empty_gt": True})) == 2
    (line,) = warnings
    assert line.endswith(
        "training drops 2 of 4 images: 1 with a side under 32 pixels, e.g. 1.jpg, 1 without objects of the classes "
        "(filter_cfg)"
    )
    assert len(open_instances(root, filter_cfg={"min_size": 32})) == 3
    assert "training drops 1 of 4 images: 1 with a side under 32 pixels" in warnings[1]
    assert len(open_instances(root, filter_cfg={"min_size": 32}, test_mode=True)) == 4 and len(warnings) == 2


def test_names_of_two_unicode_forms(masks, tmp_path, warnings):
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    (masks / "images" / "training" / "1.jpg").rename(masks / "images" / "training" / f"{composed}.jpg")
    (masks / "annotations" / "training" / "1.png").rename(masks / "annotations" / "training" / f"{decomposed}.png")
    with pytest.raises(
        UserError, match=f"without a mask, .*; '{decomposed}' looks the same, but is in Unicode form NFD"
    ):
        open_masks(masks)
    (masks / "train.txt").write_text(f"{decomposed}\n", encoding="utf-8")
    with pytest.raises(UserError, match=f"not in .*, first {decomposed}; '{composed}' looks the same"):
        open_masks(masks, ann_file="train.txt")
    root = write_coco(tmp_path / "coco")
    (root / "train2017" / "0.jpg").rename(root / "train2017" / f"{decomposed}.jpg")
    edit(root, lambda content: content["images"][0].update(file_name=f"{composed}.jpg"))
    dataset = open_instances(root, pipeline=[{"type": "LoadImage"}])
    with pytest.raises(UserError, match=f"No such file or directory; '{decomposed}.jpg' looks the same"):
        dataset[0]


@pytest.mark.parametrize("data", [None, b"\xff\xfe1\0", b""], ids=["missing", "utf-16", "empty"])
def test_a_list_of_names_that_cannot_be_read(masks, data):
    (masks / "train.txt").write_bytes(data or b"")
    if data is None:
        (masks / "train.txt").unlink()
    with pytest.raises(UserError, match=r"train\.txt (cannot be read as a list of images|contains no usable images)"):
        open_masks(masks, ann_file="train.txt")


def test_pictures_and_masks_over_pillows_limit(masks, monkeypatch):
    dataset = open_masks(masks)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(
        UserError, match=r"training/0\.jpg has more than 2,000 pixels, Pillow's limit: cut it into tiles"
    ):
        dataset[0]
    mask = masks / "annotations" / "training" / "0.png"
    with pytest.raises(UserError, match=r"mask .*0\.png cannot be read: .*exceeds limit"):
        dataset.pipeline.transforms[1]._load_seg_map({"seg_map_path": str(mask), "reduce_zero_label": False})
    with pytest.raises(UserError, match=r"0\.\w+ has more than 2,000 pixels"):
        open_masks(masks)
