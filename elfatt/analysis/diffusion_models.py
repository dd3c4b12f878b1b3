"""Diffusion models to benchmark: published configs with random weights or a user's own, whole or one layer at a time.

Configs are from the models' published ``config.json``; tests check their parameter counts.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial, partialmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from elfatt.analysis.complexity import count_true

if TYPE_CHECKING:
    from diffusers.models.modeling_utils import ModelMixin

PATCH = 8  # pixels per latent, along each side
Model = TypeVar("Model", bound=nn.Module)
KINDS = ("UNet2DConditionModel", "PixArtTransformer2DModel")
PIXART = {"caption_channels": 4096}


@dataclass(frozen=True)
class Config:
    """Config of a diffusers model.

    Attributes:
        kind: Class name.
        options: Keyword arguments of the class.
        text: Tokens per prompt.
    """

    kind: str
    options: dict[str, Any] = field(default_factory=dict)
    text: int = 77


CONFIGS = {
    "sd15": Config("UNet2DConditionModel", {"cross_attention_dim": 768}),
    "sdxl": Config(
        "UNet2DConditionModel",
        {
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (5, 10, 20),
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
    ),
    "pixart-alpha": Config("PixArtTransformer2DModel", PIXART, text=120),
    "pixart-sigma": Config("PixArtTransformer2DModel", {**PIXART, "use_additional_conditions": False}, text=300),
    "tiny": Config(  # for trying out the commands
        "UNet2DConditionModel",
        {
            "block_out_channels": (16, 32),
            "layers_per_block": 1,
            "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            "cross_attention_dim": 8,
            "attention_head_dim": 4,
            "norm_num_groups": 4,
        },
    ),
}


class Step(nn.Module):
    """One denoiser call that maps latents ``[B, C, h, w]`` to predictions, with the same text for all.

    Args:
        model: The UNet or transformer.
        timestep: Timestep of all latents.
        text: Tokens per prompt.
    """

    def __init__(self, model: ModelMixin, timestep: int = 500, text: int = 77):
        super().__init__()
        self.model, self.timestep, self.text = model, timestep, text

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Predict from latents ``[B, C, h, w]``."""
        config, ones = self.model.config, partial(torch.ones, dtype=x.dtype, device=x.device)
        options: dict[str, Any] = {"timestep": self.timestep, "return_dict": False}
        if width := config.get("caption_channels") or config.get("cross_attention_dim"):
            options["encoder_hidden_states"] = ones(len(x), self.text, width)
        if config.get("addition_embed_type") == "text_time":
            width = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
            options["added_cond_kwargs"] = {"text_embeds": ones(len(x), width), "time_ids": ones(len(x), 6)}
        if "caption_channels" in config:
            options["timestep"] = torch.full((len(x),), self.timestep, device=x.device)
            sizes = {"resolution": ones(len(x), 2), "aspect_ratio": ones(len(x), 1)}
            uses = self.model.use_additional_conditions
            options["added_cond_kwargs"] = sizes if uses else dict.fromkeys(sizes)
        return self.model(x, **options)[0]


@dataclass(frozen=True)
class Source:
    """Source of a model.

    Attributes:
        name: One of ``CONFIGS``, or a pipeline's folder.
        size: Height and width of the images in pixels.
        dtype: Dtype of the weights.
        layer: Name of a self-attention layer to run on its own.
        map: Height and width of that layer's map in tokens.
    """

    name: str
    size: tuple[int, int]
    dtype: torch.dtype
    layer: str | None = None
    map: tuple[int, int] | None = None

    @property
    def latent(self) -> tuple[int, int]:
        """Height and width of the latent."""
        return self.size[0] // PATCH, self.size[1] // PATCH

    def shape(self, batch: int, model: ModelMixin) -> tuple[int, ...]:
        """Return the shape of the latents of a batch; for a layer on its own, they have its map."""
        patch = model.config.get("patch_size") or 1
        height, width = (side * patch for side in self.map) if self.map else self.latent
        return batch, model.config.in_channels, height, width

    @property
    def text(self) -> int:
        """Tokens per prompt."""
        return CONFIGS[self.name].text if self.name in CONFIGS else 77

    def build(self, device: str) -> ModelMixin:
        """Build the model in eval mode, without weights on the ``meta`` device.

        Raises:
            ValueError: The folder is not a supported pipeline.
        """
        import diffusers

        if self.layer:
            return self._build_layer(device)
        with torch.device(device), _default_dtype(self.dtype):
            if self.name in CONFIGS:
                config = CONFIGS[self.name]
                return getattr(diffusers, config.kind)(sample_size=max(self.latent), **config.options).eval()
            folder = denoiser_folder(self.name)
            name = json.loads((folder / "config.json").read_text())["_class_name"]
            if name not in KINDS:
                raise ValueError(f"{folder} contains an unsupported {name}: use {' or '.join(KINDS)}")
            kind = getattr(diffusers, name)
            if device == "meta":
                return kind.from_config(kind.load_config(folder)).eval()
        return kind.from_pretrained(folder, torch_dtype=self.dtype, local_files_only=True).to(device).eval()

    def _build_layer(self, device):
        """Build the model with the weights of one layer only, and a forward pass that only runs this layer."""
        model = Source(self.name, self.size, self.dtype).build("meta")
        block = model.get_submodule(self.layer.rpartition(".")[0])
        layer = model.get_submodule(self.layer)
        kept = set(layer.modules())
        for module in model.modules():
            for name, weight in module._parameters.items():
                if weight is not None:
                    empty = torch.zeros(weight.shape if module in kept else 0, dtype=self.dtype, device=device)
                    module._parameters[name] = nn.Parameter(empty)
            for name in module._buffers:
                module._buffers[name] = torch.zeros(0, device=device)
            if module in kept and isinstance(module, nn.Linear):
                module.reset_parameters()
        tokens = torch.randn(1, math.prod(self.map), layer.query_dim, dtype=self.dtype, device=device)
        block.register_buffer("tokens", tokens)
        block.forward = partial(_run_layer, layer)
        model.forward = partial(_run_block, block)
        return model

    def kinds(self) -> dict[tuple[tuple[int, int], int, int], list[str]]:
        """Return the names of the self-attention layers by (map, channels, heads)."""
        from elfatt.integrations.diffusers import self_attention_layers

        model = self.build("meta")
        found: dict[tuple[tuple[int, int], int, int], list[str]] = {}
        patch = model.config.get("patch_size") or 1

        def look(name, layer, args):
            height, width = (side // patch for side in self.latent)
            while height * width > args[0].shape[1]:
                height, width = math.ceil(height / 2), math.ceil(width / 2)
            if height * width != args[0].shape[1]:
                raise ValueError(f"{name} has {args[0].shape[1]} tokens, which are no map of the latent {self.latent}")
            found.setdefault(((height, width), layer.query_dim, layer.heads), []).append(name)

        for name, layer in self_attention_layers(model).items():
            layer.register_forward_pre_hook(partial(look, name))
        with count_true():
            Step(model)(torch.empty(1, model.config.in_channels, *self.latent, dtype=self.dtype, device="meta"))
        return found


def _run_layer(layer, tokens):
    return layer(tokens)


def _run_block(block, latents, *_, **__):
    return [block(block.tokens.repeat(len(latents), 1, 1))]


def denoiser_folder(pipeline: str) -> Path:
    """Return the folder of a saved pipeline's UNet or transformer.

    Raises:
        ValueError: The pipeline has neither.
    """
    for name in ("unet", "transformer"):
        if (Path(pipeline) / name / "config.json").is_file():
            return Path(pipeline) / name
    raise ValueError(
        f"{pipeline} has no unet/config.json or transformer/config.json: pass a pipeline saved by diffusers"
    )


def share_weights(model: Model) -> Model:
    """Copy a model with shared weights."""
    return copy.deepcopy(model, {id(t): t for t in (*model.parameters(), *model.buffers())})


class Meter:
    """Record a quantity before and after each call of the given layers, with the merging of their tokens.

    Args:
        layers: Layers to measure; their classes are replaced, as their hooks see merged tokens only.
        read: Returns a number or a recorded CUDA event.
    """

    def __init__(self, layers: Iterable[nn.Module], read: Callable[[], Any]):
        self.spans: list[list[Any]] = []

        def call(layer, *args, kind, **kwargs):
            start = read()
            out = kind.__call__(layer, *args, **kwargs)
            self.spans.append([start, read()])
            return out

        for layer in layers:
            kind = type(layer)
            layer.__class__ = type(kind.__name__, (kind,), {"__call__": partialmethod(call, kind=kind)})

    def take(self) -> list[list[Any]]:
        """Return the spans so far and reset."""
        taken, self.spans = self.spans, []
        return taken


def total(spans: list[list[Any]]) -> float:
    """Return the sum of spans between numbers, or between CUDA events in seconds."""
    return sum(
        start.elapsed_time(end) / 1e3 if isinstance(start, torch.cuda.Event) else end - start for start, end in spans
    )


@contextmanager
def _default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
