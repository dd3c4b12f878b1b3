"""mmseg and mmdet datasets with the checks of ``elfatt.data``; nothing is skipped silently."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from mmengine.dataset import BaseDataset, ClassBalancedDataset, ConcatDataset, RepeatDataset
from mmengine.logging import print_log
from mmengine.registry import DATASETS
from PIL import Image, UnidentifiedImageError

from elfatt.data import UserError, check_size, is_image, list_images
from elfatt.data.classes import mismatch
from elfatt.data.coco import (
    check_annotations,
    check_categories,
    check_evaluated,
    dropped_images,
    form_faults,
    load_coco,
)
from elfatt.data.masks import check_classes, check_mask
from elfatt.integrations.mm_transforms import CheckMask
from elfatt.suggest import other_form

SAMPLE = 100  # images or masks per dataset to open before the first step
LOADS_MASKS = "LoadAnnotations"
MMENGINE_DATASETS = BaseDataset, ClassBalancedDataset, ConcatDataset, RepeatDataset


def open_dataset(config: dict) -> BaseDataset:
    """Build, list and check a dataset and the datasets it wraps.

    Args:
        config: Dataset config.

    Raises:
        UserError: It cannot be used; the message names its folder or annotation file.
    """
    dataset = DATASETS.build(lazy(config))
    if not isinstance(dataset, MMENGINE_DATASETS):
        return dataset
    for part in _unwrap(dataset):
        _open(part)
    dataset.full_init()
    return dataset


def lazy(config: dict) -> dict:
    """Return a dataset config with lazy initialisation, also of the datasets it wraps."""
    with DATASETS.switch_scope_and_registry(None) as registry:
        kind = registry.get(config["type"]) if isinstance(config["type"], str) else config["type"]
    if isinstance(kind, type) and not issubclass(kind, MMENGINE_DATASETS):
        return config
    config = {**config, "lazy_init": True}
    if "dataset" in config:
        config["dataset"] = lazy(config["dataset"])
    if "datasets" in config:
        config["datasets"] = [lazy(dataset) for dataset in config["datasets"]]
    return config


def check_training_masks(dataset: BaseDataset) -> None:
    """Read up to 100 masks as in training, or all of them if these contain fewer than two classes.

    Args:
        dataset: Initialised dataset; ignored if its pipeline reads no masks.

    Raises:
        UserError: All masks together have fewer than two classes; see ``check_classes``, and ``CheckMask`` for a single
            mask.
    """
    parts = [(part, _steps_to_masks(part)) for part in _unwrap(dataset)]
    parts = [(part, steps) for part, steps in parts if steps]
    if not parts:
        return
    names = parts[0][0].metainfo["classes"]
    pixels, masks = np.zeros(len(names), int), 0
    sample = [(steps, part, index) for part, steps in parts for index in _spread(part)]
    every = ((steps, part, index) for part, steps in parts for index in range(len(part)))
    for steps, part, index in itertools.chain(sample, every):
        if masks >= len(sample) and np.count_nonzero(pixels) >= min(2, len(names)):
            return
        results = part.get_data_info(index)
        for step in steps:
            results = step(results)
        pixels += np.bincount(results["gt_seg_map"].ravel(), minlength=256)[: len(names)]
        masks += 1
    check_classes(parts[0][0].data_prefix["seg_map_path"], pixels, names, masks - len(sample))


def check_scored(evaluator: dict | list[dict]) -> None:
    """Check the annotation files of mmdet's ``CocoMetric`` before it reads them.

    Args:
        evaluator: Config of the evaluator.

    Raises:
        UserError: COCO's evaluation could not read a file, or would not end.
    """
    for metric in evaluator if isinstance(evaluator, list) else [evaluator]:
        kind = metric.get("type") if isinstance(metric, dict) else None
        if getattr(kind, "__name__", str(kind)).split(".")[-1] != "CocoMetric" or not metric.get("ann_file"):
            continue
        wanted = metric.get("metric", "bbox")
        masks = "segm" in ([wanted] if isinstance(wanted, str) else wanted)
        path, content = metric["ann_file"], load_coco(metric["ann_file"])
        if metric.get("format_only"):
            content.setdefault("annotations", [])  # COCO's test sets have none
        _check_form(path, content, masks)
        check_annotations(path, content, {category["name"] for category in content["categories"]}, masks)
        check_evaluated(path, content, masks)


def check_evaluator(evaluator, source: str, classes: tuple[str, ...]) -> None:
    """Check that annotation files of mmdet's ``CocoMetric`` are scored under the right class names.

    Args:
        evaluator: mmengine evaluator.
        source: Path of the annotation file, for the message.
        classes: Classes of the dataset.

    Raises:
        UserError: See ``check_categories``.
    """
    for metric in evaluator.metrics:
        if coco := getattr(metric, "_coco_api", None):
            check_categories(source, coco.dataset, classes)
            for annotation in coco.dataset.get("annotations", ()):
                annotation.setdefault("iscrowd", 0)  # optional for us, not for pycocotools


def check_same_classes(where: str, classes: Sequence[str], trained: Sequence[str]) -> None:
    """Check that an index means the same class in the data and the model.

    Args:
        where: Checkpoint or evaluated dataset, for the message.
        classes: Classes of the data.
        trained: Classes the model was trained on.

    Raises:
        UserError: They differ, in names or order.
    """
    here, there = ({name: index for index, name in enumerate(names)} for names in (classes, trained))
    if difference := mismatch(here, there):
        remedy = "use the config and data it was trained with, or retrain"
        raise UserError(where, f"has different classes from the data: {difference}", remedy)


def warn(message: str) -> None:
    """Log a warning on the main process."""
    print_log(message, logger="current", level=logging.WARNING)


def _unwrap(dataset) -> list:
    """Return the datasets inside a ``RepeatDataset``, ``ConcatDataset`` or other wrapper, or the dataset itself."""
    if hasattr(dataset, "dataset"):
        return _unwrap(dataset.dataset)
    return [part for inner in getattr(dataset, "datasets", ()) for part in _unwrap(inner)] or [dataset]


def _open(dataset: BaseDataset) -> None:
    if _is_listed_by_mmseg(dataset):
        dataset.load_data_list = partial(_list_pairs, dataset)
    elif _is_read_by_pycocotools(dataset):
        dataset.COCOAPI = partial(_read_coco, dataset)
    try:
        dataset.full_init()
    except UserError:
        raise
    except ValueError as error:
        if dataset.data_list:
            raise
        # mmengine fails to serialise an empty list
        source = dataset.ann_file or dataset.data_prefix["img_path"]
        fault = f"contains no usable images (filter_cfg={dataset.filter_cfg})"
        raise UserError(source, fault, "check data_root, data_prefix and ann_file") from error
    for name in ("load_data_list", "COCOAPI"):
        vars(dataset).pop(name, None)  # spawned workers get the dataset without them
    for step in dataset.pipeline.transforms:
        if hasattr(step, "_load_seg_map"):  # mmcv's LoadAnnotations, whose errors do not name the file
            step._load_seg_map = partial(_load_mask, step._load_seg_map)
    _warn_of_turned(dataset)


def _load_mask(load: Callable[[dict], None], results: dict) -> None:
    try:
        load(results)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # Pillow raises all of them
        raise UserError(f"mask {results['seg_map_path']} cannot be read: {error}") from error


def _spread(dataset: BaseDataset) -> list[int]:
    """Return up to 100 evenly spaced indices of the dataset."""
    count = min(SAMPLE, len(dataset))
    return [i * len(dataset) // count for i in range(count)]


def _steps_to_masks(dataset: BaseDataset) -> list:
    """Return the pipeline's steps up to ``CheckMask`` or the mask loader; none if it loads no masks."""
    steps = dataset.pipeline.transforms
    last = [i for i, step in enumerate(steps) if isinstance(step, CheckMask) or type(step).__name__ == LOADS_MASKS]
    return steps[: last[-1] + 1] if last and hasattr(dataset, "reduce_zero_label") else []


def _warn_of_turned(dataset: BaseDataset) -> None:
    """Check up to 100 images; warn if EXIF rotates some and sizes do not show if the labels follow."""
    opened, turned = 0, []
    for item in map(dataset.get_data_info, _spread(dataset)):
        if not Path(item["img_path"]).is_file():
            continue  # reported when it is loaded
        if item.get("seg_map_path"):
            if not _steps_to_masks(dataset):
                return  # masks in another format, with their own reader
            size, owner = check_mask(item["seg_map_path"]), f"mask {item['seg_map_path']}"
        elif "width" in item:
            size, owner = (item["width"], item["height"]), dataset.ann_file
        else:
            return
        try:
            if check_size(item["img_path"], size, owner):
                turned.append(item["img_path"])
        except UnidentifiedImageError:
            continue  # another format, or damaged: reported when it is loaded
        opened += 1
    if turned:
        warn(
            f"{len(turned)} of {opened} images opened are rotated by their EXIF orientation, first {turned[0]}: "
            "if labels were drawn on the pixels as stored, remove the tag (exiftool -Orientation= FILE)"
        )


def _is_listed_by_mmseg(dataset: BaseDataset) -> bool:
    """Whether mmseg itself lists the dataset: local images, and masks in a separate folder."""
    listing = type(dataset).load_data_list
    theirs = (listing.__module__, listing.__qualname__)
    if theirs != ("mmseg.datasets.basesegdataset", "BaseSegDataset.load_data_list") or dataset.backend_args:
        return False
    folders = [Path(dataset.data_prefix[key]) for key in ("img_path", "seg_map_path") if dataset.data_prefix.get(key)]
    if len(folders) < 2:
        return False
    apart = not any(a.is_relative_to(b) for a, b in (folders, folders[::-1]))
    return apart and is_image("x" + dataset.img_suffix) and is_image("x" + dataset.seg_map_suffix)


def _list_pairs(dataset) -> list[dict]:
    """List data like mmseg's ``BaseSegDataset.load_data_list``, but with any file extension.

    See ``list_images`` for ``img_suffix`` and ``seg_map_suffix``.

    Raises:
        UserError: Images without a mask, two files with the same name, or names in ``ann_file`` without an image.
    """
    folders = [dataset.data_prefix[key] for key in ("img_path", "seg_map_path")]
    (images, others), (masks, _) = map(list_images, folders, (dataset.img_suffix, dataset.seg_map_suffix))
    if others:
        warn(f"{folders[0]}: {len(others):,} files are skipped, first {others[0]}")
    names = list(images)
    if dataset.ann_file:
        try:
            lines = Path(dataset.ann_file).read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            remedy = "write one image per line, in UTF-8"
            raise UserError(dataset.ann_file, f"cannot be read as a list of images ({error})", remedy) from error
        names = [line.strip() for line in lines if line.strip()]
        absent = [name for name in names if name not in images]
        if absent:
            fault = f"names {len(absent):,} images that are not in {folders[0]}, first {absent[0]}"
            fault += other_form(absent[0], images)
            raise UserError(dataset.ann_file, fault, "each line must be an image's path there, without extension")
    bare = [name for name in names if name not in masks]
    if bare:
        fault = f"contains {len(bare):,} of {len(names):,} images without a mask, first {images[bare[0]]}"
        fault += other_form(bare[0], masks)
        raise UserError(folders[0], fault, f"add masks with the same names to {folders[1]}, or remove the images")
    idle = [name for name in masks if name not in images]
    if idle:
        warn(f"{folders[1]}: {len(idle):,} of {len(masks):,} masks have no image, first {masks[idle[0]]}")
    rules = {"label_map": dataset.label_map, "reduce_zero_label": dataset.reduce_zero_label}
    return [
        {"img_path": str(images[name]), "seg_map_path": str(masks[name]), **rules, "seg_fields": []} for name in names
    ]


def _is_read_by_pycocotools(dataset: BaseDataset) -> bool:
    api = getattr(dataset, "COCOAPI", None)
    return api is not None and (api.__module__, api.__name__) == ("mmdet.datasets.api_wrappers.coco_api", "COCO")


def _read_coco(dataset, path: str):
    """Load and check an annotation file, replacing ``dataset.COCOAPI(path)``.

    Raises:
        UserError: See ``elfatt.data.coco``.
    """
    content = load_coco(path)
    if dataset.test_mode:
        content.setdefault("annotations", [])  # COCO's test sets have none
    masks = any(getattr(step, "with_mask", False) for step in dataset.pipeline.transforms)
    _check_form(path, content, masks)
    classes = dataset.metainfo["classes"]
    check_categories(path, content, classes)
    notes = [check_annotations(path, content, classes, masks, training=not dataset.test_mode)]
    if not dataset.test_mode:
        rules = dataset.filter_cfg or {}
        note = dropped_images(content, classes, rules.get("min_size", 0), rules.get("filter_empty_gt", False))
        notes.append(note and f"{path}: {note} (filter_cfg)")
    for note in filter(None, notes):
        warn(note)
    coco = type(dataset).COCOAPI()
    coco.dataset = content
    coco.createIndex()
    coco.img_ann_map, coco.cat_img_map = coco.imgToAnns, coco.catToImgs
    return coco


def _check_form(path: str, content: dict, masks: bool) -> None:
    for fault, remedy in form_faults(content, masks):
        raise UserError(path, fault, f"{remedy}; scripts/prepare_coco.sh checks the whole file")
