"""Backbones for mmsegmentation and mmdetection, registered in mmengine's root registry.

Use them in a config with ``custom_imports = dict(imports=["elfatt.integrations.openmmlab"])``. Importing this module
also installs ``mmcv_ops``, so import it before mmdet.
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

LEFT_OVER = ("head.", "norm.")  # a checkpoint's classifier and final norm: the outputs have their own norms


@MODELS.register_module()
class TimmBackbone(BaseModule):
    """timm model as a backbone with four feature maps, each followed by a LayerNorm, as in the paper's dense models.

    The norms use the model's own ε, as in each system's dense code: 1e-6 for ConvNeXt, 1e-5 otherwise.

    Args:
        name: timm model with ``forward_intermediates`` and four stages, such as this package's models or ConvNeXt.
        out_indices: Stages to return, from 0; stage i has stride ``4 * 2**i``. Stages after the last are not built.
        frozen_stages: -1 freezes nothing, 0 the stem, n the stem and the first n stages.
        with_cp: Use gradient checkpointing.
        plan: JSON file of a ``Plan`` for the vanilla layers, written by ``classification/calibrate.py``.
        pretrained: Checkpoint of a classification or dense model of this project or official; short for ``init_cfg``.
        init_cfg: ``dict(type="Pretrained", checkpoint=FILE)``; random weights if None.
        **options: Model keyword arguments, such as ``block_size``, ``img_size`` or ``drop_path_rate``.

    Raises:
        ValueError: Unknown model, plan of another model, both ``pretrained`` and ``init_cfg``, invalid ``init_cfg``, or
            ``frozen_stages`` out of range or for a model without ``stem`` and ``stages``.
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
            raise ValueError(f"pretrained={pretrained!r} and init_cfg={init_cfg!r} both name weights: pass only one")
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
        # the getter keeps the classification model's parameter names and thus loads its checkpoints
        self.features = timm.create_model(
            name, features_only=True, feature_cls="getter", out_indices=tuple(out_indices), **options
        )
        model: Any = self.features.model
        if plan:
            convert(self.features, Plan.from_json(plan))
        if frozen_stages >= 0 and not {"stem", "stages"} <= dict(model.named_children()).keys():
            raise ValueError(f"frozen_stages={frozen_stages}: {name} has no 'stem' and 'stages', use -1")
        eps = next((m.eps for m in model.modules() if isinstance(m, nn.LayerNorm)), 1e-5)
        # "norm" in the name disables weight decay, see decay_mult in the configs
        self.norms = nn.ModuleList(nn.LayerNorm(c, eps=eps) for c in self.features.feature_info.channels())
        if with_cp:
            model.set_grad_checkpointing(True)
        self._freeze()

    def init_weights(self) -> None:
        """Load the checkpoint of ``init_cfg``, all or nothing; EMA weights are preferred.

        The output norms are loaded too if the checkpoint is of a dense model and all four stages are returned.

        Raises:
            FileNotFoundError: No such checkpoint.
            ValueError: Its tensors do not fit the model.
        """
        if not self.init_cfg:
            print_log(f"{self.name}: random weights; pass --pretrained FILE to load pretrained ones", "current")
            return
        path, model = self.init_cfg["checkpoint"], self.features.model
        total = len(model.state_dict())
        norms = self.norms if len(self.norms) == 4 else nn.ModuleList()
        unused = [f"stages.{i}." for i in range(max(self.features.out_indices) + 1, 4)]
        model.norms = norms  # a checkpoint has them next to the stages
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
            f"{report.weights} weights, {len(report.resized)} resized; output norms: {'loaded' if normed else 'new'}; "
            f"left over: {left_over or 'nothing'})",
            "current",
        )

    def train(self, mode: bool = True) -> TimmBackbone:
        """Set the training mode, keeping frozen parts in eval mode."""
        super().train(mode)
        self._freeze()
        return self

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Map images ``[B, 3, H, W]`` to one feature map ``[B, C, H / stride, W / stride]`` per output stage.

        Downsampling between stages rounds sizes up (ConvNeXt: down); the stem rounds as in classification.
        """
        maps = self.features(x)
        return tuple(norm(m.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) for norm, m in zip(self.norms, maps, strict=True))

    def _freeze(self) -> None:
        if self.frozen_stages < 0:
            return
        model = self.features.model
        for part in (model.stem, *model.stages[: self.frozen_stages]):
            part.eval().requires_grad_(False)
