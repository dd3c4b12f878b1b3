"""A damaged annotation file trains on the right objects, is counted in a warning, or stops with one line."""

import copy
import faulthandler
import gzip
import json
import math
import random

import numpy as np
import pytest
import torch
from mmengine.registry import DefaultScope
from PIL import Image
from pycocotools import mask as coco_mask

from elfatt.data import UserError
from elfatt.integrations import mm_datasets, mm_models

CLASSES = ("café", "dog", "cow")  # not ASCII
SIZE = 64, 96
BOXES = ((4, 4, 36, 36), (50, 12, 40, 44))
PIPELINE = [
    {"type": "LoadImage"},
    {"type": "CheckInstances"},
    {"type": "LoadAnnotations", "with_bbox": True, "with_mask": True},
]


def bitmap(box):
    x, y, w, h = box
    mask = np.zeros(SIZE, np.uint8)
    mask[y : y + h, x : x + w] = 1
    return mask


def segmentation(box, form):
    """A rectangle as a polygon, as run lengths, or as packed run lengths."""
    x, y, w, h = box
    if form == 0:
        return [[x, y, x + w, y, x + w, y + h, x, y + h]]
    packed = coco_mask.encode(np.asfortranarray(bitmap(box)))
    if form == 1:
        return {"size": list(SIZE), "counts": packed["counts"].decode()}
    flat = bitmap(box).T.ravel()
    changes = np.flatnonzero(np.diff(flat)) + 1
    return {"size": list(SIZE), "counts": np.diff(changes, prepend=0, append=flat.size).tolist()}


@pytest.fixture
def content(tmp_path):
    """Four images of two objects each, one of them a crowd."""
    images, annotations = [], []
    for number in range(4):
        Image.new("RGB", SIZE[::-1]).save(tmp_path / f"{number}.png")
        images.append({"id": number + 1, "file_name": f"{number}.png", "height": SIZE[0], "width": SIZE[1]})
        for label, box in enumerate(BOXES):
            place = len(annotations)
            known = {"id": place + 1, "image_id": number + 1, "category_id": label + 1, "iscrowd": int(place == 7)}
            shape = segmentation(box, place % 3)
            annotations.append({**known, "bbox": list(box), "area": box[2] * box[3], "segmentation": shape})
    categories = [{"id": label + 1, "name": name} for label, name in enumerate(CLASSES)]
    return {"images": images, "annotations": annotations, "categories": categories}


def places(node, path=()):
    """The paths of all values."""
    for key, value in node.items() if isinstance(node, dict) else enumerate(node):
        yield (*path, key)
        if isinstance(value, dict | list):
            yield from places(value, (*path, key))


def of_another_type(value, rng):
    kinds = [None, str(value), [value], {"value": value}, [], {}, "", math.nan, -math.inf]
    if isinstance(value, int):
        kinds += [float(value), bool(value)] * 2
    return rng.choice(kinds)


def of_another_size(value, rng):
    if isinstance(value, list | str):
        return rng.choice([value[:-1], value[1:], value * 2, value[: len(value) // 2], value + value[:1]])
    return value * rng.choice([9, 10**9, 10**400, 0.01]) if isinstance(value, int) else None


def of_another_sign(value, rng):
    if isinstance(value, int):
        return -value
    return [-x if isinstance(x, int) else x for x in value] if isinstance(value, list) else None


def in_another_order(value, rng):
    if isinstance(value, dict):
        return dict(reversed(value.items()))
    return value[::-1] if isinstance(value, list | str) else None


def damage(content, rng):
    """A description of the damage, and the damaged file."""
    content = copy.deepcopy(content)
    kind = rng.choice([of_another_type, of_another_size, of_another_sign, in_another_order, "removed", "encoding"])
    if kind == "encoding":
        text = json.dumps(content, ensure_ascii=False)
        ways = ["utf-8", "utf-8-sig", "utf-16", "utf-32", "latin-1", "cut", "gzip", "twice", "separator", "depth"]
        way = rng.choice(ways)
        data = text.encode(way if "-" in way else "utf-8")
        data = data[: rng.randrange(len(data))] if way == "cut" else data
        data = gzip.compress(data) if way == "gzip" else data * 2 if way == "twice" else data
        data = data.replace(b",", b";") if way == "separator" else b"[" * 10**5 if way == "depth" else data
        return f"encoding: {way}", data
    by_table = {}
    for path in places(content):
        by_table.setdefault((path[0], path[-1] if isinstance(path[-1], str) else path[-2:][0]), []).append(path)
    path = rng.choice(by_table[rng.choice(sorted(by_table, key=str))])
    parent = content
    for key in path[:-1]:
        parent = parent[key]
    before = parent[path[-1]]
    if kind is of_another_size and path[-2:-1] == ("segmentation",) and isinstance(before, list):
        kind = in_another_order  # a polygon that is traced twice covers nothing, but has the same extent
    if kind == "removed":
        del parent[path[-1]]
        return f"{path} removed", json.dumps(content).encode()
    parent[path[-1]] = kind(before, rng)
    return f"{path}: {before!r} {kind.__name__}: {str(parent[path[-1]])[:80]}", json.dumps(content).encode()


def open_file(root, **options):
    mm_models._register("mmdet")
    settings = {
        "type": "CocoDataset",
        "data_root": str(root),
        "ann_file": "f.json",
        "data_prefix": {"img": ""},
        "serialize_data": False,
    }
    with DefaultScope.overwrite_default_scope("mmdet"):
        return mm_datasets.open_dataset({**settings, "metainfo": {"classes": CLASSES}, "pipeline": PIPELINE, **options})


def overlap(one, two):
    return np.logical_and(one, two).sum() / max(1, np.logical_or(one, two).sum())


def train(root):
    """Load all objects as training does; the number that are wrong, or missing."""
    loaded = [item for item in open_file(root, filter_cfg={"filter_empty_gt": True, "min_size": 32})]
    right = 0
    for item in loaded:
        for box, label, mask in zip(
            item["gt_bboxes"].tensor, item["gt_bboxes_labels"], item["gt_masks"].masks, strict=True
        ):
            left, top, right_, bottom = box.round().int().tolist()
            truth = bitmap(BOXES[label]) if label < 2 else np.zeros(SIZE)
            drawn = bitmap((max(left, 0), max(top, 0), right_ - left, bottom - top))
            right += overlap(truth, mask) > 0.3 and overlap(truth, drawn) > 0.5
    given = len(json.loads((root / "f.json").read_bytes())["annotations"])
    return given - right + sum(len(item["gt_bboxes_labels"]) for item in loaded) - right


def evaluate(root):
    """Score perfect predictions as evaluation does; the AP of boxes."""
    from mmdet.evaluation import CocoMetric

    settings = {"ann_file": str(root / "f.json"), "metric": ["bbox", "segm"]}
    mm_datasets.check_scored({"type": "CocoMetric", **settings})
    dataset = open_file(root, test_mode=True)
    metric = CocoMetric(**settings)
    metric.dataset_meta = dataset.metainfo
    mm_datasets.check_evaluator(type("Evaluator", (), {"metrics": [metric]}), settings["ann_file"], CLASSES)
    boxes = np.array([[x, y, x + w, y + h] for x, y, w, h in BOXES], np.float32)
    for item in dataset:
        found = {"labels": np.arange(2), "scores": np.ones(2), "masks": np.stack([bitmap(box) for box in BOXES])}
        found = {key: torch.from_numpy(value) for key, value in {**found, "bboxes": boxes}.items()}
        sample = {"img_id": item["img_id"], "ori_shape": item["ori_shape"], "pred_instances": found}
        metric.process({}, [sample])
    scores = metric.evaluate(len(dataset))
    return scores["coco/bbox_mAP_50"]


@pytest.fixture
def warnings(monkeypatch):
    lines = []
    monkeypatch.setattr(mm_datasets, "warn", lines.append)
    return lines


def end_of(root, warnings):
    """``error``, ``warning`` or ``right``, and a text."""
    warnings.clear()
    ends = []
    for run in (train, evaluate):
        try:
            ends.append(run(root))
        except UserError as error:
            line = str(error)
            assert "\n" not in line and (".json" in line or "image /" in line), line
            ends.append(line)
    errors = [end for end in ends if isinstance(end, str)]
    if errors:
        return "error", errors[0]
    assert all("f.json: " in line and any(map(str.isdigit, line)) for line in warnings)
    if warnings:
        return "warning", warnings[0]
    assert ends[0] == 0, ends
    if len(json.loads((root / "f.json").read_bytes())["annotations"]) == 8:
        assert ends[1] > 0.999, ends
    return "right", ""


def test_200_damaged_files(tmp_path, content, warnings):
    (tmp_path / "f.json").write_bytes(json.dumps(content).encode())
    assert end_of(tmp_path, warnings) == ("right", "")
    rng, ends = random.Random(0), []
    faulthandler.dump_traceback_later(600, exit=True)  # pycocotools cannot be interrupted
    try:
        for _ in range(200):
            what, data = damage(content, rng)
            (tmp_path / "f.json").write_bytes(data)
            try:
                ends.append(end_of(tmp_path, warnings)[0])
            except BaseException as error:
                error.add_note(what)
                raise
    finally:
        faulthandler.cancel_dump_traceback_later()
    assert all(ends.count(kind) >= 10 for kind in ("error", "warning", "right"))
