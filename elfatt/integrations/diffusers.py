"""Training-free ELFATT for diffusers: Stable Diffusion 1.x, 2.x and XL, DiT, PixArt.

The processor of each self-attention layer is wrapped. The original still runs its projections, norms and adapters; the
plan only replaces its softmax attention. Cross-attention and masked attention are left alone. Token merging uses the
same wrappers: the layer runs on the merged tokens, and its output is copied back to all tokens.
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
EXPLICIT = ("AttnProcessor", "SlicedAttnProcessor", "XFormersAttnProcessor")  # processors that do not call SDPA
WEIGH_EVERY = 7  # model calls; coprime to the usual numbers of steps, so that every step is covered
_TIMESTEP = {PixArtTransformer2DModel: 2}  # position among the arguments of forward, 1 otherwise


class DiffusionHandle(Handle):
    """A conversion applied to a diffusion model.

    Args:
        model: The UNet or transformer.
        attend: Function that computes a layer's softmax attention.
        layers: Names of the layers that use it.
        steps: Range of steps in which they do, as fractions of all steps.
        train_steps: Number of training steps of the model.
        merge: Token merging for the layers at the largest map.

    Raises:
        TypeError: Token merging is not supported for the model.
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
        self._inputs: dict[str, torch.Tensor] = {}  # of the blocks with merged tokens
        self._hooks = [model.register_forward_pre_hook(self._look, with_kwargs=True)]
        for name in merged:
            block = model.get_submodule(name.rpartition(".")[0])
            self._hooks.append(block.register_forward_pre_hook(partial(self._keep, name), with_kwargs=True))
        self._processors = []
        for name, layer in self_attention_layers(model).items():
            if name in layers or name in merged:
                own = _wrap(layer.processor)(layer.processor, name, self, name in layers, name in merged)
                self._processors.append((layer, own))
                layer.set_processor(own)  # type: ignore[arg-type]  # accepts any callable

    def _restore(self):
        for hook in self._hooks:
            hook.remove()
        self._runs = False
        self._inputs.clear()
        for layer, own in self._processors:
            if layer.processor is own:  # else it was replaced in the meantime, e.g. by a fused one
                layer.set_processor(own.original)
        self._processors = []

    def _look(self, model, args, kwargs):
        """Before each step, record the latent size and whether the step is in range."""
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
    """Processor wrapper that replaces softmax attention and optionally merges tokens."""

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
    """Return a wrapper class with the original's signature, by which diffusers filters keyword arguments."""

    def call(self, *args, **kwargs):
        return _Processor.__call__(self, *args, **kwargs)

    call.__signature__ = inspect.signature(type(original).__call__)  # type: ignore[attr-defined]  # functions have it
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
    """Replace the self-attention of a diffusion model. Calling it again replaces the previous plan.

    Args:
        pipe_or_model: A pipeline, or its UNet or transformer.
        plan: Attention plan; defaults to the paper's ELFATT, ``Plan.uniform``. Or a function that computes the
            attention of every layer, such as ``elfatt.conversion.Agent()``; its ``merge``, if any, merges tokens.
        block: Block size of the default plan, in tokens.
        min_tokens: Layers with fewer tokens stay exact in the default plan; merged tokens count once.
        steps: Range of steps to replace, as fractions from 0 (noise) to 1.
        merge_ratio: Fraction of tokens that tomesd merges before the layers at the largest map, at most 0.75. Merged
            tokens do not form a map, so block heads run exact attention on them; linear heads stay linear.

    Returns:
        A handle whose ``remove()`` restores the model.

    Raises:
        ImportError: Token merging without tomesd.
        TypeError: The model, or token merging for it, is not supported.
        ValueError: The plan is for another model, or a fraction is out of range.
    """
    model, train_steps = denoiser(pipe_or_model)
    if not 0 <= steps[0] < steps[1] <= 1:
        raise ValueError(f"steps={steps} must be two increasing fractions between 0 and 1")
    heads = {name: layer.heads for name, layer in self_attention_layers(model).items()}
    if plan is None:
        plan = Plan.uniform(name_of(model), heads, block=block, min_tokens=min_tokens)
    attend: Attend
    layers: Collection[str]
    merge: Merge | None = getattr(plan, "merge", None)
    if isinstance(plan, Plan):
        plan.check(name_of(model), heads)
        if plan.lepe:
            raise ValueError("plans with LePE are supported for ViTs only: use a plan without LePE")
        attend = partial(run_plan, plan)
        layers = {name for name, layer in plan.layers.items() if not layer.is_exact}
    else:
        attend, layers = plan, heads
    if merge_ratio:
        if merge:
            raise ValueError(f"merge_ratio={merge_ratio} must be 0: {type(plan).__name__} already merges tokens")
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
    """Measure the error of every branch in each head of a model; ``.plan(error=…)`` of the result selects branches.

    Args:
        pipe_or_model: A pipeline, or its UNet or transformer.
        run: Runs it on a batch, such as ``lambda prompt: pipe(prompt, num_inference_steps=10)``.
        batches: Inputs of ``run``.
        weigh_every: Every this many model calls, weigh the layers by the effect of their errors on the output, at one
            extra call per layer; 0 to disable.
        **options: Keyword arguments of ``elfatt.conversion.Calibration``.

    Raises:
        TypeError: The model is not supported.
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
    """Return a pipeline's UNet or transformer, or the given model, and its number of training steps.

    Raises:
        TypeError: The model is not supported; the message says why.
    """
    model = getattr(pipe_or_model, "unet", None) or getattr(pipe_or_model, "transformer", None) or pipe_or_model
    model = getattr(model, "_orig_mod", model)  # unwrap torch.compile
    if not isinstance(model, MODELS):
        reason = "it must be a UNet or transformer with separate self-attention, not joint attention with text"
        names = ", ".join(kind.__name__ for kind in MODELS)
        raise TypeError(f"{type(model).__name__} is not supported: {reason}; supported models: {names}")
    layers = self_attention_layers(model)
    if not layers:
        raise TypeError(f"{type(model).__name__} has no self-attention to replace")
    for name, layer in layers.items():
        if type(layer.processor).__name__ in EXPLICIT:
            kind = type(layer.processor).__name__
            raise TypeError(f"{kind} of {name} does not call PyTorch's attention: use AttnProcessor2_0 instead")
    scheduler = getattr(pipe_or_model, "scheduler", None)
    return model, getattr(getattr(scheduler, "config", None), "num_train_timesteps", 1000)


def self_attention_layers(model: nn.Module) -> dict[str, Attention]:
    """Return the self-attention layers of a model by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, Attention) and not module.is_cross_attention and module.added_kv_proj_dim is None
    }


def _largest_layers(model: nn.Module) -> list[str]:
    """Return the layers to merge tokens in: those at the largest map, in a UNet's first and last stage."""
    layers = [name for name in self_attention_layers(model) if name.endswith(".attn1")]
    stages = [name.split(".")[:2] for name in layers]
    ends = [
        *[stage for stage in stages if stage[0] == "down_blocks"][:1],
        *[stage for stage in stages if stage[0] == "up_blocks"][-1:],
    ]
    if not isinstance(model, UNet2DConditionModel) or not ends:
        raise TypeError(
            f"tokens of {type(model).__name__} cannot be merged: tomesd and Agent support "
            "UNet2DConditionModel only; use a plan, without merge_ratio"
        )
    return [name for name, stage in zip(layers, stages, strict=True) if stage in ends]


def name_of(model: nn.Module) -> str:
    """Return a model's name in plans: its class, total attention width and number of self-attention layers."""
    layers = self_attention_layers(model)
    return f"{type(model).__name__}-{sum(layer.inner_dim for layer in layers.values())}-{len(layers)}"


def map_size(latent: tuple[int, int], tokens: int) -> tuple[int, int]:
    """Return the map size ``(height, width)`` at which a latent has this many tokens, halving it, rounded up or down.

    Raises:
        ValueError: No map of the latent has this many tokens.
    """
    for rounding in (math.ceil, math.floor):
        height, width = latent
        while height * width > tokens:
            height, width = rounding(height / 2), rounding(width / 2)
        if height * width == tokens:
            return height, width
    raise ValueError(f"{tokens} tokens match no downsampled map of a {latent[0]} × {latent[1]} latent")
