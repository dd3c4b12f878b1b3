"""Checks a user's ADE20K or COCO folder before training starts: one line a problem, with its path and the remedy.

File names and annotation files are read completely. Images and masks are opened for a sample, or all with `--full`.
Needs no mm package. Exit code: 0 where nothing is wrong, else 1.

ADE20K: images/{training,validation}/*.jpg, annotations/{training,validation}/*.png of the same names
COCO:   {train,val}2017/*.jpg, annotations/instances_{train,val}2017.json
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

ADE20K_IMAGES = {"training": 20_210, "validation": 2_000}
COCO_IMAGES = {"train2017": 118_287, "val2017": 5_000}
COCO_CATEGORIES = 80
SAMPLE = 100  # images opened at the start of each split, and as many more at random
SHOWN = 20  # lines with the same remedy
TOLERANCE = 1.0  # pixels that a box may reach beyond its image: COCO rounds coordinates
COCO_FIELDS = {
    "images": {"id": int, "file_name": str, "width": int, "height": int},
    "categories": {"id": int, "name": str},
    "annotations": {
        "id": int,
        "image_id": int,
        "category_id": int,
        "bbox": list,
        "area": (int, float),
        "iscrowd": int,
        "segmentation": (list, dict),
    },
}
DOWNLOAD = "download and unpack this part again, or pass --any-size for data of your own"


class Problem(NamedTuple):
    """Something wrong: where, what, and what to do."""

    path: Path | str
    fault: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.path}: {self.fault}; {self.remedy}"


def check_ade20k(root: Path, split: str, args: argparse.Namespace) -> Iterator[Problem]:
    """Problems of ``root/images/{split}/*.jpg`` and ``root/annotations/{split}/*.png``.

    Args:
        root: The folder of the data set.
        split: ``training`` or ``validation``.
        args: The command line.
    """
    folders = root / "images" / split, root / "annotations" / split
    missing = [folder for folder in folders if not folder.is_dir()]
    yield from (Problem(folder, "no such folder", "see --help for what is expected") for folder in missing)
    if missing:
        return
    images, masks = (
        {path.stem: path for path in folder.glob(f"*{suffix}")}
        for folder, suffix in zip(folders, (".jpg", ".png"), strict=True)
    )
    yield from _check_count(folders[0], len(images), ADE20K_IMAGES[split], args)
    for name in sorted(images.keys() - masks.keys()):
        yield Problem(images[name], "has no mask", f"add it to {folders[1]} as a .png, or remove the image")
    for name in sorted(masks.keys() - images.keys()):
        yield Problem(masks[name], "has no image", f"add it to {folders[0]} as a .jpg, or remove the mask")
    for name in _sample(sorted(images.keys() & masks.keys()), f"{split} images", args.full):
        image = yield from _open(images[name])
        mask = yield from _open(masks[name])
        if mask is None:
            continue
        if image is not None and image.size != mask.size:
            fault = f"is {_size(mask.size)}, its image {_size(image.size)} pixels"
            yield Problem(masks[name], fault, "write the mask at the size of its image")
        labels = np.asarray(mask)
        if labels.ndim != 2:
            yield Problem(masks[name], f"is a {mask.mode} picture", "write one index a pixel, as 8-bit grey")
        elif labels.max() > args.classes:
            unknown = ", ".join(map(str, np.unique(labels[labels > args.classes])[:5]))
            remedy = f"labels are 0 (other) and 1…{args.classes}; --classes says how many you have"
            yield Problem(masks[name], f"has the labels {unknown}", remedy)


def check_coco(root: Path, split: str, args: argparse.Namespace) -> Iterator[Problem]:
    """Problems of ``root/{split}/*.jpg`` and ``root/annotations/instances_{split}.json``.

    Args:
        root: The folder of the data set.
        split: ``train2017`` or ``val2017``.
        args: The command line.
    """
    folder, path = root / split, root / "annotations" / f"instances_{split}.json"
    if not folder.is_dir():
        yield Problem(folder, "no such folder", "see --help for what is expected")
    content = yield from _read_coco(path)
    if content is None:
        return
    images = {image["id"]: image for image in content["images"]}
    categories = {category["id"] for category in content["categories"]}
    if len(categories) != COCO_CATEGORIES and not args.any_size:
        yield Problem(path, f"has {len(categories)} categories, expected {COCO_CATEGORIES}", DOWNLOAD)
    for annotation in tqdm(content["annotations"], f"{split} annotations", disable=None, leave=False):
        for fault, remedy in _annotation_faults(annotation, images, categories):
            yield Problem(path, f"annotation {annotation['id']} {fault}", remedy)
    if not folder.is_dir():
        return
    files = {file.name for file in folder.iterdir() if not file.name.startswith(".")}
    yield from _check_count(folder, len(files), COCO_IMAGES[split], args)
    present = []
    for image in content["images"]:
        file = folder / image["file_name"]
        if image["file_name"] in files or file.is_file():  # the second for names with a folder
            present.append(image)
        else:
            yield Problem(file, f"is named in {path.name} and not there", "add the image, or unpack the images again")
    for image in _sample(present, f"{split} images", args.full):
        opened = yield from _open(folder / image["file_name"])
        stated = image["width"], image["height"]
        if opened is not None and opened.size != stated:
            fault = f"is {_size(opened.size)} pixels, {path.name} says {_size(stated)}"
            yield Problem(folder / image["file_name"], fault, "correct width and height, or restore the image")


def _read_coco(path: Path) -> Generator[Problem, None, dict[str, Any] | None]:
    """Yields what is wrong with an annotation file; returns its content, or None where that cannot be used."""
    try:
        content = json.loads(path.read_bytes())
    except OSError:
        yield Problem(path, "no such file", "unpack annotations_trainval2017.zip, or write your own")
        return None
    except ValueError as error:
        fault = f"is not JSON ({error})" if path.stat().st_size else "is empty"
        yield Problem(path, fault, "unpack or write the file again")
        return None
    problems = list(_content_problems(path, content))
    yield from problems
    return None if problems else content


def _content_problems(path: Path, content: Any) -> Iterator[Problem]:
    for table, fields in COCO_FIELDS.items():
        entries = content.get(table) if isinstance(content, dict) else None
        if not isinstance(entries, list) or not entries:
            yield Problem(path, f"has no {table}", f"it needs the non-empty lists {', '.join(COCO_FIELDS)}")
            continue
        for number, entry in enumerate(entries):
            for field, kind in fields.items():
                if not isinstance(entry, dict) or not isinstance(entry.get(field), kind):
                    remedy = f"each of {table} needs {', '.join(fields)} as COCO defines them"
                    yield Problem(path, f"{table}[{number}] has no valid '{field}'", remedy)
        counts = Counter(str(entry.get("id")) for entry in entries if isinstance(entry, dict))
        for number, count in counts.items():
            if count > 1:
                yield Problem(path, f"{table} has the id {number} {count} times", f"number the {table} anew")


def _annotation_faults(annotation: dict[str, Any], images: dict[int, Any], known: set[int]) -> Iterator[tuple]:
    """Yields (fault, remedy) of one annotation whose fields are all there."""
    if annotation["id"] == 0:
        yield "has the id 0", "number from 1: COCO's evaluation takes 0 for no match"
    if annotation["category_id"] not in known:
        yield f"has the unknown category {annotation['category_id']}", "list the category, or correct the id"
    image = images.get(annotation["image_id"])
    if image is None:
        yield f"is of the unknown image {annotation['image_id']}", "list the image, or remove the annotation"
        return
    box, width, height = annotation["bbox"], image["width"], image["height"]
    try:
        left, top, across, down = map(float, box)
    except (TypeError, ValueError):
        yield f"has the box {box}", "a box is [left, top, width, height] in pixels"
    else:
        fits = left + across <= width + TOLERANCE and top + down <= height + TOLERANCE
        if not (fits and left >= -TOLERANCE and top >= -TOLERANCE and across >= 0 and down >= 0):  # so NaN is found
            fault = f"has the box {box}, outside {image['file_name']} of {_size((width, height))} pixels"
            yield fault, "a box is [left, top, width, height] in pixels, inside its image"
    shape = annotation["segmentation"]
    if not shape or (isinstance(shape, dict) and ("counts" not in shape or shape.get("size") != [height, width])):
        yield (
            "has no valid segmentation",
            "polygons, or run lengths with counts and the image's [height, width] as size",
        )


def _check_count(folder: Path, count: int, expected: int, args: argparse.Namespace) -> Iterator[Problem]:
    if not count:
        yield Problem(folder, "has no images", "see --help for what is expected")
    elif count != expected and not args.any_size:
        yield Problem(folder, f"has {count:,} images, expected {expected:,}", DOWNLOAD)


def _open(path: Path) -> Generator[Problem, None, Image.Image | None]:
    """Yields why a picture cannot be decoded to its end; returns it, or None."""
    try:
        with Image.open(path) as image:
            image.load()
            return image
    except (OSError, SyntaxError, ValueError) as error:  # Pillow raises all three on damaged files
        yield Problem(path, f"cannot be read ({error})", "restore the file")
        return None


def _sample(items: list, title: str, full: bool) -> Iterator:
    """The first ones and as many more at random, or all; with a progress bar on a terminal."""
    first, rest = items[:SAMPLE], items[SAMPLE:]
    if not full and len(rest) > SAMPLE:
        rest = random.Random(0).sample(rest, SAMPLE)
    return iter(tqdm(first + rest, title, disable=None, leave=False))


def _size(size: tuple[int, int]) -> str:
    return "{}×{}".format(*size)


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the problems and their number; returns the exit code."""
    checks = {"ade20k": (check_ade20k, ADE20K_IMAGES), "coco": (check_coco, COCO_IMAGES)}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", choices=checks, help="layout of the folder")
    parser.add_argument("root", type=Path, help="folder of the data set")
    parser.add_argument("--splits", nargs="+", metavar="SPLIT", help="only these, e.g. validation or val2017")
    parser.add_argument("--any-size", action="store_true", help="any number of images and categories: data of your own")
    parser.add_argument("--classes", type=int, default=150, help="largest label of a mask, for ade20k (default: 150)")
    parser.add_argument("--full", action="store_true", help="open all images and masks, not a sample")
    args = parser.parse_args(argv)
    check, splits = checks[args.dataset]
    for split in args.splits or ():
        if split not in splits:
            parser.error(f"{args.dataset} has no split '{split}': give {' or '.join(splits)}")
    counts: Counter[str] = Counter()
    for split in args.splits or splits:
        for problem in check(args.root, split, args):
            counts[problem.remedy] += 1
            if counts[problem.remedy] <= SHOWN:
                tqdm.write(str(problem))
    for remedy, count in counts.items():
        if count > SHOWN:
            print(f"… and {count - SHOWN:,} more lines that say: {remedy}")
    opened = "all images" if args.full else "a sample of the images; --full opens all"
    print(f"{args.root}: {counts.total():,} problem(s) found, having opened {opened}")
    return int(bool(counts))


if __name__ == "__main__":
    sys.exit(main())
