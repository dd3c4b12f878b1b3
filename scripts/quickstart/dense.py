"""Evaluate the quickstart's UperNet and Mask R-CNN with their test.py, and draw held-out scenes."""

from __future__ import annotations

import json
from pathlib import Path

import mmcv
import numpy as np
from PIL import Image

import detection.test
import segmentation.test
from elfatt.integrations.mm_resume import newest_checkpoint
from scripts.quickstart.material import NAMES
from scripts.quickstart.pictures import Instances, draw_instances, draw_semantic

ROOT = Path(__file__).resolve().parents[2]
SHOWN = 8  # scenes
CONFIDENT = 0.5  # minimum score of drawn instances


def evaluate(task: str, run: Path, scenes: Path) -> tuple[Path, dict[str, float]]:
    """Return the newest checkpoint of a finished run and its metrics on the held-out scenes.

    Args:
        task: ``segmentation`` or ``detection``.
        run: Work dir of the run.
        scenes: Folder written by scenes.py.

    Raises:
        FileNotFoundError: The run has no checkpoint.
    """
    checkpoint = newest_checkpoint(run)
    if checkpoint is None:
        raise FileNotFoundError(f"{run} contains no checkpoint: run {task}/train.py first")
    program = {"segmentation": segmentation.test, "detection": detection.test}[task]
    arguments = [str(_config(task)), str(checkpoint), "--data-dir", str(scenes), "--work-dir", str(run / "test")]
    return checkpoint, program.main(arguments)


def draw_segmentation(checkpoint: Path, scenes: Path, path: Path) -> None:
    """Draw a PNG of held-out scenes with their true and predicted classes."""
    from mmseg.apis import inference_model, init_model

    model = init_model(str(_config("segmentation")), str(checkpoint), device="cpu")
    rows = []
    for file in _images(scenes):
        mask = scenes / "annotations" / "validation" / f"{file.stem}.png"
        predicted = inference_model(model, str(file)).pred_sem_seg.data[0].numpy()
        rows.append((np.array(Image.open(file)), np.array(Image.open(mask)), predicted))
    draw_semantic(rows, NAMES, path)


def draw_detection(checkpoint: Path, scenes: Path, path: Path) -> None:
    """Draw a PNG of held-out scenes with their true and confidently predicted instances."""
    from mmdet.apis import inference_detector, init_detector
    from pycocotools import mask as coco_mask

    model = init_detector(str(_config("detection")), str(checkpoint), device="cpu")
    content = json.loads((scenes / "annotations" / "instances_val2017.json").read_text())
    numbers = {image["file_name"]: image["id"] for image in content["images"]}
    rows = []
    for file in _images(scenes):
        true = [a for a in content["annotations"] if a["image_id"] == numbers[file.name]]
        lengths = (coco_mask.frPyObjects(a["segmentation"], *a["segmentation"]["size"]) for a in true)
        boxes = np.array([a["bbox"] for a in true])
        boxes[:, 2:] += boxes[:, :2]
        truth = Instances(
            boxes,
            np.array([coco_mask.decode(code).astype(bool) for code in lengths]),
            np.array([a["category_id"] - 1 for a in true]),
        )
        found = inference_detector(model, mmcv.imread(file)).pred_instances
        found = found[found.scores >= CONFIDENT]
        prediction = Instances(*(found[key].numpy() for key in ("bboxes", "masks", "labels", "scores")))
        rows.append((np.array(Image.open(file)), truth, prediction))
    draw_instances(rows, NAMES, path)


def _config(task: str) -> Path:
    return ROOT / "configs" / task / "scenes_nano.py"


def _images(scenes: Path) -> list[Path]:
    return sorted((scenes / "images" / "validation").glob("*.jpg"))[:SHOWN]
