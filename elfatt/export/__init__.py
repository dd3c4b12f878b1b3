"""Export to other runtimes, verified against PyTorch.

Graphs use standard operators only. Batch, height and width are dynamic from ``size_limit`` up; CSWin's stripes support
a single image size.
"""

from elfatt.export.check import PRECISIONS, export
from elfatt.export.runtimes import RUNTIMES
from elfatt.export.trace import LARGEST, export_model, size_limit

__all__ = ["LARGEST", "PRECISIONS", "RUNTIMES", "export", "export_model", "size_limit"]
