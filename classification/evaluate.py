"""Exact evaluation on any number of processes: every image counts once, without padding."""

from __future__ import annotations

import time
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from classification.runtime import World
from elfatt.data import UserError
from elfatt.preemption import Preempted, Preemption


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    world: World,
    autocast: torch.autocast,
    channels_last: bool = False,
    name: str = "validate",
    preemption: Preemption | None = None,
) -> dict[str, float]:
    """Evaluate a classifier.

    Args:
        model: Maps images ``[B, 3, H, W]`` to logits ``[B, K]``; put in eval mode. Not wrapped in DDP.
        loader: Images and labels ``[B]`` of this process; processes may have different numbers of batches.
        world: This process.
        autocast: Mixed-precision context.
        channels_last: Convert images to channels-last.
        name: Label of the progress bar.
        preemption: Stops the evaluation.

    Returns:
        ``top1`` and ``top5`` in percent, mean cross-entropy ``loss``, number of ``images``, and ``images_per_s``
        including data loading, all over all processes.

    Raises:
        UserError: No images on any process.
        Preempted: Any process was asked to stop.
    """
    model.eval()
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    totals = torch.zeros(5, dtype=torch.float64, device=world.device)  # images, top-1 and top-5 hits, loss, preempted
    start = time.perf_counter()
    for images, labels in tqdm(loader, desc=name, disable=None if world.primary else True, leave=False):
        if preemption and preemption.requested:
            totals[4] = 1
            break
        with autocast:
            logits = model(images.contiguous(memory_format=memory_format))
        logits = logits.float()
        hits = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
        loss = F.cross_entropy(logits, labels, reduction="sum")
        batch = [labels.new_tensor(len(labels)), hits[:, 0].sum(), hits.sum(), loss]
        totals[:4] += torch.stack([value.double() for value in batch])
    if world.distributed:
        dist.all_reduce(totals)
    images, top1, top5, loss, preempted = totals.tolist()
    if preempted:
        raise Preempted
    if not images:
        raise UserError("no images to evaluate: correct --data-dir or --val-split")
    return {
        "top1": 100 * top1 / images,
        "top5": 100 * top5 / images,
        "loss": loss / images,
        "images": int(images),
        "images_per_s": images / (time.perf_counter() - start),
    }
