"""Read and check annotation files in COCO format (https://cocodataset.org/#format-data)."""

from __future__ import annotations

import json
import os
import posixpath
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import numpy as np

from elfatt.data.archives import compression_of
from elfatt.data.errors import UserError
from elfatt.suggest import other_form

LARGEST = 1_000_000  # pixels: no image is wider or higher, and pycocotools draws every pixel of an outline


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and -1e18 < value < 1e18  # without booleans, NaN and infinity


def _is_id(value: Any) -> bool:
    return type(value) is int and _is_number(value)


def _is_side(value: Any) -> bool:
    return _is_number(value) and 1 <= value <= LARGEST and value == int(value)


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and value.strip() != ""


def _is_list(value: Any) -> bool:
    return isinstance(value, list)


def _is_shape(value: Any) -> bool:
    return isinstance(value, list | dict)


FIELDS: dict[str, dict[str, Callable[[Any], bool]]] = {
    "images": {"id": _is_id, "file_name": _is_name, "width": _is_side, "height": _is_side},
    "categories": {"id": _is_id, "name": _is_name},
    "annotations": {
        "id": _is_id,
        "image_id": _is_id,
        "category_id": _is_id,
        "bbox": _is_list,
        "area": _is_number,
        "segmentation": _is_shape,
    },
}
TOLERANCE = 1.0  # pixels by which a box may exceed its image, as COCO rounds coordinates
SLACK = 2.0, 0.2  # by which a box may differ from its mask: pixels, and share of the mask's side
MANY = 0.25  # share of boxes that differ from their masks from which a file is wrong, not some of its annotations
SMALL = 32  # pixels: min_size of the training configs
BOX = "a box is [left, top, width, height] in pixels"
POLYGONS = "write a list of polygons [[x1, y1, x2, y2, x3, y3, …], …] in pixels, or run lengths"


def load_coco(path: str | os.PathLike) -> dict[str, Any]:
    """Read an annotation file.

    Raises:
        UserError: The file is missing, compressed, or not JSON in UTF-8.
    """
    path = Path(path)
    try:
        if kind := compression_of(path):
            raise UserError(path, f"is compressed ({kind})", "unpack it")
        content = json.loads(path.read_bytes().decode())  # not in UTF-16 or with a mark, as pycocotools reads neither
    except UserError:
        raise
    except OSError as error:
        remedy = "unpack annotations_trainval2017.zip, or write your own"
        raise UserError(path, f"cannot be read ({error.strerror})", remedy) from error
    except (RecursionError, ValueError) as error:
        fault = f"is not JSON in UTF-8 ({error})" if path.stat().st_size else "is empty"
        raise UserError(path, fault, "extract it, or write it again without a byte-order mark") from error
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
        fields = {field: is_valid for field, is_valid in fields.items() if masks or field != "segmentation"}
        entries = content.get(table)
        if not isinstance(entries, list):
            yield f"has no {table}", f"it needs the lists {', '.join(FIELDS)}"
            continue
        for number, entry in enumerate(entries):
            for field, is_valid in fields.items():
                if not isinstance(entry, dict) or not is_valid(entry.get(field)):
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
    if named == list(classes) == list(dict.fromkeys(named)):
        return
    for where, names, remedy in (
        (path, named, "give its annotations one category id, and remove the other"),
        ("metainfo['classes']", classes, "list each class once"),
    ):
        if twice := [name for name, count in Counter(names).items() if count > 1]:
            raise UserError(where, f"lists the category {_names(twice)} more than once", remedy)
    missing = [name for name in classes if name not in named]
    if missing:
        raise UserError(
            path,
            f"names {len(named)} of the {len(classes)} classes of the configuration, not {_names(missing)}"
            + other_form(missing[0], (category["name"] for category in content["categories"])),
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


def check_evaluated(path: str | os.PathLike, content: dict[str, Any], masks: bool = True) -> None:
    """Check that COCO's evaluation can score all annotations.

    Args:
        path: The file.
        content: Content of the file.
        masks: Whether masks are scored.

    Raises:
        UserError: An annotation has id 0, which counts as no match, or a first polygon that is none.
    """
    for annotation in content["annotations"]:
        if annotation.get("id") == 0:  # panoptic annotations have no id
            fault = "has an annotation of id 0, which COCO's evaluation treats as no match"
            raise UserError(path, fault, "number from 1")
        shape = annotation.get("segmentation") if masks else None
        if isinstance(shape, list) and len(shape[0]) < 6:
            fault = f"has the annotation {annotation['id']}, whose first polygon has fewer than three points"
            raise UserError(path, fault, "remove the polygon, which COCO's evaluation cannot read")


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
        A line that counts lost annotations, boxes that reach outside their images or contradict their masks, dropped
        polygons, and files under several ids; or None.

    Raises:
        UserError: An annotation is unreadable, no object is left, or many boxes contradict their masks.
    """
    images = {image["id"]: image for image in content["images"]}
    listed = {category["id"] for category in content["categories"]}
    other = {category["id"] for category in content["categories"] if category["name"] not in classes}
    usable, crowds, compared = 0, 0, 0
    lost: Counter[str] = Counter()
    first: dict[str, int] = {}
    outside: list[int] = []
    beyond: list[int] = []
    shortened: list[int] = []
    unlike: list[tuple[int, list, list[float] | None]] = []
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
            continue
        image, shape = images[annotation["image_id"]], annotation.get("segmentation")
        if annotation.get("iscrowd"):
            crowds += 1
        else:
            usable += 1
            outside += [annotation["id"]] * _reaches_outside(annotation["bbox"], image)
        extent = None if not masks and segmentation_fault(shape, image) else _extent(shape)
        if extent is None and not masks:
            continue  # only boxes are used
        compared += 1
        if extent is None or _differs(annotation["bbox"], extent):
            unlike.append((annotation["id"], annotation["bbox"], extent))
        beyond += [annotation["id"]] * (extent is not None and _reaches_outside(_as_box(extent), image))
        shortened += [annotation["id"]] * (isinstance(shape, list) and len(_polygons(shape)) < len(shape))
    if len(unlike) > MANY * compared:
        number, box, extent = unlike[0]
        example = f"its box is {_shown(box)}, its mask covers {_shown(_as_box(extent)) if extent else 'nothing'}"
        fault = f"has {len(unlike):,} of {compared:,} boxes that contradict their masks, e.g. of annotation {number}: "
        remedy = f"{BOX} around its mask, and polygons are x, y in pixels of the image"
        raise UserError(path, f"{fault}{example}", remedy)
    if crowds and not usable:
        lost["is a crowd (iscrowd 1)"] = crowds
    found = (
        (outside, "boxes reach outside their image", f": {BOX}"),
        (beyond, "masks reach outside their image", ""),
        ([number for number, _, _ in unlike], f"of {compared:,} boxes contradict their masks", ""),
        (shortened, "annotations lose polygons of fewer than three points", ""),
    )
    notes = [f"{len(ids):,} {what}, the first with id {ids[0]}{rule}" for ids, what, rule in found if ids]
    if several := _listed_twice(content["images"]):
        name, numbers = next(iter(several.items()))
        what = "files are listed under several ids, each with only some of the objects"
        notes.append(f"{len(several):,} {what}, e.g. {name} under {numbers}")
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


def dropped_images(content: dict[str, Any], classes: Collection[str], least: int, empty: bool = True) -> str | None:
    """Describe the images that mmdet's ``filter_cfg`` drops from training, or return None.

    Args:
        content: Content of a file.
        classes: Class names.
        least: Minimum width and height in pixels.
        empty: Whether images without objects of the classes are dropped.
    """
    wanted = {category["id"] for category in content["categories"] if category["name"] in classes}
    used = {annotation["image_id"] for annotation in content["annotations"] if annotation["category_id"] in wanted}
    total, images = len(content["images"]), content["images"]
    bare = sum(empty and image["id"] not in used for image in images)
    small = [image for image in images if min(image["width"], image["height"]) < least]
    small = [image["file_name"] for image in small if not empty or image["id"] in used]
    parts = [f"{len(small):,} with a side under {least} pixels, e.g. {small[0]}"] if small else []
    parts += [f"{bare:,} without objects of the classes"] * bool(bare)
    return f"training drops {len(small) + bare:,} of {total:,} images: {', '.join(parts)}" if parts else None


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
        yield f"has the box {str(box):.80}", BOX, True
    elif _reaches_outside(box, image):
        fault = f"has the box {box}, outside {image['file_name']} of {width}×{height} pixels"
        yield fault, f"{BOX}, inside its image", False
    if annotation.get("iscrowd", 0) not in (0, 1):
        yield f"has the iscrowd {annotation['iscrowd']!r:.80}", "write 0 or 1, without quotes", True
    if not masks:
        return
    if found := segmentation_fault(annotation["segmentation"], image):
        yield *found, True


def segmentation_fault(shape: Any, image: dict[str, Any]) -> tuple[str, str] | None:
    """Return (fault, remedy) of polygons or run lengths that pycocotools would misread or never finish, or None."""
    size, again = [image["height"], image["width"]], "encode the mask again, at its image's size"
    if not shape:
        return "has no valid segmentation, it is empty", POLYGONS
    if isinstance(shape, list):
        if all(isinstance(part, list) and (not part or _are_numbers(part)) for part in shape):
            return None
        return f"has no valid segmentation, polygons are lists of numbers in one list, up to {LARGEST:,}", POLYGONS
    if not isinstance(shape, dict):
        return "has no valid segmentation", POLYGONS
    if "counts" not in shape or shape.get("size") != size or not all(type(side) is int for side in shape["size"]):
        fault = (
            f"has no valid segmentation, run lengths of size {str(shape.get('size')):.80}, not [height, width] = {size}"
        )
        return fault, "write the image's actual size and counts"
    runs = _runs(shape["counts"])
    if runs is None:
        return "has run lengths that are neither whole numbers from 0 nor the text that pycocotools packs", again
    if int(runs.sum()) != size[0] * size[1]:
        return f"has run lengths of {int(runs.sum()):,} pixels, its image has {size[0] * size[1]:,}", again
    return None


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
    polygons = _polygons(annotation["segmentation"])
    if not polygons:
        return "has no polygon of three or more points [x1, y1, x2, y2, x3, y3, …]"
    if all(max(polygon) <= 1 for polygon in polygons):
        return "has polygons in 0…1, not in pixels"
    return None


def _are_numbers(values: list) -> bool:
    """Return whether all values are numbers of at most a million: beyond it, or with NaN, pycocotools hangs."""
    try:
        return bool(values) and sum(values) < np.inf and -LARGEST <= min(values) and max(values) <= LARGEST
    except (OverflowError, TypeError):
        return False


def _polygons(shape: list[list]) -> list[list]:
    """Return the polygons that mmdet keeps."""
    return [part for part in shape if len(part) >= 6 and len(part) % 2 == 0]


def _runs(counts: Any) -> np.ndarray | None:
    """Return the run lengths of a mask, or None if they are neither numbers nor packed as by pycocotools."""
    if isinstance(counts, list):
        if set(map(type, counts)) != {int} or min(counts) < 0 or max(counts) > LARGEST**2:
            return None
        return np.array(counts, np.int64)
    return _unpack(counts) if isinstance(counts, str) and counts.isascii() else None


@lru_cache(maxsize=1)  # asked for a fault, then for the extent
def _unpack(counts: str) -> np.ndarray | None:
    """Decode run lengths, or return None.

    A number is a row of characters of 5 bits, lowest first; bit 5 says that another follows, bit 4 of the last is the
    sign.
    """
    code = np.frombuffer(counts.encode(), np.uint8).astype(np.int64) - 48
    ends = np.flatnonzero(code & 32 == 0)
    if not len(ends) or ends[-1] != len(code) - 1 or code.min() < 0 or code.max() > 63:
        return None
    starts = np.concatenate([[0], ends[:-1] + 1])
    groups = ends - starts + 1
    if groups.max() > 8:
        return None
    place = 5 * (np.arange(len(code)) - starts.repeat(groups))
    runs = np.add.reduceat((code & 31) << place, starts)
    runs -= np.where(code[ends] & 16, np.int64(1) << 5 * groups, 0)
    for start in (1, 2):  # from the fourth number on, differences from the last but one
        runs[start::2] = runs[start::2].cumsum()
    return runs if runs.min() >= 0 and runs.max() <= LARGEST**2 else None


def _extent(shape: list[list] | dict[str, Any]) -> list[float] | None:
    """Return the left, top, right and bottom of a mask without faults, or None if it covers nothing."""
    if isinstance(shape, list):
        polygons = _polygons(shape)
        columns, rows = [part[::2] for part in polygons], [part[1::2] for part in polygons]
        edges = [function(map(function, values)) for function in (min, max) for values in (columns, rows) if polygons]
        return edges if polygons and edges[0] < edges[2] and edges[1] < edges[3] else None
    height = shape["size"][0]
    runs = cast(np.ndarray, _runs(shape["counts"]))
    ends = runs.cumsum()[1::2]
    starts = ends - runs[1::2]
    starts, last = starts[ends > starts], ends[ends > starts] - 1
    if not len(starts):
        return None
    within = starts // height == last // height
    top, bottom = (0, height) if not within.all() else ((starts % height).min(), (last % height).max() + 1)
    return [float(edge) for edge in (starts[0] // height, top, last[-1] // height + 1, bottom)]


def _as_box(extent: Sequence[float]) -> list[float]:
    left, top, right, bottom = extent
    return [left, top, right - left, bottom - top]


def _shown(values: Sequence[float]) -> str:
    return f"[{', '.join(f'{value:g}' for value in values)}]"


def _differs(box: Sequence[float], extent: Sequence[float]) -> bool:
    """Return whether an edge of a box is far from that of its mask."""
    left, top, across, down = box
    wide, high = (SLACK[0] + SLACK[1] * (extent[axis + 2] - extent[axis]) for axis in (0, 1))
    return (
        abs(left - extent[0]) > wide
        or abs(left + across - extent[2]) > wide
        or abs(top - extent[1]) > high
        or abs(top + down - extent[3]) > high
    )


def _listed_twice(images: list[dict[str, Any]]) -> dict[str, list[int]]:
    """Return the ids of each file that has several."""
    ids: dict[str, list[int]] = {}
    for image in images:
        ids.setdefault(posixpath.normpath(image["file_name"]), []).append(image["id"])
    return {name: numbers for name, numbers in ids.items() if len(numbers) > 1}


def _reaches_outside(box: Sequence[float], image: dict[str, Any]) -> bool:
    left, top, across, down = box
    fits = left + across <= image["width"] + TOLERANCE and top + down <= image["height"] + TOLERANCE
    return not (fits and left >= -TOLERANCE and top >= -TOLERANCE and across >= 0 and down >= 0)


def _names(names: Sequence[str]) -> str:
    shown = ", ".join(map(str, names[:5]))
    return f"[{shown}{', …' if len(names) > 5 else ''}]"
