"""Exact resumption of mmengine runs: the same weights as without the interruption, bit for bit on a CPU.

mmengine restores weights, optimizer, schedule and messages, but no random states, no accumulated gradients, and no
place within an epoch. Here

1. every sample is loaded with random generators seeded by (seed, process, epoch, batch, place in the batch): it depends
   on no worker's state, and the number of workers is free;
2. the train loops start at any batch, skipping indices instead of data;
3. a checkpoint has each process's random states and gradients, the number of batches of the epoch, and whether the
   validation after it is done; otherwise it is run on resuming.
"""

from __future__ import annotations

import pickle
import time
import zipfile
from collections.abc import Iterator, Sequence, Sized
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import all_gather_object, get_rank, get_world_size, is_main_process
from mmengine.hooks import CheckpointHook
from mmengine.registry import HOOKS, LOOPS
from mmengine.runner import BaseLoop, EpochBasedTrainLoop, IterBasedTrainLoop, Runner
from mmengine.runner.checkpoint import get_torch_safe_globals
from torch.utils.data import DataLoader, IterableDataset

from elfatt.data import UserError
from elfatt.integrations.mm_datasets import warn
from elfatt.preemption import Preempted
from elfatt.randomness import rng_state, seeded, set_rng_state

RESUME = "resume"  # our part of a checkpoint
RECOVERY = "recovery.pth"  # the state between two regular checkpoints; deleted once the next of these is complete


class SeededBatch:
    """Indices of a batch; iterating over them seeds the random generators for each sample, in whatever process.

    Args:
        indices: Indices of the dataset.
        key: Place of the batch in the run, non-negative.
    """

    def __init__(self, indices: Sequence, key: tuple[int, ...]):
        self.indices = indices
        self.key = key

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator:
        for place, index in enumerate(self.indices):
            with seeded(*self.key, place):  # until the DataLoader asks for the next index
                yield index


class SeededBatches:
    """Batch sampler around another one that yields ``SeededBatch`` and can start at any batch.

    Args:
        batches: Batch sampler.
        seed: Seed of the run.
    """

    def __init__(self, batches: Any, seed: int):
        self.batches = batches
        self.seed = seed
        self.endless = False  # start the next pass after the last batch
        self.seek(0, 0)

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["batches"], name)  # hooks look for `sampler`, and for a set_epoch in it

    def __len__(self) -> int:
        return len(self.batches)

    def seek(self, epoch: int, start: int) -> None:
        """Set the epoch, and its batch, that the next iteration starts at."""
        self.epoch, self.start = epoch, start

    def __iter__(self) -> Iterator[SeededBatch]:
        key = self.seed, get_rank(), self.epoch
        batches = islice(self._passes() if self.endless else self.batches, self.start, None)
        return (SeededBatch(batch, (*key, number)) for number, batch in enumerate(batches, self.start))

    def _passes(self) -> Iterator[Sequence]:
        set_epoch = getattr(self.sampler, "set_epoch", None)
        for epoch in count():
            if set_epoch:
                set_epoch(epoch)
            batch = None
            for batch in self.batches:
                yield batch
            if batch is None:
                raise UserError("train_dataloader", "yields no batch", "lower batch_size, or set drop_last=False")


def seed_batches(loader: DataLoader, seed: int) -> None:
    """Make every sample of a loader a function of the seed and the sample's place in the run; not of a stream."""
    if loader.batch_sampler is None or isinstance(loader.dataset, IterableDataset):
        return
    vars(loader)["batch_sampler"] = SeededBatches(loader.batch_sampler, seed)  # DataLoader forbids the assignment
    loader.generator = torch.Generator()  # a new iterator would draw from the global one


def _seek(loader: DataLoader, epoch: int, start: int) -> None:
    if isinstance(loader.batch_sampler, SeededBatches):
        loader.batch_sampler.seek(epoch, start)


@LOOPS.register_module()
class SeekableEpochLoop(EpochBasedTrainLoop):
    """``EpochBasedTrainLoop`` that can start within an epoch.

    Attributes:
        start: Batches of the current epoch that are already trained.
    """

    start = 0

    def run_epoch(self) -> None:
        """See ``EpochBasedTrainLoop``."""
        _seek(self.dataloader, self._epoch, self.start)
        super().run_epoch()
        self.start = 0

    def run_iter(self, idx: int, data_batch: Sequence[dict]) -> None:
        """See ``EpochBasedTrainLoop``."""
        super().run_iter(self.start + idx, data_batch)


@LOOPS.register_module()
class SeekableIterLoop(IterBasedTrainLoop):
    """``IterBasedTrainLoop`` that resumes without loading the data it skips, whatever the sampler."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if isinstance(self.dataloader.batch_sampler, SeededBatches):
            self.dataloader.batch_sampler.endless = True
            self.dataloader_iterator.skip_iter = partial(_seek, self.dataloader, 0)


SEEKABLE = SeekableEpochLoop, SeekableIterLoop
REPLACEMENTS = {"EpochBasedTrainLoop": SeekableEpochLoop.__name__, "IterBasedTrainLoop": SeekableIterLoop.__name__}


def seekable(loop: dict) -> dict:
    """Return a train loop's config with our loop in place of mmengine's."""
    loop = dict(loop)
    if "type" not in loop and "by_epoch" in loop:
        loop["type"] = "EpochBasedTrainLoop" if loop.pop("by_epoch") else "IterBasedTrainLoop"
    kind = loop.get("type")
    name = getattr(kind, "__name__", str(kind)).rpartition(".")[2]
    return {**loop, "type": REPLACEMENTS[name]} if name in REPLACEMENTS else loop


@HOOKS.register_module()
class ExactCheckpointHook(CheckpointHook):
    """``CheckpointHook`` from whose files a run resumes exactly.

    It also removes the oldest checkpoint after saving the newest, not before.
    """

    priority = "LOWEST"  # after all that changes the state
    max_keep_ckpts: int

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.loaded: dict | None = None  # our part of the resumed checkpoint
        self.state: dict | None = None  # our part of the checkpoint being saved
        self.batch = 0  # batches of the epoch that are trained
        self.saved: int | None = None  # iteration of the newest checkpoint
        self.validated: int | None = None  # iteration of the last validation

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """See ``Hook``."""
        self.loaded = checkpoint.get(RESUME, {})

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """See ``Hook``."""
        if self.state:
            checkpoint[RESUME] = self.state

    def before_train(self, runner: Runner) -> None:
        """Restore what mmengine does not, and run a validation that was cut off.

        Raises:
            UserError: The checkpoint is of the middle of an epoch, and the epochs have changed.
        """
        super().before_train(runner)
        self.saved = runner.iter
        if runner._resume and self.loaded is not None:
            if not self.loaded:
                warn("the checkpoint was saved without random states: the run continues, but not bit for bit")
            elif self._restore(runner, self.loaded) and not self.loaded["validated"] and runner.val_loop is not None:
                runner.val_loop.run()
        self.loaded = None

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Save at the interval, or when a signal stops the run.

        Raises:
            Preempted: A signal has stopped the run.
        """
        self.batch = batch_idx + 1
        super().after_train_iter(runner, batch_idx, data_batch, outputs)
        if runner.preemption.agreed(next(runner.model.parameters()).device):
            if self.saved != runner.iter + 1:
                self._save_recovery(runner, runner.iter + 1)
            self._stop()

    def after_train_epoch(self, runner: Runner) -> None:
        """See ``CheckpointHook``."""
        self.batch = 0
        super().after_train_epoch(runner)

    def before_val(self, runner: Runner) -> None:
        """Save the state that the validation starts from, unless it just was."""
        if self.saved not in (None, runner.iter):
            self._save_recovery(runner, runner.iter)

    def after_val_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Stop if a signal asks for it; the state is saved already.

        Raises:
            Preempted: A signal has stopped the run.
        """
        if self.saved is not None and runner.preemption.requested:
            self._stop()

    def after_val_epoch(self, runner: Runner, metrics: dict) -> None:
        """See ``CheckpointHook``."""
        self.validated = runner.iter
        super().after_val_epoch(runner, metrics)

    def _stop(self) -> None:
        warn(f"stopped by a signal, iteration {self.saved} is saved in {self.out_dir}: continue with --resume auto")
        raise Preempted

    def _save_recovery(self, runner: Runner, iteration: int) -> None:
        meta = {"epoch": runner.epoch, "iter": iteration}
        self.state = self._collect(runner, iteration)
        try:
            runner.save_checkpoint(self.out_dir, RECOVERY, meta=meta, backend_args=self.backend_args)
        finally:
            self.state = None
        self.saved = iteration

    def _save_checkpoint_with_step(self, runner: Runner, step: int, meta: dict) -> None:
        iteration = meta["iter"]
        self.state = self._collect(runner, iteration)
        try:
            self._save_first(runner, step, meta)
        finally:
            self.state = None
        self.saved = iteration
        self._remove(RECOVERY)

    def _save_first(self, runner: Runner, step: int, meta: dict) -> None:
        kept = self.max_keep_ckpts
        if kept <= 0 or step in self.keep_ckpt_ids:
            return super()._save_checkpoint_with_step(runner, step, meta)
        oldest = self.keep_ckpt_ids[0] if len(self.keep_ckpt_ids) == kept else None
        self.keep_ckpt_ids.append(step)  # at most `kept` long: drops the oldest
        runner.message_hub.update_info("keep_ckpt_ids", list(self.keep_ckpt_ids))
        self.max_keep_ckpts = 0
        try:
            super()._save_checkpoint_with_step(runner, step, meta)
        finally:
            self.max_keep_ckpts = kept
        if oldest is not None:
            self._remove(self.filename_tmpl.format(oldest))

    def _remove(self, name: str) -> None:
        path = self.file_backend.join_path(self.out_dir, name)
        if is_main_process() and self.file_backend.isfile(path):
            self.file_backend.remove(path)

    def _collect(self, runner: Runner, iteration: int) -> dict:
        """Return our part of a checkpoint; every process must call it."""
        parameters = dict(runner.model.named_parameters())
        mine = {
            "rng": rng_state(next(iter(parameters.values())).device),
            "gradients": {name: p.grad.cpu() for name, p in parameters.items() if p.grad is not None},
        }
        return {
            "time": time.time(),
            "batch": self.batch,
            "validated": self.validated == iteration,
            "layout": _layout(runner.train_loop),
            "processes": all_gather_object(mine),
        }

    def _restore(self, runner: Runner, state: dict) -> bool:
        """Restore our part of a checkpoint and return whether a validation is due."""
        loop, before, now = runner.train_loop, state["layout"], _layout(runner.train_loop)
        self.batch = state["batch"]
        within = isinstance(loop, SeekableEpochLoop) and self.batch > 0
        changes = ", ".join(f"{now[key]} {key} instead of {before[key]}" for key in now if now[key] != before[key])
        if changes and within:
            fault = f"is of the middle of an epoch, but there are {changes}"
            raise UserError("the checkpoint", fault, "resume with the same, or from the end of an epoch")
        if changes:
            warn(f"{changes}: the run continues, but not bit for bit")
        else:
            mine, parameters = state["processes"][get_rank()], dict(runner.model.named_parameters())
            set_rng_state(mine["rng"], next(iter(parameters.values())).device)
            for name, gradient in mine["gradients"].items():
                parameters[name].grad = gradient.to(parameters[name])
        if not (isinstance(loop, SEEKABLE) and isinstance(loop.dataloader.batch_sampler, SeededBatches)):
            warn("the train loop or dataset cannot start at a given batch: the run continues, but not bit for bit")
        elif within:
            loop.start = self.batch
        return isinstance(loop, SEEKABLE) and not within and _validation_is_due(loop)


def _layout(loop: BaseLoop) -> dict[str, int | None]:
    """Return what must not change within an epoch."""
    loader = loop.dataloader
    batch_size = loader.batch_size or getattr(loader.batch_sampler, "batch_size", None)
    images = len(loader.dataset) if isinstance(loader.dataset, Sized) else None  # a stream may have no length
    return {"processes": get_world_size(), "images per batch": batch_size, "training images": images}


def _validation_is_due(loop: EpochBasedTrainLoop | IterBasedTrainLoop) -> bool:
    """Whether the loop would validate before its next step; mmengine decides it within ``run``."""
    loop._decide_current_val_interval()
    by_epoch = isinstance(loop, EpochBasedTrainLoop)
    done, last = (loop.epoch, loop.max_epochs) if by_epoch else (loop.iter, loop.max_iters)
    return done >= max(1, loop.val_begin) and (done % loop.val_interval == 0 or done == last)


def read_checkpoint(path: str | Path) -> dict:
    """Read a checkpoint without its tensors, which stay on the disk.

    Raises:
        UserError: It cannot be read.
    """
    try:
        load = partial(torch.load, path, map_location="cpu", mmap=zipfile.is_zipfile(path))
        try:
            with torch.serialization.safe_globals(get_torch_safe_globals()):
                return load(weights_only=True)
        except pickle.UnpicklingError:  # objects of custom hooks, which mmengine loads as well
            return load(weights_only=False)
    except Exception as error:  # truncated or foreign files fail in many ways
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise UserError(f"checkpoint {path}", f"cannot be read ({reason})", "copy it again") from error


def newest_checkpoint(folder: str | Path) -> Path | None:
    """Return a run's newest complete checkpoint, or None if the folder has no checkpoints.

    The order is that of saving, whatever the names and ``last_checkpoint`` say: a kill may leave the latter empty or
    behind.

    Raises:
        UserError: No checkpoint is complete, or the only one, named by ``last_checkpoint``, does not exist.
    """
    found, damaged = [], []
    for path in sorted(Path(folder).glob("*.pth")):
        try:
            content = read_checkpoint(path)
        except UserError as error:
            damaged.append(error)
            continue
        iteration = content.get("meta", {}).get("iter") if isinstance(content, dict) else None
        if iteration is not None and "optimizer" in content:  # best_*.pth has no optimizer
            saved = content.get(RESUME, {}).get("time") or path.stat().st_mtime
            found.append((saved, iteration, path))
    if found:
        for fault in damaged:
            warn(f"{fault}; skipped")
        return max(found)[-1]
    if damaged:
        raise UserError(f"{folder} has no complete checkpoint: {damaged[-1]}, or start over in another --work-dir")
    pointer = Path(folder, "last_checkpoint")
    name = pointer.read_text().strip() if pointer.is_file() else ""
    if name and not Path(name).is_file():
        raise UserError(
            pointer, f"names {name}, which does not exist", "restore it, or remove the pointer to start over"
        )
    return Path(name) if name else None
