"""UperNet through the programs, on a miniature of ADE20K."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from segmentation import inference, test, train
from tests.integrations.dense import ROOT
from tests.integrations.miniature import segmentation_config, write_ade20k


@pytest.fixture
def data(tmp_path):
    return write_ade20k(tmp_path / "data")


def options(config, data, run, *extra):
    return [str(x) for x in (config, "--data-dir", data, "--work-dir", run, *extra)]


@pytest.mark.slow
def test_trains_resumes_evaluates_and_draws(data, tmp_path, capfd):
    run, config = tmp_path / "run", segmentation_config(tmp_path)
    train.main(options(config, data, run))
    first = torch.load(run / "iter_2.pth", weights_only=False)
    config = segmentation_config(tmp_path, steps=3)
    runner = train.main(options(config, data, run, "--resume"))
    assert "resumed epoch: 0, iter: 2" in "".join(capfd.readouterr())
    second = torch.load(run / "iter_3.pth", weights_only=False)
    assert (first["meta"]["iter"], second["meta"]["iter"], runner.iter) == (2, 3, 3)
    steps = [{int(s["step"]) for s in c["optimizer"]["state"].values()} for c in (first, second)]
    assert steps == [{2}, {3}]
    assert [c["param_schedulers"][0]["last_step"] for c in (first, second)] == [2, 3]
    assert list(run.glob("*/vis_data/events*"))

    scores = test.main([str(config), str(run / "iter_3.pth"), *options(config, data, run, "--tta")[1:]])
    assert set(scores) == {"mIoU", "mAcc", "aAcc"}
    picture, image = tmp_path / "out.png", data / "images" / "validation" / "0.jpg"
    inference.main([str(config), str(run / "iter_3.pth"), str(image), str(picture), "--device", "cpu"])
    assert Image.open(picture).size == Image.open(image).size


@pytest.mark.slow
def test_two_processes_train(data, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    program = options(segmentation_config(tmp_path, steps=1), data, tmp_path / "run", "--launcher", "pytorch")
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore"}
    command += [str(ROOT / "segmentation" / "train.py"), *program]
    result = subprocess.run(command, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    assert (tmp_path / "run" / "iter_1.pth").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["label", "size", "missing"])
def test_bad_masks_stop_with_the_file_name(data, tmp_path, fault):
    for path in (data / "annotations" / "training").iterdir():
        if fault == "missing":
            path.unlink()
        elif fault == "label":
            Image.fromarray(np.full((64, 96), 200, np.uint8)).save(path)
        else:
            Image.fromarray(np.ones((64, 64), np.uint8)).save(path)
    message = {"label": "holds label 199 .* 150 classes", "size": "64x64 pixels .* 96x64", "missing": "annotations"}
    with pytest.raises((ValueError, FileNotFoundError), match=message[fault]) as error:
        train.main(options(segmentation_config(tmp_path), data, tmp_path / "run"))
    assert ".png" in str(error.value)


def test_what_is_not_there_ends_in_one_line(tmp_path, capsys):
    config = segmentation_config(tmp_path)
    for arguments, word in (
        (["no.py"], "config no.py is no file"),
        ([str(config), "--data-dir", "nowhere"], "--data-dir nowhere is no folder"),
        ([str(config), "--pretrained", "no.pth"], "pretrained no.pth is no file"),
    ):
        with pytest.raises(SystemExit):
            train.main(arguments)
        assert capsys.readouterr().err == f"segmentation/train.py: error: {word}\n"
