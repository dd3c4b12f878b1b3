"""ELFATT in diffusion models of diffusers, without training: Stable Diffusion 1.x, 2.x and XL, DiT, PixArt.

A processor wraps each self-attention layer's own one. The original runs as it is, with its projections, norms and
adapters; only its softmax attention is computed by the plan. Cross-attention and masked attention are not touched.
Token merging wraps the same processors: a layer gets fewer tokens, and its output is copied back to all of them.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable, Collection, Iterable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn

try:
    from diffusers.models import DiTTransformer2DModel, PixArtTransformer2DModel, UNet2DConditionModel, UNet2DModel
    from diffusers.models.attention_processor import Attention
except ImportError as error:
    raise ImportError("elfatt.integrations.diffusers needs diffusers 0.35 or newer: pip install diffusers") from error

from elfatt.conversion import Attend, Calibration, Handle, Plan, run_plan
from elfatt.conversion.intercept import InterceptAttention
from elfatt.conversion.merging import Merge, TokenMerging

MODELS = (UNet2DConditionModel, UNet2DModel, DiTTransformer2DModel, PixArtTransformer2DModel)
EXPLICIT = ("AttnProcessor", "SlicedAttnProcessor", "XFormersAttnProcessor")  # processors with attention of their own
WEIGH_EVERY = 7  # calls of the model; no divisor of the usual numbers of steps, so that all of them have their turn
_TIMESTEP = {PixArtTransformer2DModel: 2}  # its place among the arguments of the forward pass, else 1


class DiffusionHandle(Handle):
    """A conversion applied to a diffusion model.

    Args:
        model: The UNet or transformer.
        attend: Computes the softmax attention of a layer.
        layers: Names of the layers that call it.
        steps: First and last step in which they do, as shares.
        train_steps: Steps that the model was trained with.
        merge: Merges the tokens of the layers at the model's largest map.

    Raises:
        TypeError: A model whose tokens cannot be merged.
    """

    def __init__(
        self,
        model: nn.Module,
        attend: Attend,
        layers: Collection[str],
        steps: tuple[float, float] = (0.0, 1.0),
        train_steps: int = 1000,
        merge: Merge | None = None,
    ):
        merged = _largest_layers(model) if merge else []
        super().__init__(model)
        self.attend, self.merge = attend, merge
        self._steps, self._train_steps = steps, train_steps
        self._latent, self._runs, self._done = (0, 0), False, 0.0
        self._inputs: dict[str, torch.Tensor] = {}  # of the blocks whose layer's tokens are merged
        self._hooks = [model.register_forward_pre_hook(self._look, with_kwargs=True)]
        for name in merged:
            block = model.get_submodule(name.rpartition(".")[0])
            self._hooks.append(block.register_forward_pre_hook(partial(self._keep, name), with_kwargs=True))
        self._processors = []
        for name, layer in self_attention_layers(model).items():
            if name in layers or name in merged:
                own = _wrap(layer.processor)(layer.processor, name, self, name in layers, name in merged)
                self._processors.append((layer, own))
                layer.set_processor(own)  # type: ignore[arg-type]  # takes any callable

    def _restore(self):
        for hook in self._hooks:
            hook.remove()
        self._runs = False
        self._inputs.clear()
        for layer, own in self._processors:
            if layer.processor is own:  # else another one was set in the meantime, such as a fused one
                layer.set_processor(own.original)
        self._processors = []

    def _look(self, model, args, kwargs):
        """Before each step: the size of the latent, and whether the step is among those to replace."""
        latent = kwargs.get("sample", kwargs.get("hidden_states", args[0] if args else None))
        patch = getattr(model.config, "patch_size", None) or 1
        self._latent = latent.shape[-2] // patch, latent.shape[-1] // patch
        self._runs = True
        if self._steps != (0.0, 1.0) or self.merge:
            position = _TIMESTEP.get(type(model), 1)
            timestep = kwargs.get("timestep", args[position] if len(args) > position else None)
            self._done = 1 - float(torch.as_tensor(timestep).flatten()[0]) / self._train_steps
            first, last = self._steps
            self._runs = (first == 0 or first <= self._done) and (last == 1 or self._done < last)

    def _keep(self, name, block, args, kwargs):
        if self._runs:
            self._inputs[name] = args[0] if args else kwargs["hidden_states"]


class _Processor:
    """A processor whose softmax attention a handle computes, and whose tokens it may merge."""

    def __init__(self, original: Callable, name: str, handle: DiffusionHandle, replaced: bool, merged: bool):
        self.original, self.name, self.handle = original, name, handle
        self.replaced, self.merged = replaced, merged

    def __call__(self, attention, x, *args, **kwargs):
        if not self.handle._runs:
            return self.original(attention, x, *args, **kwargs)
        undo = _same
        if self.merged:
            merge, undo = self._match()
            x = merge(x)
        with InterceptAttention(self._attend) if self.replaced else nullcontext():
            return undo(self.original(attention, x, *args, **kwargs))

    def _match(self):
        x = self.handle._inputs.pop(self.name)
        return self.handle.merge(x, map_size(self.handle._latent, x.shape[1]), self.handle._done)

    def _attend(self, q, k, v, scale):
        size = None if self.merged else map_size(self.handle._latent, q.shape[1])
        return self.handle.attend(self.name, q, k, v, size, scale=scale)


def _same(x):
    return x


def _wrap(original: Callable) -> type[_Processor]:
    """The class of a wrapper with the original's signature: diffusers reads from it which keywords to pass."""

    def call(self, *args, **kwargs):
        return _Processor.__call__(self, *args, **kwargs)

    call.__signature__ = inspect.signature(type(original).__call__)  # type: ignore[attr-defined]  # of functions
    return type(type(original).__name__, (_Processor,), {"__call__": call})


def apply(
    pipe_or_model: object,
    plan: Plan | Attend | None = None,
    *,
    block: int = 8,
    min_tokens: int = 1024,
    steps: tuple[float, float] = (0.0, 1.0),
    merge_ratio: float = 0.0,
) -> DiffusionHandle:
    """Replace the self-attention of a diffusion model by a plan; a second call replaces the first one's plan.

    Args:
        pipe_or_model: A pipeline, or its UNet or transformer.
        plan: What each layer runs; by default the paper's ELFATT, ``Plan.uniform``. Or a function that computes the
            attention of every layer, such as ``elfatt.conversion.Agent()``; its ``merge``, if any, merges tokens.
        block: Side of its blocks, in tokens.
        min_tokens: Layers of fewer tokens stay exact in it; merged tokens count once.
        steps: First and last step that are replaced, as shares of all from 0 (noise) to 1.
        merge_ratio: Share of the tokens that tomesd merges before the layers at the largest map, at most 0.75. Merged
            tokens are no map: there block heads run exactly, linear ones linearly.

    Returns:
        A handle to remove it.

    Raises:
        ImportError: Merging without tomesd.
        TypeError: A model that is not supported, or whose tokens cannot be merged.
        ValueError: A plan of another model, or a share out of range.
    """
    model, train_steps = denoiser(pipe_or_model)
    if not 0 <= steps[0] < steps[1] <= 1:
        raise ValueError(f"steps={steps} must be two growing shares from 0 to 1")
    heads = {name: layer.heads for name, layer in self_attention_layers(model).items()}
    if plan is None:
        plan = Plan.uniform(name_of(model), heads, block=block, min_tokens=min_tokens)
    attend: Attend
    layers: Collection[str]
    merge: Merge | None = getattr(plan, "merge", None)
    if isinstance(plan, Plan):
        plan.check(name_of(model), heads)
        if plan.lepe:
            raise ValueError("plans with LePE are supported for ViTs only: use a plan without it")
        attend = partial(run_plan, plan)
        layers = {name for name, layer in plan.layers.items() if not layer.is_exact}
    else:
        attend, layers = plan, heads
    if merge_ratio:
        if merge:
            raise ValueError(f"merge_ratio={merge_ratio} must be 0: {type(plan).__name__} merges tokens by itself")
        merge = TokenMerging(merge_ratio)
    return DiffusionHandle(model, attend, layers, (float(steps[0]), float(steps[1])), train_steps, merge)


def calibrate(
    pipe_or_model: object,
    run: Callable[[object], object],
    batches: Iterable,
    *,
    weigh_every: int = WEIGH_EVERY,
    **options: Any,
) -> Calibration:
    """Measure what each branch would do in each head of a model; ``.plan(error=…)`` of the result chooses.

    Args:
        pipe_or_model: A pipeline, or its UNet or transformer.
        run: Runs it on a batch, such as ``lambda prompt: pipe(prompt, num_inference_steps=10)``.
        batches: What ``run`` takes.
        weigh_every: In one of so many calls of the model its layers are weighed by what their errors do to its output,
            with one call more for each of them; 0 weighs none.
        **options: Of ``elfatt.conversion.Calibration``.

    Raises:
        TypeError: A model that is not supported.
    """
    model, train_steps = denoiser(pipe_or_model)
    calibration, calls = Calibration(name_of(model), **options), itertools.count()

    def weigh(model, args, kwargs, out):
        if weigh_every and next(calls) % weigh_every == 0:
            calibration.weigh(lambda: model.forward(*args, **kwargs)[0], out[0])

    with DiffusionHandle(model, calibration.attend, self_attention_layers(model), train_steps=train_steps):
        hook = model.register_forward_hook(weigh, with_kwargs=True)
        try:
            for batch in batches:
                run(batch)
        finally:
            hook.remove()
    return calibration


def denoiser(pipe_or_model: object) -> tuple[nn.Module, int]:
    """The UNet or transformer of a pipeline, or the model given, and the number of steps that it was trained with.

    Raises:
        TypeError: A model that is not supported; the reason is named.
    """
    model = getattr(pipe_or_model, "unet", None) or getattr(pipe_or_model, "transformer", None) or pipe_or_model
    model = getattr(model, "_orig_mod", model)  # of torch.compile
    if not isinstance(model, MODELS):
        reason = "it is no UNet or transformer with a self-attention of its own, as joint attention with text is not"
        names = ", ".join(kind.__name__ for kind in MODELS)
        raise TypeError(f"{type(model).__name__} is not supported: {reason}; supported are {names}")
    layers = self_attention_layers(model)
    if not layers:
        raise TypeError(f"{type(model).__name__} has no self-attention to replace")
    for name, layer in layers.items():
        if type(layer.processor).__name__ in EXPLICIT:
            kind = type(layer.processor).__name__
            raise TypeError(f"{kind} of {name} does not call PyTorch's attention: set AttnProcessor2_0 in its place")
    scheduler = getattr(pipe_or_model, "scheduler", None)
    return model, getattr(getattr(scheduler, "config", None), "num_train_timesteps", 1000)


def self_attention_layers(model: nn.Module) -> dict[str, Attention]:
    """The self-attention layers of a model, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, Attention) and not module.is_cross_attention and module.added_kv_proj_dim is None
    }


def _largest_layers(model: nn.Module) -> list[str]:
    """The layers whose tokens are merged: those in blocks at the largest map, so in a UNet's first and last stage."""
    layers = [name for name in self_attention_layers(model) if name.endswith(".attn1")]
    stages = [name.split(".")[:2] for name in layers]
    ends = [
        *[stage for stage in stages if stage[0] == "down_blocks"][:1],
        *[stage for stage in stages if stage[0] == "up_blocks"][-1:],
    ]
    if not isinstance(model, UNet2DConditionModel) or not ends:
        raise TypeError(
            f"tokens of {type(model).__name__} cannot be merged: tomesd and Agent know the blocks of "
            "UNet2DConditionModel only; take a plan, without merge_ratio"
        )
    return [name for name, stage in zip(layers, stages, strict=True) if stage in ends]


def name_of(model: nn.Module) -> str:
    """What plans call a model: its class, its width and its number of self-attention layers."""
    layers = self_attention_layers(model)
    return f"{type(model).__name__}-{sum(layer.inner_dim for layer in layers.values())}-{len(layers)}"


def map_size(latent: tuple[int, int], tokens: int) -> tuple[int, int]:
    """Height and width of the level of a latent that has so many tokens; levels halve, rounding up or down.

    Raises:
        ValueError: No level has.
    """
    for rounding in (math.ceil, math.floor):
        height, width = latent
        while height * width > tokens:
            height, width = rounding(height / 2), rounding(width / 2)
        if height * width == tokens:
            return height, width
    raise ValueError(
        f"{tokens} tokens are no level of a latent of {latent[0]} × {latent[1]}: the map's size is unknown"
    )
