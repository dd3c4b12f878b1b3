"""Dense runs that are interrupted and resumed end with the same weights, bit for bit on a CPU."""

import logging
import os
import random
import re
import signal
from contextlib import contextmanager
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.dataset import DefaultSampler, InfiniteSampler
from mmengine.logging import MessageHub
from mmengine.runner import EpochBasedTrainLoop, Runner
from torch.utils.data import BatchSampler, DataLoader

import detection.train
import segmentation.train
from elfatt.data import UserError
from elfatt.integrations import mm_resume
from elfatt.integrations.mm_resume import (
    ExactCheckpointHook,
    SeededBatches,
    SeekableEpochLoop,
    SeekableIterLoop,
    newest_checkpoint,
    seed_batches,
    seekable,
)
from elfatt.preemption import SIGNALS, Preempted
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


@contextmanager
def interrupted(name, times, number=None):
    """Kill the run within, or send it a signal, when it calls a hook for the n-th time."""
    call_hook, left = Runner.call_hook, [times]

    def call(runner, fn_name, **kwargs):
        left[0] -= fn_name == name
        if fn_name == name and not left[0]:
            if number is None:
                raise Killed
            os.kill(os.getpid(), number)
        call_hook(runner, fn_name, **kwargs)

    before = [signal.getsignal(number) for number in SIGNALS]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Preempted if number else Killed):
        patch.setattr(Runner, "call_hook", call)
        yield
    assert [signal.getsignal(number) for number in SIGNALS] == before


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
def test_a_segmentation_run(tmp_path, capfd):
    data = write_ade20k(tmp_path / "data", train=3)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    config = segmentation_config(tmp_path, 5, SEGMENTATION + SEED)
    segmentation.train.main(options(config, data, whole))
    with interrupted("before_train_iter", 4):
        segmentation.train.main(options(config, data, parts))
    capfd.readouterr()
    with interrupted("before_train_iter", 1, SIGNALS[-1]):
        segmentation.train.main(options(config, data, parts, "--resume", "auto"))
    lines = [line for line in "".join(capfd.readouterr()).splitlines() if "stopped by a signal" in line]
    assert len(lines) == 1 and lines[0].endswith(f"iteration 3 is saved in {parts}: continue with --resume auto")
    # the seed is the checkpoint's, and the number of workers is free
    more = SEGMENTATION + "train_dataloader.update(num_workers=2, persistent_workers=True)\n"
    config = segmentation_config(tmp_path, 5, more)
    assert (parts / "recovery.pth").is_file()
    segmentation.train.main(options(config, data, parts, "--resume", "auto"))
    compare(parts / "iter_5.pth", whole / "iter_5.pth")
    assert not (parts / "recovery.pth").exists()


# batches grouped by aspect ratio, gradients over two batches, checkpoints within epochs of three batches
DETECTION = """
train_dataloader.update(batch_size=1)
optim_wrapper = dict(accumulative_counts=2)
default_hooks["checkpoint"] = dict(by_epoch=False, interval=1, max_keep_ckpts=5)
param_scheduler = [dict(type="MultiStepLR", by_epoch=True, milestones=[1], gamma=0.1)]
randomness = dict(seed=5)
"""


@pytest.mark.slow
def test_a_detection_run(tmp_path, capfd):
    data = write_coco(tmp_path / "data")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    config = detection_config(tmp_path, 2, DETECTION)
    detection.train.main(options(config, data, whole))
    with interrupted("before_train_iter", 2):  # in the middle of an epoch, with gradients of half an update
        detection.train.main(options(config, data, parts))
    with interrupted("before_val_iter", 1, signal.SIGTERM):
        detection.train.main(options(config, data, parts, "--resume", "auto"))
    capfd.readouterr()
    detection.train.main(options(config, data, parts, "--resume", "auto"))
    compare(parts / "iter_6.pth", whole / "iter_6.pth")
    log = "".join(capfd.readouterr())
    assert re.findall(r"Epoch\((train|val)\) +\[(\d)\]\[ *\d/", log)[:2] == [("val", "1"), ("val", "1")]


@pytest.mark.slow
def test_two_processes(tmp_path):
    data, more = write_ade20k(tmp_path / "data"), SEGMENTATION + SEED

    def train(run, steps, *extra):
        config = segmentation_config(run.parent, 4, more)
        limit = ("--cfg-options", f"train_cfg.max_iters={steps}")
        segmentation.train.main(options(config, data, run, "--launcher", "pytorch", *extra, *limit))

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    in_two_processes(lambda: train(whole, 4))
    in_two_processes(lambda: train(parts, 2))
    in_two_processes(lambda: train(parts, 4, "--resume", "auto"))
    compare(parts / "iter_4.pth", whole / "iter_4.pth")


LAYOUT = {"processes": 1, "images per batch": 2, "training images": 7}


@pytest.mark.parametrize("loop", [SeekableEpochLoop, SeekableIterLoop])
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("processes", "1 processes instead of 9"),
        ("images per batch", "2 images per batch instead of 9"),
        ("training images", "7 training images instead of 9"),
    ],
)
def test_a_changed_run_does_not_resume_exactly(monkeypatch, loop, name, changes):
    lines = []
    monkeypatch.setattr(mm_resume, "warn", lines.append)
    monkeypatch.setattr(mm_resume, "_validation_is_due", lambda loop: True)
    resumed = loop.__new__(loop)
    resumed.dataloader = loader_of()
    hook, runner = ExactCheckpointHook(), SimpleNamespace(train_loop=resumed)
    state = {"layout": {**LAYOUT, name: 9}, "batch": 2}
    if loop is SeekableEpochLoop:
        message = f"checkpoint is of the middle of an epoch, but there are {changes}: resume with the same"
        with pytest.raises(UserError, match=message):
            hook._restore(runner, state)
        state["batch"] = 0  # between two epochs
    assert hook._restore(runner, state)
    assert lines == [f"{changes}: the run continues, but not bit for bit"]


def test_what_cannot_be_sought_is_said(monkeypatch):
    lines = []
    monkeypatch.setattr(mm_resume, "warn", lines.append)
    monkeypatch.setattr(mm_resume, "set_rng_state", lambda *args: None)
    for kind, dataset in ((EpochBasedTrainLoop, Numbers()), (SeekableEpochLoop, Stream())):
        loop = kind.__new__(kind)
        loop.dataloader = DataLoader(dataset, batch_size=2)
        seed_batches(loop.dataloader, 3)
        state = {"layout": mm_resume._layout(loop), "batch": 2, "processes": [{"rng": {}, "gradients": {}}]}
        runner = SimpleNamespace(train_loop=loop, model=torch.nn.Linear(1, 1))
        assert not ExactCheckpointHook()._restore(runner, state) and not getattr(loop, "start", 0)
    assert (
        lines == ["the train loop or dataset cannot start at a given batch: the run continues, but not bit for bit"] * 2
    )


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        yield from range(9)


class Numbers(torch.utils.data.Dataset):
    """Each item is its index and random numbers of all sources."""

    def __len__(self):
        return 7

    def __getitem__(self, index):
        return index, random.random(), np.random.rand(), torch.rand(()).item()


def loader_of(workers=0, sampler=DefaultSampler, endless=False):
    numbers = Numbers()
    batches = BatchSampler(sampler(numbers, seed=3), 2, drop_last=False)
    loader = DataLoader(
        numbers,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=list,
        persistent_workers=workers > 0,
    )
    seed_batches(loader, 3)
    loader.batch_sampler.endless = endless
    return loader


@pytest.mark.parametrize("workers", [0, 2])
def test_samples_depend_on_their_place_only(workers):
    loader, state = loader_of(), torch.get_rng_state()
    expected = {}
    for epoch in range(2):
        loader.batch_sampler.sampler.set_epoch(epoch)
        loader.batch_sampler.seek(epoch, 0)
        expected[epoch] = list(loader)
    values = [value for epoch in expected.values() for batch in epoch for _, *row in batch for value in row]
    assert len(set(values)) == len(values) == 2 * 7 * 3
    assert torch.equal(torch.get_rng_state(), state)  # neither samples nor iterators draw from the run's generator
    again = loader_of(workers)
    again.batch_sampler.sampler.set_epoch(1)
    again.batch_sampler.seek(1, 2)
    assert list(again) == expected[1][2:] and len(again) == 4


@pytest.mark.parametrize("sampler", [DefaultSampler, InfiniteSampler])
def test_an_endless_loader_starts_anywhere(sampler):
    expected = list(islice(loader_of(sampler=sampler, endless=True), 10))
    loader = loader_of(sampler=sampler, endless=True)
    loader.batch_sampler.seek(0, 9)
    assert next(iter(loader)) == expected[9]
    order = [[index for index, *_ in batch] for batch in expected]
    assert order[:4] != order[4:8]  # the second pass is shuffled anew


def test_a_loader_without_a_batch_is_no_endless_loop():
    batches = SeededBatches(BatchSampler(DefaultSampler(Numbers(), seed=3), 8, drop_last=True), 3)
    batches.endless = True
    with pytest.raises(UserError, match="yields no batch: lower batch_size"):
        next(iter(batches))


@pytest.mark.parametrize(
    ("given", "kind"),
    [
        ({"type": "EpochBasedTrainLoop"}, "SeekableEpochLoop"),
        ({"type": "mmengine.IterBasedTrainLoop"}, "SeekableIterLoop"),
        ({"type": EpochBasedTrainLoop}, "SeekableEpochLoop"),
        ({"by_epoch": False}, "SeekableIterLoop"),
        ({"by_epoch": True}, "SeekableEpochLoop"),
        ({"type": "Theirs"}, "Theirs"),
    ],
)
def test_the_loops_of_mmengine_become_seekable(given, kind):
    assert seekable({**given, "max_epochs": 3}) == {"type": kind, "max_epochs": 3}


def write(path, iteration, saved=None, **content):
    """Write a checkpoint of mmengine, with our part if it has a time."""
    content = {"meta": {"iter": iteration}, "optimizer": {}, "weight": torch.zeros(1000), **content}
    torch.save(content if saved is None else {**content, "resume": {"time": saved}}, path)
    return path


def damage(path, how):
    """Leave the file as a full disk, a broken copy, or a foreign program would."""
    size = path.stat().st_size
    if how == "other":
        path.write_text("no checkpoint")
    else:
        os.truncate(path, {"empty": 0, "cut": size // 2, "end": size - 1}[how])


@pytest.mark.parametrize("pointer", [None, "", "iter_40.pth", "iter_20.pth", "/gone/iter_60.pth", "iter_60.pth"])
def test_the_newest_checkpoint_is_resumed_whatever_the_pointer_says(tmp_path, pointer):
    write(tmp_path / "iter_20.pth", 20)
    write(tmp_path / "iter_60.pth", 60)
    os.utime(tmp_path / "iter_20.pth", (0, 0))
    torch.save({"meta": {"iter": 80}}, tmp_path / "best_mIoU_iter_80.pth")  # no optimizer: cannot be resumed
    (tmp_path / "iter_80.pth.tmp").write_text("cut off")
    if pointer is not None:
        (tmp_path / "last_checkpoint").write_text(pointer)
    assert newest_checkpoint(tmp_path) == tmp_path / "iter_60.pth"


@pytest.mark.parametrize("how", ["empty", "cut", "end", "other"])
def test_a_damaged_checkpoint_is_skipped_aloud(tmp_path, how, monkeypatch):
    lines = []
    monkeypatch.setattr(mm_resume, "warn", lines.append)
    older, newer = write(tmp_path / "iter_20.pth", 20, 1.0), write(tmp_path / "iter_60.pth", 60, 2.0)
    (tmp_path / "last_checkpoint").write_text(str(newer))
    damage(newer, how)
    assert newest_checkpoint(tmp_path) == older
    assert len(lines) == 1
    assert re.fullmatch(r"checkpoint .*iter_60\.pth cannot be read \(.*\): copy it again; skipped", lines[0])
    older.unlink()
    with pytest.raises(UserError, match="has no complete checkpoint: checkpoint .*iter_60.pth cannot be read") as error:
        newest_checkpoint(tmp_path)
    assert "\n" not in str(error.value)


def test_epochs_and_iterations_are_ordered_by_time(tmp_path):
    write(tmp_path / "epoch_2.pth", 20, 3.0)
    write(tmp_path / "iter_90.pth", 90, 1.0)  # of an earlier run
    assert newest_checkpoint(tmp_path).name == "epoch_2.pth"
    write(tmp_path / "recovery.pth", 25, 4.0)
    assert newest_checkpoint(tmp_path).name == "recovery.pth"


def test_a_pointer_to_another_folder(tmp_path):
    (tmp_path / "last_checkpoint").write_text(str(tmp_path / "elsewhere.tar"))
    with pytest.raises(UserError, match=r"last_checkpoint names .*elsewhere\.tar, which does not exist: restore it"):
        newest_checkpoint(tmp_path)
    write(tmp_path / "elsewhere.tar", 1)
    assert newest_checkpoint(tmp_path) == tmp_path / "elsewhere.tar"
    (tmp_path / "last_checkpoint").unlink()
    assert newest_checkpoint(tmp_path) is None and newest_checkpoint(tmp_path / "none") is None


@pytest.mark.parametrize("kept", [1, 2])
def test_the_oldest_checkpoint_goes_when_the_newest_is_complete(tmp_path, kept):
    hub = MessageHub.get_instance("checkpoints")
    full = False

    def save(out_dir, filename, *args, **kwargs):
        if full:
            raise UserError("the disk is full")
        (tmp_path / filename).touch()

    runner = SimpleNamespace(
        message_hub=hub,
        save_checkpoint=save,
        work_dir=str(tmp_path),
        epoch=0,
        iter=0,
        logger=logging.getLogger("test"),
        _resume=False,
    )
    hook = ExactCheckpointHook(interval=1, max_keep_ckpts=kept, out_dir=str(tmp_path))
    hook._collect = lambda *args: {}
    hub.update_info("keep_ckpt_ids", [])
    hook.before_train(runner)
    hook.out_dir = str(tmp_path)

    def names():
        return sorted(path.stem for path in tmp_path.glob("*.pth"))

    for epoch in range(4):
        runner.epoch = epoch
        hook._save_checkpoint(runner)
        assert names() == [f"epoch_{e + 1}" for e in range(max(0, epoch + 1 - kept), epoch + 1)]
    before, full, runner.epoch = names(), True, 4
    with pytest.raises(UserError):
        hook._save_checkpoint(runner)
    assert names() == before and (tmp_path / "last_checkpoint").read_text().endswith("epoch_4.pth")
    assert hook.max_keep_ckpts == kept
