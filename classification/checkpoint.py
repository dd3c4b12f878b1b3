"""Atomic checkpoints with the full training state, for bit-exact resumption.

Files are written under a temporary name, fsynced and renamed. ``recovery.pth.tar`` is the mid-epoch state (or the state
between the last update and validation); it is deleted once the epoch's checkpoint is complete, so if it exists it is
the newest. Files contain only tensors and plain containers, as ``torch.load(weights_only=True)`` requires.
"""

from __future__ import annotations

import argparse
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from timm.utils import CheckpointSaver, ModelEmaV3, NativeScaler
from torch import nn

from classification.runtime import World
from elfatt.data import UserError
from elfatt.data.classes import mismatch
from elfatt.data.resources import exhausted
from elfatt.randomness import rng_state, set_rng_state

LOGGER = logging.getLogger("classification")
RECOVERY = "recovery.pth.tar"
POSITION = ("epoch", "batch", "updates")
# restored with the optimizer and schedule, so a new value would have no effect
RESTORED = {"opt", "opt_kwargs", "lr", "weight_decay", "filter_bias_and_bn", "min_lr", "warmup_lr"}
RESTORED |= {"warmup_epochs", "epochs", "cooldown_epochs"}


def write(state: dict[str, Any], path: str | Path) -> None:
    """Save to ``path`` and fsync. Not atomic: rename the file afterwards.

    Raises:
        UserError: The disk is full; the partial file is removed.
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
    """Atomically replace ``target`` with ``source`` and fsync the folder."""
    os.replace(source, target)
    if os.name == "nt":  # Windows cannot open folders
        return
    folder = os.open(os.path.dirname(target) or ".", os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@dataclass
class TrainState:
    """Training state.

    Attributes:
        class_to_idx: Class labels by name, if the dataset's reader knows them.
        epoch: Current epoch, or the next one if ``batch`` is 0.
        batch: Batches of this epoch finished by this process.
        updates: Optimizer updates so far.
        loss_sum: Sum of this epoch's per-image losses in this process.
        images: Number of images in ``loss_sum``.
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

    def state_dict(self) -> dict[str, Any]:
        """Return the full state; a collective call."""
        mine = {"rng": rng_state(self.world.device), "loss_sum": self.loss_sum, "images": self.images}
        processes = [mine]
        if self.world.distributed:
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
        """Resume from a checkpoint.

        Args:
            state: Result of ``state_dict``.
            path: Path of the checkpoint, for messages.

        Raises:
            UserError: The checkpoint is of another model or program, has other classes, or is a mid-epoch one of
                another number of processes or batch size.
        """
        if "position" not in state:
            raise UserError(f"{path} is not a checkpoint of train.py: start from it with --initial-checkpoint")
        if state["arch"] != self.args.model:
            raise UserError(f"{path} is a checkpoint of {state['arch']}, not of {self.args.model}: correct --model")
        if classes := state.get("class_to_idx"):
            now = self.class_to_idx or classes
            if difference := mismatch(now, classes):
                raise UserError(f"the dataset's classes differ from those of {path}: {difference}")
        changed = {
            name: (value, state["args"].get(name))
            for name, value in vars(self.args).items()
            if name not in ("resume", "config") and state["args"].get(name) != value
        }
        for name in RESTORED & changed.keys():
            value, before = changed[name]
            raise UserError(
                f"--{name.replace('_', '-')} is {value}, but {before} in {path}: resume with its args.yaml, or "
                f"start a new run from its weights with --initial-checkpoint"
            )
        if ("state_dict_ema" in state) != (self.ema is not None):
            option = "--model-ema" if self.ema is None else "--no-model-ema"
            raise UserError(f"{path} was saved with another --model-ema: resume with {option}")
        saved = (len(state["processes"]), state["batch_size"])
        now = (self.world.size, self.args.batch_size)
        if state["position"]["batch"] and saved != now:
            last = Path(path).with_name("last.pth.tar")
            other = f"go back with --resume {last}" if last.exists() else "start a new run with another --experiment"
            raise UserError(
                f"{path} is a mid-epoch checkpoint of {saved[0]} processes × {saved[1]} images: resume with the "
                f"same, not {now[0]} × {now[1]}, or {other}"
            )
        try:
            self.model.load_state_dict(state["state_dict"])
            self.optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, ValueError) as error:
            raise UserError(f"{path} does not fit this model: {' '.join(str(error).split())[:500]}") from error
        self.scheduler.load_state_dict(state["scheduler"])
        if self.ema is not None:
            self.ema.module.load_state_dict(state["state_dict_ema"])
        if self.scaler is not None and self.scaler.state_dict_key in state:  # else --amp-dtype has changed
            self.scaler.load_state_dict(state[self.scaler.state_dict_key])
        for name, value in state["position"].items():
            setattr(self, name, value)
        if saved[0] == self.world.size:
            mine = state["processes"][self.world.rank]
            set_rng_state(mine["rng"], self.world.device)
            self.loss_sum, self.images = mine["loss_sum"], mine["images"]
        else:
            LOGGER.warning("%d processes instead of %d: RNG states are not restored", self.world.size, saved[0])
        for name, (value, before) in changed.items():
            LOGGER.warning("%s is %r, but %r in the resumed run", name, value, before)


class AtomicSaver(CheckpointSaver):
    """timm's ``CheckpointSaver`` (last, best and the N best epochs) with atomic writes.

    Args:
        folder: Output folder.
        max_history: Number of epoch checkpoints to keep.
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
        Path(temporary).unlink(missing_ok=True)  # left by a killed run
        super()._duplicate(src, temporary)  # a hard link if the file system supports it
        rename(temporary, dst)

    def save_epoch(self, state: dict[str, Any], epoch: int, metric: float) -> float:
        """Save a validated epoch and return the best metric so far."""
        self.state = state
        best, _ = self.save_checkpoint(epoch, metric)
        Path(self.recovery).unlink(missing_ok=True)  # last: obsolete once the epoch is saved
        return best

    def save_recovery(self, state: dict[str, Any], epoch: int, batch_idx: int = 0) -> None:
        """Save a mid-epoch state over the previous one."""
        self.save_as(state, epoch, self.recovery)

    def save_as(self, state: dict[str, Any], epoch: int, path: str | Path) -> None:
        """Save a mid-epoch state to ``path``."""
        self.state = state
        self._save(f"{path}.tmp", epoch)
        self._replace(f"{path}.tmp", str(path))


def load(path: str | Path) -> dict[str, Any]:
    """Load a checkpoint onto the CPU with ``weights_only=True``.

    Raises:
        UserError: The file is missing or cannot be read.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"checkpoint {path} does not exist") from None
    except Exception as error:  # truncated or foreign files fail in many ways
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"checkpoint {path} cannot be read ({type(error).__name__}: {reason})") from error


def find_newest(folder: str | Path) -> tuple[Path, dict[str, Any]] | None:
    """Return the path and content of a run's newest readable checkpoint, or None if it has no checkpoints.

    Raises:
        UserError: There are checkpoints, but none can be read.
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
        raise UserError(f"no checkpoint in {folder} can be read: remove the folder or pass another --experiment")
    return None
