"""Mask R-CNN through the programs, on a miniature of COCO."""

import json

import pytest
import torch
from PIL import Image

from detection import inference, test, train
from tests.integrations.miniature import detection_config, write_coco


@pytest.fixture
def data(tmp_path):
    return write_coco(tmp_path / "data")


def options(config, data, run, *extra):
    return [str(x) for x in (config, "--data-dir", data, "--work-dir", run, *extra)]


@pytest.mark.slow
def test_trains_resumes_evaluates_and_draws(data, tmp_path):
    run, config = tmp_path / "run", detection_config(tmp_path)
    assert (
        len(train.main(options(config, data, run)).train_dataloader.dataset) == 3
    )  # an image without instances is left out
    config = detection_config(tmp_path, epochs=2)
    train.main(options(config, data, run, "--resume"))
    first, second = (torch.load(run / f"epoch_{i}.pth", weights_only=False) for i in (1, 2))
    assert [(c["meta"]["epoch"], c["meta"]["iter"]) for c in (first, second)] == [(1, 2), (2, 4)]
    assert [{int(s["step"]) for s in c["optimizer"]["state"].values()} for c in (first, second)] == [{2}, {4}]
    assert [c["param_schedulers"][0]["last_step"] for c in (first, second)] == [2, 4]

    test.main([str(config), str(run / "epoch_2.pth"), *options(config, data, run)[1:]])
    picture, image = tmp_path / "out.png", data / "val2017" / "0.jpg"
    inference.main([str(config), str(run / "epoch_2.pth"), str(image), str(picture), "--device", "cpu"])
    assert Image.open(picture).size == Image.open(image).size


@pytest.mark.slow
def test_a_missing_image_stops_with_its_name(data, tmp_path):
    file = data / "annotations" / "instances_train2017.json"
    content = json.loads(file.read_text())
    for image in content["images"]:
        image["file_name"] = "gone.jpg"
    file.write_text(json.dumps(content))
    with pytest.raises(FileNotFoundError, match=r"gone\.jpg"):
        train.main(options(detection_config(tmp_path), data, tmp_path / "run"))
