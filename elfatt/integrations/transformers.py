"""ELFATT for vision encoders of transformers: ViT, DINOv2 with and without registers, DINOv3, CLIP, SigLIP.

Importing this module registers the attention implementation ``elfatt``::

    AutoModel.from_pretrained(…, attn_implementation="elfatt")  # or model.set_attn_implementation("elfatt")

It runs the paper's uniform split at the config's image size. Use ``convert`` for plans and other image sizes.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import nn

try:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import bidirectional_mask_function, sdpa_mask
    from transformers.modeling_layers import GradientCheckpointingLayer
    from transformers.models.clip.modeling_clip import CLIPAttention, CLIPVisionEmbeddings
    from transformers.models.dinov2.modeling_dinov2 import Dinov2Attention, Dinov2Embeddings
    from transformers.models.dinov2_with_registers.modeling_dinov2_with_registers import (
        Dinov2WithRegistersAttention,
        Dinov2WithRegistersEmbeddings,
    )
    from transformers.models.dinov3_vit.modeling_dinov3_vit import DINOv3ViTAttention, DINOv3ViTEmbeddings
    from transformers.models.siglip.modeling_siglip import SiglipAttention, SiglipVisionEmbeddings
    from transformers.models.vit.modeling_vit import ViTAttention, ViTEmbeddings
except ImportError as error:
    raise ImportError("elfatt.integrations.transformers needs transformers 5: pip install transformers>=5") from error

from elfatt.conversion import Attend, Calibration, Plan, hybrid_attention, vit
from elfatt.conversion.handle import Call, ConvertedLayer, binding_of

NAME = "elfatt"
LAYERS: dict[type[nn.Module], type[nn.Module]] = {  # attention class by embeddings class
    ViTEmbeddings: ViTAttention,
    Dinov2Embeddings: Dinov2Attention,
    Dinov2WithRegistersEmbeddings: Dinov2WithRegistersAttention,
    DINOv3ViTEmbeddings: DINOv3ViTAttention,
    CLIPVisionEmbeddings: CLIPAttention,
    SiglipVisionEmbeddings: SiglipAttention,
}
ROTARY = (DINOv3ViTAttention,)
LAYER_ARGUMENTS = ("attention_mask", "position_embeddings")  # of the layers' forward, after the hidden states


def convert(
    model: nn.Module,
    plan: Plan | None = None,
    *,
    images: torch.Tensor | Iterable[torch.Tensor] | None = None,
    budget: float = 0.5,
    block: int = 8,
    min_tokens: int = 0,
) -> vit.ViTHandle:
    """Convert a transformers model; see ``elfatt.convert``. ``images`` are pixel values."""
    return vit.convert(vit_of(model), plan, images=images, budget=budget, block=block, min_tokens=min_tokens)


def calibrate(
    model: nn.Module, images: torch.Tensor | Iterable[torch.Tensor], *, weigh: bool = True, **options: Any
) -> Calibration:
    """Calibrate a transformers model; see ``elfatt.integrations.timm.calibrate``. ``images`` are pixel values."""
    return vit.calibrate(vit_of(model), images, weigh=weigh, **options)


def attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Compute attention for transformers' ``AttentionInterface``.

    Args:
        module: Attention layer.
        query: ``[B, heads, N, d]``.
        key: ``[B, heads, N, d]``.
        value: ``[B, heads, N, d]``.
        attention_mask: Must be None.
        scaling: Scale of the scores.
        dropout: Must be 0.
        is_causal: Must not be True.

    Returns:
        Outputs ``[B, N, heads, d]``, and None in place of the weights.

    Raises:
        ValueError: Mask, causal attention, dropout, an unsupported layer, or, without ``convert``, an image size other
            than the config's.
    """
    kind = type(module).__name__
    if not isinstance(module, tuple(LAYERS.values())) or not hasattr(module.config, "patch_size"):
        raise ValueError(
            f"{kind} is not part of a vision encoder supported by {NAME}: use attn_implementation='sdpa' for it"
        )
    if attention_mask is not None or is_causal or query.shape != key.shape or dropout:
        raise ValueError(
            f"{kind}: {NAME} supports no masks, causal attention or dropout: use attn_implementation='sdpa'"
        )
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return _uniform(module, q, k, v, scaling), None


def _mask(*args, mask_function=None, attention_mask=None, **kwargs):
    """Make no mask if none is needed, also while tracing; others are made to be rejected."""
    if attention_mask is None and mask_function is bidirectional_mask_function:
        return None
    return sdpa_mask(*args, mask_function=mask_function, attention_mask=attention_mask, **kwargs)


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, _mask)


def _uniform(module, q, k, v, scale):
    """Run the uniform plan at the config's image size, since a layer does not know the image's."""
    config = module.config
    size = tuple(side // config.patch_size for side in _pair(config.image_size))
    prefix = 0 if isinstance(module, SiglipAttention) else 1 + getattr(config, "num_register_tokens", 0)
    if q.shape[1] != prefix + size[0] * size[1]:
        raise ValueError(
            f"{q.shape[1]} tokens do not match the config's {prefix} + {size[0]} × {size[1]}: "
            "use elfatt.integrations.transformers.convert(model) for images of any size"
        )
    branch = "exact" if isinstance(module, ROTARY) else "linear"
    plan = Plan.uniform("", {"": q.shape[2]}, global_branch=branch).layers[""]
    return hybrid_attention(q, k, v, size, plan, prefix=prefix, scale=scale)


def _pair(size):
    return tuple(size) if isinstance(size, (list, tuple)) else (size, size)


def vit_of(model: nn.Module) -> vit.ViT:
    """Return the vision encoder inside a model.

    Raises:
        TypeError: No supported encoder, or several.
    """
    found = [m for m in model.modules() if type(getattr(m, "embeddings", None)) in LAYERS]
    if len(found) != 1:
        names = ", ".join(kind.__name__.removesuffix("Attention") for kind in LAYERS.values())
        raise TypeError(
            f"{type(model).__name__} contains {len(found) or 'no'} supported vision encoders, expected one of {names}"
        )
    (encoder,) = found
    attention_class = LAYERS[type(encoder.get_submodule("embeddings"))]
    layers = {name: module for name, module in encoder.named_modules() if isinstance(module, attention_class)}
    config: Any = encoder.config  # depends on the encoder
    return vit.ViT(
        model=encoder,
        name=f"{type(encoder).__name__}-{config.hidden_size}-{len(layers)}",
        layers=layers,
        heads=dict.fromkeys(layers, config.num_attention_heads),
        width=config.hidden_size,
        linear=attention_class not in ROTARY,
        features=partial(_features, encoder),
        handle=_Handle,
        unsupported=_without_layers(encoder, layers),
    )


def _without_layers(encoder, layers):
    """Return the names of the blocks that have none of the layers."""
    blocks = [name for name, module in encoder.named_modules() if isinstance(module, GradientCheckpointingLayer)]
    return tuple(name for name in blocks if not any(layer.startswith(f"{name}.") for layer in layers))


def _features(encoder, images):
    accepted = inspect.signature(encoder.embeddings.forward).parameters
    options = {"interpolate_pos_encoding": True} if "interpolate_pos_encoding" in accepted else {}
    out = encoder(images, **options)[0]
    return out[-1] if isinstance(out, tuple) else out  # a backbone returns several maps


class _Layer(ConvertedLayer):
    @property
    def config(self) -> Any:
        """The layer's config; with PyTorch's attention, which can be intercepted, while the layer is converted."""
        binding = binding_of(self)
        return self.__dict__["config"] if binding is None else binding.handle.config

    @config.setter
    def config(self, value: Any) -> None:
        self.__dict__["config"] = value


class _Handle(vit.ViTHandle):
    def __init__(self, found: vit.ViT, attend: Attend, layers: Iterable[str], plan: Plan | None = None):
        super().__init__(found, attend, layers, plan)
        config: Any = found.model.config  # depends on the encoder
        self.config = copy.copy(config)  # the model's may be shared
        self.config._attn_implementation_internal = "sdpa"
        self.bind(found.layers if self.layers else {}, _Layer)  # a layer that the plan leaves out is exact
        embeddings: Any = found.model.get_submodule("embeddings")
        self._hooks.append(embeddings.register_forward_hook(self._look, with_kwargs=True))
        self._patch = _pair(config.patch_size)
        self._prefix = _prefix(embeddings)
        self._parameters = list(inspect.signature(type(found.model).forward).parameters)[1:]

    def _begin(self, model, args, kwargs):
        super()._begin(model, args, kwargs)
        mask = dict(zip(self._parameters, args, strict=False)).get("attention_mask", kwargs.get("attention_mask"))
        self.enter(Call(masked=mask is not None))

    def _look(self, embeddings, args, kwargs, tokens):
        images = args[0] if args else kwargs["pixel_values"]
        height, width = (side // patch for side, patch in zip(images.shape[-2:], self._patch, strict=True))
        self.embedded((height, width), self._prefix)

    def run(self, name: str, layer: Any, call: Callable, args: tuple, kwargs: dict) -> Any:
        """Run a converted layer, without the mask that transformers makes while tracing even if none was passed."""
        known = self.known_call(name)
        tracing = torch.compiler.is_compiling() or torch.jit.is_tracing()
        if tracing and known is not None and not known.masked:
            kwargs = kwargs | dict(zip(LAYER_ARGUMENTS, args[1:], strict=False)) | {"attention_mask": None}
            args = args[:1]
        if name not in self.layers:
            self.state.ran.add(name)
            return call(*args, **kwargs)
        return super().run(name, layer, call, args, kwargs)


def _prefix(embeddings: Any) -> int:
    """Return the number of class and register tokens that embeddings put before the map."""
    tokens = (getattr(embeddings, name, None) for name in ("cls_token", "class_embedding", "register_tokens"))
    return sum(token.numel() // token.shape[-1] for token in tokens if token is not None)
