"""Load checkpoints of our models and of the official ones, renamed and fully checked first.

Microsoft's CSWin-T and -B have other depths than this paper's: build ours with ``depths=(1, 2, 21, 1)`` or
``(2, 4, 32, 2)`` for their weights. VMamba's other tiny model, s2l5, is ``depths=(2, 2, 5, 2), ssm_ratio=2.0``.
``python -m elfatt.checkpoints --help`` converts a file. ``published_crop`` tells how its authors evaluate.
"""

from elfatt.checkpoints.loading import LoadReport, load_checkpoint, published_crop
from elfatt.checkpoints.names import convert_state_dict

__all__ = ["LoadReport", "convert_state_dict", "load_checkpoint", "published_crop"]
