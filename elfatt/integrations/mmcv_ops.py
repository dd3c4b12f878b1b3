"""A stand-in for mmcv's compiled operations, so that mmdet trains and tests after a plain ``pip install``.

``mmcv.ops`` imports ``mmcv._ext``, which has to be compiled for each version of PyTorch. Mask R-CNN needs three
functions of it, and torchvision ships all three for CPU and CUDA. ``install`` puts a module with these under that name
before ``mmcv.ops`` is imported; every other operation imports, and refuses when it is called. Where the compiled
module exists, it is left in charge.

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
    """Indices of the boxes that non-maximum suppression keeps, best score first.

    Args:
        boxes: ``[N, 4]`` as x1, y1, x2, y2 in pixels.
        scores: ``[N]``.
        iou_threshold: A box that overlaps a better one by more than this is dropped.
        offset: Pixels added to widths and heights; torchvision has 0, mmdet's default.

    Raises:
        ValueError: Another ``offset``.
    """
    if offset:
        raise ValueError(f"nms with offset={offset} needs mmcv's compiled operations: use offset=0")
    wide = torch.promote_types(boxes.dtype, torch.float32)  # a CPU has no half-precision kernel
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
    """Write the mean of bilinear samples in each cell of each region into ``output``.

    Args:
        input: Map ``[B, C, H, W]``.
        rois: ``[N, 5]``: index of the image, then x1, y1, x2, y2 in pixels of the image.
        output: ``[N, C, aligned_height, aligned_width]``, overwritten.
        argmax_y: For maximum pooling only; untouched.
        argmax_x: Likewise.
        aligned_height: Rows of cells.
        aligned_width: Columns of cells.
        spatial_scale: Side of a pixel of the image in pixels of the map.
        sampling_ratio: Samples along a side of a cell; 0 takes one for each pixel of the map.
        pool_mode: 1 for the mean.
        aligned: Shift by half a pixel, so that pixels are counted at their centres.

    Raises:
        ValueError: ``pool_mode`` 0, the maximum.
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
    """Add the gradient of the map to ``grad_input`` ``[B, C, H, W]``; see ``roi_align_forward``.

    Raises:
        ValueError: ``pool_mode`` 0, the maximum.
    """
    _check_pool_mode(pool_mode)
    size = (aligned_height, aligned_width)
    grad_input.add_(
        torch.ops.torchvision._roi_align_backward(
            grad_output, rois, spatial_scale, *size, *grad_input.shape, sampling_ratio, aligned
        )
    )


def get_compiler_version() -> str:
    """Shown in the version list of mmengine's log."""
    return "none: torchvision's operations stand in for mmcv's"


get_compiling_cuda_version = get_compiler_version


def install() -> bool:
    """Put the stand-in in place where mmcv has no compiled operations; says whether it is there afterwards.

    Raises:
        ModuleNotFoundError: mmcv is not installed.
    """
    if NAME not in sys.modules and importlib.util.find_spec(NAME) is None:
        sys.modules[NAME] = _StandIn()
    return isinstance(sys.modules.get(NAME), _StandIn)


class _StandIn(ModuleType):
    """``mmcv._ext`` with the functions above; any other name is a function that refuses."""

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
                f"mmcv's operation {name!r} is not compiled here, and torchvision has no equal that stands in for it: "
                "build mmcv with MMCV_WITH_OPS=1, or use nms and average roi_align"
            )

        return refuse


def _check_pool_mode(pool_mode: int) -> None:
    if pool_mode != 1:
        raise ValueError(
            f"roi_align with pool_mode={pool_mode} (maximum) needs mmcv's compiled operations: use pool_mode='avg'"
        )
