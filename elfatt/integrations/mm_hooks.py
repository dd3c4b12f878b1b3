"""Hooks of the segmentation and detection programs."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import torch
from mmengine.dist import all_reduce, is_main_process
from mmengine.hooks import Hook
from mmengine.runner import Runner

from elfatt.data import read_image
from elfatt.integrations.mm_datasets import warn


class DrawImages(Hook):
    """Draw the ground truth (left) and the prediction (right) of every evaluated image; in mmengine only rank 0 draws.

    Args:
        folder: Output folder; files are named after the images.
    """

    def __init__(self, folder: str):
        self.folder = Path(folder)

    def after_test_iter(self, runner: Runner, batch_idx: int, data_batch: dict, outputs: list) -> None:
        """See ``Hook``."""
        for sample in outputs:
            image, path = np.asarray(read_image(sample.img_path)), Path(sample.img_path)
            name = path.name if cv2.haveImageWriter(path.name) else f"{path.name}.png"
            runner.visualizer.add_datasample(name, image, sample, out_file=str(self.folder / name))


class NameUnseenClasses(Hook):
    """Log the classes absent from the ground truth after each evaluation."""

    def _before(self, runner: Runner) -> None:
        device = next(runner.model.parameters()).device
        self.masks, self.pixels = torch.zeros(1, device=device), torch.zeros(256, dtype=torch.long, device=device)

    def _after_batch(self, runner: Runner, batch_idx: int, data_batch: dict, outputs: list) -> None:
        for sample in (sample for sample in outputs if hasattr(sample, "gt_sem_seg")):
            self.masks += 1
            labels = sample.gt_sem_seg.data.to(self.pixels)
            self.pixels += torch.bincount(labels.flatten(), minlength=256)

    def _after(self, runner: Runner, metrics: dict | None = None) -> None:
        all_reduce(self.masks)
        all_reduce(self.pixels)
        if not (is_main_process() and self.masks):  # a test set may have no masks
            return
        names = runner.visualizer.dataset_meta["classes"]
        unseen = [name for name, count in zip(names, self.pixels.tolist(), strict=False) if not count]
        if unseen:
            listed = ", ".join(unseen[:20]) + (", …" if len(unseen) > 20 else "")
            warn(
                f"{len(unseen)} of the {len(names)} classes are absent from the ground truth: {listed}; "
                "mAcc ignores them, mIoU counts those predicted anywhere as 0 and ignores the rest"
            )

    before_val_epoch = before_test_epoch = _before
    after_val_iter = after_test_iter = _after_batch
    after_val_epoch = after_test_epoch = _after
