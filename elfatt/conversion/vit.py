"""Conversion and calibration of trained ViTs, shared by the timm and transformers adapters."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from elfatt.conversion.attention import run_plan
from elfatt.conversion.calibrate import CANDIDATES, Attend, Calibration
from elfatt.conversion.handle import Call, Handle
from elfatt.conversion.plan import Plan
from elfatt.layers.lepe import convolve, make_lepe

Images = torch.Tensor | Iterable[torch.Tensor]


class ViTHandle(Handle):
    """A conversion applied to a ViT. Subclasses bind its layers and enter the size of each call's map.

    Args:
        vit: The ViT.
        attend: Computes a layer's attention.
        layers: Names of the layers to convert.
        plan: Plan run by ``attend``, if any.
    """

    def __init__(self, vit: ViT, attend: Attend, layers: Iterable[str], plan: Plan | None = None):
        super().__init__(vit.model)
        self.attend, self.plan, self._width = attend, plan, vit.width
        self.layers = {name: vit.layers[name] for name in layers}
        if plan and plan.lepe:
            for layer in self.layers.values():
                weight = next(layer.parameters())
                layer.lepe = make_lepe(vit.width).to(weight.device, weight.dtype)
                for parameter in layer.lepe.parameters():
                    nn.init.zeros_(parameter)

    @property
    def promised(self) -> list[str]:
        """Names of the layers whose attention is replaced."""
        return list(self.layers)

    def _restore(self):
        if self.plan and self.plan.lepe:
            for layer in self.layers.values():
                del layer.lepe
        self.layers = {}

    def embedded(self, size: tuple[int, int], prefix: int) -> None:
        """Enter the map of embedded images, unless others of another size wait for their blocks."""
        before = self.state.call
        waiting = before is not None and before.size != size and not (self.state.inside or self.state.ran)
        self.enter(replace(before or Call(), size=None if waiting else size, prefix=prefix))
        if not self.state.inside:
            self.state.ran.clear()

    def attention(
        self, name: str, layer: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None
    ) -> torch.Tensor | None:
        """Compute one layer's attention on tensors ``[B, N, heads, d]``; None if their map is unknown."""
        call = self.known_call(name)
        if call is None or call.size is None:
            met = "it runs outside its model's forward, or images of several sizes were embedded before"
            self.warn(name, met, "call the model on one batch after the other")
            return None
        (height, width), prefix = call.size, call.prefix
        if q.shape[1] != prefix + height * width:
            met = f"{q.shape[1]} tokens are not {prefix} + {height} × {width}"
            self.warn(name, met, "tokens that are merged, dropped or added have no map: remove() the conversion")
            return None
        out = self.attend(name, q, k, v, call.size, prefix=prefix, scale=scale)
        lepe = getattr(layer, "lepe", None)
        return out if lepe is None else out + self._encode(lepe, v, call.size, prefix)

    def _encode(self, lepe, v, size, prefix):
        """Return LePE of the map, zero-padded for the prefix and for features appended to V."""
        heads, width = v.shape[2:]
        channels = self._width // heads
        x = convolve(lepe, v[:, prefix:, :, :channels].flatten(2).unflatten(1, size))
        return F.pad(x.flatten(1, 2).unflatten(-1, (heads, channels)), (0, width - channels, 0, 0, prefix, 0))


@dataclass(frozen=True)
class ViT:
    """A trained ViT, described for conversion.

    Attributes:
        model: The ViT.
        name: Its name in plans.
        layers: Its self-attention layers, by name.
        heads: Number of heads per layer.
        width: Channels of V per layer.
        linear: Whether linear heads are supported; false with rotary embeddings or relative position biases.
        features: Maps a batch of images to features.
        handle: The adapter's handle class.
        unsupported: Names of the blocks whose attention cannot be converted.
    """

    model: nn.Module
    name: str
    layers: Mapping[str, nn.Module]
    heads: Mapping[str, int]
    width: int
    linear: bool
    features: Callable[[torch.Tensor], torch.Tensor]
    handle: type[ViTHandle]
    unsupported: tuple[str, ...] = ()


def convert(
    vit: ViT, plan: Plan | None, *, images: Images | None, budget: float, block: int, min_tokens: int
) -> ViTHandle:
    """Implement ``elfatt.convert``."""
    if plan is None and vit.unsupported:
        names = ", ".join(vit.unsupported)
        warnings.warn(f"no attention in {names} of {vit.name} can be converted: it stays as it is", stacklevel=3)
    if plan is not None and not isinstance(plan, Plan):
        raise TypeError(f"plan={plan!r} must be a Plan: read a file with Plan.from_json")
    if plan is not None and images is not None:
        raise ValueError("pass either a plan or images to calibrate one, not both")
    if plan is None and images is not None:
        plan = calibrate(vit, images, min_tokens=min_tokens).plan(cost=budget)
    elif plan is None:
        branch = "linear" if vit.linear else "exact"
        plan = Plan.uniform(vit.name, vit.heads, block=block, min_tokens=min_tokens, global_branch=branch)
    plan.check(vit.name, vit.heads)
    for name, layer in plan.layers.items():
        if not vit.linear and any(head.branch == "linear" for head in layer.heads):
            raise ValueError(
                f"{name} has rotary or relative positions, which linear heads do not support: use exact or block"
            )
    changed = [name for name, layer in plan.layers.items() if not layer.is_exact]
    return vit.handle(vit, partial(run_plan, plan), changed, plan)


@torch.no_grad()
def calibrate(vit: ViT, images: Images, *, weigh: bool = True, **options: Any) -> Calibration:
    """Implement ``elfatt.integrations.timm.calibrate``."""
    if not vit.linear:
        options.setdefault("candidates", [head for head in CANDIDATES if head.branch != "linear"])
    calibration = Calibration(vit.name, **options)
    modes = {module: module.training for module in vit.model.modules()}
    with vit.handle(vit, calibration.attend, vit.layers):
        vit.model.eval()
        try:
            for batch in [images] if isinstance(images, torch.Tensor) else images:
                features = vit.features(batch)
                if weigh:
                    calibration.weigh(partial(vit.features, batch), features)
        finally:
            for module, mode in modes.items():
                module.training = mode
    return calibration
