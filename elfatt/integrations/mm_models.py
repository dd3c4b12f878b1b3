"""Segmentors and detectors built from configs without mmengine's ``Runner``, with the same work for any image."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from types import MethodType, SimpleNamespace
from typing import Any

import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from torch import nn

import elfatt.integrations.openmmlab  # noqa: F401  before mmdet


@cache
def _register(scope: str) -> None:
    if scope == "mmseg":
        from mmseg.utils import register_all_modules
    else:
        from mmdet.utils import register_all_modules
    register_all_modules(init_default_scope=False)


def build_model(config: Config, device: str = "meta") -> nn.Module:
    """Build the segmentor or detector of a config, in eval mode."""
    _register(config.default_scope)
    with DefaultScope.overwrite_default_scope(config.default_scope), torch.device(device):
        return MODELS.build(config.model).eval()


def load_model(path: Path, device: str = "meta") -> nn.Module:
    """Build the model of a config file; see ``build_model``."""
    return build_model(Config.fromfile(path), device)


class Segmentor(nn.Module):
    """Backbone and decode head of a segmentor, with unchanged parameter names.

    Args:
        model: mmsegmentation model.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.backbone, self.decode_head = model.get_submodule("backbone"), model.get_submodule("decode_head")

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Map normalised images ``[B, 3, H, W]`` to logits ``[B, classes, H/4, W/4]``."""
        return self.decode_head(self.backbone(image))


def load_segmentor(path: Path) -> Segmentor:
    """Build the segmentor of a config file for export, without preprocessing and auxiliary heads.

    Raises:
        ValueError: The config is of a detector.
    """
    model = load_model(path, "cpu")
    if hasattr(model, "rpn_head"):
        raise ValueError(f"{path} is a detector: its number of boxes depends on the image and cannot be traced")
    return Segmentor(model)


class FixedWork(nn.Module):
    """Model that maps an image to raw outputs with ``forward(mode="tensor")`` and data-independent cost.

    A detector's data-dependent proposals are replaced by fixed boxes after the real RPN. On the meta device, RoIAlign
    (which is not counted) returns empty maps of the right shape.

    Args:
        model: Segmentor or detector; a detector is modified in place.
        proposals: Number of boxes per image of a detector; mmdet's mask head uses the first 100.
    """

    def __init__(self, model: nn.Module, proposals: int = 1000):
        super().__init__()
        self.model = model
        if hasattr(model, "rpn_head"):
            detector: Any = model  # mmdet has no types
            detector.rpn_head.proposals = proposals
            detector.rpn_head.predict = MethodType(_predict, detector.rpn_head)
            if next(model.parameters()).is_meta:
                for extractor in (detector.roi_head.bbox_roi_extractor, detector.roi_head.mask_roi_extractor):
                    extractor.forward = MethodType(_extract, extractor)

    def forward(self, image: torch.Tensor):
        """Map images ``[B, 3, H, W]`` to the outputs of the heads."""
        return self.model(image, None, mode="tensor")


def _predict(head, features, samples, rescale=False):
    """Return boxes of 16 pixels up to the image's shorter side, spread over the image."""
    seen = 0 * sum(x.mean() for maps in head(features) for x in maps)  # keeps the RPN in traces
    height, width = (4 * side for side in features[0].shape[-2:])
    step = torch.linspace(0, 1, head.proposals, device=features[0].device, dtype=features[0].dtype)
    side = 16 * (min(height, width) / 16) ** step
    left, top = (step * 97 % 1) * (width - side), (step * 61 % 1) * (height - side)
    boxes = torch.stack([left, top, left + side, top + side], 1) + seen
    return [SimpleNamespace(bboxes=boxes)] * len(features[0])


def _extract(extractor, features, rois):
    size = extractor.roi_layers[0].output_size
    return features[0].new_zeros(len(rois), extractor.out_channels, *size)
