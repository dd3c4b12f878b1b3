"""ELFATT for timm's pretrained ViTs: VisionTransformer (DeiT, DINOv2, CLIP, SigLIP, MAE …), EVA, DINOv3, SAM.

Each attention layer keeps its own projections, norms and rotary embeddings; the plan only replaces its softmax
attention. SAM's windowed layers are left alone, and the position biases of its global layers become extra query and key
features. In this package's models the vanilla layers are converted, which makes them linear in the number of pixels;
LePE is kept. State dicts do not change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.layers import Attention, AttentionRope
from timm.models.eva import Eva, EvaAttention
from timm.models.vision_transformer import ParallelScalingBlock, VisionTransformer
from timm.models.vision_transformer_sam import Attention as SAMAttention
from timm.models.vision_transformer_sam import Block as SAMBlock
from timm.models.vision_transformer_sam import VisionTransformerSAM, get_rel_pos
from torch import nn

from elfatt.attention.vanilla import VanillaAttention
from elfatt.backbones.hierarchical import HierarchicalBackbone
from elfatt.conversion import Attend, Calibration, Plan, vit
from elfatt.conversion.handle import ConvertedLayer, binding_of
from elfatt.conversion.positions import with_relative_positions
from elfatt.layers.lepe import convolve

ENCODERS = (VisionTransformer, Eva, VisionTransformerSAM, HierarchicalBackbone)
LAYERS = (Attention, AttentionRope, EvaAttention, ParallelScalingBlock)


def convert(
    model: nn.Module,
    plan: Plan | None = None,
    *,
    images: torch.Tensor | Iterable[torch.Tensor] | None = None,
    budget: float = 0.5,
    block: int = 8,
    min_tokens: int = 0,
) -> vit.ViTHandle:
    """Replace the self-attention of a trained ViT. Converting again replaces the previous conversion.

    Without a plan, one is calibrated on ``images``; without images it is the paper's ELFATT, ``Plan.uniform``: half the
    heads linear, half in blocks. Models with rotary embeddings or relative position biases (EVA-02, DINOv3, SAM) do not
    support linear heads; their first half stays exact.

    Args:
        model: A timm ViT, a model of this package, or a module that contains one, such as its ``features_only`` form or
            a segmentor.
        plan: Attention plan.
        images: One or more batches ``[B, C, H, W]``, normalised for the model.
        budget: Maximum share of attention's multiply-adds to keep when calibrating.
        block: Block size of the uniform plan, in tokens.
        min_tokens: Inputs with fewer tokens stay exact, unless a plan is given.

    Returns:
        A handle with the ``plan``; its ``remove()`` restores the model.

    Raises:
        TypeError: The model contains no supported ViT, or ``plan`` is not a ``Plan``.
        ValueError: The plan is for another model or has branches this one does not support, or the budget is out of
            range.
    """
    return vit.convert(vit_of(model), plan, images=images, budget=budget, block=block, min_tokens=min_tokens)


def calibrate(
    model: nn.Module, images: torch.Tensor | Iterable[torch.Tensor], *, weigh: bool = True, **options: Any
) -> Calibration:
    """Measure the error of every branch in each head of a ViT, for ``.plan(cost=…)`` or ``.plan(error=…)``.

    Args:
        model: See ``convert``.
        images: See ``convert``.
        weigh: Weigh layers by the effect of their errors on the features, at one extra pass per layer and batch.
        **options: Keyword arguments of ``elfatt.conversion.Calibration``.

    Raises:
        TypeError: The model contains no supported ViT.
    """
    return vit.calibrate(vit_of(model), images, weigh=weigh, **options)


def vit_of(model: nn.Module) -> vit.ViT:
    """Return the ViT inside a model.

    Raises:
        TypeError: No ViT, several, or one with unsupported attention; the message says why.
    """
    found = [module for module in model.modules() if isinstance(module, ENCODERS)]
    if len(found) != 1:
        names = ", ".join(encoder.__name__ for encoder in ENCODERS)
        raise TypeError(
            f"{type(model).__name__} contains {len(found) or 'no'} supported ViTs, expected one of timm's {names}"
        )
    (encoder,) = found
    if isinstance(encoder, HierarchicalBackbone):
        return _own(encoder)
    kind = type(encoder).__name__
    is_sam = isinstance(encoder, VisionTransformerSAM)
    layers = _relative_layers(encoder) if is_sam else _plain_layers(encoder)
    if not layers:
        raise TypeError(f"{kind} has no self-attention that can be converted")
    for name, layer in layers.items():
        if layer.attn_drop.p:
            raise TypeError(f"{name} has attn_drop={layer.attn_drop.p}: build the model with attn_drop_rate=0")
    return vit.ViT(
        model=encoder,
        name=f"{kind}-{encoder.embed_dim}-{len(layers)}",
        layers=layers,
        heads={name: layer.num_heads for name, layer in layers.items()},
        width=encoder.embed_dim,
        linear=not is_sam and getattr(encoder, "rope", None) is None,
        features=encoder.forward_features,
        handle=_Handle,
        unsupported=() if is_sam else _without_layers(encoder, layers),
    )


def _own(model: HierarchicalBackbone) -> vit.ViT:
    layers = {name: module for name, module in model.named_modules() if isinstance(module, VanillaAttention)}
    if not layers:
        raise TypeError(f"{type(model).__name__} has no vanilla attention that can be converted")
    dims = "-".join(str(dim) for dim in dict.fromkeys(layer.dim for layer in layers.values()))
    return vit.ViT(
        model=model,
        name=f"{type(model).__name__}-{dims}-{len(layers)}",
        layers=layers,
        heads={name: layer.num_heads for name, layer in layers.items()},
        width=0,  # differs per stage; only used by a plan's LePE, which is rejected
        linear=True,
        features=model.forward_features,
        handle=_OwnHandle,
    )


class _OwnLayer(ConvertedLayer):
    """A vanilla layer of this package, whose map is its input."""

    num_heads: int
    lepe: nn.Module | None

    def attend(self, qkv: torch.Tensor) -> torch.Tensor:
        """Map packed ``[B, H, W, 3C]`` to ``[B, H, W, C]``."""
        binding = binding_of(self)
        if binding is None:
            return super().attend(qkv)  # type: ignore[misc]  # the layer's
        return binding.handle.attend_map(binding.name, self, qkv)


class _OwnHandle(vit.ViTHandle):
    """Conversion of the vanilla layers of this package's models; map sizes differ per stage."""

    def __init__(self, found: vit.ViT, attend: Attend, layers: Iterable[str], plan: Plan | None = None):
        if plan and plan.lepe:
            raise ValueError(f"{found.name} has its own LePE: use a plan without it")
        super().__init__(found, attend, layers, plan)
        self.bind(self.layers, _OwnLayer)

    def run(self, name: str, layer: Any, call: Callable, args: tuple, kwargs: dict) -> Any:
        """Run a converted layer; its attention is replaced in ``attend``."""
        return call(*args, **kwargs)

    def attend_map(self, name: str, layer: _OwnLayer, qkv: torch.Tensor) -> torch.Tensor:
        """Map packed ``[B, H, W, 3C]`` to ``[B, H, W, C]``."""
        self.state.ran.add(name)
        height, width = size = qkv.shape[1:3]
        q, k, v = qkv.flatten(1, 2).unflatten(-1, (3, layer.num_heads, -1)).unbind(2)
        out = self.attend(name, q, k, v, (height, width)).flatten(2).unflatten(1, size)
        return out if layer.lepe is None else out + convolve(layer.lepe, v.flatten(2).unflatten(1, size))


class _Layer(ConvertedLayer):
    @property
    def fused_attn(self) -> bool:
        """Whether attention is one operation; explicit products cannot be intercepted."""
        return binding_of(self) is not None or self.__dict__["fused_attn"]

    @fused_attn.setter
    def fused_attn(self, value: bool) -> None:
        self.__dict__["fused_attn"] = value


class _RelativeLayer(ConvertedLayer):
    """SAM's attention with decomposed relative positions, without materialising the ``N × N`` bias."""

    def run_layer(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``[B, H, W, C]`` to the same shape."""
        if binding_of(self) is None:
            return super().run_layer(x)
        layer, size = cast(SAMAttention, self), x.shape[1:3]
        q, k, v = layer.qkv(x).flatten(1, 2).unflatten(-1, (3, layer.num_heads, -1)).unbind(2)
        q, k = layer.q_norm(q), layer.k_norm(k)
        width = v.shape[-1]
        tables = (get_rel_pos(n, n, table) for n, table in zip(size, (layer.rel_pos_h, layer.rel_pos_w), strict=True))
        q, k = with_relative_positions(q, k, *tables)
        v = F.pad(v, (0, q.shape[-1] - width))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, scale=1.0).transpose(1, 2)
        return layer.proj_drop(layer.proj(out[..., :width].flatten(2))).unflatten(1, size)


class _Handle(vit.ViTHandle):
    def __init__(self, found: vit.ViT, attend: Attend, layers: Iterable[str], plan: Plan | None = None):
        super().__init__(found, attend, layers, plan)
        is_sam = isinstance(found.model, VisionTransformerSAM)
        self.bind(self.layers, _RelativeLayer if is_sam else _Layer)
        self._prefix = getattr(found.model, "num_prefix_tokens", 0)
        self._hooks.append(found.model.get_submodule("patch_embed").register_forward_pre_hook(self._look))

    def _look(self, patch_embed, args):
        self.embedded(tuple(patch_embed.dynamic_feat_size(args[0].shape[-2:])), self._prefix)


def _plain_layers(encoder):
    return {name: module for name, module in encoder.named_modules() if isinstance(module, LAYERS)}


def _without_layers(encoder, layers):
    """Return the names of the blocks that have none of the layers."""
    blocks = (f"blocks.{name}" for name, _ in encoder.get_submodule("blocks").named_children())
    return tuple(name for name in blocks if not any(f"{layer}.".startswith(f"{name}.") for layer in layers))


def _relative_layers(encoder):
    blocks = {name: module for name, module in encoder.named_modules() if isinstance(module, SAMBlock)}
    return {f"{name}.attn": b.attn for name, b in blocks.items() if b.window_size == 0 and b.attn.use_rel_pos}
