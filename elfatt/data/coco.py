"""Read and check annotation files in COCO format (https://cocodataset.org/#format-data)."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from elfatt.data.errors import UserError

FIELDS: dict[str, dict[str, type | tuple[type, ...]]] = {
    "images": {"id": int, "file_name": str, "width": (int, float), "height": (int, float)},
    "categories": {"id": int, "name": str},
    "annotations": {
        "id": int,
        "image_id": int,
        "category_id": int,
        "bbox": list,
        "area": (int, float),
        "segmentation": (list, dict),
    },
}
TOLERANCE = 1.0  # pixels by which a box may exceed its image, as COCO rounds coordinates
BOX = "a box is [left, top, width, height] in pixels"
POLYGONS = "write a list of polygons [[x1, y1, x2, y2, x3, y3, …], …] in pixels, or run lengths"


def load_coco(path: str | os.PathLike) -> dict[str, Any]:
    """Read an annotation file.

    Raises:
        UserError: The file is missing or not JSON.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        remedy = "unpack annotations_trainval2017.zip, or write your own"
        raise UserError(path, f"cannot be read ({error.strerror})", remedy) from error
    except ValueError as error:
        fault = f"is not JSON ({error})" if path.stat().st_size else "is empty"
        raise UserError(path, fault, "extract or write the file again") from error
    if not isinstance(content, dict):
        raise UserError(path, "has no tables", f"it needs the lists {', '.join(FIELDS)}")
    return content


def form_faults(content: dict[str, Any], masks: bool = True) -> Iterator[tuple[str, str]]:
    """Yield (fault, remedy) for missing tables, invalid fields and duplicate ids.

    Args:
        content: Content of a file.
        masks: Whether annotations need a segmentation.
    """
    for table, fields in FIELDS.items():
        fields = {field: kind for field, kind in fields.items() if masks or field != "segmentation"}
        entries = content.get(table)
        if not isinstance(entries, list):
            yield f"has no {table}", f"it needs the lists {', '.join(FIELDS)}"
            continue
        for number, entry in enumerate(entries):
            for field, kind in fields.items():
                if not isinstance(entry, dict) or not isinstance(entry.get(field), kind):
                    remedy = f"each of {table} needs {', '.join(fields)} as COCO defines them"
                    yield f"has no valid '{field}' in {table}[{number}]", remedy
        counts = Counter(str(entry.get("id")) for entry in entries if isinstance(entry, dict))
        for identity, count in counts.items():
            if count > 1:
                yield f"has id {identity} in {table} {count} times", f"renumber the {table}"


def check_categories(path: str | os.PathLike, content: dict[str, Any], classes: Sequence[str]) -> None:
    """Check that categories and classes are in the same order, as mmdet numbers categories in file order.

    Args:
        path: The file.
        content: Content of the file.
        classes: Class names; other categories are ignored.

    Raises:
        UserError: A class is missing, duplicated or out of order.
    """
    named = [category["name"] for category in content["categories"] if category["name"] in classes]
    if named == list(classes):
        return
    missing = [name for name in classes if name not in named]
    if missing:
        raise UserError(
            path,
            f"names {len(set(named))} of the {len(classes)} classes of the configuration, not {_names(missing)}",
            "list all of them in its 'categories', or set metainfo and num_classes to match it",
        )
    place = next((i for i, (a, b) in enumerate(zip(named, classes, strict=False)) if a != b), len(classes))
    raise UserError(
        path,
        f"lists its categories in a different order than the classes: {_names(named[place:])} instead of "
        f"{_names(classes[place:])} from number {place} on",
        "reorder the list 'categories', keeping ids and annotations, or, before training, metainfo['classes'] for all "
        "files",
    )


def check_ids(path: str | os.PathLike, content: dict[str, Any]) -> None:
    """Check that no annotation has id 0, which COCO's evaluation treats as no match.

    Raises:
        UserError: An annotation has id 0.
    """
    if any(annotation.get("id") == 0 for annotation in content["annotations"]):  # panoptic annotations have no id
        raise UserError(path, "has an annotation of id 0, which COCO's evaluation treats as no match", "number from 1")


def check_annotations(
    path: str | os.PathLike,
    content: dict[str, Any],
    classes: Collection[str],
    masks: bool = True,
    training: bool = False,
) -> str | None:
    """Check that annotations are readable and not all lost.

    Args:
        path: The file.
        content: Content of the file, without faults found by ``form_faults``.
        classes: Class names; annotations of other categories are ignored.
        masks: Whether annotations need a segmentation.
        training: Whether at least one object is required.

    Returns:
        A line about lost annotations and boxes outside their images, or None.

    Raises:
        UserError: An annotation is unreadable, or no object is left.
    """
    images = {image["id"]: image for image in content["images"]}
    listed = {category["id"] for category in content["categories"]}
    other = {category["id"] for category in content["categories"] if category["name"] not in classes}
    usable, crowds = 0, 0
    lost: Counter[str] = Counter()
    first: dict[str, int] = {}
    outside: list[int] = []
    for annotation in content["annotations"]:
        for fault, remedy, stops in annotation_faults(annotation, images, listed, masks):
            if stops:
                raise UserError(path, f"has the annotation {annotation['id']}, which {fault}", remedy)
        if annotation["category_id"] in other:
            continue
        reason = why_lost(annotation, images, listed, masks)
        if reason:
            lost[reason] += 1
            first.setdefault(reason, annotation["id"])
        elif annotation.get("iscrowd"):
            crowds += 1
        else:
            usable += 1
            outside += [annotation["id"]] * _reaches_outside(annotation["bbox"], images[annotation["image_id"]])
    if crowds and not usable:
        lost["is a crowd (iscrowd 1)"] = crowds
    notes = []
    if outside:
        notes.append(f"{len(outside):,} boxes reach outside their image, the first with id {outside[0]}: {BOX}")
    reasons = "; ".join(
        f"{count:,} because each {reason}" + (f", the first with id {first[reason]}" if reason in first else "")
        for reason, count in lost.most_common()
    )
    if lost:
        notes.append(f"{lost.total():,} of {lost.total() + crowds + usable:,} annotations are lost: {reasons}")
    if training and images and not (usable or lost):
        raise UserError(path, "has no annotation of the classes", "correct the file, or metainfo['classes']")
    if usable or not lost:
        return f"{path}: {'; '.join(notes)}" if notes else None
    fault = f"has {lost.total():,} annotations and no object to learn among them, {reasons}"
    raise UserError(path, fault, "correct what is named; scripts/prepare_coco.sh checks the whole file")


def annotation_faults(
    annotation: dict[str, Any], images: dict[int, Any], categories: Collection[int], masks: bool = True
) -> Iterator[tuple[str, str, bool]]:
    """Yield (fault, remedy, whether it is fatal) for one annotation with all its fields.

    Args:
        annotation: The annotation.
        images: All images by id.
        categories: All category ids.
        masks: Whether it needs a segmentation.
    """
    if annotation["category_id"] not in categories:
        yield f"has the unknown category {annotation['category_id']}", "list the category, or correct the id", False
    image = images.get(annotation["image_id"])
    if image is None:
        yield f"is of the unknown image {annotation['image_id']}", "list the image, or remove the annotation", False
        return
    box, width, height = annotation["bbox"], image["width"], image["height"]
    if len(box) != 4 or not _are_numbers(box):
        yield f"has the box {box}", BOX, True
    elif _reaches_outside(box, image):
        fault = f"has the box {box}, outside {image['file_name']} of {width}×{height} pixels"
        yield fault, f"{BOX}, inside its image", False
    if annotation.get("iscrowd", 0) not in (0, 1):
        yield f"has the iscrowd {annotation['iscrowd']!r}", "write 0 or 1, without quotes", True
    if not masks:
        return
    shape = annotation["segmentation"]
    if not shape:
        yield "has no valid segmentation, it is empty", POLYGONS, True
    elif isinstance(shape, dict):
        if "counts" not in shape or shape.get("size") != [height, width]:
            fault = f"has no valid segmentation, run lengths of size {shape.get('size')}, not [height, width] = "
            yield f"{fault}{[height, width]}", "write the image's actual size and counts", True
        elif isinstance(shape["counts"], list) and sum(shape["counts"]) != height * width:
            fault = f"has run lengths of {sum(shape['counts'])} pixels, its image has {height * width}"
            yield fault, "re-encode the mask", True
    elif not all(isinstance(part, list) and _are_numbers(part) for part in shape):
        fault = "has no valid segmentation, polygons are lists of numbers in one list"
        yield fault, POLYGONS, True


def why_lost(
    annotation: dict[str, Any], images: dict[int, Any], categories: Collection[int], masks: bool = True
) -> str | None:
    """Return why mmdet's ``CocoDataset`` and ``LoadAnnotations`` silently skip an annotation, or None."""
    image = images.get(annotation["image_id"])
    if image is None:
        return "is of an image that is not listed"
    if annotation["category_id"] not in categories:
        return "is of a category that is not listed"
    if annotation.get("ignore"):
        return "says 'ignore'"
    left, top, across, down = annotation["bbox"]
    if annotation["area"] <= 0:
        return "has an area of 0"
    if max(left, top, across, down) <= 1:
        return "has a box in 0…1, not in pixels"
    if across < 1 or down < 1:
        return "has a box less than a pixel wide or high"
    if min(left + across, image["width"]) <= max(left, 0) or min(top + down, image["height"]) <= max(top, 0):
        return "has a box outside its image"
    if not masks or isinstance(annotation["segmentation"], dict):
        return None
    polygons = [part for part in annotation["segmentation"] if len(part) >= 6 and len(part) % 2 == 0]
    if not polygons:
        return "has no polygon of three or more points [x1, y1, x2, y2, x3, y3, …]"
    if all(max(polygon) <= 1 for polygon in polygons):
        return "has polygons in 0…1, not in pixels"
    return None


def _are_numbers(values: list) -> bool:
    """Return whether all values are finite numbers; a NaN in a polygon makes pycocotools hang."""
    try:
        return math.isfinite(sum(values))
    except TypeError:
        return False


def _reaches_outside(box: Sequence[float], image: dict[str, Any]) -> bool:
    left, top, across, down = box
    fits = left + across <= image["width"] + TOLERANCE and top + down <= image["height"] + TOLERANCE
    return not (fits and left >= -TOLERANCE and top >= -TOLERANCE and across >= 0 and down >= 0)


def _names(names: Sequence[str]) -> str:
    shown = ", ".join(map(str, names[:5]))
    return f"[{shown}{', …' if len(names) > 5 else ''}]"
