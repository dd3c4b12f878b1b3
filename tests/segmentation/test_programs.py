"""UperNet through the programs, on a miniature of ADE20K."""

import re

import numpy as np
import pytest
import torch
from mmengine.config import Config
from PIL import Image

from elfatt.data import UserError
from elfatt.integrations.mm_models import build_model
from segmentation import inference, test, train
from tests.integrations.miniature import (
    VMAMBA,
    in_two_processes,
    options,
    run_script,
    segmentation_config,
    write_ade20k,
)


@pytest.fixture
def data(tmp_path):
    return write_ade20k(tmp_path / "data")


@pytest.mark.slow
def test_trains_and_resumes(data, tmp_path, capfd, backends_run):
    run, config = tmp_path / "run", segmentation_config(tmp_path)
    train.main(options(config, data, run))
    first = torch.load(run / "iter_2.pth", weights_only=False)
    config = segmentation_config(tmp_path, steps=3)
    backends_run.clear()
    extra = ["--resume", "auto", "--pretrained", "not needed any more", "--backend", "reference"]
    runner = train.main(options(config, data, run, *extra))
    log = "".join(capfd.readouterr())
    assert "resumed epoch: 0, iter: 2" in log and "Could not safely load" not in log
    assert backends_run == {"reference"} and re.search(r"^backend ?= ?'reference'$", log, re.MULTILINE)
    assert Config.fromfile(run / config.name).backend == "reference"
    second = torch.load(run / "iter_3.pth", weights_only=False)
    assert (first["meta"]["iter"], second["meta"]["iter"], runner.iter) == (2, 3, 3)
    steps = [{int(s["step"]) for s in c["optimizer"]["state"].values()} for c in (first, second)]
    assert steps == [{2}, {3}]
    assert [c["param_schedulers"][0]["last_step"] for c in (first, second)] == [2, 3]
    assert list(run.glob("*/vis_data/events*"))


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "backend"), [(1, "auto"), (2, "sdpa")])
def test_the_scripts_train_and_evaluate(data, tmp_path, processes, backend):
    config, run = segmentation_config(tmp_path, steps=1), tmp_path / "run"
    run_script("train_ade20k.sh", processes, config, data, "--work-dir", run, "--backend", backend)
    run_script("evaluate_ade20k.sh", processes, config, data, run / "iter_1.pth", "--work-dir", run)


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["label", "size", "channels", "bits", "missing"])
def test_bad_masks_stop_with_the_file_name(data, tmp_path, fault):
    for path in (data / "annotations" / "training").iterdir():
        if fault == "missing":
            path.unlink()
        elif fault == "label":
            Image.fromarray(np.full((64, 96), 200, np.uint8)).save(path)
        elif fault == "bits":
            Image.fromarray(np.full((64, 96), 257, np.uint16)).save(path)  # 1 in 8 bits
        else:
            shape = {"size": (64, 64), "channels": (64, 96, 3)}[fault]
            Image.fromarray(np.ones(shape, np.uint8)).save(path)
    message = {
        "label": "holds label 199, but 0 to 149 and 255 are known: .* 150 classes",
        "size": r"96x64 pixels .*\.png says 64x64",
        "channels": "of mode RGB: save class indices as 8-bit grey",
        "bits": "of mode I;16: save class indices as 8-bit grey",
        "missing": r"images/training contains 4 of 4 images without a mask, first .*0\.jpg: add masks",
    }
    with pytest.raises(UserError, match=message[fault]):
        train.main(options(segmentation_config(tmp_path), data, tmp_path / "run"))


@pytest.fixture
def weights(tmp_path):
    """Of no use, but the same each time."""
    config = Config.fromfile(segmentation_config(tmp_path))
    torch.manual_seed(0)
    path = tmp_path / "random.pth"
    torch.save({"state_dict": build_model(config, "cpu").state_dict()}, path)
    return path


def evaluate(weights, data, run, *extra):
    return test.main([str(segmentation_config(run.parent)), str(weights), *options("", data, run, *extra)[1:]])


@pytest.fixture
def by_brightness(monkeypatch):
    """A stand-in for the network that knows the miniature's grey levels, and nothing of scales, flips and files."""
    from mmseg.models import EncoderDecoder

    def encode_decode(model, inputs, metas):
        preprocessor = model.data_preprocessor
        grey = (inputs * preprocessor.std + preprocessor.mean).mean(1, keepdim=True)
        grey = torch.nn.functional.avg_pool2d(grey, 3, stride=1, padding=1, count_include_pad=False)
        levels = torch.arange(90, 90 + 60 * 150, 60).view(1, 150, 1, 1)
        return -(grey - levels).abs() / 60

    monkeypatch.setattr(EncoderDecoder, "encode_decode", encode_decode)


@pytest.mark.slow
@pytest.mark.parametrize("extra", [(), ("--tta",)], ids=["once", "tta"])
def test_what_is_evaluated_is_what_is_drawn(data, tmp_path, weights, by_brightness, extra):
    scores = evaluate(weights, data, tmp_path / "run", "--show-dir", tmp_path / "pictures", *extra)
    assert set(scores) == {"mIoU", "mAcc", "aAcc"} and min(scores.values()) > 85
    pictures = sorted((tmp_path / "pictures").rglob("*"))
    assert [path.name for path in pictures] == ["0.jpg", "1.jpg"]
    for path in pictures:
        picture = np.array(Image.open(path), dtype=int)
        assert picture.shape == (64, 2 * 96, 3)
        truth, prediction = picture[4:, :96], picture[4:, 96:]  # the first rows are unlabelled
        assert (abs(truth - prediction).max(2) < 40).mean() > 0.8


@pytest.mark.slow
def test_the_backend_of_an_evaluation_and_of_an_image(data, tmp_path, weights, backends_run):
    evaluate(weights, data, tmp_path / "run", "--backend", "math")
    assert backends_run == {"math"}
    assert Config.fromfile(tmp_path / "run" / "segmentation_nano.py").backend == "math"
    backends_run.clear()
    image, out = data / "images" / "validation" / "0.jpg", tmp_path / "out.png"
    arguments = [str(segmentation_config(tmp_path)), str(weights), str(image), str(out), "--device", "cpu"]
    inference.main([*arguments, "--backend", "reference"])
    assert backends_run == {"reference"} and out.is_file()


@pytest.mark.slow
@pytest.mark.parametrize("program", ["test", "inference", "resume", "validation"])
def test_classes_that_are_not_those_of_the_training_stop(data, tmp_path, weights, program):
    from mmseg.datasets import ADE20KDataset

    classes = list(ADE20KDataset.METAINFO["classes"])
    turned = f"metainfo=dict(classes={classes[::-1]})"
    run, image = tmp_path / "run", data / "images" / "validation" / "0.jpg"
    if program == "validation":
        config = segmentation_config(tmp_path, more=f"val_dataloader['dataset'].update({turned})")
        with pytest.raises(UserError, match=r"train_dataloader has different classes from the data: 'flag' is class"):
            train.main(options(config, data, run))
        return
    state = torch.load(weights)
    torch.save({**state, "meta": {"dataset_meta": {"classes": classes[::-1]}}}, weights)
    with pytest.raises(UserError, match=r"random\.pth has different classes from the data: 'wall' is class 0"):
        if program == "test":
            evaluate(weights, data, run)
        elif program == "resume":
            train.main(options(segmentation_config(tmp_path), data, run, "--resume", weights))
        else:
            config = segmentation_config(tmp_path)
            inference.main([str(config), str(weights), str(image), str(tmp_path / "out.png"), "--device", "cpu"])


@pytest.mark.slow
def test_two_processes_have_the_scores_of_one(tmp_path, weights, by_brightness):
    data = write_ade20k(tmp_path / "data", val=3)  # one process has two images, the other one
    one = evaluate(weights, data, tmp_path / "one")
    two = in_two_processes(lambda: evaluate(weights, data, tmp_path / "two", "--launcher", "pytorch"))
    assert two == [one, one] and 85 < one["mIoU"] < 100


@pytest.mark.slow
def test_a_photograph_gets_the_colours_of_its_classes(data, tmp_path, weights, by_brightness):
    from mmseg.datasets import ADE20KDataset

    image, out = data / "images" / "validation" / "0.jpg", tmp_path / "out.png"
    config = str(segmentation_config(tmp_path))
    inference.main([config, str(weights), str(image), str(out), "--device", "cpu"])
    mask = np.array(Image.open(data / "annotations" / "validation" / "0.png"))[4:]
    colours = np.array(ADE20KDataset.METAINFO["palette"])[mask - 1]
    picture, expected = np.array(Image.open(out))[4:], (np.array(Image.open(image))[4:] + colours) / 2
    assert (abs(picture - expected).max(2) < 20).mean() > 0.8  # the rest is at edges, and under the classes' names

    before = image.read_bytes()
    with pytest.raises(SystemExit, match=r"output .*0\.jpg would overwrite an input: pass another name"):
        inference.main([config, str(weights), str(image), str(image)])
    assert image.read_bytes() == before

    text = tmp_path / "notes.txt"
    text.write_text("no picture")
    with pytest.raises(SystemExit, match=r"segmentation/inference\.py: error: image .*notes\.txt cannot be read"):
        inference.main([config, str(weights), str(text), str(out)])


@pytest.mark.slow
@pytest.mark.parametrize("extra", [(), ("--tta",)], ids=["once", "tta"])
def test_a_bad_mask_stops_the_evaluation(data, tmp_path, weights, extra):
    Image.fromarray(np.ones((64, 64), np.uint8)).save(data / "annotations" / "validation" / "1.png")
    with pytest.raises(UserError, match=r"1\.jpg has 96x64 pixels .*1\.png says 64x64"):
        evaluate(weights, data, tmp_path / "run", *extra)


@pytest.mark.slow
def test_unlabelled_images_train_and_count_nothing(data, tmp_path, weights):
    for path in (data / "annotations" / "training" / "0.png", data / "annotations" / "validation" / "1.png"):
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
    with pytest.raises(ValueError, match="images/training contains no usable image"):
        train.main(options(segmentation_config(tmp_path), data, tmp_path / "run"))


@pytest.mark.slow
def test_vmamba_trains_and_is_evaluated(data, tmp_path):
    run, config = tmp_path / "run", segmentation_config(tmp_path, 1, VMAMBA)
    train.main(options(config, data, run))
    scores = test.main([str(config), str(run / "iter_1.pth"), *options(config, data, run)[1:]])
    assert all(np.isfinite(score) for score in scores.values())
