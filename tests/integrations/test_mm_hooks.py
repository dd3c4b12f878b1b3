"""What is said after an evaluation, and what is drawn."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from elfatt.integrations import mm_hooks


def samples(*labels):
    return [SimpleNamespace(gt_sem_seg=SimpleNamespace(data=torch.tensor([labels], dtype=torch.uint8)))]


@pytest.mark.parametrize("stage", ["val", "test"])
def test_classes_without_a_pixel_are_named(monkeypatch, stage):
    lines = []
    monkeypatch.setattr(mm_hooks, "warn", lines.append)
    meta = {"classes": ("road", "car", "tree")}
    runner = SimpleNamespace(model=torch.nn.Linear(1, 1), visualizer=SimpleNamespace(dataset_meta=meta))
    hook = mm_hooks.NameUnseenClasses()
    no_mask = [SimpleNamespace()]
    for batches in (
        [samples(0, 255), no_mask],
        [samples(255, 2), samples(0, 0), samples(1, 0)],
        [no_mask],
    ):
        getattr(hook, f"before_{stage}_epoch")(runner)
        for i, batch in enumerate(batches):
            getattr(hook, f"after_{stage}_iter")(runner, i, {}, batch)
        getattr(hook, f"after_{stage}_epoch")(runner, {})
    assert lines == [
        "2 of the 3 classes are absent from the ground truth: car, tree; "
        "mAcc ignores them, mIoU counts those predicted anywhere as 0 and ignores the rest"
    ]


def test_what_is_drawn_is_what_the_model_saw(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = np.arange(24, dtype=np.uint16).reshape(4, 6) * 257
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    Image.fromarray(pixels).save(tmp_path / "b.jp2")
    drawn = {}
    draw = SimpleNamespace(add_datasample=lambda name, image, sample, out_file: drawn.update({out_file: image}))
    outputs = [SimpleNamespace(img_path=str(tmp_path / name)) for name in ("a.png", "b.jp2")]
    mm_hooks.DrawImages("out").after_test_iter(SimpleNamespace(visualizer=draw), 0, {}, outputs)
    np.testing.assert_array_equal(drawn["out/a.png"], np.stack([np.rot90(pixels // 257, -1)] * 3, -1))
    assert drawn.keys() == {"out/a.png", "out/b.jp2"}
