"""Config checks before the first step."""

from __future__ import annotations

from collections.abc import Iterator

from mmengine.config import Config
from mmengine.dist import get_world_size
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from elfatt.data import UserError


def check_batch_norm(model: nn.Module, batch_size: int | None) -> None:
    """Check that batch norm after 1x1 pooling, as in UperNet, sees more than one value per channel.

    Raises:
        UserError: It sees only one.
    """
    pooled = [part for part in model.modules() if isinstance(part, nn.Sequential) and _pools_to_a_pixel(part)]
    norms = [part for whole in pooled for part in whole.modules() if isinstance(part, _BatchNorm)]
    apart = [norm for norm in norms if not (isinstance(norm, nn.SyncBatchNorm) and get_world_size() > 1)]
    if batch_size == 1 and apart:
        raise UserError(
            "train_dataloader.batch_size=1",
            "leaves one value per channel for the batch norm after 1x1 pooling",
            "set train_dataloader.batch_size=2, or use a norm_cfg without batch norm",
        )


def _pools_to_a_pixel(part: nn.Sequential) -> bool:
    first = next(iter(part), None)
    return isinstance(first, nn.AdaptiveAvgPool2d) and first.output_size in (1, (1, 1))


def check_channels(config: Config) -> None:
    """Check that the backbone, the preprocessor and the pipelines agree on the number of image channels.

    Raises:
        UserError: They disagree, or the number is neither 1 nor 3.
    """
    channels, preprocessor = config.model.backbone.get("in_chans", 3), config.model.get("data_preprocessor") or {}
    if channels not in (1, 3):
        raise UserError(f"model.backbone.in_chans={channels}", "is not supported", "use 3 (colour) or 1 (greyscale)")
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
        raise UserError("PhotoMetricDistortion", "changes colours, but in_chans=1 is greyscale", "remove it")


def _steps(node, kind: str) -> Iterator[dict]:
    """Yield every dict of one type in a config."""
    if isinstance(node, dict):
        if node.get("type") == kind:
            yield node
        node = list(node.values())
    if isinstance(node, list | tuple):
        for value in node:
            yield from _steps(value, kind)
