"""The models as backbones of mmsegmentation and mmdetection, registered once in mmengine's root registries.

A configuration finds them with ``custom_imports = dict(imports=["elfatt.integrations.openmmlab"])``. Importing this
file also puts ``mmcv_ops`` in place, so it must come before mmdet.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import timm
import torch
from mmengine.logging import print_log
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from torch import nn

from elfatt.backbones import check_model
from elfatt.checkpoints import load_checkpoint
from elfatt.conversion import Plan
from elfatt.integrations import mm_transforms, mmcv_ops  # noqa: F401  the first registers
from elfatt.integrations.timm import convert

mmcv_ops.install()

LEFT_OVER = ("head.", "norm.")  # a checkpoint's classifier and the norm before it: the levels have norms of their own


@MODELS.register_module()
class TimmBackbone(BaseModule):
    """Four feature maps of a timm model, each behind a LayerNorm of its own, as the paper's dense models have them.

    The ε of these norms is that of the model's own, as in the dense code of each system: 1e-6 in ConvNeXt, else 1e-5.

    Args:
        name: Model of ``timm.create_model`` with ``forward_intermediates``: ours, ConvNeXt, or another of four stages.
        out_indices: Levels to return, from 0; level i has stride ``4 * 2**i``. Stages behind the last are not built.
        frozen_stages: Parts that do not train: 0 freezes the stem, n the first n stages as well, -1 nothing.
        with_cp: Recompute activations in the backward pass instead of keeping them.
        plan: JSON file of a ``Plan`` for the vanilla layers, as ``classification/calibrate.py`` writes it.
        pretrained: Checkpoint file of a classification or dense model, ours or an official one; short for ``init_cfg``.
        init_cfg: ``dict(type="Pretrained", checkpoint=FILE)``; without it the weights are random.
        **options: Keywords of the model, such as ``block_size``, ``img_size`` or ``drop_path_rate``.

    Raises:
        ValueError: An unknown model, a plan that does not fit it, both ``pretrained`` and ``init_cfg``, another
            ``init_cfg``, or ``frozen_stages`` out of range or for a model without ``stem`` and ``stages``.
    """

    features: Any  # timm's, of any model

    def __init__(
        self,
        name: str,
        *,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        frozen_stages: int = -1,
        with_cp: bool = False,
        plan: str | None = None,
        pretrained: str | None = None,
        init_cfg: dict | None = None,
        **options: Any,
    ):
        if pretrained and init_cfg:
            raise ValueError(f"pretrained={pretrained!r} and init_cfg={init_cfg!r} both name weights: give one")
        if pretrained:
            init_cfg = {"type": "Pretrained", "checkpoint": pretrained}
        if init_cfg and (init_cfg.get("type") != "Pretrained" or not init_cfg.get("checkpoint")):
            raise ValueError(f"init_cfg={init_cfg!r} must be dict(type='Pretrained', checkpoint=FILE)")
        super().__init__(init_cfg)
        if not -1 <= frozen_stages <= 4:
            raise ValueError(f"frozen_stages={frozen_stages} must be -1 (none), 0 (the stem), or 1 to 4 (stages)")
        check_model(name)
        self.name = name
        self.frozen_stages = frozen_stages
        # the getter keeps the classification model's parameter names, so that its checkpoints fit
        self.features = timm.create_model(
            name, features_only=True, feature_cls="getter", out_indices=tuple(out_indices), **options
        )
        model: Any = self.features.model
        if plan:
            convert(self.features, Plan.from_json(plan))
        if frozen_stages >= 0 and not {"stem", "stages"} <= dict(model.named_children()).keys():
            raise ValueError(f"frozen_stages={frozen_stages}: {name} has no 'stem' and 'stages', leave it at -1")
        eps = next((m.eps for m in model.modules() if isinstance(m, nn.LayerNorm)), 1e-5)
        # "norm" in the name keeps weight decay away, see decay_mult in the configurations
        self.norms = nn.ModuleList(nn.LayerNorm(c, eps=eps) for c in self.features.feature_info.channels())
        if with_cp:
            model.set_grad_checkpointing(True)
        self._freeze()

    def init_weights(self) -> None:
        """Load the checkpoint that ``init_cfg`` names, averaged (EMA) weights first; all that the levels need, or none.

        The levels' own norms are loaded too where the checkpoint is a dense model's and all four levels are built.

        Raises:
            FileNotFoundError: No such checkpoint.
            ValueError: Its tensors do not fit the model.
        """
        if not self.init_cfg:
            print_log(f"{self.name}: random weights; pretrained weights are given by --pretrained FILE", "current")
            return
        path, model = self.init_cfg["checkpoint"], self.features.model
        total = len(model.state_dict())
        norms = self.norms if len(self.norms) == 4 else nn.ModuleList()
        unused = [f"stages.{i}." for i in range(max(self.features.out_indices) + 1, 4)]
        model.norms = norms  # a checkpoint has them beside the stages
        try:
            report = load_checkpoint(model, path, allow=(*LEFT_OVER, "norms.", *unused))
        finally:
            del model.norms
        new = [name for name in report.skipped if name.startswith("norms.")]
        normed = len(norms.state_dict()) - len(new)
        skipped = [name for name in report.skipped if name not in new]
        parts = Counter(name.split(".")[0] for name in (*skipped, *report.left_over))
        left_over = ", ".join(f"{count} of {part}" for part, count in parts.items())
        print_log(
            f"{self.name}: {report.matched - normed} of {total} tensors matched from {path} (source {report.source}, "
            f"{report.weights} weights, {len(report.resized)} resized; level norms: {'loaded' if normed else 'new'}; "
            f"left over: {left_over or 'nothing'})",
            "current",
        )

    def train(self, mode: bool = True) -> TimmBackbone:
        """As in PyTorch, but frozen parts stay in evaluation mode."""
        super().train(mode)
        self._freeze()
        return self

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Image ``[B, 3, H, W]`` to one map ``[B, C, H / stride, W / stride]`` a level.

        Between levels sides are rounded up, by ConvNeXt down; the stem rounds as it does for classification.
        """
        maps = self.features(x)
        return tuple(norm(m.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) for norm, m in zip(self.norms, maps, strict=True))

    def _freeze(self) -> None:
        if self.frozen_stages < 0:
            return
        model = self.features.model
        for part in (model.stem, *model.stages[: self.frozen_stages]):
            part.eval().requires_grad_(False)
