"""Swin Transformer (arXiv 2103.14030): 4×4 stem, linear merges, shifted windows as local attention."""

from __future__ import annotations

from elfatt.backbones.hierarchical import HierarchicalTransformer


class SwinTransformer(HierarchicalTransformer):
    """See ``HierarchicalTransformer``; with ELFATT the paper gives it CSWin's stem and merges."""

    local, local_size = "swin", "window_size"
    overrides = {"flatten": {"lepe": False}}  # official FLatten has LePE on CSWin only
