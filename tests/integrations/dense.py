"""The dense models of the configurations, and ways to count them."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from types import MethodType, SimpleNamespace

import torch
from mmengine.analysis import get_model_complexity_info
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from torch import nn

import elfatt.integrations.openmmlab  # noqa: F401  before mmdet
from elfatt.analysis.complexity import Complexity, measure_complexity
from elfatt.ops import use_backend

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs"


@cache
def register(scope: str) -> None:
    """Fill the registries of mmseg or mmdet."""
    if scope == "mmseg":
        from mmseg.utils import register_all_modules
    else:
        from mmdet.utils import register_all_modules
    register_all_modules(init_default_scope=False)


def build(config: Config, device: str = "meta") -> nn.Module:
    """The segmentor or detector of a configuration, in evaluation mode."""
    register(config.default_scope)
    with DefaultScope.overwrite_default_scope(config.default_scope), torch.device(device):
        return MODELS.build(config.model).eval()


class Forward(nn.Module):
    """Image to raw outputs, through the real model's own ``forward(mode="tensor")``.

    A detector's proposals depend on the data; they are given boxes here, behind the real RPN. On the meta device
    RoIAlign, which no rule counts, gives maps of its shape.
    """

    def __init__(self, model: nn.Module, proposals: int = 1000):
        super().__init__()
        self.model = model
        if hasattr(model, "rpn_head"):
            model.rpn_head.proposals = proposals
            model.rpn_head.predict = MethodType(_predict, model.rpn_head)
            if next(model.parameters()).is_meta:
                for extractor in (model.roi_head.bbox_roi_extractor, model.roi_head.mask_roi_extractor):
                    extractor.forward = MethodType(_extract, extractor)

    def forward(self, image: torch.Tensor):
        return self.model(image, None, mode="tensor")


def _predict(head, features, samples, rescale=False):
    seen = 0 * sum(x.mean() for maps in head(features) for x in maps)  # a trace forgets what nothing depends on
    corner = torch.rand(head.proposals, 2, device=features[0].device) * 50 + seen
    return [SimpleNamespace(bboxes=torch.cat([corner, corner + 10 + torch.rand_like(corner) * 50], 1))]


def _extract(extractor, features, rois):
    size = extractor.roi_layers[0].output_size
    return features[0].new_zeros(len(rois), extractor.out_channels, *size)


def count(model: nn.Module, size: tuple[int, int], proposals: int = 1000) -> Complexity:
    """By our counter, which runs on the meta device."""
    return measure_complexity(Forward(model, proposals), size)


def count_with_mmengine(model: nn.Module, size: tuple[int, int], backend: str, proposals: int = 1000):
    """Parameters and multiply-adds by mmengine's counter, which runs the model for real."""
    with use_backend(backend), torch.no_grad():
        info = get_model_complexity_info(Forward(model, proposals), (3, *size), show_table=False, show_arch=False)
    return info["params"], info["flops"]
