"""Swin Transformer (arXiv 2103.14030): 4×4 stem, patch merging, shifted-window local attention."""

from __future__ import annotations

from elfatt.backbones.hierarchical import HierarchicalTransformer


class SwinTransformer(HierarchicalTransformer):
    """See ``HierarchicalTransformer``; the paper's ELFATT models use CSWin's stem and downsampling."""

    local, local_size = "swin", "window_size"
    overrides = {"flatten": {"lepe": False}}  # official FLatten has LePE on CSWin only
