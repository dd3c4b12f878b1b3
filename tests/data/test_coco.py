"""Annotation files: categories in another order, annotations that mmdet loses, ids that COCO's evaluation loses."""

import math

import pytest

from elfatt.data import UserError
from elfatt.data.coco import check_annotations, check_categories, check_ids, form_faults, load_coco

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
    corners = {"bbox": [60, 40, 90, 70]}  # right and bottom in place of width and height
    line = check_annotations("f.json", content({}, corners, corners, {"area": 0}), NAMES)
    assert line.startswith("f.json: 2 boxes reach outside their image, the first with id 2: a box is [left, top, width")
    assert "; 1 of 4 annotations are lost" in line
    assert check_annotations("f.json", content({}, {"bbox": [60, 40, 40.5, 40.5]}), NAMES) is None


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
    with pytest.raises(UserError, match=r"a different order than the classes: \[cow\] instead of \[\] from number 3"):
        check_categories("f.json", file, NAMES)


def test_an_evaluated_annotation_has_no_id_0():
    file = content({}, {})
    check_ids("f.json", file)
    check_ids("f.json", {"annotations": [{"image_id": 7, "segments_info": []}]})
    file["annotations"][1]["id"] = 0
    with pytest.raises(UserError, match="id 0, which COCO's evaluation treats as no match: number from 1"):
        check_ids("f.json", file)


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "No such file"), ("", "is empty"), ('{"images": [', "is not JSON"), ("[]", "has no tables")],
)
def test_files_that_are_none(tmp_path, text, message):
    path = tmp_path / "f.json"
    if text is not None:
        path.write_text(text)
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


def test_run_lengths_fill_their_image():
    lengths = {"size": [80, 100], "counts": [10, 7990]}
    assert check_annotations("f.json", content({"segmentation": lengths}), NAMES) is None
    with pytest.raises(UserError, match="has run lengths of 20 pixels, its image has 8000: re-encode the mask"):
        check_annotations("f.json", content({"segmentation": {**lengths, "counts": [10, 10]}}), NAMES)
