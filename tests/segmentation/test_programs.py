"""UperNet through the programs, on a miniature of ADE20K."""

import numpy as np
import pytest
import torch
from mmengine.config import Config
from PIL import Image

from segmentation import inference, test, train
from tests.integrations.dense import build
from tests.integrations.miniature import VMAMBA, options, run_script, segmentation_config, write_ade20k


@pytest.fixture
def data(tmp_path):
    return write_ade20k(tmp_path / "data")


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


# mmengine keeps no states of random generators: an equal run has no augmentation, no dropout, and a seed
DETERMINISTIC_EMA = """
train_pipeline[3:7] = [dict(type="Resize", scale=(64, 64))]
train_dataloader.update(dataset=dict(pipeline=train_pipeline))
model["decode_head"].update(dropout_ratio=0.0)
model["auxiliary_head"].update(dropout_ratio=0.0)
randomness = dict(seed=0)
param_scheduler = [dict(type="LinearLR", start_factor=0.1, by_epoch=False, end=4)]
custom_hooks = [dict(type="EMAHook", momentum=0.1)]
"""


@pytest.mark.slow
def test_an_interrupted_run_continues_its_averaged_weights(data, tmp_path, capfd):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train.main(options(segmentation_config(tmp_path, 4, DETERMINISTIC_EMA), data, whole))
    train.main(options(segmentation_config(tmp_path, 2, DETERMINISTIC_EMA), data, parts))
    train.main(options(segmentation_config(tmp_path, 4, DETERMINISTIC_EMA), data, parts, "--resume"))
    assert "resumed epoch: 0, iter: 2" in "".join(capfd.readouterr())
    expected, found = (torch.load(run / "iter_4.pth", weights_only=False) for run in (whole, parts))
    averaged, raw = found["state_dict"], found["ema_state_dict"]  # mmengine's names for them once they are saved
    assert raw["steps"] == 4
    assert not torch.equal(averaged["decode_head.conv_seg.weight"], raw["module.decode_head.conv_seg.weight"])
    for part in ("state_dict", "ema_state_dict", "optimizer"):
        torch.testing.assert_close(found[part], expected[part], rtol=0, atol=0)
    assert found["param_schedulers"] == expected["param_schedulers"]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_the_scripts_train_and_evaluate(data, tmp_path, processes):
    config, run = segmentation_config(tmp_path, steps=1), tmp_path / "run"
    run_script("train_ade20k.sh", processes, config, data, "--work-dir", run)
    run_script("evaluate_ade20k.sh", processes, config, data, run / "iter_1.pth", "--work-dir", run)


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["label", "size", "channels", "missing"])
def test_bad_masks_stop_with_the_file_name(data, tmp_path, fault):
    for path in (data / "annotations" / "training").iterdir():
        if fault == "missing":
            path.unlink()
        elif fault == "label":
            Image.fromarray(np.full((64, 96), 200, np.uint8)).save(path)
        else:
            shape = {"size": (64, 64), "channels": (64, 96, 3)}[fault]
            Image.fromarray(np.ones(shape, np.uint8)).save(path)
    message = {
        "label": "holds label 199 .* 150 classes",
        "size": "64x64 pixels .* 96x64",
        "channels": "has 3 channels",
        "missing": "annotations",
    }
    with pytest.raises((ValueError, FileNotFoundError), match=message[fault]) as error:
        train.main(options(segmentation_config(tmp_path), data, tmp_path / "run"))
    assert ".png" in str(error.value)


@pytest.fixture
def weights(tmp_path):
    """Of no use, but the same each time."""
    config = Config.fromfile(segmentation_config(tmp_path))
    torch.manual_seed(0)
    path = tmp_path / "random.pth"
    torch.save({"state_dict": build(config, "cpu").state_dict()}, path)
    return path


def evaluate(weights, data, run, *extra):
    return test.main([str(segmentation_config(run.parent)), str(weights), *options("", data, run, *extra)[1:]])


@pytest.mark.slow
@pytest.mark.parametrize("extra", [(), ("--tta",)], ids=["once", "tta"])
def test_a_bad_mask_stops_the_evaluation(data, tmp_path, weights, extra):
    Image.fromarray(np.ones((64, 64), np.uint8)).save(data / "annotations" / "validation" / "1.png")
    with pytest.raises(ValueError, match=r"1\.png has 64x64 pixels .* 96x64"):
        evaluate(weights, data, tmp_path / "run", *extra)


@pytest.mark.slow
def test_unlabelled_images_train_and_count_nothing(data, tmp_path, weights):
    for path in (*(data / "annotations" / "training").iterdir(), data / "annotations" / "validation" / "1.png"):
        Image.fromarray(np.zeros((64, 96), np.uint8)).save(path)
    runner = train.main(options(segmentation_config(tmp_path), data, tmp_path / "run"))
    assert all(p.isfinite().all() for p in runner.model.parameters())
    scores = evaluate(weights, data, tmp_path / "both")
    (data / "images" / "validation" / "1.jpg").unlink()
    assert evaluate(weights, data, tmp_path / "labelled") == scores


@pytest.mark.slow
def test_a_folder_without_images_is_named(data, tmp_path):
    for path in (data / "images" / "training").iterdir():
        path.unlink()
    with pytest.raises(ValueError, match="images/training holds no image"):
        train.main(options(segmentation_config(tmp_path), data, tmp_path / "run"))


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


@pytest.mark.slow
def test_vmamba_trains_and_is_evaluated(data, tmp_path):
    run, config = tmp_path / "run", segmentation_config(tmp_path, 1, VMAMBA)
    train.main(options(config, data, run))
    scores = test.main([str(config), str(run / "iter_1.pth"), *options(config, data, run)[1:]])
    assert all(np.isfinite(score) for score in scores.values())
