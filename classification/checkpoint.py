"""Checkpoints that an interruption cannot spoil and that hold all a run needs to go on exactly.

A file is written under another name, flushed to the disk and renamed. `recovery.pth.tar` is the state inside an
epoch (or between its last update and its validation); it goes when the epoch's own checkpoint is complete, so where
it exists it is the newest. Files hold tensors and plain containers only: `torch.load(weights_only=True)` reads them.
"""

from __future__ import annotations

import argparse
import logging
import os
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from timm.utils import CheckpointSaver, ModelEmaV3, NativeScaler
from torch import nn

from classification.runtime import World
from elfatt.data import UserError
from elfatt.data.classes import mismatch
from elfatt.data.resources import exhausted

LOGGER = logging.getLogger("classification")
RECOVERY = "recovery.pth.tar"
POSITION = ("epoch", "batch", "updates")
# options that live on in the optimizer and the schedule, where a new value would have no effect
RESTORED = {"opt", "opt_kwargs", "lr", "weight_decay", "filter_bias_and_bn", "min_lr", "warmup_lr"}
RESTORED |= {"warmup_epochs", "epochs", "cooldown_epochs"}


def write(state: dict[str, Any], path: str | Path) -> None:
    """Saves to `path` and returns when the bytes are on the disk. Not atomic by itself: rename afterwards.

    Raises:
        UserError: The disk is full; the part that was written is removed.
    """
    try:
        with open(path, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:
        Path(path).unlink(missing_ok=True)
        if full := exhausted(error, Path(path).parent):
            raise UserError(f"cannot save {path}: {full}") from error
        raise


def rename(source: str | Path, target: str | Path) -> None:
    """Puts `source` in the place of `target` in one step, and makes the new name durable."""
    os.replace(source, target)
    if os.name == "nt":  # Windows opens no folders
        return
    folder = os.open(os.path.dirname(target) or ".", os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def rng_state(device: torch.device) -> dict[str, Any]:
    """Returns the states of Python's, NumPy's, torch's and the GPU's random numbers of this process."""
    name, keys, *rest = np.random.get_state()
    state = {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(keys.astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_rng_state(state: dict[str, Any], device: torch.device) -> None:
    """Puts back what `rng_state` returned."""
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


@dataclass
class TrainState:
    """All that changes in training.

    Attributes:
        class_to_idx: The data set's classes, where its reader knows them.
        epoch: The epoch under way, or the next one where `batch` is 0.
        batch: Batches of this epoch that this process has finished.
        updates: Optimizer updates since the beginning.
        loss_sum: Sum of this epoch's image losses so far, in this process.
        images: Number of images in that sum.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: Any
    scaler: NativeScaler | None
    ema: ModelEmaV3 | None
    args: argparse.Namespace
    world: World
    class_to_idx: dict[str, int] | None = None
    epoch: int = 0
    batch: int = 0
    updates: int = 0
    loss_sum: float = 0.0
    images: int = 0

    def state_dict(self, gather: bool = True) -> dict[str, Any]:
        """Returns the whole state. A collective call unless `gather` is False: every process gives its own part."""
        mine = {"rng": rng_state(self.world.device), "loss_sum": self.loss_sum, "images": self.images}
        processes = [mine]
        if gather and self.world.distributed:
            processes = [None] * self.world.size
            dist.all_gather_object(processes, mine)
        state = {
            "arch": self.args.model,
            "args": vars(self.args),
            "state_dict": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "position": {name: getattr(self, name) for name in POSITION},
            "class_to_idx": self.class_to_idx,
            "batch_size": self.args.batch_size,
            "processes": processes,
            "version": 2,  # timm's format
        }
        if self.ema is not None:
            state["state_dict_ema"] = self.ema.module.state_dict()
        if self.scaler is not None:
            state[self.scaler.state_dict_key] = self.scaler.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any], path: str | Path) -> None:
        """Continues from a checkpoint.

        Args:
            state: What `state_dict` returned.
            path: Where it was read, for messages.

        Raises:
            UserError: The checkpoint is another model's or another program's, has other classes, or its position
                cannot be continued with this number of processes and this batch size.
        """
        if "position" not in state:
            raise UserError(f"{path} is no checkpoint of train.py: start from it with --initial-checkpoint")
        if state["arch"] != self.args.model:
            raise UserError(f"{path} is a checkpoint of {state['arch']}, not of {self.args.model}: correct --model")
        if classes := state.get("class_to_idx"):
            now = self.class_to_idx or classes
            if difference := mismatch(now, classes):
                raise UserError(f"the data have other classes than the run of {path}: {difference}")
        changed = {
            name: (value, state["args"].get(name))
            for name, value in vars(self.args).items()
            if name not in ("resume", "config") and state["args"].get(name) != value
        }
        for name in RESTORED & changed.keys():
            value, before = changed[name]
            raise UserError(
                f"--{name.replace('_', '-')} is {value}, the run of {path} has {before}: resume with its args.yaml, or "
                f"begin a new run from its weights with --initial-checkpoint"
            )
        for name, wanted in (("state_dict_ema", self.ema), ("amp_scaler", self.scaler)):
            if (name in state) != (wanted is not None):
                option = "--model-ema" if wanted is self.ema else "--amp and --amp-dtype"
                raise UserError(f"{path} was saved with another {option}: resume with the options in args.yaml")
        saved = (len(state["processes"]), state["batch_size"])
        now = (self.world.size, self.args.batch_size)
        if state["position"]["batch"] and saved != now:
            raise UserError(
                f"{path} stands inside an epoch of {saved[0]} processes × {saved[1]} images: resume it with the "
                f"same, not {now[0]} × {now[1]}, or resume from last.pth.tar"
            )
        try:
            self.model.load_state_dict(state["state_dict"])
            self.optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, ValueError) as error:
            raise UserError(f"{path} does not fit this model: {' '.join(str(error).split())[:500]}") from error
        self.scheduler.load_state_dict(state["scheduler"])
        if self.ema is not None:
            self.ema.module.load_state_dict(state["state_dict_ema"])
        if self.scaler is not None:
            self.scaler.load_state_dict(state["amp_scaler"])
        for name, value in state["position"].items():
            setattr(self, name, value)
        if saved[0] == self.world.size:
            mine = state["processes"][self.world.rank]
            set_rng_state(mine["rng"], self.world.device)
            self.loss_sum, self.images = mine["loss_sum"], mine["images"]
        else:
            LOGGER.warning("%d processes instead of %d: random numbers start anew", self.world.size, saved[0])
        for name, (value, before) in changed.items():
            LOGGER.warning("%s is %r, the resumed run had %r", name, value, before)


class AtomicSaver(CheckpointSaver):
    """timm's bookkeeping (last, best, the N best epochs), every file put in place by a rename.

    Args:
        folder: Output folder.
        max_history: Epoch checkpoints kept.
    """

    def __init__(self, folder: str | Path, max_history: int) -> None:
        super().__init__(None, None, checkpoint_dir=str(folder), max_history=max_history)
        self.recovery = os.path.join(folder, RECOVERY)
        self.state: dict[str, Any] = {}

    def _save(self, save_path: str, epoch: int, metric: float | None = None) -> None:
        saver = self.state_dict(epoch if metric is not None else None, metric)
        write({**self.state, "epoch": epoch, "metric": metric, "saver": saver}, save_path)

    def _replace(self, src: str, dst: str) -> None:
        rename(src, dst)

    def _duplicate(self, src: str, dst: str) -> None:
        temporary = dst + ".tmp"
        Path(temporary).unlink(missing_ok=True)  # left by a kill
        super()._duplicate(src, temporary)  # a hard link where the file system has them
        rename(temporary, dst)

    def save_epoch(self, state: dict[str, Any], epoch: int, metric: float) -> float:
        """Saves a finished, validated epoch, and returns the best metric so far."""
        self.state = state
        best, _ = self.save_checkpoint(epoch, metric)
        Path(self.recovery).unlink(missing_ok=True)  # last: it stands for unfinished work
        return best

    def save_recovery(self, state: dict[str, Any], epoch: int, batch_idx: int = 0) -> None:
        """Saves a state inside an epoch, in place of the one before."""
        self.state = state
        self._save(self.recovery + ".tmp", epoch)
        self._replace(self.recovery + ".tmp", self.recovery)


def load(path: str | Path) -> dict[str, Any]:
    """Reads a checkpoint onto the CPU, tensors and plain containers only.

    Raises:
        UserError: The file is missing or cannot be read.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"checkpoint {path} does not exist") from None
    except Exception as error:  # truncated and foreign files fail in many ways
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"checkpoint {path} cannot be read ({type(error).__name__}: {reason})") from error


def find_newest(folder: str | Path) -> tuple[Path, dict[str, Any]] | None:
    """Returns the path and content of the newest readable checkpoint of a run, or None where there is no file.

    Raises:
        UserError: There are checkpoints, and none can be read.
    """
    folder = Path(folder)
    paths = [folder / RECOVERY, folder / "last.pth.tar"]
    paths += sorted(folder.glob("checkpoint-*.pth.tar"), key=lambda path: path.stat().st_mtime, reverse=True)
    paths = [path for path in paths if path.exists()]
    for path in paths:
        try:
            return path, load(path)
        except UserError as error:
            LOGGER.warning("%s; trying an older one", error)
    if paths:
        raise UserError(f"no checkpoint in {folder} can be read: remove the folder or choose another --experiment")
    return None
