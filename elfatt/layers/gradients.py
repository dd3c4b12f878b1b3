"""Gradients laid out as their parameters, which ``DistributedDataParallel`` asks for."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn


def align_gradients(model: nn.Module) -> None:
    """Give gradients their parameters' strides in dimensions of size 1 too, where any stride is right.

    Autograd keeps the strides that an operator chose, such as a depthwise or 1 × 1 convolution of a channels-last map;
    DDP compares them all with its buckets' and warns. Call it before DDP wraps the model.
    """
    for parameter in model.parameters():
        if parameter.requires_grad and 1 in parameter.shape:
            parameter.register_hook(partial(_align, parameter))


def _align(parameter: nn.Parameter, gradient: torch.Tensor | None) -> torch.Tensor | None:
    if gradient is None:  # of an operator that gives none
        return None
    pairs = zip(parameter.shape, parameter.stride(), gradient.stride(), strict=True)
    if all(size == 1 or own == other for size, own, other in pairs):
        return gradient.as_strided(parameter.shape, parameter.stride())
    return gradient  # of another layout: autograd copies it into the parameter's
