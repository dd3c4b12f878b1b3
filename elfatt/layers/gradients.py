"""Align gradient strides with parameters for ``DistributedDataParallel``."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn


def align_gradients(model: nn.Module) -> None:
    """Give gradients their parameters' strides in size-1 dimensions too, where strides are arbitrary.

    Autograd keeps the strides chosen by an operator, e.g. a depthwise or 1×1 convolution of a channels-last map; DDP
    compares all strides with its buckets' and warns. Call this before wrapping the model in DDP.
    """
    for parameter in model.parameters():
        if parameter.requires_grad and 1 in parameter.shape:
            parameter.register_hook(partial(_align, parameter))


def _align(parameter: nn.Parameter, gradient: torch.Tensor | None) -> torch.Tensor | None:
    if gradient is None:  # an operator may return none
        return None
    pairs = zip(parameter.shape, parameter.stride(), gradient.stride(), strict=True)
    if all(size == 1 or own == other for size, own, other in pairs):
        return gradient.as_strided(parameter.shape, parameter.stride())
    return gradient  # another layout, which autograd copies into the parameter's
