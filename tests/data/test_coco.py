"""Annotation files: categories in another order, annotations that mmdet loses, ids that COCO's evaluation loses."""

import gzip
import math
import random

import numpy as np
import pytest

from elfatt.data import UserError
from elfatt.data.coco import (
    check_annotations,
    check_categories,
    check_evaluated,
    dropped_images,
    form_faults,
    load_coco,
)

POLYGON = [[10, 10, 50, 10, 50, 40, 10, 40]]
NAMES = ("cat", "dog", "cow")


def content(*annotations):
    """One image of 100 × 80 pixels, and annotations that differ from a good one."""
    good = {"image_id": 7, "category_id": 1, "bbox": [10, 10, 40, 30], "area": 1200, "iscrowd": 0}
    return {
        "images": [{"id": 7, "file_name": "a.jpg", "width": 100, "height": 80}],
        "categories": [{"id": i + 1, "name": name} for i, name in enumerate(NAMES)],
        "annotations": [
            {"id": number, **good, "segmentation": POLYGON, **changes}
            for number, changes in enumerate(annotations, start=1)
        ],
    }


LOST = {
    "an area of 0": {"area": 0},
    "a box in 0…1, not in pixels": {"bbox": [0.1, 0.1, 0.4, 0.3]},
    "a box less than a pixel wide or high": {"bbox": [10, 10, 40, 0.5]},
    "a box outside its image": {"bbox": [120, 10, 40, 30]},
    "no polygon of three or more points": {"segmentation": [[10, 10, 50, 40]]},
    "polygons in 0…1, not in pixels": {"segmentation": [[0.1, 0.1, 0.5, 0.1, 0.5, 0.4]]},
    "a category that is not listed": {"category_id": 9},
    "an image that is not listed": {"image_id": 9},
}


@pytest.mark.parametrize("reason", LOST)
def test_lost_annotations_are_counted(reason):
    changes = LOST[reason]
    assert check_annotations("f.json", content({}, {}), NAMES) is None
    line = check_annotations("f.json", content({}, changes, {"iscrowd": 1}, changes), NAMES)
    assert line.startswith("f.json: 2 of 4 annotations are lost: 2 because each ")
    assert reason in line and line.endswith(", the first with id 2")
    with pytest.raises(UserError, match=f"f.json has 2 annotations and no object to learn .* {reason}.*id 1"):
        check_annotations("f.json", content(changes, changes), NAMES)


@pytest.mark.parametrize("segmentation", [[[]], [[10, 10], [50, 10], [50, 40]]])
def test_polygons_without_three_points_are_lost(segmentation):
    with pytest.raises(UserError, match="no polygon of three or more points"):
        check_annotations("f.json", content({"segmentation": segmentation}), NAMES)


def test_boxes_that_reach_outside_their_image_are_counted():
    hidden = {"bbox": [60, 40, 90, 70], "segmentation": [[60, 40, 150, 40, 150, 110, 60, 110]]}  # partly outside
    line = check_annotations("f.json", content({}, hidden, hidden, {"area": 0}), NAMES)
    assert line.startswith("f.json: 2 boxes reach outside their image, the first with id 2: a box is [left, top, width")
    assert "; 2 masks reach outside their image, the first with id 2; 1 of 4 annotations are lost" in line
    whole = {"bbox": [60, 40, 40.5, 40.5], "segmentation": [[60, 40, 100, 40, 100, 80]]}
    assert check_annotations("f.json", content({}, whole), NAMES) is None


def test_crowds_alone_teach_nothing():
    with pytest.raises(UserError, match="2 because each is a crowd"):
        check_annotations("f.json", content({"iscrowd": 1}, {"iscrowd": 1}), NAMES)


def test_no_annotation_and_other_categories_are_no_fault():
    assert check_annotations("f.json", content(), NAMES) is None
    with pytest.raises(UserError, match="has no annotation of the classes"):
        check_annotations("f.json", content(), NAMES, training=True)
    with pytest.raises(UserError, match="has no annotation of the classes"):
        check_annotations("f.json", content({"category_id": 2}), ["cat"], training=True)
    assert check_annotations("f.json", content({}, {"category_id": 2, "area": 0}), ["cat"]) is None


@pytest.mark.parametrize(
    "changes",
    [
        {"segmentation": [10, 10, 50, 10, 50, 40]},
        {"segmentation": [[[10, 10], [50, 10], [50, 40]]]},
        {"segmentation": []},
        {"segmentation": [["10", "10", "50", "10", "50", "40"]]},
        {"segmentation": {"counts": [9], "size": [100, 80]}},
        {"segmentation": [[1, 2, 3, math.nan, 5, 6]]},
        {"bbox": [1, 2, 3]},
        {"bbox": ["1", "2", "3", "4"]},
        {"bbox": [1, 2, math.inf, 4]},
        {"bbox": [1, 2, 3, math.nan]},
        {"bbox": [1, 2, 3, 10**400]},
        {"bbox": [1, 2, 3, 1e7]},
        {"bbox": [1, 2, 3, None]},
        {"segmentation": [[1, 2, 3e8, 4, 5, 6]]},
        {"segmentation": [[1, 2, 3, -math.inf, 5, 6]]},
        {"segmentation": [*POLYGON, None]},
        {"segmentation": {"counts": [8000], "size": [80.0, 100]}},
        {"segmentation": {"counts": [8000], "size": "80"}},
        {"segmentation": {"size": [80, 100]}},
        {"iscrowd": "0"},
    ],
    ids=str,
)
def test_annotations_that_cannot_be_read(changes):
    with pytest.raises(UserError, match="f.json has the annotation 2, which has "):
        check_annotations("f.json", content({}, changes), NAMES)


def test_categories_keep_their_order():
    file = content()
    check_categories("f.json", file, NAMES)
    check_categories("f.json", file, ["cat", "cow"])  # the file may have more
    with pytest.raises(
        UserError,
        match=r"a different order than the classes: \[cat, dog, cow\] instead of \[dog, cat, cow\] from number 0 on",
    ):
        check_categories("f.json", file, ["dog", "cat", "cow"])
    with pytest.raises(UserError, match=r"names 2 of the 3 classes of the configuration, not \[hen\]"):
        check_categories("f.json", file, ["cat", "dog", "hen"])
    file["categories"].append({"id": 9, "name": "cow"})
    with pytest.raises(UserError, match=r"^f.json lists the category \[cow\] more than once: give its annotations one"):
        check_categories("f.json", file, NAMES)
    check_categories("f.json", file, ["cat", "dog"])  # others do not matter
    with pytest.raises(UserError, match=r"metainfo\['classes'\] lists the category \[cat\] more than once"):
        check_categories("f.json", content(), [*NAMES, "cat"])
    file["categories"] = [{"id": 1, "name": "caf\u00e9"}]
    with pytest.raises(UserError, match="not \\[cafe\u0301\\]; 'caf\u00e9' looks the same, but is in Unicode form NFC"):
        check_categories("f.json", file, ["cafe\u0301"])


def test_an_evaluated_annotation_has_no_id_0():
    file = content({}, {})
    check_evaluated("f.json", file)
    check_evaluated("f.json", {"annotations": [{"image_id": 7, "segments_info": []}]})
    file["annotations"][1]["id"] = 0
    with pytest.raises(UserError, match="id 0, which COCO's evaluation treats as no match: number from 1"):
        check_evaluated("f.json", file)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "No such file"),
        (b"", "is empty"),
        (b'{"images": [', "is not JSON in UTF-8"),
        (b"[]", "has no tables"),
        ("{}".encode("utf-16"), "is not JSON in UTF-8"),
        ("{}".encode("utf-8-sig"), "is not JSON in UTF-8 .* without a byte-order mark"),
        ('{"é": 1}'.encode("latin-1"), "is not JSON in UTF-8"),
        (b"[" * 100_000, "is not JSON in UTF-8"),
        (gzip.compress(b"{}", mtime=0), r"is compressed \(gzip\): unpack it"),
        (b"PK\3\4", r"is compressed \(zip\): unpack it"),
    ],
    ids=str,
)
def test_files_that_are_none(tmp_path, data, message):
    path = tmp_path / "f.json"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(UserError, match=f"f.json .*{message}"):
        load_coco(path)


def test_fields_and_ids_are_there_once():
    file = content({}, {"id": 1})
    del file["images"][0]["width"]
    del file["categories"]
    assert [fault for fault, _ in form_faults(file)] == [
        "has no valid 'width' in images[0]",
        "has no categories",
        "has id 1 in annotations 2 times",
    ]


def test_files_without_masks_serve_detection_alone():
    file = content({"iscrowd": 0}, {})
    for annotation in file["annotations"]:
        del annotation["segmentation"], annotation["iscrowd"]
    assert not list(form_faults(file, masks=False))
    assert check_annotations("f.json", file, NAMES, masks=False, training=True) is None
    assert [fault for fault, _ in form_faults(file)] == [
        f"has no valid 'segmentation' in annotations[{number}]" for number in range(2)
    ]


def packed(mask):
    """Run lengths of a mask ``[H, W]``, packed by a plain loop."""
    flat = mask.T.ravel()
    ends = np.flatnonzero(np.diff(flat, append=1 - flat[-1])) + 1
    counts = [0] * int(flat[0]) + np.diff(ends, prepend=0).tolist()
    text = ""
    for place, count in enumerate(counts):
        value = count - counts[place - 2] if place > 2 else count
        more = True
        while more:
            group, value = value & 31, value >> 5
            more = value != (-1 if group & 16 else 0)
            text += chr(48 + group + 32 * more)
    return counts, text


def test_run_lengths_are_decoded():
    """Every form has the extent of its mask, so that a box that fits passes, and one 3 pixels off does not."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        mask = np.zeros((80, 100), np.uint8)
        left, top, right, bottom = *rng.integers(0, 60, 2), *rng.integers(61, 80, 2)
        mask[top:bottom, left:right] = 1
        mask[top + 1 : bottom - 1, left + 1 : right - 1] = rng.integers(0, 2, (bottom - top - 2, right - left - 2))
        box = [int(edge) for edge in (left, top, right - left, bottom - top)]
        for counts in packed(mask):
            shape = {"size": [80, 100], "counts": counts}
            assert check_annotations("f.json", content({"segmentation": shape, "bbox": box}), NAMES) is None
            moved = [box[0] + 3 + box[2] // 4, *box[1:]]
            with pytest.raises(UserError, match="has 1 of 1 boxes that contradict their masks"):
                check_annotations("f.json", content({"segmentation": shape, "bbox": moved}), NAMES)


COUNTS, TEXT = packed(np.pad(np.ones((30, 40), np.uint8), ((10, 40), (10, 50))))


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ([10, 10], "has run lengths of 20 pixels, its image has 8,000: encode the mask again"),
        ([*COUNTS, 1], "has run lengths of 8,001 pixels"),
        (packed(np.ones((79, 100), np.uint8))[1], "has run lengths of 7,900 pixels"),
        (TEXT[:-3], "has run lengths of"),
        ("", "neither whole numbers from 0 nor the text that pycocotools packs"),
        (TEXT[:-2] + "`", "neither whole numbers"),  # says that a character follows
        (TEXT + "\x7f", "neither whole numbers"),
        (TEXT + "é", "neither whole numbers"),
        ("P" * 20 + "0", "neither whole numbers"),
        ([*COUNTS[:-1], -COUNTS[-1]], "neither whole numbers"),
        ([*COUNTS[:-1], str(COUNTS[-1])], "neither whole numbers"),
        ([*COUNTS[:-1], 0.5], "neither whole numbers"),
        ([8000, True], "neither whole numbers"),
        ([10**30], "neither whole numbers"),
        ([], "neither whole numbers"),
        (None, "neither whole numbers"),
    ],
    ids=str,
)
def test_run_lengths_that_pycocotools_would_misread(counts, message):
    shape = {"size": [80, 100], "counts": COUNTS}
    for good in (COUNTS, TEXT):
        assert check_annotations("f.json", content({"segmentation": {**shape, "counts": good}}), NAMES) is None
    with pytest.raises(UserError, match=f"f.json has the annotation 2, which .*{message}"):
        check_annotations("f.json", content({}, {"segmentation": {**shape, "counts": counts}}), NAMES)


def objects(count=40):
    """Boxes inside the 100 × 80 pixels of the image, each with the outline of an ellipse."""
    rng = random.Random(0)
    for _ in range(count):
        across, down = rng.uniform(8, 40), rng.uniform(8, 32)
        left, top = rng.uniform(0, 100 - across), rng.uniform(0, 80 - down)
        turns = [2 * math.pi * step / 12 for step in range(12)]
        points = [(left + across * (1 + math.cos(turn)) / 2, top + down * (1 + math.sin(turn)) / 2) for turn in turns]
        yield (left, top, across, down), points


def of_box(change):
    return [{"bbox": change(*box), "segmentation": [sum(map(list, points), [])]} for box, points in objects()]


def of_mask(change):
    pairs = [(box, [change(*box, *point) for point in points]) for box, points in objects()]
    return [{"bbox": list(box), "segmentation": [sum(map(list, points), [])]} for box, points in pairs]


OTHER_MEANINGS = {
    "corners": of_box(lambda x, y, w, h: [x, y, x + w, y + h]),
    "corners at the edge": [
        {"bbox": [50, 12, 90, 56], "segmentation": [[50, 12, 90, 12, 90, 56, 50, 56]]} for _ in range(40)
    ],
    "centres": of_box(lambda x, y, w, h: [x + w / 2, y + h / 2, w, h]),
    "percent": of_box(lambda x, y, w, h: [x, y / 0.8, w, h / 0.8]),
    "rows first": of_box(lambda x, y, w, h: [y, x, h, w]),
    "corners, rows first": of_box(lambda x, y, w, h: [y, x, y + h, x + w]),
    "from below": of_box(lambda x, y, w, h: [x, 80 - y - h, w, h]),
    "another scale": of_box(lambda x, y, w, h: [x / 2, y / 2, w / 2, h / 2]),
    "half a size": of_box(lambda x, y, w, h: [x, y, w / 2, h / 2]),
    "polygons, rows first": of_mask(lambda x, y, w, h, u, v: (v, u)),
    "polygons in their box": of_mask(lambda x, y, w, h, u, v: (u - x, v - y)),
    "polygons in percent of their box": of_mask(lambda x, y, w, h, u, v: (100 * (u - x) / w, 100 * (v - y) / h)),
}


@pytest.mark.parametrize("meaning", OTHER_MEANINGS)
@pytest.mark.parametrize("masks", [True, False])
def test_boxes_and_masks_of_another_meaning_stop(meaning, masks):
    good = of_box(lambda *box: list(box))
    assert check_annotations("f.json", content(*good), NAMES, masks) is None
    wrong = OTHER_MEANINGS[meaning]
    with pytest.raises(
        UserError, match=r"f.json has \d+ of \d+ boxes that contradict their masks, e.g. of annotation \d+:"
    ):
        check_annotations("f.json", content(*wrong), NAMES, masks)
    note = check_annotations("f.json", content(*good, *good, wrong[1]), NAMES, masks)
    assert "1 of 81 boxes contradict their masks, the first with id 81" in note


@pytest.mark.parametrize(
    "change",
    [
        lambda *box: [round(value) for value in box],
        lambda x, y, w, h: [x + 1, y + 1, w - 1, h - 1],
        lambda x, y, w, h: [x - 0.1 * w, y - 0.1 * h, 1.2 * w, 1.2 * h],
    ],
    ids=["rounded", "inclusive", "loose"],
)
def test_boxes_drawn_loosely_pass(change):
    note = check_annotations("f.json", content(*of_box(change)), NAMES)
    assert note is None or "contradict" not in note


def test_what_a_mask_loses_is_counted():
    far = {"bbox": [10, 2, 40, 38], "segmentation": [[10, 10, 50, 10, 50, 40, 10, 40, 30, -3]]}
    note = check_annotations("f.json", content({}, far), NAMES)
    assert note == "f.json: 1 masks reach outside their image, the first with id 2"
    first = [*POLYGON, [1, 2, 3, 4]]
    note = check_annotations("f.json", content({}, {"segmentation": first}), NAMES)
    assert note == "f.json: 1 annotations lose polygons of fewer than three points, the first with id 2"
    empty = {"size": [80, 100], "counts": [8000]}
    with pytest.raises(
        UserError, match=r"e.g. of annotation 1: its box is \[10, 10, 40, 30\], its mask covers nothing: a"
    ):
        check_annotations("f.json", content({"segmentation": empty}), NAMES)
    for shape in (None, [], [[]], [[0] * 6], empty, "?"):  # not used
        assert check_annotations("f.json", content({"segmentation": shape}), NAMES, masks=False) is None


def test_a_file_under_several_ids_is_counted():
    file = content({}, {})
    file["images"].append({**file["images"][0], "id": 8, "file_name": "./a.jpg"})
    note = check_annotations("f.json", file, NAMES)
    assert note.endswith(
        "1 files are listed under several ids, each with only some of the objects, e.g. a.jpg under [7, 8]"
    )


def test_dropped_images_are_counted():
    file = content({})
    file["images"] += [{"id": 8, "file_name": "b.jpg", "width": 31, "height": 80}, {**file["images"][0], "id": 9}]
    file["annotations"].append({**file["annotations"][0], "image_id": 8})
    assert dropped_images(file, NAMES, 0, empty=False) is None
    assert dropped_images(file, NAMES, 32) == (
        "training drops 2 of 3 images: 1 with a side under 32 pixels, e.g. b.jpg, 1 without objects of the classes"
    )
    assert dropped_images(file, ["dog"], 32).endswith("training drops 3 of 3 images: 3 without objects of the classes")


@pytest.mark.parametrize(
    ("table", "values"),
    [
        ("images", {"width": 0}),
        ("images", {"height": -80}),
        ("images", {"width": math.nan}),
        ("images", {"width": 10.5}),
        ("images", {"height": math.inf}),
        ("images", {"width": 10**400}),
        ("images", {"id": True}),
        ("images", {"id": 2**70}),
        ("images", {"file_name": ""}),
        ("categories", {"id": 1.0}),
        ("annotations", {"area": math.nan}),
        ("annotations", {"area": True}),
        ("annotations", {"image_id": "7"}),
    ],
    ids=str,
)
def test_fields_that_are_no_size_name_or_number(table, values):
    file = content({})
    file[table][0].update(values)
    assert [fault for fault, _ in form_faults(file)] == [f"has no valid '{next(iter(values))}' in {table}[0]"]


def test_whole_numbers_may_be_floats():
    file = content({"bbox": [10.0, 10.0, 40.0, 30.0]})
    file["images"][0].update(width=100.0, height=80.0)
    assert not list(form_faults(file)) and check_annotations("f.json", file, NAMES) is None
