"""Training-free ELFATT for diffusers: Stable Diffusion 1.x, 2.x and XL, DiT, PixArt.

Each self-attention layer and its processor still run their projections, norms and adapters; the plan only replaces the
softmax attention inside, whichever processor is set. Cross-attention and masked attention are left alone. Where tokens
are merged, the layer runs on the merged tokens, and its output is copied back to all tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable
from dataclasses import replace
from functools import partial
from typing import Any, cast
from weakref import ref

import torch
from torch import nn

try:
    from diffusers.models import DiTTransformer2DModel, PixArtTransformer2DModel, UNet2DConditionModel, UNet2DModel
    from diffusers.models.attention_processor import Attention
except ImportError as error:
    raise ImportError("elfatt.integrations.diffusers needs diffusers 0.35 or newer: pip install diffusers") from error

from elfatt.conversion import Attend, Calibration, Handle, Plan, run_plan
from elfatt.conversion.handle import Call, binding_of
from elfatt.conversion.merging import Merge, TokenMerging, Tokens

MODELS = (UNet2DConditionModel, UNet2DModel, DiTTransformer2DModel, PixArtTransformer2DModel)
EXPLICIT = ("AttnProcessor", "SlicedAttnProcessor", "XFormersAttnProcessor")  # processors that do not call SDPA
WEIGH_EVERY = 7  # model calls; coprime to the usual numbers of steps, so that every step is covered
TOLERANCE = 0.01  # of the largest timestep, for timesteps in half precision
_TIMESTEP = {PixArtTransformer2DModel: 2}  # position among the arguments of forward, 1 otherwise


class DiffusionHandle(Handle):
    """A conversion applied to a diffusion model.

    Args:
        model: The UNet or transformer.
        attend: Function that computes a layer's softmax attention.
        layers: Names of the layers that use it.
        steps: Range of steps in which they do, as fractions of all steps.
        progress: Maps a timestep to the fraction of steps done, or to None if it is unknown; None if it is not needed.
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
        progress: Progress | None = None,
        merge: Merge | None = None,
    ):
        merged = _largest_layers(model) if merge else []
        super().__init__(model)
        self.attend, self.merge = attend, merge
        self._replaced, self._merged = set(layers), set(merged)
        self._steps, self._progress = steps, progress
        found = self_attention_layers(model)
        self._blocks = {name.rpartition(".")[0]: name for name in merged}  # names of their merged layers
        self.bind({name: layer for name, layer in found.items() if name in layers or name in merged})

    @property
    def promised(self) -> list[str]:
        """Names of the layers whose attention is replaced."""
        return sorted(self._replaced)

    def run(self, name: str, layer: Any, call: Callable, args: tuple, kwargs: dict) -> Any:
        """Run a converted layer if the plan runs at this step, on merged tokens if it merges them."""
        state, known = self.state, self.known_call(name)
        if known is not None and not known.runs:
            state.ran.add(name)
            return call(*args, **kwargs)
        x = state.inputs.pop(name, None)
        if x is None or known is None or known.size is None or not _fits(known.size, x):
            return super().run(name, layer, call, args, kwargs)
        tokens = self._match(name, known, known.size, x)
        self.enter(replace(known, size=None, tokens=tokens))
        try:
            args = (tokens.merge(args[0]), *args[1:])
            if name in self._replaced:
                out = super().run(name, layer, call, args, kwargs)
            else:
                state.ran.add(name)
                out = call(*args, **kwargs)
            return tokens.unmerge(out)
        finally:
            self.enter(known)

    def _match(self, name: str, known: Call, size: tuple[int, int], x: torch.Tensor) -> Tokens:
        """Match a layer's tokens; again as before if the layer is recomputed."""
        state, merge = self.state, cast("Merge", self.merge)
        if state.generator is None or state.generator.device != x.device:
            state.generator = _fork_rng(x.device)
        generator = state.generator
        if name in known.draws:
            generator = torch.Generator(generator.device)
            generator.set_state(known.draws[name])
        elif torch.is_grad_enabled() or x.requires_grad:
            known.draws[name] = generator.get_state()
        return merge(x, size, known.done, generator)

    def attention(
        self, name: str, layer: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None
    ) -> torch.Tensor | None:
        """Compute a layer's attention on tensors ``[B, N, heads, d]``; None if their map is unknown."""
        call = self.known_call(name)
        if call is not None and call.tokens is not None:
            return (call.tokens.attend or self.attend)(name, q, k, v, None, scale=scale)
        if call is None or call.size is None:
            self.warn(name, "it runs outside its model's forward", "call the model, which knows the map's size")
            return None
        if not _fits(call.size, q):
            met = "{} tokens are not {} × {}".format(q.shape[1], *call.size)
            self.warn(name, met, "tokens that are merged, dropped or added have no map: use apply's merge_ratio")
            return None
        return self.attend(name, q, k, v, call.size, scale=scale)

    def _begin(self, model, args, kwargs):
        """Before the model's forward, enter the latent's map and whether the plan runs at this step."""
        super()._begin(model, args, kwargs)
        latent = kwargs.get("sample", kwargs.get("hidden_states", args[0] if args else None))
        patch = getattr(model.config, "patch_size", None) or 1
        runs, done = True, 0.0
        if self._progress is not None:
            position = _TIMESTEP.get(type(model), 1)
            timestep = kwargs.get("timestep", args[position] if len(args) > position else None)
            found = self._progress(timestep)
            if found is None:
                self.warn("the model", f"timestep {timestep} is none of the scheduler's", "pass its scheduler to apply")
            first, last = self._steps
            runs, done = found is not None and first <= found < last, found or 0.0
        self.enter(Call((latent.shape[-2] // patch, latent.shape[-1] // patch), runs=runs, done=done))

    def carry(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Before a module around converted layers, as in ``Handle``; an input ``[B, C, H, W]`` is their map."""
        super().carry(module, args, kwargs)
        state, binding = self.state, binding_of(module)
        x = args[0] if args else kwargs.get("hidden_states")
        if state.call is None or binding is None or not isinstance(x, torch.Tensor):
            return
        if x.ndim == 4:
            height, width = x.shape[-2:]
            self.enter(replace(state.call, size=(height, width)))
        if binding.name in self._blocks and state.call.runs:
            state.inputs[self._blocks[binding.name]] = x


class Progress:
    """The fraction of steps done, counted in a scheduler's own timesteps.

    Args:
        scheduler: The scheduler; by default that of the pipeline, which may be replaced later.
        pipe: The pipeline, if there is one.
    """

    def __init__(self, scheduler: object = None, pipe: object = None):
        self._scheduler = scheduler
        self._pipe = None if pipe is None else ref(pipe)  # a copy of the model does not copy the pipeline

    def __getstate__(self) -> dict:
        pipe = self._pipe and self._pipe()
        return {"_scheduler": self._scheduler or getattr(pipe, "scheduler", None), "_pipe": None}

    def __deepcopy__(self, memo: dict) -> Progress:
        return self  # the same scheduler steps the copy

    def __call__(self, timestep: torch.Tensor | float | None) -> float | None:
        """Return the position of a timestep among this run's, from 0 to below 1; None if it is not one of them.

        Image-to-image begins later, which schedulers with a ``begin_index`` and the pipeline know.
        """
        pipe = self._pipe and self._pipe()
        scheduler: Any = self._scheduler or getattr(pipe, "scheduler", None)
        timesteps = getattr(scheduler, "timesteps", None)
        if timestep is None or timesteps is None or not len(timesteps):
            return None
        if hasattr(scheduler, "begin_index"):
            begin = scheduler.begin_index or 0
        else:
            begin = max(0, len(timesteps) - getattr(pipe, "_num_timesteps", len(timesteps)))
        listed = torch.as_tensor(timesteps).cpu().double()
        given = torch.as_tensor(timestep).flatten().cpu().double()
        if (given != given[0]).any():
            return None
        # a step may call the model several times, at one timestep
        own = torch.tensor(list(dict.fromkeys(listed[begin:].tolist())))
        distance = (own - given[0]).abs()
        index = int(distance.argmin())
        return index / len(own) if distance[index] <= TOLERANCE * listed.abs().max() else None


def _fork_rng(device: torch.device) -> torch.Generator:
    """Return a generator in the state of the device's default one, as tomesd does."""
    if device.type == "cuda":
        return torch.Generator(device).set_state(torch.cuda.get_rng_state(device))
    return torch.Generator().set_state(torch.get_rng_state())


def _fits(size: tuple[int, int], x: torch.Tensor) -> bool:
    """Return whether tokens ``[B, N, ...]`` are a map of a size."""
    return x.shape[1] == size[0] * size[1]


def apply(
    pipe_or_model: object,
    plan: Plan | Attend | None = None,
    *,
    block: int = 8,
    min_tokens: int = 1024,
    steps: tuple[float, float] = (0.0, 1.0),
    scheduler: object = None,
    merge_ratio: float = 0.0,
) -> DiffusionHandle:
    """Replace the self-attention of a diffusion model. Calling it again replaces the previous plan.

    Args:
        pipe_or_model: A pipeline, or its UNet or transformer.
        plan: Attention plan; defaults to the paper's ELFATT, ``Plan.uniform``. Or a function that computes the
            attention of every layer, such as ``elfatt.conversion.Agent()``; its ``merge``, if any, merges tokens.
        block: Block size of the default plan, in tokens.
        min_tokens: Layers with fewer tokens stay exact in the default plan; merged tokens count once.
        steps: Range of steps to replace, as fractions from 0 (noise) to 1, counted in the scheduler's timesteps.
        scheduler: Scheduler whose timesteps are counted; defaults to the pipeline's. Needed for ``steps`` and
            ``Agent`` if a model is passed without its pipeline.
        merge_ratio: Fraction of tokens that tomesd merges before the layers at the largest map, at most 0.75. Merged
            tokens do not form a map, so block heads run exact attention on them; linear heads stay linear.

    Returns:
        A handle whose ``remove()`` restores the model.

    Raises:
        ImportError: Token merging without tomesd.
        TypeError: The model, or token merging for it, is not supported.
        ValueError: The plan is for another model, a fraction is out of range, or a scheduler is needed.
    """
    model = denoiser(pipe_or_model)
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
    progress = None
    if tuple(steps) != (0, 1) or merge:
        if scheduler is None and not hasattr(pipe_or_model, "scheduler"):
            raise ValueError(
                "steps and token merging by steps are counted in the scheduler's timesteps: pass the pipeline, or "
                "scheduler=…"
            )
        progress = Progress(scheduler) if scheduler is not None else Progress(pipe=pipe_or_model)
    if merge_ratio:
        if merge:
            raise ValueError(f"merge_ratio={merge_ratio} must be 0: {type(plan).__name__} already merges tokens")
        merge = TokenMerging(merge_ratio)
    return DiffusionHandle(model, attend, layers, (float(steps[0]), float(steps[1])), progress, merge)


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
    model = denoiser(pipe_or_model)
    calibration, calls, weighing = Calibration(name_of(model), **options), itertools.count(), False

    def weigh(model, args, kwargs, out):
        nonlocal weighing
        if not weighing and weigh_every and next(calls) % weigh_every == 0:
            weighing = True
            try:
                calibration.weigh(lambda: model(*args, **kwargs)[0], out[0])
            finally:
                weighing = False

    with DiffusionHandle(model, calibration.attend, self_attention_layers(model)):
        hook = model.register_forward_hook(weigh, with_kwargs=True)
        try:
            for batch in batches:
                run(batch)
        finally:
            hook.remove()
    return calibration


def denoiser(pipe_or_model: object) -> nn.Module:
    """Return a pipeline's UNet or transformer, or the given model.

    Raises:
        TypeError: The model is not supported; the message says why.
    """
    parts = (getattr(pipe_or_model, name, None) for name in ("unet", "transformer"))
    model = next((part for part in parts if part is not None), pipe_or_model)
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
    return model


def self_attention_layers(model: nn.Module) -> dict[str, Attention]:
    """Return the self-attention layers of a model by name, without GLIGEN's fusers, which see grounding tokens."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, Attention)
        and not module.is_cross_attention
        and module.added_kv_proj_dim is None
        and "fuser" not in name.split(".")
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
