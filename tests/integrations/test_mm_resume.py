"""Dense runs that are interrupted and resumed end with the same weights, bit for bit on a CPU."""

import json
import logging
import os
import re
from itertools import islice
from types import SimpleNamespace

import pytest
import torch
from mmengine.config import Config
from mmengine.dataset import DefaultSampler, InfiniteSampler
from mmengine.logging import MessageHub
from mmengine.runner import EpochBasedTrainLoop, Runner
from torch.utils.data import BatchSampler, DataLoader

import detection.train
import segmentation.train
from elfatt.data import UserError
from elfatt.integrations import mm_resume
from elfatt.integrations.mm_resume import SeededBatches, newest_checkpoint, seed_batches, seekable
from tests.integrations.miniature import (
    detection_config,
    in_two_processes,
    options,
    segmentation_config,
    write_ade20k,
    write_coco,
)


class Killed(BaseException):
    """No handler catches it."""


@pytest.fixture
def kill(monkeypatch):
    """Kill the next run when it calls a hook for the n-th time from now."""
    call_hook = Runner.call_hook

    def prepare(name, times):
        left = [times]

        def call(runner, fn_name, **kwargs):
            left[0] -= fn_name == name
            if fn_name == name and not left[0]:
                raise Killed
            call_hook(runner, fn_name, **kwargs)

        monkeypatch.setattr(Runner, "call_hook", call)

    yield prepare


def compare(found, expected):
    """Compare all that goes on: weights, their averages, optimizer, schedule, and random states of each process."""
    found, expected = (torch.load(path, weights_only=False) for path in (found, expected))
    for part in ("state_dict", "ema_state_dict", "optimizer"):
        torch.testing.assert_close(found.get(part), expected.get(part), rtol=0, atol=0)
    assert found["param_schedulers"] == expected["param_schedulers"]
    for mine, other in zip(found["resume"]["processes"], expected["resume"]["processes"], strict=True):
        assert mine["rng"]["python"] == other["rng"]["python"]
        torch.testing.assert_close(mine["rng"]["numpy"][1], other["rng"]["numpy"][1])
        torch.testing.assert_close(mine["rng"]["torch"], other["rng"]["torch"])
        torch.testing.assert_close(mine["gradients"], other["gradients"], rtol=0, atol=0)


# augmentation is the recipe's
SEGMENTATION = """
model["backbone"].update(drop_path_rate=0.2)
default_hooks["checkpoint"].update(interval=2)
train_cfg.update(val_interval=2)
custom_hooks = [dict(type="EMAHook", momentum=0.1)]
param_scheduler = [dict(type="LinearLR", start_factor=0.1, by_epoch=False, end=5)]
"""
SEED = "\nrandomness = dict(seed=5)\n"


@pytest.mark.slow
def test_a_segmentation_run(tmp_path, kill, monkeypatch):
    data = write_ade20k(tmp_path / "data", train=3)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    segmentation.train.main(options(segmentation_config(tmp_path, 5, SEGMENTATION + SEED), data, whole))
    kill("before_train_iter", 4)
    with pytest.raises(Killed):
        segmentation.train.main(options(segmentation_config(tmp_path, 5, SEGMENTATION + SEED), data, parts))
    monkeypatch.undo()
    # the seed is the checkpoint's, and the number of workers is free
    more = SEGMENTATION + "train_dataloader.update(num_workers=2, persistent_workers=True)\n"
    segmentation.train.main(options(segmentation_config(tmp_path, 5, more), data, parts, "--resume", "auto"))
    compare(parts / "iter_5.pth", whole / "iter_5.pth")


# batches grouped by aspect ratio, gradients over two batches, checkpoints within epochs of three batches
DETECTION = """
train_dataloader.update(batch_size=1, num_workers=1, persistent_workers=True)
optim_wrapper = dict(accumulative_counts=2)
default_hooks["checkpoint"] = dict(by_epoch=False, interval=1, max_keep_ckpts=5)
param_scheduler = [dict(type="MultiStepLR", by_epoch=True, milestones=[1], gamma=0.1)]
randomness = dict(seed=5)
"""


@pytest.mark.slow
def test_a_detection_run(tmp_path, kill, monkeypatch, capfd):
    data = write_coco(tmp_path / "data")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    config = detection_config(tmp_path, 2, DETECTION)
    detection.train.main(options(config, data, whole))
    kill("before_train_iter", 3)  # in the middle of an epoch, of which gradients are left
    with pytest.raises(Killed):
        detection.train.main(options(config, data, parts))
    with pytest.raises(UserError, match="middle of an epoch, but there are 2 images per batch instead of 1: resume with"):
        detection.train.main(
            options(config, data, parts, "--resume", "auto", "--cfg-options", "train_dataloader.batch_size=2")
        )
    kill("before_val_iter", 1)
    with pytest.raises(Killed):
        detection.train.main(options(config, data, parts, "--resume", "auto"))
    monkeypatch.undo()
    capfd.readouterr()
    detection.train.main(options(config, data, parts, "--resume", "auto"))
    compare(parts / "iter_6.pth", whole / "iter_6.pth")
    log = "".join(capfd.readouterr())
    steps = [part.split("]")[0].strip() for part in re.findall(r"Epoch\((?:train|val)\) +\[(.*?\[.*?\])", log)]
    assert steps[:2] == ["val"], log
