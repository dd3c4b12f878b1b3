"""Checkpoints survive a kill at any moment, and hold everything."""

import errno
import os
import signal

import pytest
import timm
import torch
from timm.utils import ModelEmaV3
from torch import nn

from classification import checkpoint
from classification.checkpoint import AtomicSaver, find_newest, load
from elfatt.data import UserError

CPU = torch.device("cpu")


def save(saver, epoch, metric):
    return saver.save_epoch({"value": torch.tensor(epoch)}, epoch, metric)


def test_the_best_epochs_the_last_and_the_best_one_are_kept(tmp_path):
    saver = AtomicSaver(tmp_path, max_history=2)
    saver.save_recovery({"value": torch.tensor(-1)}, 0)
    assert (tmp_path / "recovery.pth.tar").exists()
    assert [save(saver, epoch, metric) for epoch, metric in enumerate([50.0, 70.0, 60.0, 40.0])] == [50, 70, 70, 70]
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {f"{name}.pth.tar" for name in ("checkpoint-1", "checkpoint-2", "last", "model_best")}
    assert load(tmp_path / "model_best.pth.tar")["value"] == 1
    assert load(tmp_path / "last.pth.tar")["value"] == 3
    again = AtomicSaver(tmp_path, max_history=2)
    again.load_state_dict(load(tmp_path / "last.pth.tar")["saver"])
    assert (again.best_metric, again.best_epoch) == (70, 1)
    assert save(again, 4, 65.0) == 70
    assert not (tmp_path / "checkpoint-2.pth.tar").exists()


@pytest.mark.parametrize("moment", ["save", "replace"])
def test_a_kill_while_saving_leaves_the_last_good_one(tmp_path, monkeypatch, moment):
    saver = AtomicSaver(tmp_path, max_history=3)
    save(saver, 0, 10.0)
    good = {path.name for path in tmp_path.iterdir()}
    child = os.fork()
    if not child:  # in the child process: die in the middle of the next save
        if moment == "save":

            def half(state, file):
                file.write(b"PK half a checkpoint")
                file.flush()
                os.kill(os.getpid(), signal.SIGKILL)

            monkeypatch.setattr(torch, "save", half)
        else:
            monkeypatch.setattr(checkpoint.os, "replace", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        save(saver, 1, 20.0)
        os._exit(1)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    assert good < {path.name for path in tmp_path.iterdir()}  # the unfinished file is there, under another name
    for name in good:
        assert load(tmp_path / name)["value"] == 0
    path, state = find_newest(tmp_path)
    assert path.name == "last.pth.tar" and state["value"] == 0
    again = AtomicSaver(tmp_path, max_history=3)
    again.load_state_dict(state["saver"])
    assert save(again, 1, 20.0) == 20
    assert {path.name for path in tmp_path.iterdir() if "tmp" in path.name} == set()


def test_a_full_disk_loses_nothing_and_is_named(tmp_path, monkeypatch):
    saver = AtomicSaver(tmp_path, max_history=3)
    save(saver, 0, 10.0)
    good = {path.name for path in tmp_path.iterdir()}

    def full(state, file):
        file.write(b"PK half a checkpoint")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match=rf"cannot save {tmp_path}/.*: the disk is full \({tmp_path} has .* MiB left\)"):
        save(saver, 1, 20.0)
    assert {path.name for path in tmp_path.iterdir()} == good
    assert find_newest(tmp_path)[1]["value"] == 0


def test_the_names_of_a_checkpoint_never_vanish(tmp_path, monkeypatch):
    """timm's saver unlinks a name before it writes it again; here every name is there at every moment."""
    saver = AtomicSaver(tmp_path, max_history=3)
    save(saver, 0, 10.0)
    seen = []
    replace = os.replace

    def watched(source, target):
        seen.append((tmp_path / "last.pth.tar").exists() and (tmp_path / "model_best.pth.tar").exists())
        replace(source, target)

    monkeypatch.setattr(checkpoint.os, "replace", watched)
    save(saver, 1, 20.0)
    assert seen == [True] * 3  # last, checkpoint-1, model_best


def test_the_newest_readable_checkpoint_is_found(tmp_path, caplog):
    assert find_newest(tmp_path) is None
    saver = AtomicSaver(tmp_path, max_history=3)
    save(saver, 0, 10.0)
    assert find_newest(tmp_path)[0].name == "last.pth.tar"
    saver.save_recovery({"value": torch.tensor(5)}, 1)
    assert find_newest(tmp_path)[0].name == "recovery.pth.tar"
    (tmp_path / "recovery.pth.tar").write_bytes(b"half")
    assert find_newest(tmp_path)[0].name == "last.pth.tar"
    (tmp_path / "last.pth.tar").write_bytes(b"")
    (tmp_path / "checkpoint-0.pth.tar").write_bytes(b"")
    with pytest.raises(UserError, match="no checkpoint in .* can be read"):
        find_newest(tmp_path)


def test_ema_averages_floating_point_tensors_only():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(2))
            self.register_buffer("index", torch.tensor([3, 7]))
            self.register_buffer("mask", torch.tensor([True, False]))
            self.register_buffer("mean", torch.zeros(1))

    model = Model()
    ema = ModelEmaV3(model, decay=0.75)
    with torch.no_grad():
        model.weight += 4
        model.index += 10
        model.mean += 8
    ema.update(model)
    average = ema.module.state_dict()
    assert average["weight"].tolist() == [1, 1] and average["mean"].item() == 2
    assert average["index"].tolist() == [13, 17] and average["index"].dtype == torch.int64
    assert average["mask"].tolist() == [True, False]


def test_ema_keeps_the_integer_tables_of_swin():
    model = timm.create_model("swin_nano_elfatt", img_size=32, num_classes=3)
    integers = {name: value for name, value in model.state_dict().items() if not value.is_floating_point()}
    ema = ModelEmaV3(model, decay=0.9)
    for _ in range(3):
        ema.update(model)
    for name, value in integers.items():
        assert torch.equal(ema.module.state_dict()[name], value)
