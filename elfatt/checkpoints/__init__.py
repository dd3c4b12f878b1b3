"""Load our own and official checkpoints, with renaming and full checks.

Microsoft's CSWin-T and -B differ in depth from the paper's: build models with ``depths=(1, 2, 21, 1)`` or
``(2, 4, 32, 2)`` for their weights. VMamba's other tiny model, s2l5, is ``depths=(2, 2, 5, 2), ssm_ratio=2.0``.
``python -m elfatt.checkpoints`` converts files; ``published_crop`` returns the authors' evaluation crop.
"""

from elfatt.checkpoints.loading import LoadReport, load_checkpoint, published_crop
from elfatt.checkpoints.names import convert_state_dict

__all__ = ["LoadReport", "convert_state_dict", "load_checkpoint", "published_crop"]
