"""Replacement for mmcv's compiled ops, so that mmdet trains and tests after a plain ``pip install``.

``mmcv.ops`` imports ``mmcv._ext``, which must be compiled for each PyTorch version. Mask R-CNN needs three of its
functions, all of which torchvision ships for CPU and CUDA. ``install`` registers a module with these as ``mmcv._ext``
before ``mmcv.ops`` is imported; all other ops can be imported but raise when called. A compiled ``mmcv._ext`` takes
precedence.

Signatures follow mmcv (mmcv/ops/nms.py, mmcv/ops/roi_align.py).
"""

from __future__ import annotations

import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import NoReturn

import torch
import torchvision

NAME = "mmcv._ext"


def nms(boxes: torch.Tensor, scores: torch.Tensor, iou_threshold: float, offset: int) -> torch.Tensor:
    """Return the indices of the boxes kept by non-maximum suppression, best score first.

    Args:
        boxes: ``[N, 4]`` as x1, y1, x2, y2 in pixels.
        scores: ``[N]``.
        iou_threshold: Drop boxes whose IoU with a better one is larger than this.
        offset: Pixels added to widths and heights; torchvision only supports 0, mmdet's default.

    Raises:
        ValueError: ``offset`` is not 0.
    """
    if offset:
        raise ValueError(f"nms with offset={offset} needs mmcv's compiled ops: use offset=0")
    wide = torch.promote_types(boxes.dtype, torch.float32)  # no half-precision kernel on CPU
    return torchvision.ops.nms(boxes.to(wide), scores.to(wide), iou_threshold)


def roi_align_forward(
    input: torch.Tensor,
    rois: torch.Tensor,
    output: torch.Tensor,
    argmax_y: torch.Tensor,
    argmax_x: torch.Tensor,
    *,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Write the average-pooled bilinear samples of each region to ``output``.

    Args:
        input: Feature map ``[B, C, H, W]``.
        rois: ``[N, 5]``: image index, then x1, y1, x2, y2 in image pixels.
        output: ``[N, C, aligned_height, aligned_width]``, overwritten.
        argmax_y: For max pooling only; unused.
        argmax_x: For max pooling only; unused.
        aligned_height: Output height.
        aligned_width: Output width.
        spatial_scale: Scale from image to map coordinates.
        sampling_ratio: Samples along each side of a cell; 0 for one per map pixel.
        pool_mode: 1 for average pooling.
        aligned: Shift by half a pixel, to pixel centres.

    Raises:
        ValueError: ``pool_mode`` is 0 (max pooling).
    """
    _check_pool_mode(pool_mode)
    size = (aligned_height, aligned_width)
    output.copy_(torch.ops.torchvision.roi_align(input, rois, spatial_scale, *size, sampling_ratio, aligned))


def roi_align_backward(
    grad_output: torch.Tensor,
    rois: torch.Tensor,
    argmax_y: torch.Tensor,
    argmax_x: torch.Tensor,
    grad_input: torch.Tensor,
    *,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Add the gradient of the feature map to ``grad_input`` ``[B, C, H, W]``; see ``roi_align_forward``.

    Raises:
        ValueError: ``pool_mode`` is 0 (max pooling).
    """
    _check_pool_mode(pool_mode)
    size = (aligned_height, aligned_width)
    grad_input.add_(
        torch.ops.torchvision._roi_align_backward(
            grad_output, rois, spatial_scale, *size, *grad_input.shape, sampling_ratio, aligned
        )
    )


def get_compiler_version() -> str:
    """Return the text shown in mmengine's version log."""
    return "none: torchvision ops replace mmcv's"


get_compiling_cuda_version = get_compiler_version


def install() -> bool:
    """Register the replacement if mmcv has no compiled ops; return whether it is in use.

    Raises:
        ModuleNotFoundError: mmcv is not installed.
    """
    if NAME not in sys.modules and importlib.util.find_spec(NAME) is None:
        sys.modules[NAME] = _StandIn()
    return isinstance(sys.modules.get(NAME), _StandIn)


class _StandIn(ModuleType):
    """``mmcv._ext`` with the functions above; any other name is a function that raises."""

    def __init__(self):
        super().__init__(NAME, __doc__)
        self.__spec__ = ModuleSpec(NAME, loader=None)  # mmengine asks importlib whether the module exists
        for function in (nms, roi_align_forward, roi_align_backward, get_compiler_version):
            setattr(self, function.__name__, function)
        self.get_compiling_cuda_version = get_compiling_cuda_version

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)

        def refuse(*args, **kwargs) -> NoReturn:
            raise NotImplementedError(
                f"mmcv's op {name!r} is not compiled, and torchvision has no equivalent: "
                "build mmcv with MMCV_WITH_OPS=1, or use nms and average roi_align"
            )

        return refuse


def _check_pool_mode(pool_mode: int) -> None:
    if pool_mode != 1:
        raise ValueError(f"roi_align with pool_mode={pool_mode} (max) needs mmcv's compiled ops: use pool_mode='avg'")
