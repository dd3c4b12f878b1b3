"""Mask R-CNN through the programs, on a miniature of COCO."""

import json

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.structures import InstanceData
from PIL import Image

from detection import inference, test, train
from elfatt.data import UserError
from elfatt.integrations.mm_models import build_model
from tests.integrations.miniature import VMAMBA, detection_config, in_two_processes, options, run_script, write_coco


@pytest.fixture
def data(tmp_path):
    return write_coco(tmp_path / "data")


@pytest.mark.slow
def test_trains_and_resumes(data, tmp_path, backends_run):
    run, config = tmp_path / "run", detection_config(tmp_path)
    assert (
        len(train.main(options(config, data, run)).train_dataloader.dataset) == 3
    )  # an image without instances is left out
    config = detection_config(tmp_path, epochs=2)
    backends_run.clear()
    train.main(options(config, data, run, "--resume", "auto", "--backend", "math"))
    assert backends_run == {"math"} and Config.fromfile(run / config.name).backend == "math"
    first, second = (torch.load(run / f"epoch_{i}.pth", weights_only=False) for i in (1, 2))
    assert [(c["meta"]["epoch"], c["meta"]["iter"]) for c in (first, second)] == [(1, 2), (2, 4)]
    assert [{int(s["step"]) for s in c["optimizer"]["state"].values()} for c in (first, second)] == [{2}, {4}]
    assert [c["param_schedulers"][0]["last_step"] for c in (first, second)] == [2, 4]


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "backend"), [(1, "auto"), (2, "sdpa")])
def test_the_scripts_train_and_evaluate(data, tmp_path, processes, backend):
    config, run = detection_config(tmp_path), tmp_path / "run"
    run_script("train_coco.sh", processes, config, data, "--work-dir", run, "--backend", backend)
    state = torch.load(run / "epoch_1.pth", weights_only=False)
    assert state["meta"]["iter"] == 2 // processes  # three images, batches of two
    run_script("evaluate_coco.sh", processes, config, data, run / "epoch_1.pth", "--work-dir", run)


def random_weights(folder):
    checkpoint, config = folder / "random.pth", detection_config(folder)
    torch.save({"state_dict": build_model(Config.fromfile(config), "cpu").state_dict()}, checkpoint)
    return [str(config), str(checkpoint)]


def evaluate(data, folder, *extra):
    return test.main([*random_weights(folder), *options("", data, folder / "run", *extra)[1:]])


@pytest.mark.slow
def test_a_checkpoint_of_another_model_is_refused(data, tmp_path):
    config, checkpoint = detection_config(tmp_path), tmp_path / "other.pth"
    state = build_model(Config.fromfile(config), "cpu").state_dict()
    del state["roi_head.bbox_head.fc_cls.bias"]
    torch.save({"state_dict": state, "meta": {}}, checkpoint)
    arguments = [str(config), str(checkpoint), *options("", data, tmp_path / "run")[1:]]
    with pytest.raises(UserError, match="other.pth: .*roi_head.bbox_head.fc_cls.bias"):
        test.main(arguments)
    image = str(data / "val2017" / "0.jpg")
    with pytest.raises(UserError, match="other.pth: .*roi_head.bbox_head.fc_cls.bias"):
        inference.main([str(config), str(checkpoint), image, str(tmp_path / "out.png"), "--device", "cpu"])


def truth(data):
    """A stand-in for ``MaskRCNN.predict`` that knows the annotation file, and nothing of the pipeline."""
    from mmdet.datasets import CocoDataset

    content = json.loads((data / "annotations" / "instances_val2017.json").read_text())
    names = {category["id"]: category["name"] for category in content["categories"]}

    def predict(model, images, samples, rescale=True):
        for sample in samples:
            own = [a for a in content["annotations"] if a["image_id"] == sample.img_id]
            labels = [CocoDataset.METAINFO["classes"].index(names[a["category_id"]]) for a in own]
            boxes = torch.tensor([a["bbox"] for a in own])
            masks = torch.zeros(len(own), *sample.ori_shape, dtype=torch.bool)
            for mask, (x, y, w, h) in zip(masks, boxes.tolist(), strict=True):
                mask[y : y + h, x : x + w] = True
            boxes = torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1).float()
            found = {"bboxes": boxes, "labels": torch.tensor(labels), "scores": torch.ones(len(own)), "masks": masks}
            sample.pred_instances = InstanceData(**found)
        return samples

    return predict


@pytest.mark.slow
@pytest.mark.parametrize(("wrong", "precision"), [(0, 1.0), (1, 0.0)], ids=["truth", "another class"])
def test_the_truth_has_an_average_precision_of_one(data, tmp_path, monkeypatch, wrong, precision):
    from mmdet.models import MaskRCNN

    predict = truth(data)

    def shifted(*args, **kwargs):
        samples = predict(*args, **kwargs)
        for sample in samples:
            sample.pred_instances.labels += wrong
        return samples

    monkeypatch.setattr(MaskRCNN, "predict", shifted)
    scores = evaluate(data, tmp_path)
    assert scores["coco/bbox_mAP"] == scores["coco/segm_mAP"] == precision


def drawn(picture, image):
    """Whether each pixel is another one than in the image."""
    return abs(picture.astype(int) - np.array(Image.open(image)).astype(int)).max(2) > 30


def inside():
    """The pixels of the miniature's two instances."""
    mask = np.zeros((64, 96), bool)
    mask[4:40, 4:40] = mask[12:56, 50:90] = True
    return mask


@pytest.mark.slow
def test_what_is_evaluated_is_drawn(data, tmp_path, monkeypatch):
    from mmdet.models import MaskRCNN

    monkeypatch.setattr(MaskRCNN, "predict", truth(data))
    evaluate(data, tmp_path, "--show-dir", tmp_path / "pictures")
    pictures = sorted((tmp_path / "pictures").rglob("*"))
    assert [path.name for path in pictures] == ["0.jpg", "1.jpg"]
    for path in pictures:
        picture = np.array(Image.open(path))
        assert picture.shape == (64, 2 * 96, 3)
        for half in (picture[:, :96], picture[:, 96:]):
            found = drawn(half, data / "val2017" / path.name)
            assert found[inside()].mean() > 0.8 and found[~inside()].mean() < 0.5  # labels


@pytest.mark.slow
def test_the_instances_of_a_photograph_are_drawn(data, tmp_path, monkeypatch):
    from mmdet.models import MaskRCNN

    predict = truth(data)

    def predict_first(model, images, samples, rescale=True):
        samples[0].set_metainfo({"img_id": 1})  # a file of one's own has none
        return predict(model, images, samples)

    monkeypatch.setattr(MaskRCNN, "predict", predict_first)
    image, out, weights = data / "val2017" / "0.jpg", tmp_path / "out.png", random_weights(tmp_path)
    inference.main([*weights, str(image), str(out), "--device", "cpu"])
    found = drawn(np.array(Image.open(out)), image)
    assert found[inside()].mean() > 0.8 and found[~inside()].mean() < 0.5  # labels

    inference.main([*weights, str(image), str(out), "--device", "cpu", "--score", "1.1"])
    assert not drawn(np.array(Image.open(out)), image).any()


@pytest.mark.slow
def test_two_processes_have_the_scores_of_one(tmp_path, monkeypatch):
    from mmdet.models import MaskRCNN

    data = write_coco(tmp_path / "data", val=3)  # one process has two images, the other one
    predict = truth(data)

    def predict_some(model, images, samples, rescale=True):
        samples = predict(model, images, samples)
        for sample in samples:
            sample.pred_instances = sample.pred_instances[sample.img_id % 2 :]  # one of two in images 1 and 3
        return samples

    monkeypatch.setattr(MaskRCNN, "predict", predict_some)
    one = evaluate(data, tmp_path)
    two = in_two_processes(lambda: evaluate(data, tmp_path, "--launcher", "pytorch"))
    assert two == [one, one] and 0 < one["coco/bbox_mAP"] < 1


@pytest.mark.slow
def test_the_backend_of_an_evaluation_and_of_an_image(data, tmp_path, backends_run):
    evaluate(data, tmp_path, "--backend", "math")
    assert backends_run == {"math"} and Config.fromfile(tmp_path / "run" / "detection_nano.py").backend == "math"
    backends_run.clear()
    image, out = data / "val2017" / "0.jpg", tmp_path / "out.png"
    inference.main([*random_weights(tmp_path), str(image), str(out), "--device", "cpu", "--backend", "reference"])
    assert backends_run == {"reference"} and out.is_file()


@pytest.mark.slow
def test_a_missing_image_stops_with_its_name(data, tmp_path):
    file = data / "annotations" / "instances_train2017.json"
    content = json.loads(file.read_text())
    for image in content["images"]:
        image["file_name"] = "gone.jpg"
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"gone\.jpg cannot be read: No such file"):
        train.main(options(detection_config(tmp_path), data, tmp_path / "run"))


def change(data, split, **fields):
    file = data / "annotations" / f"instances_{split}.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"annotations": []}, "train2017.json has no annotation of the classes"),
        ({"images": [], "annotations": []}, "train2017.json contains no usable image"),
        ({"categories": [{"id": 1, "name": "person"}]}, "train2017.json names 1 of the 80 classes"),
    ],
    ids=["no instance", "no image", "one category"],
)
def test_an_annotation_file_of_no_use_is_named(data, tmp_path, fields, message):
    change(data, "train2017", **fields)
    with pytest.raises(ValueError, match=message):
        train.main(options(detection_config(tmp_path), data, tmp_path / "run"))


@pytest.mark.slow
def test_evaluation_without_instances_gives_the_sign_of_no_precision(data, tmp_path):
    change(data, "val2017", annotations=[])
    assert set(evaluate(data, tmp_path).values()) == {-1.0}
    change(data, "val2017", images=[])
    with pytest.raises(ValueError, match=r"val2017\.json contains no usable image"):
        evaluate(data, tmp_path)


@pytest.mark.slow
def test_vmamba_trains_and_is_evaluated(data, tmp_path):
    run, config = tmp_path / "run", detection_config(tmp_path, more=VMAMBA)
    train.main(options(config, data, run))
    state = torch.load(run / "epoch_1.pth", weights_only=False)["state_dict"]
    assert "backbone.features.model.stages.0.blocks.0.attn.A_logs" in state
    assert all(tensor.isfinite().all() for tensor in state.values())
    test.main([str(config), str(run / "epoch_1.pth"), *options(config, data, run)[1:]])
