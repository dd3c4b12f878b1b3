"""Locally-enhanced positional encoding (CSWin, arXiv 2107.00652, section 3.3): a depthwise convolution of V."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn

from elfatt.ops.geometry import Filter


class LePE(nn.Conv2d):
    """Depthwise filter of LePE; operations apply it, over the map or inside each block.

    Args:
        channels: Channels of V.
        kernel_size: Odd filter size in tokens.
    """

    def __init__(self, channels: int, kernel_size: int = 3):
        super().__init__(channels, channels, kernel_size, padding=kernel_size // 2, groups=channels)

    @property
    def filter(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight ``[channels, 1, k, k]`` and bias ``[channels]``."""
        return self.weight, cast("nn.Parameter", self.bias)


def filter_of(lepe: LePE | None) -> Filter | None:
    """Return the weight and bias of an optional LePE."""
    return None if lepe is None else lepe.filter
