"""Checks of a configuration before the first step."""

from __future__ import annotations

from collections.abc import Iterator

from mmengine.config import Config
from mmengine.dist import get_world_size
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from elfatt.data import UserError


def check_batch_norm(model: nn.Module, batch_size: int | None) -> None:
    """Stops where a batch norm behind a pooling to one pixel, as UperNet's, would see one value a channel.

    Raises:
        UserError: It would.
    """
    pooled = [part for part in model.modules() if isinstance(part, nn.Sequential) and _pools_to_a_pixel(part)]
    norms = [part for whole in pooled for part in whole.modules() if isinstance(part, _BatchNorm)]
    apart = [norm for norm in norms if not (isinstance(norm, nn.SyncBatchNorm) and get_world_size() > 1)]
    if batch_size == 1 and apart:
        raise UserError(
            "train_dataloader.batch_size=1",
            "leaves one value a channel to the batch norm behind a pooling to 1x1",
            "set train_dataloader.batch_size=2, or a norm_cfg without batch norm",
        )


def _pools_to_a_pixel(part: nn.Sequential) -> bool:
    first = next(iter(part), None)
    return isinstance(first, nn.AdaptiveAvgPool2d) and first.output_size in (1, (1, 1))


def check_channels(config: Config) -> None:
    """Stops where the backbone, the preprocessor and the pipelines do not agree on the channels of an image.

    Raises:
        UserError: They do not, or there is no such image.
    """
    channels, preprocessor = config.model.backbone.get("in_chans", 3), config.model.get("data_preprocessor") or {}
    if channels not in (1, 3):
        raise UserError(f"model.backbone.in_chans={channels}", "fits no image", "choose 3 (colour) or 1 (grey)")
    mode = "L" if channels == 1 else "RGB"
    loaders = [config.get(f"{name}_dataloader") for name in ("train", "val", "test")]
    modes = {step.get("mode", "RGB") for loader in loaders for step in _steps(loader, "LoadImage")}
    means = len(preprocessor.get("mean") or [0] * channels)
    if modes - {mode} or means != channels or (channels == 1 and preprocessor.get("bgr_to_rgb")):
        raise UserError(
            f"model.backbone.in_chans={channels}",
            f"does not fit LoadImage(mode={'/'.join(sorted(modes))!r}) and data_preprocessor with {means} means",
            f"set mode='{mode}' in LoadImage of every pipeline, and in model.data_preprocessor mean and std of "
            f"{channels} value(s) and bgr_to_rgb={channels == 3}",
        )
    if channels == 1 and any(list(_steps(loader, "PhotoMetricDistortion")) for loader in loaders):
        raise UserError("PhotoMetricDistortion", "changes colours, and in_chans=1 is grey", "leave it out")


def _steps(node, kind: str) -> Iterator[dict]:
    """Every dict of one type in a configuration."""
    if isinstance(node, dict):
        if node.get("type") == kind:
            yield node
        node = list(node.values())
    if isinstance(node, list | tuple):
        for value in node:
            yield from _steps(value, kind)
