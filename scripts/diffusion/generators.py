"""Two small class-conditional diffusion models of diffusers, trained from scratch on 32×32 digits, and their sampling.

The DiT is mostly trained at half the resolution, where global softmax attention costs a sixteenth; its token
coordinates are interpolated. The UNet, whose convolutions do not rescale, is trained at full resolution and gets the
pixel coordinates as two extra channels.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DiTTransformer2DModel, UNet2DConditionModel
from torch import nn
from tqdm import tqdm

SIDE, CLASSES = 32, 10
PHASES = {  # image size in pixels, batch size, steps
    "UNet": ((32, 16, 320),),
    "DiT": ((16, 32, 400), (32, 32, 40)),
}
RATE = 2e-3
SAVE_EVERY = 25  # steps
SCHEDULE = {
    "beta_schedule": "squaredcos_cap_v2",
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
}


def build_unet() -> UNet2DConditionModel:
    """Build a UNet with three attention layers at 32×32 and one at 2×2, class scale and shift, and no text."""
    return UNet2DConditionModel(
        sample_size=SIDE,
        in_channels=3,
        out_channels=1,
        block_out_channels=(32, 64, 96, 96, 96),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", *["DownBlock2D"] * 4),
        up_block_types=(*["UpBlock2D"] * 4, "CrossAttnUpBlock2D"),
        cross_attention_dim=8,
        num_class_embeds=CLASSES,
        resnet_time_scale_shift="scale_shift",
        attention_head_dim=4,  # diffusers uses it as the number of heads
        norm_num_groups=8,
    )


def build_dit() -> DiTTransformer2DModel:
    """Build a DiT with four blocks and one token per pixel."""
    return DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=16,
        in_channels=1,
        out_channels=1,
        num_layers=4,
        sample_size=SIDE,
        patch_size=1,
        num_embeds_ada_norm=CLASSES,
    )


MODELS: dict[str, Callable[[], nn.Module]] = {"UNet": build_unet, "DiT": build_dit}


def denoise(model: nn.Module, x: torch.Tensor, t: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the model's prediction for noisy images ``[B, 1, H, W]`` at timesteps ``[B]``, of classes ``[B]``."""
    if isinstance(model, DiTTransformer2DModel):
        return model(x, timestep=t, class_labels=labels).sample
    place = torch.meshgrid(*(torch.linspace(-1, 1, length).to(x) for length in x.shape[2:]), indexing="ij")
    x = torch.cat([x, torch.stack(place).expand(len(x), -1, -1, -1)], dim=1)
    return model(x, t, x.new_zeros(len(x), 1, model.config.cross_attention_dim), class_labels=labels).sample


def train(
    model: nn.Module, images: torch.Tensor, labels: torch.Tensor, path: Path, phases: Sequence[tuple[int, int, int]]
) -> nn.Module:
    """Train a model, resuming from its file if it exists.

    Args:
        model: One of ``MODELS``, with random weights.
        images: ``[N, 1, SIDE, SIDE]`` in -1…1.
        labels: ``[N]``.
        path: Checkpoint with the model and the training state.
        phases: Image size, batch size and number of steps of each successive phase.

    Returns:
        The model, in eval mode.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01)
    scheduler = DDIMScheduler(**SCHEDULE)
    total, done = sum(steps for *_, steps in phases), 0
    if path.exists():
        saved = torch.load(path, map_location="cpu", weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        done = saved["steps"]
    progress = tqdm(total=total, initial=done, desc=f"training {path.stem}", unit="step", disable=done == total)
    first = 0
    for side, batch, steps in phases:
        small = F.interpolate(images, size=(side, side), mode="bicubic", antialias=True).clamp(-1, 1)
        for step in range(max(done, first), first + steps):
            chance = torch.Generator().manual_seed(step)  # a resumed run draws the same numbers
            for group in optimizer.param_groups:
                group["lr"] = RATE * min(1, (step - first + 1) / 20, (first + steps - step) / (0.5 * steps))
            chosen = torch.randint(len(images), (batch,), generator=chance)
            noise = torch.randn(batch, 1, side, side, generator=chance)
            t = torch.randint(scheduler.config.num_train_timesteps, (batch,), generator=chance)
            x = small[chosen]
            found = denoise(model, scheduler.add_noise(x, noise, t), t, labels[chosen])
            loss = F.mse_loss(found, scheduler.get_velocity(x, noise, t))
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            progress.update()
            progress.set_postfix(side=side, loss=f"{loss.item():.3f}", refresh=False)
            if (step + 1) % SAVE_EVERY == 0 or step + 1 == total:
                save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "steps": step + 1}, path)
        first += steps
    progress.close()
    return model.eval()


def sampler(steps: int) -> DDIMScheduler:
    """Return the scheduler of a number of sampling steps."""
    scheduler = DDIMScheduler(**SCHEDULE)
    scheduler.set_timesteps(steps)
    return scheduler


@torch.no_grad()
def sample(model: nn.Module, labels: torch.Tensor, steps: int, seed: int) -> torch.Tensor:
    """Sample images ``[B, 1, SIDE, SIDE]`` in 0…1 by deterministic DDIM.

    Args:
        model: A trained model.
        labels: Classes ``[B]``.
        steps: Number of sampling steps.
        seed: Seed of the initial noise.
    """
    scheduler = sampler(steps)
    x = torch.randn(len(labels), 1, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))
    for t in scheduler.timesteps:
        x = scheduler.step(denoise(model, x, t.expand(len(x)), labels), t, x).prev_sample
    return (x / 2 + 0.5).clamp(0, 1)


def save(content: object, path: Path) -> None:
    """Save atomically with ``torch.save``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".tmp")
    torch.save(content, unfinished)
    os.replace(unfinished, path)
