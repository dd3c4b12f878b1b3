"""Swin Transformer (arXiv 2103.14030): 4×4 stem, linear merges, shifted windows as local attention."""

from __future__ import annotations

from elfatt.backbones.hierarchical import HierarchicalTransformer


class SwinTransformer(HierarchicalTransformer):
    """See ``HierarchicalTransformer``; with ELFATT the paper gives it CSWin's stem and merges."""

    local = "swin"

    def local_options(self, stage: int, block: int) -> dict:
        """Windows, shifted in every second block."""
        return {"window_size": self.window_size[stage], "shifted": block % 2 == 1}
