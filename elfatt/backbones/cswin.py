"""CSWin Transformer (arXiv 2107.00652): convolutional stem and merges, cross-shaped stripes as local attention."""

from __future__ import annotations

from elfatt.backbones.hierarchical import HierarchicalTransformer


class CSWinTransformer(HierarchicalTransformer):
    """See ``HierarchicalTransformer``; the last stage of CSWin is one vanilla branch, so its level is V."""

    local, local_size = "cswin", "stripe"
