"""Check a user's ADE20K or COCO folder before training: one line per problem, with its path and the remedy.

File names and annotation files are checked completely, images and masks for a sample, or all with ``--full``. Needs no
mm package and applies the rules of the training programs. Exits with 0 if there are no problems, 1 otherwise. Lines
that start with "note" report losses and open questions, not problems.

ADE20K: images/{training,validation}/*, annotations/{training,validation}/* with the same names and any extension
COCO:   {train,val}2017/*, annotations/instances_{train,val}2017.json
"""

from __future__ import annotations

import argparse
import random
import sys
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from elfatt.console import replace_unprintable
from elfatt.data import UserError, check_shape, check_size, is_image, list_images, opened, read_image
from elfatt.data.coco import (
    FIELDS,
    SMALL,
    annotation_faults,
    check_annotations,
    check_categories,
    check_evaluated,
    dropped_images,
    form_faults,
    load_coco,
)
from elfatt.data.masks import check_classes, check_labels, check_mask
from elfatt.suggest import other_form

ADE20K_IMAGES = {"training": 20_210, "validation": 2_000}
COCO_IMAGES = {"train2017": 118_287, "val2017": 5_000}
COCO_CATEGORIES = 80
SAMPLE = 100  # images to open at the start of each split, and again at random
SHOWN = 20  # maximum lines per remedy
DOWNLOAD = "download and unpack this part again, or pass --any-size for your own data"


Found = UserError | str  # a problem, or a note


def check_ade20k(root: Path, split: str, args: argparse.Namespace) -> Iterator[Found]:
    """Yield the problems and notes of ``root/images/{split}`` and ``root/annotations/{split}``.

    Args:
        root: Dataset folder.
        split: ``training`` or ``validation``.
        args: Parsed options.
    """
    folders = root / "images" / split, root / "annotations" / split
    listed = yield from _caught(list_images, folders[0], ".jpg")
    labelled = yield from _caught(list_images, folders[1], ".png")
    if listed is None or labelled is None:
        return
    (images, others), (masks, _) = listed, labelled
    if others:
        yield f"{folders[0]}: {len(others):,} files are skipped, first {others[0]}"
    yield from _check_count(folders[0], len(images), ADE20K_IMAGES[split], args)
    for name in sorted(images.keys() - masks.keys()):
        yield UserError(images[name], "has no mask", f"add one with the same name to {folders[1]}, or remove the image")
    for name in sorted(masks.keys() - images.keys()):
        yield UserError(masks[name], "has no image", f"add one with the same name to {folders[0]}, or remove the mask")
    first = 0 if args.keep_zero else 1
    largest = first + args.classes - 1
    remedy = (
        f"labels are {'' if args.keep_zero else '0 (other) and '}{first} to {largest}, see --classes and --keep-zero"
    )
    turned, pixels, read = [], np.zeros(args.classes, int), 0
    pairs = sorted(images.keys() & masks.keys())
    for name in _sample(pairs, f"{split} images", args.full):
        opened = yield from _caught(_open, images[name])
        size = yield from _caught(check_mask, masks[name])
        if size is None:
            continue
        if opened and (yield from _caught(check_size, images[name], size, masks[name])):
            turned.append(images[name])
        labels = yield from _caught(_read_labels, masks[name])
        if labels is not None:
            yield from _caught(check_labels, masks[name], labels, largest, remedy)
            pixels += np.bincount(labels.ravel(), minlength=256)[first : largest + 1]
            read += 1
    yield from _turned(turned)
    if split == "training" and read:
        names = [str(label) for label in range(first, largest + 1)]
        for problem in _caught(check_classes, folders[1], pixels, names, read):
            yield problem if read == len(pairs) else str(problem)  # as in training: other masks may differ


def check_coco(root: Path, split: str, args: argparse.Namespace) -> Iterator[Found]:
    """Yield the problems and notes of ``root/{split}`` and ``root/annotations/instances_{split}.json``.

    Args:
        root: Dataset folder.
        split: ``train2017`` or ``val2017``.
        args: Parsed options.
    """
    folder, path = root / split, root / "annotations" / f"instances_{split}.json"
    if not folder.is_dir():
        yield UserError(folder, "is not a folder", "see --help for the expected layout")
    content = yield from _read_coco(path, not args.no_masks)
    if content is None:
        return
    yield from _check_instances(path, content, split, args)
    yield from _check_categories(path, content)
    if not folder.is_dir():
        return
    files = {file.name for file in folder.iterdir() if is_image(file)}
    yield from _check_count(folder, len(files), COCO_IMAGES[split], args)
    present, turned = [], []
    for image in content["images"]:
        file = folder / image["file_name"]
        if image["file_name"] in files or file.is_file():  # is_file for names with a folder
            present.append(image)
        else:
            hint = other_form(image["file_name"], files)
            yield UserError(file, f"is listed in {path.name} but missing{hint}", "add it, or unpack the images again")
    for image in _sample(present, f"{split} images", args.full):
        file = folder / image["file_name"]
        if not (yield from _caught(_open, file)):
            continue
        if (yield from _caught(check_size, file, (image["width"], image["height"]), path.name)):
            turned.append(file)
    yield from _turned(turned)


def _read_coco(path: Path, masks: bool) -> Generator[Found, None, dict[str, Any] | None]:
    """Yield the problems of an annotation file; return its content, or None if it cannot be used."""
    content = yield from _caught(load_coco, path)
    if content is None:
        return None
    faults = list(form_faults(content, masks))
    faults += [
        (f"has no {table}", f"it needs the non-empty lists {', '.join(FIELDS)}")
        for table in FIELDS
        if content.get(table) == []
    ]
    yield from (UserError(path, *fault) for fault in faults)
    return None if faults else content


def _check_instances(path: Path, content: dict[str, Any], split: str, args: argparse.Namespace) -> Iterator[Found]:
    images = {image["id"]: image for image in content["images"]}
    categories = {category["id"] for category in content["categories"]}
    if len(categories) != COCO_CATEGORIES and not args.any_size:
        yield UserError(path, f"has {len(categories)} categories, expected {COCO_CATEGORIES}", DOWNLOAD)
    classes = {category["name"] for category in content["categories"]}
    readable = True
    for annotation in tqdm(content["annotations"], f"{split} annotations", disable=None, leave=False):
        for fault, remedy, stops in annotation_faults(annotation, images, categories, not args.no_masks):
            yield UserError(path, f"has the annotation {annotation['id']}, which {fault}", remedy)
            readable &= not stops
    if not readable:
        return
    lost = yield from _caught(check_annotations, path, content, classes, not args.no_masks)
    if lost:
        yield lost
    if split.startswith("val"):
        yield from _caught(check_evaluated, path, content, not args.no_masks)
    elif dropped := dropped_images(content, classes, SMALL):
        yield f"{path}: {dropped}"


def _check_categories(path: Path, content: dict[str, Any]) -> Iterator[UserError]:
    """Check that no category is listed twice, and that the order is that of the training annotations, if readable."""
    own = [category["name"] for category in content["categories"]]
    other, classes = path.with_name("instances_train2017.json"), own
    if path != other:
        try:
            classes = [category["name"] for category in load_coco(other)["categories"]]
        except (UserError, LookupError, TypeError):
            pass  # reported by its own check
    extra = [name for name in own if name not in classes]
    if extra:
        yield UserError(path, f"has the category {extra[0]}, missing in {other.name}", "list the same in both files")
    yield from _caught(check_categories, path, content, list(dict.fromkeys(classes)))


def _caught(rule: Callable, path: Path, *others) -> Generator[UserError, None, Any]:
    """Yield the problem that a rule raises about a file; return the rule's result, or None."""
    try:
        return rule(path, *others)
    except UserError as error:
        yield error
    except (OSError, SyntaxError, ValueError) as error:  # Pillow raises all three on damaged files
        yield UserError(path, f"cannot be read ({error})", "restore the file")


def _open(path: Path) -> bool:
    """Read and check an image; return True."""
    check_shape(path, read_image(path).size)
    return True


def _read_labels(path: Path) -> np.ndarray:
    with opened(path) as image:
        return np.asarray(image).astype(np.uint8)


def _turned(images: list[Path]) -> Iterator[str]:
    if images:
        yield (
            f"{len(images)} of the images opened are rotated by their EXIF orientation, first {images[0]}: "
            "if labels were drawn on the pixels as stored, remove the tag (exiftool -Orientation= FILE)"
        )


def _check_count(folder: Path, count: int, expected: int, args: argparse.Namespace) -> Iterator[UserError]:
    if not count:
        yield UserError(folder, "has no images", "see --help for the expected layout")
    elif count != expected and not args.any_size:
        yield UserError(folder, f"has {count:,} images, expected {expected:,}", DOWNLOAD)


def _sample(items: list, title: str, full: bool) -> Iterator:
    """Return the first items and as many random ones, or all, with a progress bar on a terminal."""
    first, rest = items[:SAMPLE], items[SAMPLE:]
    if not full and len(rest) > SAMPLE:
        rest = random.Random(0).sample(rest, SAMPLE)
    return iter(tqdm(first + rest, title, disable=None, leave=False))


def main(argv: Sequence[str] | None = None) -> int:
    """Print the problems and their number, and return the exit code."""
    replace_unprintable()
    checks = {"ade20k": (check_ade20k, ADE20K_IMAGES), "coco": (check_coco, COCO_IMAGES)}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", choices=checks, help="dataset layout")
    parser.add_argument("root", type=Path, help="dataset folder")
    parser.add_argument("--splits", nargs="+", metavar="SPLIT", help="only these, e.g. validation or val2017")
    parser.add_argument(
        "--any-size", action="store_true", help="any number of images and categories, for your own data"
    )
    parser.add_argument("--classes", type=int, default=150, help="number of classes, for ade20k (default: 150)")
    parser.add_argument(
        "--keep-zero", action="store_true", help="for ade20k: label 0 is a class, as with reduce_zero_label=False"
    )
    parser.add_argument("--no-masks", action="store_true", help="for coco: boxes only, without segmentations")
    parser.add_argument("--full", action="store_true", help="open all images and masks instead of a sample")
    args = parser.parse_args(argv)
    check, splits = checks[args.dataset]
    for split in args.splits or ():
        if split not in splits:
            parser.error(f"{args.dataset} has no split '{split}': pass {' or '.join(splits)}")
    counts: Counter[str] = Counter()
    for split in args.splits or splits:
        for found in check(args.root, split, args):
            if isinstance(found, str):
                tqdm.write(f"note: {found}")
                continue
            counts[found.remedy] += 1
            if counts[found.remedy] <= SHOWN:
                tqdm.write(str(found))
    for remedy, count in counts.items():
        if count > SHOWN:
            print(f"… and {count - SHOWN:,} more with the remedy: {remedy}")
    opened = "all images" if args.full else "a sample of the images; --full opens all"
    print(f"{args.root}: {counts.total():,} problem(s) found, having opened {opened}")
    return int(bool(counts))


if __name__ == "__main__":
    sys.exit(main())
