"""CSWin Transformer (arXiv 2107.00652): convolutional stem and downsampling, cross-shaped local attention."""

from __future__ import annotations

from elfatt.backbones.hierarchical import HierarchicalTransformer


class CSWinTransformer(HierarchicalTransformer):
    """See ``HierarchicalTransformer``; CSWin's last stage is a single vanilla branch, so its level is V."""

    local, local_size = "cswin", "stripe"
