"""ELFATT in pretrained ViTs of timm: VisionTransformer and its kin (DeiT, DINOv2, CLIP, SigLIP, MAE …), EVA, DINOv3.

Each attention layer keeps its forward pass with its projections, norms and rotary embeddings; the plan computes its
softmax attention only. State dicts do not change.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from timm.layers import Attention, AttentionRope
from timm.models.eva import Eva, EvaAttention
from timm.models.vision_transformer import ParallelScalingBlock, VisionTransformer
from torch import nn

from elfatt.conversion import Attend, Calibration, Handle, Plan, hybrid_attention
from elfatt.conversion.calibrate import CANDIDATES
from elfatt.conversion.intercept import InterceptAttention

ENCODERS = (VisionTransformer, Eva)
LAYERS = (Attention, AttentionRope, EvaAttention, ParallelScalingBlock)


class ViTHandle(Handle):
    """Another attention within a ViT of timm.

    Args:
        model: A module with one ViT in it.
        attend: Computes the softmax attention of a layer.
        plan: What ``attend`` follows, if a plan.
        layers: Names of the layers that call it.
    """

    def __init__(self, model: nn.Module, attend: Attend, layers: Iterable[str], plan: Plan | None = None):
        super().__init__(encoder_of(model))
        self.attend, self.plan = attend, plan
        self.size = (0, 0)  # of the map, in tokens
        self._hook = self.model.patch_embed.register_forward_pre_hook(self._look)
        self._fused: dict[str, bool] = {}
        for name in layers:
            layer = self.model.get_submodule(name)
            self._fused[name] = layer.fused_attn
            layer.fused_attn = True  # explicit products cannot be intercepted
            layer.forward = _Forward(self, name, layer)

    def _restore(self):
        self._hook.remove()
        for name, fused in self._fused.items():
            layer = self.model.get_submodule(name)
            layer.fused_attn = fused
            del layer.forward
        self._fused = {}

    def _look(self, patch_embed, args):
        self.size = patch_embed.dynamic_feat_size(args[0].shape[-2:])


class _Forward:
    """A layer's forward pass, within which its softmax attention is a handle's."""

    def __init__(self, handle: ViTHandle, name: str, layer: nn.Module):
        self.handle, self.name, self.layer = handle, name, layer

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        with InterceptAttention(self._attend):
            return type(self.layer).forward(self.layer, *args, **kwargs)

    def _attend(self, q, k, v, scale):
        handle = self.handle
        return handle.attend(self.name, q, k, v, handle.size, prefix=handle.model.num_prefix_tokens, scale=scale)


def convert(
    model: nn.Module,
    plan: Plan | None = None,
    *,
    images: torch.Tensor | Iterable[torch.Tensor] | None = None,
    budget: float = 0.5,
    block: int = 8,
    min_tokens: int = 0,
) -> ViTHandle:
    """Replace the self-attention of a trained ViT; converting again replaces what was there.

    Without a plan, one is calibrated on ``images``; without these it is the paper's ELFATT, ``Plan.uniform``: half the
    heads linear, half in blocks. Linear attention is not sound for rotary embeddings (EVA-02, DINOv3), where half
    the heads stay exact instead.

    Args:
        model: A ViT of timm, or a module with one in it, such as its ``features_only`` form.
        plan: What each layer runs.
        images: A batch ``[B, C, H, W]``, normalised as the model wants it, or several.
        budget: Share of attention's multiply-adds that calibration leaves, at most.
        block: Side of the uniform plan's blocks, in tokens.
        min_tokens: Inputs of fewer tokens stay exact in a plan that is made here.

    Returns:
        A handle with the ``plan``; its ``remove()`` takes it out.

    Raises:
        TypeError: A model without such layers.
        ValueError: A plan of another model or one that its layers cannot run, or a budget out of range.
    """
    vit = encoder_of(model)
    heads = {name: layer.num_heads for name, layer in self_attention_layers(vit).items()}
    if plan is None and images is not None:
        plan = calibrate(model, images, min_tokens=min_tokens).plan(cost=budget)
    elif plan is None:
        far = "exact" if _is_rotary(vit) else "linear"
        plan = Plan.uniform(name_of(vit), heads, block=block, min_tokens=min_tokens, global_branch=far)
    plan.check(name_of(vit), heads)
    if _is_rotary(vit):
        for name, layer in plan.layers.items():
            if any(head.branch == "linear" for head in layer.heads):
                raise ValueError(f"{name} has rotary embeddings, where linear heads are not sound: use exact or block")
    return ViTHandle(vit, partial(_attend, plan), (n for n, layer in plan.layers.items() if not layer.is_exact), plan)


def _attend(plan, layer, q, k, v, size, *, prefix=0, scale=None):
    return hybrid_attention(q, k, v, size, plan.layers[layer], prefix=prefix, scale=scale)


@torch.no_grad()
def calibrate(
    model: nn.Module, images: torch.Tensor | Iterable[torch.Tensor], *, weigh: bool = True, **options: Any
) -> Calibration:
    """Measure what each branch would do in each head of a ViT; ``.plan(cost=…)`` or ``.plan(error=…)`` chooses.

    Args:
        model: As in ``convert``.
        images: As in ``convert``.
        weigh: Weigh each layer by what its errors do to the features, with one more pass of each batch for each layer.
        **options: Of ``elfatt.conversion.Calibration``.

    Raises:
        TypeError: A model without such layers.
    """
    vit = encoder_of(model)
    layers = self_attention_layers(vit)
    if _is_rotary(vit):
        options.setdefault("candidates", [head for head in CANDIDATES if head.branch != "linear"])
    calibration = Calibration(name_of(vit), **options)
    modes = {module: module.training for module in vit.modules()}
    with ViTHandle(vit, calibration.attend, layers):
        vit.eval()
        try:
            for batch in [images] if isinstance(images, torch.Tensor) else images:
                features = vit.forward_features(batch)
                if weigh:
                    calibration.weigh(partial(vit.forward_features, batch), features)
        finally:
            for module, mode in modes.items():
                module.training = mode
    return calibration


def encoder_of(model: nn.Module) -> nn.Module:
    """The ViT in a model.

    Raises:
        TypeError: None or several, or one whose attention is not supported; the reason is named.
    """
    found = [module for module in model.modules() if isinstance(module, ENCODERS)]
    if len(found) != 1:
        names = " and ".join(encoder.__name__ for encoder in ENCODERS)
        raise TypeError(f"{type(model).__name__} holds {len(found) or 'no'} plain ViTs: supported are timm's {names}")
    (vit,) = found
    layers = self_attention_layers(vit)
    if not layers:
        raise TypeError(f"{type(vit).__name__} has no plain self-attention to replace")
    for name, layer in layers.items():
        if layer.attn_drop.p:
            raise TypeError(f"{name} has attn_drop={layer.attn_drop.p}: build the model with attn_drop_rate=0")
    return vit


def self_attention_layers(vit: nn.Module) -> dict[str, nn.Module]:
    """The self-attention layers of a ViT, by name."""
    return {name: module for name, module in vit.named_modules() if isinstance(module, LAYERS)}


def _is_rotary(vit: nn.Module) -> bool:
    return getattr(vit, "rope", None) is not None


def name_of(vit: nn.Module) -> str:
    """What plans call a ViT: its class, its width and its number of attention layers."""
    return f"{type(vit).__name__}-{vit.embed_dim}-{len(self_attention_layers(vit))}"
