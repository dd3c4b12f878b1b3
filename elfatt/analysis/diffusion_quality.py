"""Compare a pipeline's images under other attention with the unpatched ones, for the same prompts and seeds.

FID is between a variant's images and the unpatched ones, not between generated images and photographs.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from tqdm import tqdm

from elfatt.analysis.diffusion import NO_ATTENTION, UNPATCHED, VARIANTS, Plans, add_times
from elfatt.analysis.diffusion_models import Source
from elfatt.analysis.timing import summarize
from elfatt.conversion import Plan

MAX_PSNR = 100.0  # decibels, for equal images
THUMB, TITLE = 256, 20  # pixels in the grid


@dataclass(frozen=True)
class Metric:
    """Image quality metric of one variant.

    Attributes:
        key: Key in the results.
        packages: Required packages.
        measure: Function of images, unpatched images (both uint8 ``[N, 3, H, W]``), prompts and CLIP's name.
        paired: Compares with the unpatched images, so it does not apply to these.
    """

    key: str
    packages: tuple[str, ...]
    measure: Callable[[torch.Tensor, torch.Tensor, list[str], str], float]
    paired: bool = True


def psnr(pictures: torch.Tensor, unpatched: torch.Tensor, *_: object) -> float:
    """Return the mean peak signal-to-noise ratio of pairs in decibels; equal images count as 100."""
    errors = (pictures.double() - unpatched.double()).square().mean(dim=(1, 2, 3)) / 255**2
    return (-10 * errors.log10()).clamp(max=MAX_PSNR).mean().item()


def _lpips(pictures, unpatched, *_):
    import lpips

    net = lpips.LPIPS(net="alex", verbose=False)
    pairs = zip(pictures, unpatched, strict=True)
    with torch.no_grad():
        return float(np.mean([net(*(x[None].float() / 127.5 - 1 for x in pair)).item() for pair in pairs]))


def _clip_score(pictures, unpatched, prompts, clip):
    """``100 · max(cos, 0)`` (Hessel et al., 2021); torchmetrics' takes no folder and predates transformers 5."""
    from transformers import CLIPModel, CLIPProcessor

    model, processor = CLIPModel.from_pretrained(clip), CLIPProcessor.from_pretrained(clip)
    inputs = processor(text=prompts, images=list(pictures), return_tensors="pt", padding=True, truncation=True)
    with torch.no_grad():
        out = model(**inputs)
    return 100 * torch.cosine_similarity(out.image_embeds, out.text_embeds).clamp(min=0).mean().item()


def _fid(pictures, unpatched, *_):
    from torchmetrics.image.fid import FrechetInceptionDistance

    fid = FrechetInceptionDistance()
    fid.update(unpatched, real=True)
    fid.update(pictures, real=False)
    return fid.compute().item()


METRICS = {
    "PSNR": Metric("psnr_db", (), psnr),
    "LPIPS": Metric("lpips", ("lpips",), _lpips),
    "CLIP score": Metric("clip_score", ("transformers",), _clip_score, paired=False),
    "FID": Metric("fid", ("torchmetrics", "torch_fidelity"), _fid),
}


def measure_pictures(
    source: Source, prompts: list[str], plan: Plan | None, args: argparse.Namespace
) -> tuple[dict[str, dict[str, Any]], Plan | None]:
    """Measure time and quality of images by variant, and draw the grid. The variants take turns at every prompt.

    Returns:
        The rows, and the plan: the given one, or one calibrated on the first prompt and saved next to the grid.
    """
    from diffusers import DiffusionPipeline

    from elfatt.integrations import diffusers as adapter

    metrics = {}
    for title, metric in METRICS.items():
        if missing := [name for name in metric.packages if not importlib.util.find_spec(name)]:
            packages = " ".join(missing).replace("_", "-")
            print(f"{title} is skipped: pip install {packages}", file=sys.stderr)
        else:
            metrics[title] = metric

    pipe = DiffusionPipeline.from_pretrained(source.name, torch_dtype=source.dtype, local_files_only=True)
    pipe.to(args.device)
    pipe.set_progress_bar_config(disable=True)
    height, width = source.size

    def draw(index):
        generator = torch.Generator("cpu").manual_seed(args.seed + index)
        torch.manual_seed(args.seed + index)  # for token merging
        out = pipe(
            prompts[index], height=height, width=width, num_inference_steps=args.steps, generator=generator
        ).images[0]
        return torch.from_numpy(np.array(out.convert("RGB"))).movedim(-1, 0)

    plans = Plans(pipe, lambda: draw(0), plan, args)
    rows: dict[str, dict[str, Any]] = {}
    options = {}
    for name in (name for name in args.variants if name != NO_ATTENTION):
        try:
            chosen = plans.options(VARIANTS[name])
            adapter.apply(pipe, **chosen).remove()
            options[name], rows[name] = chosen, {}
        except (ImportError, TypeError, ValueError) as error:
            print(f"{name} is skipped: {error}", file=sys.stderr)
            rows[name] = {"refused": str(error)}
    pictures: dict[str, list[torch.Tensor]] = {name: [] for name in options}
    seconds: dict[str, list[float]] = {name: [] for name in options}
    for index in tqdm(range(len(prompts)), "prompts", disable=None, leave=False):
        for name in options:
            with adapter.apply(pipe, **options[name]):
                start = time.perf_counter()
                pictures[name].append(draw(index))  # returned on the CPU, so no work is pending
                seconds[name].append(time.perf_counter() - start)
    stacked = {name: torch.stack(found) for name, found in pictures.items()}
    add_times("picture", {name: summarize(taken) for name, taken in seconds.items()}, rows)
    for title, metric in metrics.items():
        try:
            for name, found in stacked.items():
                if name != UNPATCHED or not metric.paired:
                    rows[name][metric.key] = metric.measure(found, stacked[UNPATCHED], prompts, args.clip)
        except (OSError, RuntimeError, ValueError) as error:  # e.g. missing weights; keep the images
            print(f"{title} is skipped: {error}", file=sys.stderr)
    draw_grid(stacked, args.grid)
    print(f"pictures: {args.grid}", file=sys.stderr)
    if "ELFATT calibrated" in options and not plan:
        plan = plans.calibrated
        plan.to_json(args.grid.with_suffix(".json"))
        print(f"calibrated plan: {args.grid.with_suffix('.json')}", file=sys.stderr)
    return rows, plan


def draw_grid(pictures: dict[str, torch.Tensor], path: Path) -> None:
    """Draw a grid with one column per variant and one row per prompt.

    Args:
        pictures: Images ``[prompts, 3, H, W]``, uint8, by variant.
        path: PNG file to write.
    """
    count = len(next(iter(pictures.values())))
    grid = Image.new("RGB", (THUMB * len(pictures), TITLE + THUMB * count), "white")
    for column, (name, found) in enumerate(pictures.items()):
        ImageDraw.Draw(grid).text((THUMB * column + 4, 4), name, fill="black")
        for row, picture in enumerate(found):
            thumb = Image.fromarray(picture.movedim(0, -1).numpy())
            thumb.thumbnail((THUMB, THUMB))
            grid.paste(thumb, (THUMB * column, TITLE + THUMB * row))
    path.parent.mkdir(parents=True, exist_ok=True)
    grid.save(path)
