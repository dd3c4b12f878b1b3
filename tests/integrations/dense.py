"""The dense models of the configurations, counted in two ways."""

from __future__ import annotations

from pathlib import Path

import torch
from mmengine.analysis import get_model_complexity_info
from torch import nn

from elfatt.analysis.complexity import Complexity, measure_complexity
from elfatt.integrations.mm_models import FixedWork
from elfatt.ops import use_backend

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs"


def count(model: nn.Module, size: tuple[int, int], proposals: int = 1000) -> Complexity:
    """By our counter, which runs on the meta device."""
    return measure_complexity(FixedWork(model, proposals), size)


def count_with_mmengine(model: nn.Module, size: tuple[int, int], backend: str, proposals: int = 1000):
    """Parameters and multiply-adds by mmengine's counter, which runs the model for real."""
    with use_backend(backend), torch.no_grad():
        info = get_model_complexity_info(FixedWork(model, proposals), (3, *size), show_table=False, show_arch=False)
    return info["params"], info["flops"]
