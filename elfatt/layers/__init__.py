"""Layers shared by attention mechanisms and backbones."""

from elfatt.layers.gradients import align_gradients
from elfatt.layers.lepe import make_lepe
from elfatt.layers.merges import ConvMerge, PatchMerge
from elfatt.layers.mlp import Mlp
from elfatt.layers.positions import relative_position_index, resize_positions, shift_mask
from elfatt.layers.stems import DoubleStem, Stem

__all__ = [
    "ConvMerge",
    "DoubleStem",
    "Mlp",
    "PatchMerge",
    "Stem",
    "align_gradients",
    "make_lepe",
    "relative_position_index",
    "resize_positions",
    "shift_mask",
]
