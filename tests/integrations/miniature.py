"""Miniature data sets in the layouts of ADE20K and COCO, and configurations of nano models for them."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.multiprocessing import start_processes

from tests.integrations.dense import CONFIGS, ROOT
from tests.processes import join_as, open_store


def options(config: Path, data: Path, run: Path, *extra) -> list[str]:
    """Command line of a ``train.py``."""
    return [str(x) for x in (config, "--data-dir", data, "--work-dir", run, *extra)]


def run_script(name: str, processes: int, *arguments) -> None:
    """Run a script of ``scripts`` on CPUs; DDP must not warn of gradients laid out unlike their parameters."""
    env = {**os.environ, "NGPUS": str(processes), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = ["bash", str(ROOT / "scripts" / name), *map(str, arguments)]
    result = subprocess.run(command, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "Grad strides" not in result.stdout + result.stderr


def in_two_processes(function: Callable[[], dict]) -> list[dict]:
    """What ``function`` returns in two forked processes with the environment that torchrun gives."""
    store, results = open_store(), multiprocessing.get_context("fork").SimpleQueue()

    def run(rank: int) -> None:
        join_as(rank, store)
        torch.set_num_threads(1)
        results.put(function())

    start_processes(run, nprocs=2, start_method="fork")  # what a test has patched stays so
    return [results.get() for _ in range(2)]


def write_ade20k(root: Path, train: int = 4, val: int = 2, size: tuple[int, int] = (64, 96)) -> Path:
    """Squares of two classes on a third one, as images and index masks (0 is unlabelled)."""
    rng = np.random.default_rng(0)
    for split, number in (("training", train), ("validation", val)):
        for kind in ("images", "annotations"):
            (root / kind / split).mkdir(parents=True)
        for i in range(number):
            mask = np.ones(size, np.uint8)
            mask[8:40, 8:40], mask[20:60, 50:90], mask[:4] = 2, 3, 0
            image = rng.integers(0, 60, (*size, 3)) + 60 * mask[..., None]
            Image.fromarray(image.astype(np.uint8)).save(root / "images" / split / f"{i}.jpg")
            Image.fromarray(mask).save(root / "annotations" / split / f"{i}.png")
    return root


def write_coco(root: Path, train: int = 4, val: int = 2) -> Path:
    """A person and a stop sign, both square, with polygons; the last training image has no instance."""
    from mmdet.datasets import CocoDataset  # behind the stand-in for mmcv's operations

    names = CocoDataset.METAINFO["classes"]
    rng = np.random.default_rng(0)
    (root / "annotations").mkdir(parents=True)
    for split, number in (("train2017", train), ("val2017", val)):
        (root / split).mkdir()
        images, annotations = [], []
        for i in range(number):
            pixels = rng.integers(0, 60, (64, 96, 3))
            images.append({"id": i + 1, "file_name": f"{i}.jpg", "height": 64, "width": 96})
            boxes = ((4, 4, 36, 36), (50, 12, 40, 44)) if split == "val2017" or i < number - 1 else ()
            for label, (x, y, w, h) in zip((0, 11), boxes, strict=False):
                pixels[y : y + h, x : x + w, label % 3] += 150
                annotation = {"id": len(annotations) + 1, "image_id": i + 1, "category_id": 3 * label + 1, "iscrowd": 0}
                polygon = [x, y, x + w, y, x + w, y + h, x, y + h]
                annotations.append(annotation | {"bbox": [x, y, w, h], "area": w * h, "segmentation": [polygon]})
            Image.fromarray(pixels.astype(np.uint8)).save(root / split / f"{i}.jpg")
        content = {
            "images": images,
            "annotations": annotations,
            "categories": [{"id": 3 * label + 1, "name": name} for label, name in enumerate(names)],
        }
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return root


LOADERS = """
train_dataloader = dict(num_workers=0, batch_size=2)
val_dataloader = dict(num_workers=0)
test_dataloader = dict(num_workers=0)
"""


# to append: VMamba in place of the nano backbone, with the same channels
VMAMBA = """
model["backbone"] = dict(
    _delete_=True, type="TimmBackbone", name="vmamba_tiny", embed_dim=32, depths=(1, 1, 1, 1), drop_path_rate=0.2
)
"""


def segmentation_config(folder: Path, steps: int = 2, more: str = "") -> Path:
    """The CSWin-T recipe with a nano backbone and crops of 64 pixels; ``more`` is appended."""
    path = folder / "segmentation_nano.py"
    path.write_text(f"""
_base_ = {str(CONFIGS / "segmentation" / "upernet_cswin_tiny_elfatt.py")!r}
model = dict(
    data_preprocessor=dict(size=(64, 64)),
    backbone=dict(name="cswin_nano_elfatt", drop_path_rate=0.0, block_size=7),
    decode_head=dict(in_channels=[32, 64, 128, 256], channels=16),
    auxiliary_head=dict(in_channels=128, channels=16),
)
train_pipeline = _base_.train_pipeline
train_pipeline[3].update(scale=(96, 64))
train_pipeline[4].update(crop_size=(64, 64))
test_pipeline = _base_.test_pipeline
test_pipeline[1].update(scale=(96, 64))
tta_pipeline = _base_.tta_pipeline
tta_pipeline[1]["transforms"][0] = [dict(type="Resize", scale=(96 * r, 64 * r), keep_ratio=True) for r in (1, 2)]
{LOADERS}
train_dataloader.update(dataset=dict(pipeline=train_pipeline))
val_dataloader.update(dataset=dict(pipeline=test_pipeline))
test_dataloader.update(dataset=dict(pipeline=test_pipeline))
train_cfg = dict(max_iters={steps}, val_interval={steps})
default_hooks = dict(logger=dict(interval=1), checkpoint=dict(interval={steps}))
{more}
""")
    return path


def detection_config(folder: Path, epochs: int = 1, more: str = "") -> Path:
    """The CSWin-T recipe with a nano backbone and images of 96 × 64 pixels; ``more`` is appended."""
    path = folder / "detection_nano.py"
    path.write_text(f"""
_base_ = {str(CONFIGS / "detection" / "mask_rcnn_cswin_tiny_elfatt_1x.py")!r}
model = dict(
    backbone=dict(name="cswin_nano_elfatt", drop_path_rate=0.0, block_size=7),
    neck=dict(in_channels=[32, 64, 128, 256], out_channels=32),
    rpn_head=dict(in_channels=32, feat_channels=32),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=32),
        mask_roi_extractor=dict(out_channels=32),
        bbox_head=dict(in_channels=32, fc_out_channels=32),
        mask_head=dict(in_channels=32, conv_out_channels=32, num_convs=1),
    ),
)
train_pipeline = _base_.train_pipeline
train_pipeline[3].update(scale=(96, 64))
test_pipeline = _base_.test_pipeline
test_pipeline[1].update(scale=(96, 64))
{LOADERS}
train_dataloader.update(dataset=dict(pipeline=train_pipeline))
val_dataloader.update(dataset=dict(pipeline=test_pipeline))
test_dataloader.update(dataset=dict(pipeline=test_pipeline))
train_cfg = dict(max_epochs={epochs})
default_hooks = dict(logger=dict(interval=1))
{more}
""")
    return path
