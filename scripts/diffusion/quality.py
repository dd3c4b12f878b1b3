"""Judge images with a digit classifier: classes and distances of features."""

from __future__ import annotations

from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.transforms import RandomAffine
from tqdm import trange

import elfatt  # noqa: F401  registers the models
from scripts.diffusion.generators import CLASSES, SIDE, save

EPOCHS, BATCH, RATE = 12, 64, 2e-3


def train_classifier(images: torch.Tensor, labels: torch.Tensor, path: Path, epochs: int = EPOCHS) -> nn.Module:
    """Train or load the quickstart's ELFATT for greyscale digits ``[N, 1, SIDE, SIDE]`` in -1…1."""
    model = timm.create_model(
        "cswin_nano_elfatt", in_chans=1, img_size=SIDE, num_classes=CLASSES, block_size=4, drop_path_rate=0.05
    )
    if path.exists():
        model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        return model.eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.05)
    steps = epochs * -(-len(images) // BATCH)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps, pct_start=0.1)
    move = RandomAffine(10, translate=(0.08, 0.08), scale=(0.9, 1.1), fill=-1)
    for _ in trange(epochs, desc="training the classifier", unit="epoch"):
        for chosen in torch.randperm(len(images)).split(BATCH):
            moved = torch.stack([move(image) for image in images[chosen]])
            loss = F.cross_entropy(model(moved), labels[chosen], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            rate.step()
    save(model.state_dict(), path)
    return model.eval()


@torch.no_grad()
def judge(classifier: nn.Module, pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the pre-logits ``[N, D]`` and predicted classes ``[N]`` of images ``[N, 1, H, W]`` in 0…1."""
    features = torch.cat(
        [
            classifier.forward_head(classifier.forward_features(part * 2 - 1), pre_logits=True)
            for part in pictures.split(100)
        ]
    )
    return features, classifier.get_classifier()(features).argmax(-1)


def feature_distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Return the mean of ``‖found − wanted‖ / ‖wanted‖`` over paired features ``[N, D]``."""
    return ((found - wanted).norm(dim=1) / wanted.norm(dim=1)).mean().item()


def frechet_distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Return the Fréchet distance of normal distributions fitted to features ``[N, D]`` and ``[M, D]``.

    ``‖μ₁ − μ₂‖² + tr(C₁ + C₂ − 2 (C₁ C₂)^½)``. With ``C = XᵀX`` the last trace is the nuclear norm of ``X₁ X₂ᵀ``.
    """
    means = [x.double().mean(0) for x in (found, wanted)]
    roots = [(x.double() - mean) / (len(x) - 1) ** 0.5 for x, mean in zip((found, wanted), means, strict=True)]
    spread = sum(x.square().sum() for x in roots) - 2 * torch.linalg.matrix_norm(roots[0] @ roots[1].T, "nuc")
    return ((means[0] - means[1]).square().sum() + spread).item()
