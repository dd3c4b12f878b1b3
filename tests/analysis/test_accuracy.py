"""Accuracy of a folder of checkpoints, by the task folders' own programs."""

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from elfatt.analysis import accuracy
from elfatt.analysis.__main__ import main
from elfatt.analysis.results import load_runs
from elfatt.analysis.rows import select_rows
from elfatt.ops import use_backend


@pytest.mark.slow
def test_a_checkpoint_gets_the_top_1_of_validate(tmp_path, monkeypatch):
    """Weights whose classifier always says class 3, on an ImageNet of four images and classes."""
    real = subprocess.run
    monkeypatch.setattr(
        accuracy.subprocess, "run", lambda command, **options: real([*command, "--num-classes", "4"], **options)
    )
    data, checkpoints = tmp_path / "imagenet", tmp_path / "checkpoints"
    for number in range(4):
        folder = data / "val" / f"n{number:08d}"
        folder.mkdir(parents=True)
        noise = np.random.default_rng(number).integers(0, 255, (64, 64, 3), np.uint8)
        Image.fromarray(noise).save(folder / "x.jpg")
    model = timm.create_model("cswin_tiny_elfatt", num_classes=4)
    model.head.fc.bias.data[3] = 100
    checkpoints.mkdir()
    torch.save({"state_dict": model.state_dict()}, checkpoints / "cswin_tiny_elfatt_224.pth")
    argv = ["tables", "1", "--rows", "CSWin-T*", "--measure", "accuracy", "--device", "cpu"]
    argv += ["--checkpoints", str(checkpoints), "--imagenet", str(data), "--results", str(tmp_path / "m.json")]
    assert main(argv) == 0
    (run,) = load_runs(tmp_path / "m.json")
    (row,) = run["rows"]
    assert row["name"] == "CSWin-T24181-ELFATT 224" and row["top1_percent"] == 25


@pytest.mark.parametrize(
    ("table", "program", "metrics", "expected"),
    [
        (
            7,
            "segmentation.test",
            {"mIoU": 49.5, "mAcc": 61.0, "aAcc": 80.0},
            {"miou_percent": 49.5, "macc_percent": 61.0},
        ),
        (
            6,
            "detection.test",
            {f"coco/{kind}_mAP{suffix}": 0.5 for kind in ("bbox", "segm") for suffix in ("", "_50", "_75")},
            {f"{ap}_{kind}": 50.0 for ap in ("ap", "ap50", "ap75") for kind in ("box", "mask")},
        ),
    ],
)
def test_dense_metrics_are_read_from_mmengines_file(tmp_path, monkeypatch, table, program, metrics, expected):
    row = select_rows([table], ["Swin-T-ELFATT*"])[0]
    (tmp_path / f"{row.config}.pth").touch()
    commands = []

    def run(command, **_):
        commands.append(command)
        folder = Path(command[command.index("--work-dir") + 1]) / "20260101_000000"
        folder.mkdir()
        (folder / "20260101_000000.json").write_text(json.dumps(metrics))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(accuracy.subprocess, "run", run)
    data = {"segmentation": Path("ade"), "detection": Path("coco"), "classification": None}
    with use_backend("math"):
        assert accuracy.evaluate(row, tmp_path, data, "cpu") == {"checkpoint": f"{row.config}.pth"} | expected
    assert commands[0][1:3] == ["-m", program] and Path(commands[0][3]).is_file()
    assert commands[0][-2:] == ["--backend", "math"]
    assert accuracy.evaluate(row, tmp_path / "elsewhere", data, "cpu") == {}
    assert set(expected) <= set(row.published)


def test_a_program_that_fails_is_quoted(tmp_path):
    (row,) = select_rows([1], ["CSWin-T24181-ELFATT"])
    (tmp_path / f"{row.config}.pth").write_text("no checkpoint")
    with pytest.raises(RuntimeError, match=r"classification.validate failed on .*cswin_tiny_elfatt_224.pth: .+"):
        accuracy.evaluate(row, tmp_path, {"classification": tmp_path}, "cpu")
