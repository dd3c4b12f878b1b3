"""The stand-in for mmcv's compiled operations against formulas written apart."""

import math
import subprocess
import sys

import pytest
import torch

from elfatt.integrations import mmcv_ops

STOOD_IN = mmcv_ops.install()
from mmcv.ops import RoIAlign, batched_nms, nms, roi_align  # noqa: E402

needs_stand_in = pytest.mark.skipif(not STOOD_IN, reason="mmcv has its compiled operations")


def overlap(a, b):
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    inter = max(width, 0) * max(height, 0)
    area = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1])
    return inter / (area - inter)


def test_nms_keeps_the_best_of_what_overlaps():
    torch.manual_seed(0)
    corner = torch.rand(60, 2) * 20
    boxes, scores = torch.cat([corner, corner + 5 + torch.rand(60, 2) * 10], 1), torch.rand(60)
    kept = []
    for i in scores.argsort(descending=True).tolist():
        if all(overlap(boxes[i].tolist(), boxes[j].tolist()) <= 0.5 for j in kept):
            kept.append(i)
    found, index = nms(boxes, scores, 0.5)
    assert index.tolist() == kept and 5 < len(kept) < 60
    torch.testing.assert_close(found, torch.cat([boxes, scores[:, None]], 1)[kept])
    assert len(nms(boxes[:0], scores[:0], 0.5)[1]) == 0
    classes = torch.arange(60)
    assert len(batched_nms(boxes, scores, classes, {"type": "nms", "iou_threshold": 0.5})[1]) == 60


def bilinear(image, y, x):
    height, width = image.shape
    if y < -1 or y > height or x < -1 or x > width:
        return 0.0
    y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
    top, left = min(int(y), height - 1), min(int(x), width - 1)
    bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
    dy, dx = y - top, x - left
    upper = image[top, left] * (1 - dx) + image[top, right] * dx
    return upper * (1 - dy) + (image[bottom, left] * (1 - dx) + image[bottom, right] * dx) * dy


def align(maps, rois, size, scale, ratio):
    out = torch.zeros(len(rois), maps.shape[1], size, size, dtype=maps.dtype)
    for n, (batch, *box) in enumerate(rois.tolist()):
        x1, y1, x2, y2 = (value * scale - 0.5 for value in box)
        cell_h, cell_w = (y2 - y1) / size, (x2 - x1) / size
        rows, columns = (ratio or math.ceil(cell_h)), (ratio or math.ceil(cell_w))
        for c in range(maps.shape[1]):
            for i in range(size):
                for j in range(size):
                    samples = [
                        bilinear(
                            maps[int(batch), c],
                            y1 + cell_h * (i + (a + 0.5) / rows),
                            x1 + cell_w * (j + (b + 0.5) / columns),
                        )
                        for a in range(rows)
                        for b in range(columns)
                    ]
                    out[n, c, i, j] = sum(samples) / len(samples)
    return out


@pytest.mark.parametrize("ratio", [0, 2])
def test_roi_align_is_the_mean_of_bilinear_samples(ratio):
    torch.manual_seed(0)
    maps = torch.rand(2, 2, 7, 9, dtype=torch.float64, requires_grad=True)
    rois = torch.tensor([[0, 2.3, 4.1, 30, 25], [1, 0, 0, 11, 13.5], [1, 20, 10, 39, 29]], dtype=torch.float64)
    found = roi_align(maps, rois, (3, 3), 0.25, ratio, "avg", True)
    torch.testing.assert_close(found.detach(), align(maps.detach(), rois, 3, 0.25, ratio))
    assert torch.autograd.gradcheck(lambda x: roi_align(x, rois, (3, 3), 0.25, ratio, "avg", True), (maps,))


def test_roi_align_without_regions():
    assert roi_align(torch.rand(1, 2, 4, 4), torch.zeros(0, 5), (3, 3), 1.0).shape == (0, 2, 3, 3)


@needs_stand_in
def test_anything_else_refuses_in_one_line():
    from mmcv.ops import DeformConv2dPack, soft_nms

    boxes, scores = torch.tensor([[0.0, 0, 1, 1]]), torch.ones(1)
    for name, call in (
        ("softnms", lambda: soft_nms(boxes, scores)),
        ("deform_conv_forward", lambda: DeformConv2dPack(2, 2, 3)(torch.rand(1, 2, 5, 5))),
    ):
        with pytest.raises(NotImplementedError, match=f"'{name}'.*MMCV_WITH_OPS=1") as error:
            call()
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="offset=1.*offset=0"):
        nms(boxes, scores, 0.5, offset=1)
    with pytest.raises(ValueError, match="pool_mode='avg'"):
        RoIAlign(2, pool_mode="max")(torch.rand(1, 1, 4, 4), torch.tensor([[0.0, 0, 0, 2, 2]]))


def test_steps_aside_for_compiled_operations():
    code = """
import importlib.util, sys, types
from elfatt.integrations import mmcv_ops
sys.modules["mmcv._ext"] = compiled = types.ModuleType("mmcv._ext")
assert not mmcv_ops.install() and sys.modules["mmcv._ext"] is compiled
del sys.modules["mmcv._ext"]
if mmcv_ops.install():
    assert importlib.util.find_spec("mmcv._ext") and mmcv_ops.install()
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
