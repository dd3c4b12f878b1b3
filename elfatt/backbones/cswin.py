"""CSWin Transformer (arXiv 2107.00652): convolutional stem and merges, cross-shaped stripes as local attention."""

from __future__ import annotations

from elfatt.backbones.hierarchical import HierarchicalTransformer


class CSWinTransformer(HierarchicalTransformer):
    """See ``HierarchicalTransformer``; the last stage of CSWin is one vanilla branch, so its level is V."""

    local = "cswin"

    def local_options(self, stage: int, block: int) -> dict:
        """Stripes of the stage's width."""
        return {"stripe": self.window_size[stage], "lepe": self.lepe}
