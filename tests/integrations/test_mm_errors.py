"""A program ends in one line where its user has something to put right, and in a traceback where not."""

import errno
import multiprocessing
import os
import sys

import pytest
import torch
from mmengine.registry import TRANSFORMS
from torch.utils.data import DataLoader

from elfatt.data import UserError
from elfatt.integrations import mm_errors
from elfatt.integrations.mm_checks import check_batch_norm, check_channels
from elfatt.integrations.mm_runner import CheckedRunner
from elfatt.ops import get_backend
from elfatt.preemption import Preempted
from elfatt.processes import start_worker


def end(monkeypatch, main):
    monkeypatch.setattr(sys, "argv", ["/somewhere/segmentation/train.py"])
    with pytest.raises(SystemExit) as stop:
        mm_errors.run(main)
    assert "\n" not in stop.value.code
    return stop.value.code


class Broken(torch.utils.data.Dataset):
    def __init__(self, error):
        self.error = error

    def __len__(self):
        return 2

    def __getitem__(self, index):
        raise self.error


def load(error):
    return lambda: next(iter(DataLoader(Broken(error), num_workers=1)))


def build():
    TRANSFORMS.build({"type": "LoadImage", "mode": "BGR"})


def ask():
    get_backend("fast")


def preempted():
    raise Preempted


def test_a_run_stopped_by_a_signal_ends_like_one_killed_by_it():
    with pytest.raises(SystemExit) as stop:
        mm_errors.run(preempted)
    assert stop.value.code == 143


@pytest.mark.parametrize(
    ("main", "message"),
    [
        (load(UserError("a.png", "has no end", "restore it")), "a.png has no end: restore it"),
        (build, "LoadImage(mode='BGR') is not a mode: use 'RGB' or 'L'"),
        (ask, "unknown backend 'fast': choose one of "),
    ],
    ids=["worker", "registry", "ValueError of the package"],
)
def test_what_a_user_puts_right_takes_one_line(monkeypatch, main, message):
    assert end(monkeypatch, main).startswith(f"segmentation/train.py: error: {message}")


@pytest.mark.parametrize("error", [ValueError("not ours"), RuntimeError("CUDA"), KeyError("mask")])
def test_anything_else_keeps_its_traceback(error):
    def main():
        raise error

    with pytest.raises(type(error)) as caught:
        mm_errors.run(main)
    assert caught.value is error
    with pytest.raises(type(error)):
        mm_errors.run(load(error))


class Large(torch.utils.data.Dataset):
    def __len__(self):
        return 2

    def __getitem__(self, index):
        return torch.zeros(8)


def test_a_batch_that_a_worker_cannot_hand_over_stops_the_program(monkeypatch):
    """As on a full /dev/shm; PyTorch alone waits for the batch for ever."""

    def refuse(*args):
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1_2>: No space left on device (28)")

    def main():
        loader = DataLoader(Large(), num_workers=1, multiprocessing_context="fork", timeout=30)
        loader.worker_init_fn = lambda worker: (
            start_worker(None, worker),
            multiprocessing.reduction.ForkingPickler.register(torch.Tensor, refuse),
        )
        next(iter(loader))

    line = end(monkeypatch, main)
    assert (
        "workers ran out of shared memory" in line and "/dev/shm" in line and "train_dataloader.num_workers=0" in line
    )


def test_a_worker_killed_for_shared_memory_is_explained():
    killed = RuntimeError("DataLoader worker is killed by signal: Bus error. ... out of shared memory. ...")
    error = RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly")
    with pytest.raises(RuntimeError), mm_errors.enough_space("."):
        raise error
    error.__cause__ = killed
    with pytest.raises(UserError, match=r"train_dataloader\.num_workers=0"), mm_errors.enough_space("."):
        raise error


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_leaves_no_part_of_a_checkpoint(monkeypatch, tmp_path, number):
    def write(runner, out_dir, filename, whole=False):
        with open(os.path.join(out_dir, filename), "w") as file:
            file.write("part")
        if not whole:
            raise OSError(number, "No space left on device")

    monkeypatch.setattr("mmengine.runner.Runner.save_checkpoint", write)
    runner = CheckedRunner.__new__(CheckedRunner)
    with pytest.raises(UserError, match=rf"the disk is full \({tmp_path} has [\d.]+ MiB left\): make room"):
        runner.save_checkpoint(str(tmp_path), "iter_1.pth")
    assert not list(tmp_path.iterdir())
    runner.save_checkpoint(str(tmp_path), "iter_1.pth", whole=True)
    assert [path.name for path in tmp_path.iterdir()] == ["iter_1.pth"]


def test_only_the_process_that_writes_a_checkpoint_touches_its_file(monkeypatch, tmp_path):
    monkeypatch.setattr("mmengine.runner.Runner.save_checkpoint", lambda *args: None)
    monkeypatch.setattr("elfatt.integrations.mm_runner.is_main_process", lambda: False)
    part = tmp_path / "iter_1.pth.tmp"
    part.touch()
    CheckedRunner.save_checkpoint(CheckedRunner.__new__(CheckedRunner), str(tmp_path), "iter_1.pth")
    assert part.exists()


def test_another_error_of_the_disk_is_kept(tmp_path):
    with pytest.raises(PermissionError), mm_errors.enough_space(str(tmp_path)):
        raise PermissionError(errno.EACCES, "denied")


def pooled(norm, size=1):
    return torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(size), torch.nn.Sequential(torch.nn.Conv2d(1, 1, 1), norm))


@pytest.mark.parametrize(
    ("model", "batch", "stops"),
    [
        (pooled(torch.nn.BatchNorm2d(1)), 1, True),
        (pooled(torch.nn.SyncBatchNorm(1)), 1, True),  # of one process
        (pooled(torch.nn.BatchNorm2d(1)), 2, False),
        (pooled(torch.nn.BatchNorm2d(1), size=2), 1, False),
        (pooled(torch.nn.Identity()), 1, False),
    ],
)
def test_a_batch_norm_needs_two_values(model, batch, stops):
    if not stops:
        check_batch_norm(model, batch)
        model.train()(torch.zeros(batch, 1, 3, 3))
        return
    with pytest.raises(UserError, match="batch_size=1 leaves one value .* train_dataloader.batch_size=2"):
        check_batch_norm(model, batch)


@pytest.mark.parametrize(
    ("channels", "mode", "means", "swap", "message"),
    [
        (3, "RGB", 3, True, None),
        (1, "L", 1, False, None),
        (
            1,
            "RGB",
            3,
            True,
            r"in_chans=1 does not fit LoadImage\(mode='RGB'\) .* 3 means: set mode='L'",
        ),
        (1, "L", 3, False, "data_preprocessor with 3 means"),
        (1, "L", 1, True, "bgr_to_rgb=False"),
        (3, "L", 3, True, r"in_chans=3 does not fit LoadImage\(mode='L'\)"),
        (4, "RGB", 3, True, "in_chans=4 is not supported: use 3"),
    ],
)
def test_channels_agree(channels, mode, means, swap, message):
    from mmengine.config import Config

    loader = {"dataset": {"type": "RepeatDataset", "dataset": {"pipeline": [{"type": "LoadImage", "mode": mode}]}}}
    preprocessor = {"mean": [0.0] * means, "bgr_to_rgb": swap}
    model = {"backbone": {"in_chans": channels}, "data_preprocessor": preprocessor}
    config = Config({"model": model, "train_dataloader": loader})
    if message is None:
        check_channels(config)
        config.train_dataloader.dataset.dataset.pipeline.append({"type": "PhotoMetricDistortion"})
        if channels == 1:
            with pytest.raises(UserError, match="PhotoMetricDistortion changes colours"):
                check_channels(config)
    else:
        with pytest.raises(UserError, match=message):
            check_channels(config)
