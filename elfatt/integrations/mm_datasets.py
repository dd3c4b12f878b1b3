"""Data sets of mmseg and mmdet, checked by the rules of ``elfatt.data``; nothing is skipped silently."""

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
from PIL import UnidentifiedImageError

from elfatt.data import UserError, check_size, is_image, list_images
from elfatt.data.classes import mismatch
from elfatt.data.coco import check_annotations, check_categories, check_ids, form_faults, load_coco
from elfatt.data.masks import check_classes, check_mask
from elfatt.integrations.mm_transforms import CheckMask

SAMPLE = 100  # images or masks of a data set that are opened before the first step
LOADS_MASKS = "LoadAnnotations"
MMENGINE_DATASETS = BaseDataset, ClassBalancedDataset, ConcatDataset, RepeatDataset


def open_dataset(config: dict) -> BaseDataset:
    """Builds, lists and checks a data set, and those that it wraps.

    Args:
        config: Of the data set.

    Raises:
        UserError: It cannot be trained on or evaluated; its folder or annotation file is named.
    """
    dataset = DATASETS.build(lazy(config))
    if not isinstance(dataset, MMENGINE_DATASETS):
        return dataset
    for part in _unwrap(dataset):
        _open(part)
    dataset.full_init()
    return dataset


def lazy(config: dict) -> dict:
    """The configuration of a data set, and of those that it wraps, that reads nothing before it is told to."""
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
    """Read up to 100 masks as training does, and all of them if these hold fewer than two classes.

    Args:
        dataset: Open; passed over where its pipeline reads no mask.

    Raises:
        UserError: No two classes in all of them; see ``check_classes``, and ``CheckMask`` for a single one.
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


def check_evaluator(evaluator, source: str, classes: tuple[str, ...]) -> None:
    """Stops at annotation files of mmdet's ``CocoMetric`` that would be scored under other names, or not at all.

    Args:
        evaluator: mmengine's, built.
        source: Path of the annotation file, for the message.
        classes: Of the data set.

    Raises:
        UserError: See ``check_categories`` and ``check_ids``.
    """
    for metric in evaluator.metrics:
        if getattr(metric, "_coco_api", None):
            check_categories(source, metric._coco_api.dataset, classes)
            check_ids(source, metric._coco_api.dataset)


def check_same_classes(where: str, classes: Sequence[str], trained: Sequence[str]) -> None:
    """Raise if one index means two classes.

    Args:
        where: A checkpoint, or the data set that is evaluated.
        classes: Of the data.
        trained: Those that the model was trained on.

    Raises:
        UserError: They differ, in names or order.
    """
    here, there = ({name: index for index, name in enumerate(names)} for names in (classes, trained))
    if difference := mismatch(here, there):
        remedy = "take the configuration and the data that it was trained with, or train anew"
        raise UserError(where, f"has other classes than the data: {difference}", remedy)


def warn(message: str) -> None:
    """Logs a warning; of several processes the first one does."""
    print_log(message, logger="current", level=logging.WARNING)


def _unwrap(dataset) -> list:
    """The data sets that a RepeatDataset, a ConcatDataset or another wrapper holds, or the one given."""
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
        # mmengine cannot pack an empty list
        source = dataset.ann_file or dataset.data_prefix["img_path"]
        fault = f"holds no image that can be used (filter_cfg={dataset.filter_cfg})"
        raise UserError(source, fault, "check data_root, data_prefix and ann_file") from error
    for name in ("load_data_list", "COCOAPI"):
        vars(dataset).pop(name, None)  # a worker that is spawned gets the data set alone
    for step in dataset.pipeline.transforms:
        if hasattr(step, "_load_seg_map"):  # of mmcv's LoadAnnotations, whose errors name no file
            step._load_seg_map = partial(_load_mask, step._load_seg_map)
    _warn_of_turned(dataset)


def _load_mask(load: Callable[[dict], None], results: dict) -> None:
    try:
        load(results)
    except (OSError, SyntaxError, ValueError) as error:  # Pillow raises all three on damaged files
        raise UserError(f"mask {results['seg_map_path']} cannot be read: {error}") from error


def _spread(dataset: BaseDataset) -> list[int]:
    """Numbers of up to 100 items, evenly over the data set."""
    count = min(SAMPLE, len(dataset))
    return [i * len(dataset) // count for i in range(count)]


def _steps_to_masks(dataset: BaseDataset) -> list:
    """The steps of a pipeline up to ``CheckMask``, or to the one that loads masks; none where nothing does."""
    steps = dataset.pipeline.transforms
    last = [i for i, step in enumerate(steps) if isinstance(step, CheckMask) or type(step).__name__ == LOADS_MASKS]
    return steps[: last[-1] + 1] if last and hasattr(dataset, "reduce_zero_label") else []


def _warn_of_turned(dataset: BaseDataset) -> None:
    """Warns of images that EXIF turns where the sizes do not tell how the labels were drawn; up to 100 are opened."""
    opened, turned = 0, []
    for item in map(dataset.get_data_info, _spread(dataset)):
        if not Path(item["img_path"]).is_file():
            continue  # whoever loads it says so
        if item.get("seg_map_path"):
            if not _steps_to_masks(dataset):
                return  # masks of another form, with a reader of their own
            size, owner = check_mask(item["seg_map_path"]), f"mask {item['seg_map_path']}"
        elif "width" in item:
            size, owner = (item["width"], item["height"]), dataset.ann_file
        else:
            return
        try:
            if check_size(item["img_path"], size, owner):
                turned.append(item["img_path"])
        except UnidentifiedImageError:
            continue  # another reader's, or damaged: whoever loads it says so
        opened += 1
    if turned:
        warn(
            f"{len(turned)} of {opened} images opened are turned upright by their EXIF orientation, first {turned[0]}: "
            "where labels were drawn on the pixels as they are stored, remove the tag (exiftool -Orientation= FILE)"
        )


def _is_listed_by_mmseg(dataset: BaseDataset) -> bool:
    """Whether the listing is mmseg's own, of local images and of masks in another folder."""
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
    """What mmseg's ``BaseSegDataset.load_data_list`` gives, for images and masks with any extension.

    ``img_suffix`` and ``seg_map_suffix`` count as in ``list_images``.

    Raises:
        UserError: Images without a mask, two files of one name, or names in ``ann_file`` without an image.
    """
    folders = [dataset.data_prefix[key] for key in ("img_path", "seg_map_path")]
    (images, others), (masks, _) = map(list_images, folders, (dataset.img_suffix, dataset.seg_map_suffix))
    if others:
        warn(f"{folders[0]}: {len(others):,} files are passed over, first {others[0]}")
    names = list(images)
    if dataset.ann_file:
        names = [line.strip() for line in Path(dataset.ann_file).read_text().splitlines() if line.strip()]
        absent = [name for name in names if name not in images]
        if absent:
            fault = f"names {len(absent):,} images that are not in {folders[0]}, first {absent[0]}"
            raise UserError(dataset.ann_file, fault, "a line is the path of an image there, without its extension")
    bare = [name for name in names if name not in masks]
    if bare:
        fault = f"holds {len(bare):,} of {len(names):,} images without a mask, first {images[bare[0]]}"
        raise UserError(folders[0], fault, f"add masks of the same names to {folders[1]}, or remove the images")
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
    """The annotation file as mmdet wants it, checked; in place of ``dataset.COCOAPI(path)``.

    Raises:
        UserError: See ``elfatt.data.coco``.
    """
    content = load_coco(path)
    if dataset.test_mode:
        content.setdefault("annotations", [])  # COCO's test sets have none
    masks = any(getattr(step, "with_mask", False) for step in dataset.pipeline.transforms)
    for fault, remedy in form_faults(content, masks):
        raise UserError(path, fault, f"{remedy}; scripts/prepare_coco.sh checks the whole file")
    check_categories(path, content, dataset.metainfo["classes"])
    loss = check_annotations(path, content, dataset.metainfo["classes"], masks, training=not dataset.test_mode)
    if loss:
        warn(loss)
    coco = type(dataset).COCOAPI()
    coco.dataset = content
    coco.createIndex()
    coco.img_ann_map, coco.cat_img_map = coco.imgToAnns, coco.catToImgs
    return coco
